//! Matrices in fixed12 in device memory.

use llmpress_entropy::fixed12::{Grid, MAX_BASE, MIN_BASE, StripsRef, TILE_CODE_BYTES, TILE_WEIGHTS};

use super::{Argument, Buffer, Error, Gpu, Launch, Result, View, size32};

/// A matrix in fixed12.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    base: u32,
    sign_mantissa: Buffer,
    codes: Buffer,
    escape_offsets: Buffer,
    escape_positions: Buffer,
    escape_exponents: Buffer,
}

impl Matrix {
    /// Copies a matrix to the device, after checks that no kernel makes: offsets ascend, positions lie inside their tile.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the components do not fit `rows` x `cols`; not so much memory.
    pub fn upload(gpu: &Gpu, rows: usize, cols: usize, base: i16, strips: &StripsRef<'_>) -> Result<Self> {
        let invalid = |what: &str| Error::Invalid(format!("a fixed12 matrix of {rows} x {cols}: {what}"));
        let grid = Grid::new(rows as u64, cols as u64).ok_or_else(|| invalid("too large"))?;
        let tiles = usize::try_from(grid.tiles()).map_err(|_| invalid("too large"))?;
        if !(MIN_BASE..=MAX_BASE).contains(&base) {
            return Err(invalid("the base is out of range"));
        }
        let StripsRef { sign_mantissa, codes, escape_offsets, escape_positions, escape_exponents } = *strips;
        if Some(sign_mantissa.len()) != tiles.checked_mul(TILE_WEIGHTS)
            || codes.len() != tiles * TILE_CODE_BYTES
            || escape_offsets.len() != tiles + 1
            || escape_positions.len() != escape_exponents.len()
        {
            return Err(invalid("components of other sizes"));
        }
        let ends = (escape_offsets.first().copied(), escape_offsets.last().map(|&n| n as usize));
        if ends != (Some(0), Some(escape_positions.len())) || !escape_offsets.is_sorted() {
            return Err(invalid("escape_offsets do not ascend from 0 to the number of escapes"));
        }
        if escape_positions.iter().any(|&p| usize::from(p) >= TILE_WEIGHTS) {
            return Err(invalid("an escape lies outside of its tile"));
        }
        Ok(Self {
            rows,
            cols,
            base: base.unsigned_abs().into(),
            sign_mantissa: gpu.upload(sign_mantissa)?,
            codes: gpu.upload(codes)?,
            escape_offsets: gpu.upload(escape_offsets)?,
            escape_positions: gpu.upload(escape_positions)?,
            escape_exponents: gpu.upload(escape_exponents)?,
        })
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in device memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        [
            &self.sign_mantissa,
            &self.codes,
            &self.escape_offsets,
            &self.escape_positions,
            &self.escape_exponents,
        ]
        .iter()
        .map(|buffer| buffer.bytes())
        .sum()
    }

    /// The first arguments of every kernel that reads it.
    pub(super) fn components(&self) -> [Argument; 6] {
        self.components_from(0)
    }

    /// The same for what lies from a strip of 16 rows on, which must be inside.
    pub(super) fn components_from(&self, strip: usize) -> [Argument; 6] {
        let tiles = strip * self.cols.div_ceil(64);
        // Offsets of escapes count from the matrix's first, so the lists stay whole.
        let from = |buffer: &Buffer, bytes: usize| match buffer.view().pointer() {
            Argument::Pointer(address) => Argument::Pointer(address + (tiles * bytes) as u64),
            other => other,
        };
        [
            from(&self.sign_mantissa, TILE_WEIGHTS),
            from(&self.codes, TILE_CODE_BYTES),
            from(&self.escape_offsets, 4),
            self.escape_positions.view().pointer(),
            self.escape_exponents.view().pointer(),
            Argument::U32(self.base),
        ]
    }

    /// Decodes it to `BF16 [rows, cols]`, row-major.
    ///
    /// # Errors
    /// `out` is too small; `cols` is no multiple of 8; the launch fails.
    pub fn decode(&self, gpu: &Gpu, out: View<'_>) -> Result<()> {
        out.require("the decoded matrix", 2 * self.rows * self.cols)?;
        if !self.cols.is_multiple_of(8) {
            return Err(Error::Unsupported(format!(
                "a matrix of {} columns: fixed12 is decoded on a GPU in multiples of 8",
                self.cols
            )));
        }
        let tiles = self.rows.div_ceil(16) * self.cols.div_ceil(64);
        if tiles == 0 {
            return Ok(());
        }
        let mut arguments = self.components().to_vec();
        arguments.extend([Argument::U64(self.rows as u64), Argument::U64(self.cols as u64), out.pointer()]);
        gpu.launch(&Launch {
            file: "fixed12",
            kernel: "decode_fixed12",
            grid: [size32("tiles", tiles.div_ceil(8))?, 1, 1],
            block: 256,
            shared: 0,
            arguments: &arguments,
        })
    }
}
