//! Encoding in pieces.
//!
//! ```text
//! piece k: windows from its start bit on   |w|w|w|w.|
//! piece k+1:                                     |.w|w|...     the shared window is joined by OR
//! ```
//!
//! A piece owns the entries (gap, first symbol) of the windows that its codes complete the way to.

use super::word::{CodeWord, left_justified};
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
#[derive(Clone, Debug, Default)]
pub struct Piece {
    /// A byte a weight.
    pub sign_mantissa: Vec<u8>,
    pub(super) start: Position,
    pub(super) end: Position,
    /// Complete windows from the one that holds the start bit, first bit highest; the first `complete`.
    pub(super) windows: Vec<u64>,
    /// The window after them, as far as it is known.
    pub(super) partial: u64,
    /// The gap of the window after each complete one; the first `complete`.
    pub(super) gaps: Vec<u8>,
    /// How many windows are complete. The lists are longer: clearing them for every piece costs time.
    pub(super) complete: usize,
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
    /// Where the next piece starts.
    #[must_use]
    pub fn end(&self) -> Position {
        self.end
    }

    fn complete_windows(&self) -> &[u64] {
        &self.windows[..self.complete]
    }

    fn complete_gaps(&self) -> &[u8] {
        &self.gaps[..self.complete]
    }

    /// Empties the piece and sets its start.
    pub(super) fn restart(&mut self, start: Position) {
        self.complete = 0;
        self.partial = 0;
        self.block_starts.clear();
        self.start = start;
        self.end = start;
    }
}

impl PartialEq for Piece {
    fn eq(&self, other: &Self) -> bool {
        let parts = |p: &Self| (p.start, p.end, p.partial, p.complete);
        parts(self) == parts(other)
            && self.sign_mantissa == other.sign_mantissa
            && self.complete_windows() == other.complete_windows()
            && self.complete_gaps() == other.complete_gaps()
            && self.block_starts == other.block_starts
    }
}

impl Eq for Piece {}

/// Where the stream is.
#[derive(Clone, Copy)]
struct State {
    /// How many windows of the piece are complete.
    complete: usize,
    /// The window after them.
    window: u64,
    /// Bits of it in use, below 64.
    used: u32,
    /// Complete windows before the piece in the whole stream.
    before: usize,
}

impl State {
    /// Appends a code and, where it completes a window, that window's entries; `element` is the number
    /// of its symbol.
    fn append(&mut self, word: CodeWord, element: u64, out: &mut Piece) -> bool {
        if word.length == 0 {
            return false;
        }
        let bits = u64::from(word.bits) << (64 - word.length);
        let end = self.used + word.length;
        let full = self.window | bits >> self.used;
        if end < 64 {
            (self.window, self.used) = (full, end);
            return false;
        }
        out.windows[self.complete] = full;
        out.gaps[self.complete] = (end - 64) as u8;
        self.complete += 1;
        self.window = bits << (63 - self.used) << 1;
        self.used = end - 64;
        if (self.before + self.complete).is_multiple_of(BLOCK_WINDOWS) {
            out.block_starts.push(element.wrapping_add(1) as u32);
        }
        true
    }
}

/// Encodes the words of a piece that starts at `start`. Exponents that the code does not know must not
/// occur; they would be left out.
pub fn encode_piece(code: &Code, start: Position, words: &[u16], out: &mut Piece) {
    #[cfg(target_arch = "x86_64")]
    if crate::isa::has_avx2_and_bmi2() {
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
    let (table, lengths) = (code.words(), code.lengths());
    let pairs: &[u64; 1 << 16] = match (&*code.pairs().0).try_into() {
        Ok(pairs) => pairs,
        Err(_) => return,
    };
    let mut state = State {
        complete: 0,
        window: 0,
        used: (start.bit % WINDOW_BITS) as u32,
        before: (start.bit / WINDOW_BITS) as usize,
    };
    let mut exponents = [0u8; BATCH_WORDS];
    // For each window that a batch completes: the group that did, and the bits in use before it.
    let mut completed_by = [0u32; BATCH_WORDS / 2 + 2];
    for (number, batch) in words.chunks(BATCH_WORDS).enumerate() {
        let mantissas = &mut out.sign_mantissa[number * BATCH_WORDS..][..batch.len()];
        for ((&word, e), sm) in batch.iter().zip(&mut exponents).zip(mantissas) {
            *e = exponent(word);
            *sm = sign_mantissa(word);
        }
        let exponents = &exponents[..batch.len()];
        let element = start.element + (number * BATCH_WORDS) as u64;
        // Room for the longest codes.
        let room = state.complete + batch.len() / 2 + 2;
        if out.windows.len() < room {
            out.windows.resize(room, 0);
            out.gaps.resize(room, 0);
        }
        let first_window = state.complete;
        let groups = exponents.chunks_exact(8);
        let tail = groups.remainder();
        for (group, bytes) in groups.enumerate() {
            let mut eight = [0; 8];
            eight.copy_from_slice(bytes);
            let eight = u64::from_le_bytes(eight);
            let pair = |i: u32| pairs[usize::from((eight >> (16 * i)) as u16)];
            let (a, b, c, d) = (pair(0), pair(1), pair(2), pair(3));
            let length = |pair: u64| pair as u32 & 255;
            let half = length(c) + length(d);
            let total = length(a) + length(b) + half;
            if total > 64 {
                for (i, &e) in bytes.iter().enumerate() {
                    if state.append(table[usize::from(e)], element + (group * 8 + i) as u64, out) {
                        completed_by[state.complete - 1 - first_window] = ENTRIES_MADE;
                    }
                }
                continue;
            }
            let State { complete, window, used, before } = state;
            let first = a >> 8 << length(b) | b >> 8;
            let second = c >> 8 << length(d) | d >> 8;
            let joined = (first << half | second) << (64 - total);
            let full = window | joined >> used;
            let rest = joined << (63 - used) << 1;
            let end = used + total;
            let crossed = end >> 6;
            out.windows[complete] = full;
            completed_by[complete - first_window] = (group as u32) << 8 | used;
            let window = if crossed == 1 { rest } else { full };
            state = State { complete: complete + crossed as usize, window, used: end & 63, before };
        }
        for (i, &e) in tail.iter().enumerate() {
            let number = element + (batch.len() - tail.len() + i) as u64;
            if state.append(table[usize::from(e)], number, out) {
                completed_by[state.complete - 1 - first_window] = ENTRIES_MADE;
            }
        }
        let mut starts = Vec::new();
        let windows = completed_by.iter().zip(&mut out.gaps[first_window..state.complete]);
        for (i, (&by, gap)) in windows.enumerate() {
            if by == ENTRIES_MADE {
                continue;
            }
            let (group, used) = ((by >> 8) as usize * 8, by & 255);
            // The first code that starts in the next window: the smallest end from 64 on.
            let mut end = used;
            let (mut smallest, mut inside) = (u32::MAX, 0);
            for &e in &exponents[group..group + 8] {
                end += u32::from(lengths[usize::from(e)]);
                smallest = smallest.min(end.wrapping_sub(64));
                inside += u64::from(end < 64);
            }
            *gap = smallest as u8;
            if (state.before + first_window + i + 1).is_multiple_of(BLOCK_WINDOWS) {
                starts.push((element + group as u64 + inside).wrapping_add(1) as u32);
            }
        }
        if !starts.is_empty() {
            // Between those of the slow path, if there were any.
            out.block_starts.extend(starts);
            out.block_starts.sort_unstable();
        }
    }
    out.complete = state.complete;
    out.partial = state.window;
    let bit = (state.before + state.complete) as u64 * WINDOW_BITS + u64::from(state.used);
    out.end = Position { element: start.element + words.len() as u64, bit };
}

/// Marks a window whose gap and first symbol were written already.
const ENTRIES_MADE: u32 = u32::MAX;

/// Words whose fields are split at a time.
const BATCH_WORDS: usize = 4096;

/// Joins the pieces of a unit, in order, and gives out whole bytes.
#[derive(Debug)]
pub struct Assembler {
    layout: Layout,
    at: Position,
    window: u64,
    /// Gaps not yet packed, never empty: eight make five bytes.
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
        if let Some((&first, rest)) = piece.complete_windows().split_first() {
            out.encoded_exponent.extend_from_slice(&(self.window | first).to_be_bytes());
            let at = out.encoded_exponent.len();
            out.encoded_exponent.resize(at + rest.len() * 8, 0);
            for (bytes, window) in out.encoded_exponent[at..].chunks_exact_mut(8).zip(rest) {
                bytes.copy_from_slice(&window.to_be_bytes());
            }
            self.window = piece.partial;
        } else {
            self.window |= piece.partial;
        }
        for &start in &piece.block_starts {
            self.block_start(start, out);
        }
        let limit = self.layout.blocks * BLOCK_WINDOWS as u64;
        // The stream may end on the edge of the last block: there is no window after it.
        let gaps = piece.complete_gaps();
        let room = limit.saturating_sub(self.gaps_seen).min(gaps.len() as u64) as usize;
        self.gaps_seen += room as u64;
        self.gaps.extend_from_slice(&gaps[..room]);
        // The last entry may change: see `finish`.
        let whole = (self.gaps.len() - 1) / 8 * 8;
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
            let leading = u64::from(left_justified(end)) << 32;
            let last_byte = u64::MAX.checked_shr((used + open) as u32).unwrap_or(0);
            tail |= leading >> used & !last_byte;
        }
        out.encoded_exponent.extend_from_slice(&tail.to_be_bytes()[..used.div_ceil(8)]);
        // A last window that holds only the rest of a code has no entry, unless the end symbol starts in it.
        if open == 0
            && let Some(gap) = self.gaps.last_mut()
            && usize::from(*gap) == used
        {
            *gap = 0;
        }
        self.gaps.resize(self.gaps.len() + (blocks * BLOCK_WINDOWS as u64 - self.gaps_seen) as usize, 0);
        pack_gaps(&self.gaps, &mut out.gaps);
        if self.positions <= blocks {
            self.block_start(elements as u32, out);
        }
        Ok(())
    }

    /// The most symbols of a block, the last one ending before symbol `end`.
    #[must_use]
    pub fn most_block_symbols(&self, end: u64) -> u64 {
        self.most.max(end.saturating_sub(u64::from(self.last_start)))
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
    let most = assembler.most_block_symbols(layout.elements);
    if most > MAX_BLOCK_SYMBOLS {
        return Err(Unrepresentable::BlockSymbols(most));
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
