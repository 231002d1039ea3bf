//! Matrices in fixed12 in device memory.

use llmpress_entropy::fixed12::{
    Grid, Histogram, MAX_BASE, MIN_BASE, Strips, StripsRef, TILE_CODE_BYTES, TILE_WEIGHTS, encode_strips,
};

use super::dense::row_stride;
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
    /// Place and exponent of each escape, as kernels/cuda/fixed12.cu says; in a tile they ascend by place.
    escapes: Buffer,
}

/// Where a tile's weight lies among the lanes' fragments: lane 4 g + q has eight weights for each `mma`, number 2 h + p, in words
/// 2 j + r: those of row g + 8 r and columns 32 h + 8 q + 4 p + 2 j, + 1.
fn place(position: u16) -> u32 {
    let (row, col) = (u32::from(position) / 64, u32::from(position) % 64);
    let lane = row % 8 * 4 + col % 32 / 8;
    let mma = col / 32 * 2 + col % 8 / 4;
    (mma * 32 + lane) * 8 + col % 4 / 2 * 4 + row / 8 * 2 + col % 2
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
        // Kernels count tiles in 32 bits.
        if u32::try_from(tiles).is_err() {
            return Err(invalid("too large"));
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
        let tile =
            |ends: &[u32]| escape_positions[ends[0] as usize..ends[1] as usize].is_sorted_by(|a, b| a < b);
        if !escape_offsets.windows(2).all(tile) {
            return Err(invalid("a tile's escapes do not ascend"));
        }
        let mut escapes: Vec<u32> = escape_positions
            .iter()
            .zip(escape_exponents)
            .map(|(&position, &exponent)| place(position) | u32::from(exponent) << 23)
            .collect();
        for ends in escape_offsets.windows(2) {
            escapes[ends[0] as usize..ends[1] as usize].sort_unstable_by_key(|escape| escape & 1023);
        }
        Ok(Self {
            rows,
            cols,
            base: base.unsigned_abs().into(),
            sign_mantissa: gpu.upload(sign_mantissa)?,
            codes: gpu.upload(codes)?,
            escape_offsets: gpu.upload(escape_offsets)?,
            escapes: gpu.upload(&escapes)?,
        })
    }

    /// Encodes BF16 words, row-major, with the base that leaves the fewest escapes, and copies them to the device.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there are not `rows` x `cols` words; those of [`Self::upload`].
    pub fn encode(gpu: &Gpu, rows: usize, cols: usize, words: &[u16]) -> Result<Self> {
        let invalid = |what: String| Error::Invalid(format!("a fixed12 matrix of {rows} x {cols}: {what}"));
        if rows.checked_mul(cols) != Some(words.len()) {
            return Err(invalid(format!("{} words", words.len())));
        }
        let mut histogram = Histogram::new();
        histogram.add(words);
        let base = histogram.best_window().base;
        let mut strips = Strips::default();
        encode_strips(base, cols, words, &mut strips).map_err(|e| invalid(e.to_string()))?;
        let mut escape_offsets = vec![0u32];
        let mut before = 0;
        for count in &strips.escape_counts {
            before += count;
            escape_offsets.push(before);
        }
        let strips = StripsRef {
            sign_mantissa: &strips.sign_mantissa,
            codes: &strips.codes,
            escape_offsets: &escape_offsets,
            escape_positions: &strips.escape_positions,
            escape_exponents: &strips.escape_exponents,
        };
        Self::upload(gpu, rows, cols, base, &strips)
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
        [&self.sign_mantissa, &self.codes, &self.escape_offsets, &self.escapes]
            .iter()
            .map(|buffer| buffer.bytes())
            .sum()
    }

    /// The first arguments of every kernel that reads it: from a strip of 16 rows on, which must be inside.
    pub(super) fn components_from(&self, strip: usize) -> [Argument; 5] {
        let tiles = strip * self.cols.div_ceil(64);
        // Offsets of escapes count from the matrix's first, so the list stays whole.
        let from = |buffer: &Buffer, bytes: usize| match buffer.view().pointer() {
            Argument::Pointer(address) => Argument::Pointer(address + (tiles * bytes) as u64),
            other => other,
        };
        [
            from(&self.sign_mantissa, TILE_WEIGHTS),
            from(&self.codes, TILE_CODE_BYTES),
            from(&self.escape_offsets, 4),
            self.escapes.view().pointer(),
            Argument::U32(self.base),
        ]
    }

    /// Decodes it to `BF16 [rows, cols]`, row-major.
    ///
    /// # Errors
    /// `out` is too small; the launch fails.
    pub fn decode(&self, gpu: &Gpu, out: View<'_>) -> Result<()> {
        self.start_decode(gpu, 0, self.rows, out, self.cols)
    }

    /// Decodes `rows` rows, from a multiple of 16 on, to what a product with plain weights reads: rows of
    /// [`super::dense::row_stride`] elements.
    pub(super) fn decode_rows(&self, gpu: &Gpu, first: usize, rows: usize, out: View<'_>) -> Result<()> {
        self.start_decode(gpu, first, rows, out, row_stride(self.cols))
    }

    fn start_decode(&self, gpu: &Gpu, first: usize, rows: usize, out: View<'_>, stride: usize) -> Result<()> {
        out.require("the decoded matrix", 2 * rows * stride)?;
        let tiles = rows.div_ceil(16) * self.cols.div_ceil(64);
        if tiles == 0 {
            return Ok(());
        }
        let mut arguments = self.components_from(first / 16).to_vec();
        arguments.extend([
            Argument::U64(rows as u64),
            Argument::U64(self.cols as u64),
            out.pointer(),
            Argument::U64(stride as u64),
        ]);
        gpu.launch(&Launch {
            file: "fixed12",
            kernel: "decode_fixed12",
            grid: [size32("tiles", tiles.div_ceil(8))?, 1, 1],
            block: 256,
            // Half a tile of each of eight warps.
            shared: 8 * 1024,
            arguments: &arguments,
        })
    }
}
