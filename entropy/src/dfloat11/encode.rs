//! Encoding in pieces.
//!
//! ```text
//! piece k: windows from its start bit on   |w|w|w|w.|
//! piece k+1:                                     |.w|w|...     the shared window is joined by OR
//! ```
//!
//! A piece owns the entries (gap, first symbol) of the windows that its codes complete the way to.

use super::code::CodeWord;
use super::{
    BLOCK_BYTES, BLOCK_WINDOWS, Code, Histogram, Layout, MAX_BLOCK_SYMBOLS, Unrepresentable, WINDOW_BITS,
};
use crate::Error;
use crate::bf16::{exponent, sign_mantissa};

/// Where a piece starts in its unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Number of its first weight.
    pub element: u64,
    /// Bits of the codes before it.
    pub bit: u64,
}

/// An encoded piece; reused as a buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// A byte a weight.
    pub sign_mantissa: Vec<u8>,
    pub(super) start: Position,
    pub(super) end: Position,
    /// Windows from the one that holds the start bit, first bit highest: complete ones, then one partial.
    pub(super) windows: Vec<u64>,
    /// The gap of the window after each complete one.
    pub(super) gaps: Vec<u8>,
    /// Numbers of the first symbols of blocks.
    pub(super) block_starts: Vec<u32>,
}

/// Bytes that an [`Assembler`] has finished.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sections {
    /// Of `encoded_exponent`.
    pub encoded_exponent: Vec<u8>,
    /// Of `gaps`.
    pub gaps: Vec<u8>,
    /// Of `output_positions`.
    pub output_positions: Vec<u8>,
}

/// A whole unit in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodedUnit {
    /// The tables.
    pub luts: Vec<u8>,
    /// The stream.
    pub encoded_exponent: Vec<u8>,
    /// A byte a weight.
    pub sign_mantissa: Vec<u8>,
    /// First symbols of blocks.
    pub output_positions: Vec<u8>,
    /// First codes of windows.
    pub gaps: Vec<u8>,
}

impl Piece {
    /// Empties the piece and sets its start.
    pub(super) fn restart(&mut self, start: Position) {
        self.sign_mantissa.clear();
        self.windows.clear();
        self.gaps.clear();
        self.block_starts.clear();
        self.start = start;
        self.end = start;
    }
}

/// The stream being written: one window at a time.
struct Writer<'a> {
    piece: &'a mut Piece,
    window: u64,
    /// Bits of `window` still free, 1..=64.
    free: u32,
    /// Complete windows before this one in the whole stream.
    number: u64,
}

impl Writer<'_> {
    /// Appends a code; `element` is the number of its symbol.
    #[inline(always)]
    fn append(&mut self, word: CodeWord, element: u64) {
        let bits = u64::from(word.bits);
        if word.length < self.free {
            self.window |= bits << (self.free - word.length);
            self.free -= word.length;
            return;
        }
        let spill = word.length - self.free;
        self.piece.windows.push(self.window | bits >> spill);
        self.piece.gaps.push(spill as u8);
        self.number += 1;
        if self.number % BLOCK_WINDOWS as u64 == 0 {
            self.piece.block_starts.push(element.wrapping_add(1) as u32);
        }
        self.free = 64 - spill;
        self.window = if spill == 0 { 0 } else { bits << self.free };
    }
}

/// Encodes the words of a piece that starts at `start`. Exponents that the code does not know must not
/// occur; they would be left out.
pub fn encode_piece(code: &Code, start: Position, words: &[u16], out: &mut Piece) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("bmi2") && std::arch::is_x86_feature_detected!("avx2") {
        #[allow(unsafe_code)]
        // SAFETY: the processor has the features that the function is compiled for.
        return unsafe { encode_piece_bmi2(code, start, words, out) };
    }
    encode_piece_body(code, start, words, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "bmi2,avx2")]
fn encode_piece_bmi2(code: &Code, start: Position, words: &[u16], out: &mut Piece) {
    encode_piece_body(code, start, words, out);
}

#[inline(always)]
fn encode_piece_body(code: &Code, start: Position, words: &[u16], out: &mut Piece) {
    out.restart(start);
    out.sign_mantissa.resize(words.len(), 0);
    for (byte, &word) in out.sign_mantissa.iter_mut().zip(words) {
        *byte = sign_mantissa(word);
    }
    let table = code.words();
    let used = (start.bit % WINDOW_BITS) as u32;
    let mut writer = Writer { piece: out, window: 0, free: 64 - used, number: start.bit / WINDOW_BITS };
    let mut element = start.element;
    let mut groups = words.chunks_exact(4);
    for group in &mut groups {
        let word = |i: usize| table[usize::from(exponent(group[i]))];
        let (a, b, c, d) = (word(0), word(1), word(2), word(3));
        let (ab, cd) = (a.length + b.length, c.length + d.length);
        let length = ab + cd;
        if length < writer.free {
            // All four fit: join them off the chain of dependent shifts.
            let first = u64::from(a.bits) << b.length | u64::from(b.bits);
            let second = u64::from(c.bits) << d.length | u64::from(d.bits);
            writer.window |= (first << cd | second) << (writer.free - length);
            writer.free -= length;
        } else {
            for (i, word) in [a, b, c, d].into_iter().enumerate() {
                writer.append(word, element + i as u64);
            }
        }
        element += 4;
    }
    for &word in groups.remainder() {
        writer.append(table[usize::from(exponent(word))], element);
        element += 1;
    }
    let Writer { window, free, number, .. } = writer;
    out.windows.push(window);
    out.end = Position { element, bit: number * WINDOW_BITS + u64::from(64 - free) };
}

/// Joins the pieces of a unit, in order, and gives out whole bytes.
#[derive(Debug)]
pub struct Assembler {
    layout: Layout,
    at: Position,
    window: u64,
    /// Gaps not yet packed: eight make five bytes.
    gaps: Vec<u8>,
    gaps_seen: u64,
    positions: u64,
    /// Number of the last block's first symbol, and the most symbols of a block.
    last_start: u32,
    most: u64,
}

impl Assembler {
    /// For a unit with this layout.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        Self {
            layout: *layout,
            at: Position::default(),
            window: 0,
            gaps: vec![0],
            gaps_seen: 1,
            positions: 0,
            last_start: 0,
            most: 0,
        }
    }

    /// Appends the next piece; what is complete goes to `out`.
    pub fn push(&mut self, piece: &Piece, out: &mut Sections) {
        if self.positions == 0 {
            self.positions = 1;
            out.output_positions.extend_from_slice(&0u32.to_le_bytes());
        }
        let Some((&partial, complete)) = piece.windows.split_last() else { return };
        if let Some((&first, rest)) = complete.split_first() {
            out.encoded_exponent.extend_from_slice(&(self.window | first).to_be_bytes());
            out.encoded_exponent.reserve(rest.len() * 8);
            out.encoded_exponent.extend(rest.iter().flat_map(|w| w.to_be_bytes()));
            self.window = partial;
        } else {
            self.window |= partial;
        }
        for &start in &piece.block_starts {
            self.block_start(start, out);
        }
        let limit = self.layout.blocks * BLOCK_WINDOWS as u64;
        // The stream may end on the edge of the last block: there is no window after it.
        let room = (limit.saturating_sub(self.gaps_seen)).min(piece.gaps.len() as u64) as usize;
        self.gaps_seen += room as u64;
        self.gaps.extend_from_slice(&piece.gaps[..room]);
        let whole = self.gaps.len() / 8 * 8;
        pack_gaps(&self.gaps[..whole], &mut out.gaps);
        self.gaps.drain(..whole);
        self.at = piece.end;
    }

    fn block_start(&mut self, start: u32, out: &mut Sections) {
        if self.positions <= self.layout.blocks {
            self.positions += 1;
            out.output_positions.extend_from_slice(&start.to_le_bytes());
        }
        self.most = self.most.max(u64::from(start.wrapping_sub(self.last_start)));
        self.last_start = start;
    }

    /// Ends the stream: tail bits, last entries, padding. An error says that the pieces were not those
    /// of the layout.
    pub fn finish(mut self, code: &Code, out: &mut Sections) -> Result<(), Error> {
        let Layout { elements, bits, blocks, .. } = self.layout;
        if self.at != (Position { element: elements, bit: bits }) {
            return Err(Error::Invalid(format!(
                "pieces of {} elements and {} bits were joined, the layout has {elements} and {bits}",
                self.at.element, self.at.bit
            )));
        }
        let used = (bits % WINDOW_BITS) as usize;
        let mut tail = self.window;
        let open = (8 - used % 8) % 8;
        if open > 0 {
            let end = code.end();
            let leading = u64::from(super::code::left_justified(end)) << 32;
            let last_byte = u64::MAX.checked_shr((used + open) as u32).unwrap_or(0);
            tail |= leading >> used & !last_byte;
        }
        out.encoded_exponent.extend_from_slice(&tail.to_be_bytes()[..used.div_ceil(8)]);
        self.gaps.resize(self.gaps.len() + (blocks * BLOCK_WINDOWS as u64 - self.gaps_seen) as usize, 0);
        pack_gaps(&self.gaps, &mut out.gaps);
        if self.positions <= blocks {
            self.block_start(elements as u32, out);
        }
        Ok(())
    }

    /// The most symbols of a block so far.
    #[must_use]
    pub fn most_block_symbols(&self) -> u64 {
        self.most
    }
}

/// Packs 5-bit values, first highest; a multiple of eight.
fn pack_gaps(gaps: &[u8], out: &mut Vec<u8>) {
    out.reserve(gaps.len() / 8 * 5);
    for eight in gaps.chunks_exact(8) {
        let packed = eight.iter().fold(0u64, |bits, &gap| bits << 5 | u64::from(gap & 31));
        out.extend_from_slice(&packed.to_be_bytes()[3..]);
    }
}

/// Words of a piece when a whole unit is encoded in memory: keeps its buffers in the cache.
const PIECE_WORDS: usize = 1 << 16;

/// Encodes a whole unit in memory.
pub fn encode(words: &[u16]) -> Result<EncodedUnit, Unrepresentable> {
    let mut histogram = Histogram::new();
    histogram.add(words);
    let code = Code::build(&histogram)?;
    let layout = Layout::new(&code, &histogram)?;
    let mut sections = Sections {
        encoded_exponent: Vec::with_capacity(layout.encoded_exponent_bytes as usize + BLOCK_BYTES),
        gaps: Vec::with_capacity(layout.gaps_bytes() as usize),
        output_positions: Vec::with_capacity(layout.output_positions_bytes() as usize),
    };
    let mut sign_mantissa = Vec::with_capacity(words.len());
    let mut assembler = Assembler::new(&layout);
    let mut piece = Piece::default();
    for words in words.chunks(PIECE_WORDS) {
        encode_piece(&code, piece.end, words, &mut piece);
        sign_mantissa.extend_from_slice(&piece.sign_mantissa);
        assembler.push(&piece, &mut sections);
    }
    if assembler.most_block_symbols() > MAX_BLOCK_SYMBOLS {
        return Err(Unrepresentable::BlockSymbols(assembler.most_block_symbols()));
    }
    assembler.finish(&code, &mut sections).map_err(|_| Unrepresentable::Empty)?;
    Ok(EncodedUnit {
        luts: code.luts().to_vec(),
        encoded_exponent: sections.encoded_exponent,
        sign_mantissa,
        output_positions: sections.output_positions,
        gaps: sections.gaps,
    })
}
