//! Matrices in fixed12 in device memory.

use llmpress_entropy::fixed12::{
    Grid, Histogram, MAX_BASE, MIN_BASE, Strips, StripsRef, TILE_CODE_BYTES, TILE_WEIGHTS, encode_strips,
};

use super::dense::row_stride;
use super::{Argument, Buffer, Error, Gpu, Launch, Result, View, size32};

/// A matrix in fixed12, or several one below the other.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    /// Of each strip of 16 rows, at bits 7 and 23.
    bases: Buffer,
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

/// A matrix to be copied to a device.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Output features.
    pub rows: usize,
    /// The base of its codes.
    pub base: i16,
    /// Its components.
    pub strips: StripsRef<'a>,
}

impl Part<'_> {
    /// Makes the checks that no kernel makes. Its tiles.
    fn check(&self, cols: usize) -> Result<usize> {
        let (rows, base) = (self.rows, self.base);
        let invalid = |what: &str| Error::Invalid(format!("a fixed12 matrix of {rows} x {cols}: {what}"));
        let grid = Grid::new(rows as u64, cols as u64).ok_or_else(|| invalid("too large"))?;
        let tiles = usize::try_from(grid.tiles()).map_err(|_| invalid("too large"))?;
        if !(MIN_BASE..=MAX_BASE).contains(&base) {
            return Err(invalid("the base is out of range"));
        }
        let StripsRef { sign_mantissa, codes, escape_offsets, escape_positions, escape_exponents } =
            self.strips;
        if Some(sign_mantissa.len()) != tiles.checked_mul(TILE_WEIGHTS)
            || Some(codes.len()) != tiles.checked_mul(TILE_CODE_BYTES)
            || Some(escape_offsets.len()) != tiles.checked_add(1)
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
        Ok(tiles)
    }

    /// Place and exponent of each escape, as kernels read them.
    fn escapes(&self) -> Vec<u32> {
        let StripsRef { escape_offsets, escape_positions, escape_exponents, .. } = self.strips;
        let mut escapes: Vec<u32> = escape_positions
            .iter()
            .zip(escape_exponents)
            .map(|(&position, &exponent)| place(position) | u32::from(exponent) << 23)
            .collect();
        for ends in escape_offsets.windows(2) {
            escapes[ends[0] as usize..ends[1] as usize].sort_unstable_by_key(|escape| escape & 1023);
        }
        escapes
    }
}

/// A matrix that was encoded to be copied to a device.
#[derive(Debug)]
pub struct Encoded {
    rows: usize,
    base: i16,
    strips: Strips,
    escape_offsets: Vec<u32>,
}

impl Encoded {
    /// Encodes BF16 words, row-major, with the base that leaves the fewest escapes.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there are not `rows` x `cols` words.
    pub fn new(rows: usize, cols: usize, words: &[u16]) -> Result<Self> {
        Self::with_base(rows, cols, words, Self::best_base(words))
    }

    /// The base that leaves the fewest escapes.
    pub(super) fn best_base(words: &[u16]) -> i16 {
        let mut histogram = Histogram::new();
        histogram.add(words);
        histogram.best_window().base
    }

    /// The same with a given base.
    pub(super) fn with_base(rows: usize, cols: usize, words: &[u16], base: i16) -> Result<Self> {
        let invalid = |what: String| Error::Invalid(format!("a fixed12 matrix of {rows} x {cols}: {what}"));
        if rows.checked_mul(cols) != Some(words.len()) {
            return Err(invalid(format!("{} words", words.len())));
        }
        let mut strips = Strips::default();
        encode_strips(base, cols, words, &mut strips).map_err(|e| invalid(e.to_string()))?;
        let mut escape_offsets = vec![0u32];
        let mut before = 0;
        for count in &strips.escape_counts {
            before += count;
            escape_offsets.push(before);
        }
        Ok(Self { rows, base, strips, escape_offsets })
    }

    /// Its components.
    #[must_use]
    pub fn part(&self) -> Part<'_> {
        let strips = StripsRef {
            sign_mantissa: &self.strips.sign_mantissa,
            codes: &self.strips.codes,
            escape_offsets: &self.escape_offsets,
            escape_positions: &self.strips.escape_positions,
            escape_exponents: &self.strips.escape_exponents,
        };
        Part { rows: self.rows, base: self.base, strips }
    }
}

/// Refuses matrices of which one but the last ends inside a strip of 16 rows.
fn check_above(rows: impl Iterator<Item = usize>) -> Result<()> {
    let mut above: usize = 16;
    for rows in rows {
        if !above.is_multiple_of(16) {
            return Err(Error::Invalid(format!(
                "a matrix of {above} rows above another: only whole strips of 16 can be"
            )));
        }
        above = rows;
    }
    Ok(())
}

/// Matrices of as many columns, each copied to the device below those before it.
struct Pile {
    cols: usize,
    sign_mantissa: Buffer,
    codes: Buffer,
    offsets: Vec<u32>,
    escapes: Vec<u32>,
    bases: Vec<u32>,
    /// Tiles that are there.
    tiles: usize,
}

impl Pile {
    /// Room for so many strips.
    fn new(gpu: &Gpu, cols: usize, strips: usize) -> Result<Self> {
        let all = strips.saturating_mul(cols.div_ceil(64));
        // Kernels count tiles in 32 bits.
        size32("tiles of a fixed12 matrix", all)?;
        Ok(Self {
            cols,
            sign_mantissa: gpu.allocate(all * TILE_WEIGHTS)?,
            codes: gpu.allocate(all * TILE_CODE_BYTES)?,
            offsets: vec![0],
            escapes: Vec::new(),
            bases: Vec::new(),
            tiles: 0,
        })
    }

    /// Adds a matrix, which begins with a strip of its own.
    fn add(&mut self, part: &Part<'_>) -> Result<()> {
        let tiles = part.check(self.cols)?;
        let view = |buffer: &Buffer, each: usize, bytes: &[u8]| {
            buffer.slice(self.tiles * each..(self.tiles + tiles) * each)?.write(bytes)
        };
        view(&self.sign_mantissa, TILE_WEIGHTS, part.strips.sign_mantissa)?;
        view(&self.codes, TILE_CODE_BYTES, part.strips.codes)?;
        let before = size32("escapes", self.escapes.len())?;
        self.escapes.extend(part.escapes());
        size32("escapes", self.escapes.len())?;
        self.offsets.extend(part.strips.escape_offsets[1..].iter().map(|offset| before + offset));
        let base = u32::from(part.base.unsigned_abs());
        self.bases.extend(std::iter::repeat_n(base << 7 | base << 23, part.rows.div_ceil(16)));
        self.tiles += tiles;
        Ok(())
    }

    fn finish(self, gpu: &Gpu, rows: usize) -> Result<Matrix> {
        Ok(Matrix {
            rows,
            cols: self.cols,
            bases: gpu.upload(&self.bases)?,
            sign_mantissa: self.sign_mantissa,
            codes: self.codes,
            escape_offsets: gpu.upload(&self.offsets)?,
            escapes: gpu.upload(&self.escapes)?,
        })
    }
}

/// The same matrix of all experts of a layer, in fixed12: each begins with a strip of 16 rows of its own.
#[derive(Debug)]
pub struct ExpertMatrix {
    matrix: Matrix,
    experts: usize,
    rows: usize,
}

/// An [`ExpertMatrix`] on its way to the device.
pub struct ExpertPile {
    pile: Pile,
    experts: usize,
    rows: usize,
    /// Experts that are whole, and the rows of the parts of the next one.
    whole: usize,
    heights: Vec<usize>,
}

impl ExpertPile {
    /// Room for `experts` matrices of `rows` x `cols`.
    ///
    /// # Errors
    /// More than kernels count; not so much memory.
    pub fn new(gpu: &Gpu, experts: usize, rows: usize, cols: usize) -> Result<Self> {
        let strips = experts.saturating_mul(rows.div_ceil(16));
        Ok(Self { pile: Pile::new(gpu, cols, strips)?, experts, rows, whole: 0, heights: Vec::new() })
    }

    /// Copies the next part of the expert at hand to the device, below those before it.
    ///
    /// # Errors
    /// [`Error::Invalid`] where components do not fit, or a part but an expert's last ends inside a strip of 16 rows, or there are
    /// more experts or rows than room.
    pub fn add(&mut self, part: &Part<'_>) -> Result<()> {
        self.heights.push(part.rows);
        check_above(self.heights.iter().copied())?;
        let height: usize = self.heights.iter().sum();
        if height > self.rows || self.whole == self.experts {
            return Err(Error::Invalid(format!("more than {} experts of {} rows", self.experts, self.rows)));
        }
        self.pile.add(part)?;
        if height == self.rows {
            self.whole += 1;
            self.heights.clear();
        }
        Ok(())
    }

    /// All of them.
    ///
    /// # Errors
    /// [`Error::Invalid`] where some are missing; not so much memory.
    pub fn finish(self, gpu: &Gpu) -> Result<ExpertMatrix> {
        let Self { pile, experts, rows, whole, .. } = self;
        if whole != experts {
            return Err(Error::Invalid(format!("{whole} experts of {experts}")));
        }
        Ok(ExpertMatrix { matrix: pile.finish(gpu, rows)?, experts, rows })
    }
}

impl ExpertMatrix {
    /// How many experts.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Output features of an expert.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.matrix.cols
    }

    /// Bytes in device memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.matrix.bytes()
    }

    pub(super) fn components(&self) -> [Argument; 5] {
        self.matrix.components_from(0)
    }
}

impl Matrix {
    /// Copies a matrix to the device, after checks that no kernel makes: offsets ascend, positions lie inside their tile.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the components do not fit `rows` x `cols`; not so much memory.
    pub fn upload(gpu: &Gpu, rows: usize, cols: usize, base: i16, strips: &StripsRef<'_>) -> Result<Self> {
        Self::stack(gpu, cols, &[Part { rows, base, strips: *strips }])
    }

    /// Copies matrices of as many columns to the device, one below the other: one matrix to every kernel.
    ///
    /// # Errors
    /// [`Error::Invalid`] where components do not fit, or a matrix but the last ends inside a strip of 16 rows; not so much
    /// memory.
    pub fn stack(gpu: &Gpu, cols: usize, parts: &[Part<'_>]) -> Result<Self> {
        check_above(parts.iter().map(|part| part.rows))?;
        let strips = parts.iter().map(|part| part.rows.div_ceil(16)).sum();
        let mut pile = Pile::new(gpu, cols, strips)?;
        parts.iter().try_for_each(|part| pile.add(part))?;
        pile.finish(gpu, parts.iter().map(|part| part.rows).sum())
    }

    /// Encodes BF16 words, row-major, with the base that leaves the fewest escapes, and copies them to the device.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there are not `rows` x `cols` words; those of [`Self::upload`].
    pub fn encode(gpu: &Gpu, rows: usize, cols: usize, words: &[u16]) -> Result<Self> {
        Self::stack(gpu, cols, &[Encoded::new(rows, cols, words)?.part()])
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
        let small = [&self.codes, &self.escape_offsets, &self.escapes, &self.bases];
        self.sign_mantissa.bytes() + small.iter().map(|buffer| buffer.bytes()).sum::<usize>()
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
            match self.bases.view().pointer() {
                Argument::Pointer(address) => Argument::Pointer(address + 4 * strip as u64),
                other => other,
            },
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
            overlaps: true,
        })
    }
}
