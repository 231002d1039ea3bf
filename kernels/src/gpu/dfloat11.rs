//! DFloat11 units in device memory, and FP8 matrices in the same stream (`dfloat8`).

use llmpress_entropy::dfloat8;
use llmpress_entropy::dfloat11::{BLOCK_BYTES, BLOCK_GAP_BYTES, Code, MAX_BLOCK_SYMBOLS};

use super::{Argument, Buffer, Error, Gpu, Launch, Result, View, size32};

/// Bits of the look-up table's index.
const TABLE_BITS: u32 = 10;
/// Bits of the index of a table that a longer code is looked up in, of which there are at most so many.
const LINK_BITS: u32 = 5;
const LINKS: usize = 8;
/// Symbols of an entry of it.
const ENTRY_SYMBOLS: u32 = 4;
/// Threads of a block.
const THREADS: usize = 256;
/// Blocks that a multiprocessor runs side by side.
const RESIDENT: u32 = 8;

/// The components of a unit (docs/format.md, section 4.3).
#[derive(Clone, Copy, Debug)]
pub struct Components<'a> {
    /// Look-up rows, then the lengths.
    pub luts: &'a [u8],
    /// The stream.
    pub encoded_exponent: &'a [u8],
    /// A byte a weight; half a byte of FP8.
    pub sign_mantissa: &'a [u8],
    /// Number of the first symbol of each block, then that of all. Official files may lack the last but one.
    pub output_positions: &'a [u32],
    /// 5 bits a window.
    pub gaps: &'a [u8],
}

/// What the FP8 weights of a matrix are multiplied with.
#[derive(Clone, Copy, Debug)]
pub struct Scales<'a> {
    /// A scale for every block: [`ceil(rows / block[0])`, `ceil(cols / block[1])`], finite.
    pub values: &'a [f32],
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
    /// Rows and columns that share a scale.
    pub block: [usize; 2],
}

impl Scales<'_> {
    /// Whether eight weights from a multiple of eight on always share a row and a scale, which is what the kernel goes by.
    #[must_use]
    pub fn in_eights(cols: usize, block: [usize; 2]) -> bool {
        cols.is_multiple_of(8)
            && block[0] > 0
            && block[1] > 0
            && (block[1].is_multiple_of(8) || block[1] >= cols)
    }
}

/// [`Scales`] in device memory.
#[derive(Debug)]
struct Scaled {
    values: Buffer,
    cols: u32,
    block: [u32; 2],
}

/// A unit.
#[derive(Debug)]
pub struct Unit {
    elements: usize,
    blocks: u32,
    rows: u32,
    capacity: u32,
    stream: Buffer,
    gaps: Buffer,
    positions: Buffer,
    /// How many codes start in each thread's windows.
    counts: Buffer,
    sign_mantissa: Buffer,
    table: Buffer,
    luts: Buffer,
    /// Number of the first symbol of each block, then of all; and to which experts blocks belong, where there are any.
    starts: Vec<u32>,
    owners: Option<Buffer>,
    /// Of FP8.
    scaled: Option<Scaled>,
}

/// Of a block's owners: some of its weights belong to no expert.
const COMMON: u32 = 1 << 31;
/// Of one of a block's owners: there are more.
const MANY: u32 = 0x7fff;

/// Which blocks of a unit are decoded.
#[derive(Clone, Copy, Debug)]
enum Blocks<'a> {
    All,
    Common,
    Wanted(View<'a>),
}

impl Unit {
    /// Copies a unit to the device, after checks that no kernel makes.
    ///
    /// # Errors
    /// [`Error::Invalid`] where components have other sizes, positions do not ascend or tables do not resolve; not so much
    /// memory.
    pub fn upload(gpu: &Gpu, c: &Components<'_>) -> Result<Self> {
        Self::of(gpu, c, c.sign_mantissa.len(), None)
    }

    /// Copies an FP8 matrix to the device, to be decoded to BF16: each weight times its scale in single precision, rounded once.
    ///
    /// # Errors
    /// Those of [`Self::upload`]; exponents that FP8 does not have; scales of another shape or that are not finite; blocks of which eight
    /// weights in a row do not share one ([`Scales::in_eights`]).
    pub fn upload_fp8(gpu: &Gpu, c: &Components<'_>, scales: &Scales<'_>) -> Result<Self> {
        let invalid = |what: &str| Error::Invalid(format!("a dfloat8 matrix: {what}"));
        let Scales { values, rows, cols, block } = *scales;
        if !Scales::in_eights(cols, block) {
            return Err(invalid("eight weights in a row have different scales"));
        }
        if values.len() != rows.div_ceil(block[0]) * cols.div_ceil(block[1])
            || !values.iter().all(|s| s.is_finite())
        {
            return Err(invalid("its scales are of another shape, or not finite"));
        }
        let elements = rows.checked_mul(cols).filter(|n| n.div_ceil(2) == c.sign_mantissa.len());
        let elements = elements.ok_or_else(|| invalid("components of other sizes"))?;
        let code = Code::from_luts(c.luts).map_err(|e| invalid(&e.to_string()))?;
        if !dfloat8::fits(&code) {
            return Err(invalid("codes of exponents that FP8 does not have"));
        }
        // Wider blocks than the matrix are as wide as it is.
        let block = [block[0].min(rows.max(1)), block[1].min(cols)].map(|side| side as u32);
        let scaled = Scaled { values: gpu.upload(values)?, cols: size32("columns", cols)?, block };
        Self::of(gpu, c, elements, Some(scaled))
    }

    fn of(gpu: &Gpu, c: &Components<'_>, elements: usize, scaled: Option<Scaled>) -> Result<Self> {
        let invalid = |what: &str| Error::Invalid(format!("a DFloat11 unit: {what}"));
        Code::from_luts(c.luts).map_err(|e| invalid(&e.to_string()))?;
        let blocks = c.encoded_exponent.len().div_ceil(BLOCK_BYTES);
        let elements = u32::try_from(elements).map_err(|_| invalid("2^32 weights or more"))?;
        let mut positions = c.output_positions.to_vec();
        if positions.len() == blocks {
            positions.push(elements);
        }
        if positions.len() != blocks + 1 || c.gaps.len() != blocks * BLOCK_GAP_BYTES {
            return Err(invalid("components of other sizes"));
        }
        if positions.first() != Some(&0) || positions.last() != Some(&elements) || !positions.is_sorted() {
            return Err(invalid("output_positions do not ascend from 0 to the number of weights"));
        }
        let most = positions.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        if u64::from(most) > MAX_BLOCK_SYMBOLS {
            return Err(invalid("a block holds more symbols than the format allows"));
        }
        // Threads read whole blocks and a word more.
        let mut stream = Vec::with_capacity(blocks * BLOCK_BYTES + 16);
        stream.extend_from_slice(c.encoded_exponent);
        stream.resize(blocks * BLOCK_BYTES + 16, 0);
        let unit = Self {
            elements: elements as usize,
            blocks: size32("blocks", blocks)?,
            rows: (c.luts.len() / 256 - 1) as u32,
            capacity: most,
            stream: gpu.upload(&stream)?,
            gaps: gpu.upload(c.gaps)?,
            positions: gpu.upload(&positions)?,
            counts: gpu.allocate(blocks * THREADS)?,
            sign_mantissa: gpu.upload(c.sign_mantissa)?,
            table: gpu.upload(&symbol_table(c.luts))?,
            luts: gpu.upload(c.luts)?,
            starts: positions,
            owners: None,
            scaled,
        };
        unit.count(gpu)?;
        // Decoding may begin before what was started earlier has ended, and counts as weights what this makes.
        gpu.synchronize()?;
        Ok(unit)
    }

    /// Counts the codes of each thread's windows, so that decoding need not.
    fn count(&self, gpu: &Gpu) -> Result<()> {
        if self.blocks == 0 {
            return Ok(());
        }
        gpu.launch(&Launch {
            file: "dfloat11",
            kernel: "count_dfloat11",
            grid: [self.blocks, 1, 1],
            block: THREADS as u32,
            shared: 0,
            arguments: &[
                self.stream.view().pointer(),
                self.gaps.view().pointer(),
                self.luts.view().pointer(),
                Argument::U32(self.rows),
                self.counts.view().pointer(),
            ],
            overlaps: true,
        })
    }

    /// Weights.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Bytes in device memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let small = [&self.stream, &self.gaps, &self.positions, &self.counts, &self.table, &self.luts];
        let scales = self.scaled.as_ref().map_or(0, |scaled| scaled.values.bytes());
        self.sign_mantissa.bytes() + scales + small.iter().map(|buffer| buffer.bytes()).sum::<usize>()
    }

    /// Says which elements belong to which of `experts` experts, so that they can be decoded by themselves: ranges that ascend and do
    /// not overlap.
    ///
    /// # Errors
    /// [`Error::Invalid`] where ranges are not so, or beyond the unit, or of more experts than there are or can be; no memory.
    pub fn own(
        &mut self,
        gpu: &Gpu,
        experts: usize,
        ranges: &[(std::ops::Range<usize>, usize)],
    ) -> Result<()> {
        let ascend = ranges.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start);
        let inside = |(range, expert): &(std::ops::Range<usize>, usize)| {
            range.start <= range.end && range.end <= self.elements && *expert < experts
        };
        if self.scaled.is_some() || experts >= MANY as usize || !ascend || !ranges.iter().all(inside) {
            return Err(Error::Invalid("a DFloat11 unit's experts overlap or lie outside of it".to_owned()));
        }
        let mut at = 0;
        let mut owners = Vec::with_capacity(self.blocks as usize);
        for ends in self.starts.windows(2) {
            let (mut first, end) = (ends[0] as usize, ends[1] as usize);
            let mut owner = 0;
            while ranges.get(at).is_some_and(|(range, _)| range.end <= first) {
                at += 1;
            }
            for (range, expert) in &ranges[at..] {
                if range.start >= end {
                    break;
                }
                if range.start > first {
                    owner |= COMMON;
                }
                owner = with_owner(owner, *expert as u32 + 1);
                first = range.end;
            }
            owners.push(if first < end { owner | COMMON } else { owner });
        }
        self.owners = Some(gpu.upload(&owners)?);
        // Decoding reads them before it waits for what was started earlier.
        gpu.synchronize()
    }

    /// Decodes what belongs to no expert, or everything where nothing was said to: `BF16 [elements]`.
    ///
    /// # Errors
    /// Those of [`Self::decode`].
    pub fn decode_common(&self, gpu: &Gpu, out: View<'_>) -> Result<()> {
        self.start(gpu, out, if self.owners.is_some() { Blocks::Common } else { Blocks::All })
    }

    /// Decodes what belongs to the experts whose number in `wanted` (`U32 [experts]`, what [`Self::own`] was told) is not zero.
    ///
    /// # Errors
    /// Those of [`Self::decode`].
    pub fn decode_wanted(&self, gpu: &Gpu, wanted: View<'_>, out: View<'_>) -> Result<()> {
        self.start(gpu, out, Blocks::Wanted(wanted))
    }

    /// Decodes it to `BF16 [elements]`.
    ///
    /// # Errors
    /// `out` is too small or does not start at a multiple of 16 bytes; the launch fails.
    pub fn decode(&self, gpu: &Gpu, out: View<'_>) -> Result<()> {
        self.start(gpu, out, Blocks::All)
    }

    fn start(&self, gpu: &Gpu, out: View<'_>, blocks: Blocks<'_>) -> Result<()> {
        let none = Argument::Pointer(0);
        let owners = self.owners.as_ref().map_or(none, |owners| owners.view().pointer());
        let (owners, wanted) = match blocks {
            Blocks::All => (none, none),
            Blocks::Common => (owners, none),
            Blocks::Wanted(wanted) => (owners, wanted.pointer()),
        };
        out.require("the decoded unit", 2 * self.elements)?;
        out.require_aligned("the decoded unit", 16)?;
        if self.blocks == 0 {
            return Ok(());
        }
        let piece = |bytes: u32| bytes.next_multiple_of(16);
        let mut arguments = vec![
            self.stream.view().pointer(),
            self.gaps.view().pointer(),
            self.positions.view().pointer(),
            self.counts.view().pointer(),
            self.sign_mantissa.view().pointer(),
            self.table.view().pointer(),
            Argument::U32((self.table.bytes() / 8) as u32),
            self.luts.view().pointer(),
            Argument::U32(self.rows),
            Argument::U32(self.blocks),
            Argument::U32(self.capacity),
            out.pointer(),
        ];
        match &self.scaled {
            None => arguments.extend([owners, wanted]),
            Some(Scaled { values, cols, block: [height, width] }) => arguments.extend([
                values.view().pointer(),
                Argument::U32(*cols),
                Argument::U32(*height),
                Argument::U32(*width),
            ]),
        }
        gpu.launch(&Launch {
            file: "dfloat11",
            kernel: if self.scaled.is_some() { "decode_dfloat8" } else { "decode_dfloat11" },
            grid: [self.blocks.min(RESIDENT * gpu.backend().multiprocessors()), 1, 1],
            block: THREADS as u32,
            shared: piece(self.table.bytes() as u32)
                + piece(4 * THREADS as u32)
                + piece(32)
                + piece(self.capacity + 16),
            arguments: &arguments,
            overlaps: true,
        })
    }
}

/// A block's owners and one more, by its number plus one.
fn with_owner(owners: u32, new: u32) -> u32 {
    let (one, other) = (owners & MANY, owners >> 15 & MANY);
    let both = match (one, other) {
        (0, _) => new,
        (one, _) if one == new => return owners,
        (one, 0) => one | new << 15,
        (_, other) if other == new => return owners,
        _ => MANY | MANY << 15,
    };
    owners & COMMON | both
}

/// What the next bits hold: whole codes, up to four (kernels/cuda/dfloat11.cu gives the fields).
fn symbol_table(luts: &[u8]) -> Vec<[u32; 2]> {
    let (rows, lengths) = luts.split_at(luts.len() - 256);
    // The code at the front of `bits`, of which `known` are there and the others zero.
    let code = |bits: u32, known: u32| -> Option<(u32, u32)> {
        let mut row = 0;
        for depth in 0..2 {
            let column = ((bits << (8 * depth)) >> 24) as usize;
            let entry = *rows.get(row * 256 + column)?;
            // Columns that no code starts at hold what the one before them holds; so the bits that are not known must
            // make no difference.
            let unknown = 8u32.saturating_sub(known.saturating_sub(8 * depth));
            if rows.get(row * 256 + column + (1 << unknown) - 1) != Some(&entry) {
                return None;
            }
            if entry < 240 {
                let length = u32::from(lengths[usize::from(entry)]);
                return (8 * depth + 1..=known).contains(&length).then_some((u32::from(entry), length));
            }
            row = 256 - usize::from(entry);
        }
        None
    };
    let entry = |bits: u32, known: u32| {
        let (mut symbols, mut count, mut taken) = (0, 0, 0);
        while count < ENTRY_SYMBOLS {
            let Some((symbol, length)) = code(bits << taken, known - taken) else { break };
            symbols |= symbol << (8 * count);
            (count, taken) = (count + 1, taken + length);
        }
        if count == 0 { [0, 0] } else { [symbols, taken | (8 * count) << 16] }
    };
    let mut table: Vec<[u32; 2]> =
        (0..1u32 << TABLE_BITS).map(|key| entry(key << (32 - TABLE_BITS), TABLE_BITS)).collect();
    let longer: Vec<usize> = (0..table.len()).filter(|key| table[*key][1] == 0).collect();
    for key in longer.into_iter().take(LINKS) {
        table[key][0] = table.len() as u32;
        let known = TABLE_BITS + LINK_BITS;
        let front = (key as u32) << (32 - TABLE_BITS);
        table.extend((0..1u32 << LINK_BITS).map(|more| entry(front | more << (32 - known), known)));
    }
    table
}
