//! Decoding runs of whole blocks.
//!
//! ```text
//! block a: --lookup--> up to 5 exponents, their bits -->        four blocks take turns, so that the
//! block b: --lookup--> up to 5 exponents, their bits -->        look-ups of one hide behind the others'
//! ...                            then exponents + sign_mantissa -> words
//! ```

use super::tables::{LOOKUP_BITS, LOOKUP_SYMBOLS, Tables};
use super::{BLOCK_BITS, BLOCK_BYTES, BLOCK_GAP_BYTES, BLOCK_WINDOWS, Code};
use crate::Error;
use crate::bf16::join;

/// Look-ups from one word of the stream: 4 x 12 bits and the 7 bits before them fit into 64.
const TURN_LOOKUPS: usize = 4;
/// Blocks decoded side by side.
const LANES: usize = 4;
/// Bytes behind a block that its last code and the reader's words may touch.
const SLACK: usize = 32;

/// A run of whole blocks of a unit, blocks j0..j1 of it.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// The stream from byte 4096 j0 to 4096 j1, and at least 4 bytes more where it goes on.
    pub encoded_exponent: &'a [u8],
    /// The gaps of these blocks: 320 bytes each.
    pub gaps: &'a [u8],
    /// Their entries of `output_positions` and the next one: u32, little-endian.
    pub output_positions: &'a [u8],
    /// From the first symbol of the first block to the last of the last block.
    pub sign_mantissa: &'a [u8],
}

/// A span whose sizes fit together.
pub(super) struct CheckedSpan<'a> {
    span: Span<'a>,
    pub(super) blocks: usize,
    first: u32,
}

impl<'a> CheckedSpan<'a> {
    /// Checks sizes and that the wanted range lies within the span.
    pub(super) fn new(span: &Span<'a>, skip: usize, wanted: usize) -> Result<Self, Error> {
        let blocks = span.gaps.len() / BLOCK_GAP_BYTES;
        if !span.gaps.len().is_multiple_of(BLOCK_GAP_BYTES) || blocks == 0 {
            return Err(Error::corrupt("gaps", format!("{} bytes are not whole blocks", span.gaps.len())));
        }
        if span.output_positions.len() != 4 * (blocks + 1) {
            return Err(Error::corrupt(
                "output_positions",
                format!(
                    "{} bytes where {blocks} blocks need {}",
                    span.output_positions.len(),
                    4 * (blocks + 1)
                ),
            ));
        }
        let checked = Self { span: *span, blocks, first: 0 };
        let checked = Self { first: checked.position(0), ..checked };
        let mut last = checked.first;
        for block in 1..=blocks {
            let next = checked.position(block);
            if next < last || next - last > BLOCK_BITS as u32 {
                return Err(Error::corrupt(
                    "output_positions",
                    format!("a block runs from symbol {last} to {next}; it can start 0 to {BLOCK_BITS}"),
                ));
            }
            last = next;
        }
        let elements = (last - checked.first) as usize;
        if span.sign_mantissa.len() != elements {
            return Err(Error::corrupt(
                "sign_mantissa",
                format!("{} bytes where the blocks hold {elements} weights", span.sign_mantissa.len()),
            ));
        }
        if span.encoded_exponent.len() <= (blocks - 1) * BLOCK_BYTES {
            return Err(Error::corrupt(
                "encoded_exponent",
                format!("{} bytes are fewer than {blocks} blocks", span.encoded_exponent.len()),
            ));
        }
        if skip.checked_add(wanted).is_none_or(|end| end > elements) {
            return Err(Error::Invalid(format!(
                "weights {skip}.. {wanted} more of {elements} were asked for"
            )));
        }
        Ok(checked)
    }

    fn position(&self, index: usize) -> u32 {
        let at = index * 4;
        self.span.output_positions.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// The symbols that start in a block, numbered from the span's first.
    pub(super) fn symbols(&self, block: usize) -> std::ops::Range<usize> {
        (self.position(block) - self.first) as usize..(self.position(block + 1) - self.first) as usize
    }

    /// The stream from a block's first byte on.
    pub(super) fn stream(&self, block: usize) -> &'a [u8] {
        &self.span.encoded_exponent[block * BLOCK_BYTES..]
    }

    /// The gaps of a block's windows, and 0 or the first gap of the next block behind them.
    pub(super) fn gaps(&self, block: usize) -> [u8; BLOCK_WINDOWS + 1] {
        let mut gaps = [0; BLOCK_WINDOWS + 1];
        let packed = &self.span.gaps[block * BLOCK_GAP_BYTES..];
        for (eight, five) in gaps.chunks_exact_mut(8).zip(packed.chunks_exact(5)) {
            let bits = five.iter().fold(0u64, |bits, &b| bits << 8 | u64::from(b));
            for (i, gap) in eight.iter_mut().enumerate() {
                *gap = (bits >> (35 - 5 * i)) as u8 & 31;
            }
        }
        gaps[BLOCK_WINDOWS] = packed.get(BLOCK_GAP_BYTES).map_or(0, |b| b >> 3);
        gaps
    }

    /// Checks where the codes of a block end: at the first code of the next block, or in the last byte.
    pub(super) fn check_end(&self, block: usize, last_start: usize, end: usize) -> Result<(), Error> {
        let available = self.stream(block).len() * 8;
        if end > available {
            return Err(Error::corrupt("encoded_exponent", "ends within a code"));
        }
        if last_start >= BLOCK_BITS {
            return Err(Error::corrupt(
                "output_positions",
                "claims a symbol for a block that starts in the next",
            ));
        }
        let next = self.gaps(block)[BLOCK_WINDOWS];
        let ends_well = if block + 1 < self.blocks {
            let following = self.symbols(block + 1);
            end == BLOCK_BITS + usize::from(next) || following.is_empty() && end >= BLOCK_BITS
        } else if available > BLOCK_BITS {
            end >= BLOCK_BITS
        } else {
            end + 8 > available
        };
        if ends_well {
            return Ok(());
        }
        Err(Error::corrupt(
            "output_positions",
            format!(
                "the symbols claimed for a block end at bit {end} of it, before or after the next block's first"
            ),
        ))
    }
}

/// Decodes weights `skip .. skip + out.len()` of a span. Whatever the bytes, it ends, and either fills
/// `out` or says which component is wrong: symbols must agree with `output_positions` and `gaps`.
pub fn decode_span(code: &Code, span: &Span<'_>, skip: usize, out: &mut [u16]) -> Result<(), Error> {
    if out.is_empty() {
        return Ok(());
    }
    #[cfg(target_arch = "x86_64")]
    if crate::isa::has_avx2_and_bmi2() {
        #[allow(unsafe_code)]
        // SAFETY: the processor has the features that the function is compiled for.
        return unsafe { decode_span_bmi2(code, span, skip, out) };
    }
    decode_span_body(code, span, skip, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "bmi1,bmi2,avx2")]
fn decode_span_bmi2(code: &Code, span: &Span<'_>, skip: usize, out: &mut [u16]) -> Result<(), Error> {
    decode_span_body(code, span, skip, out)
}

#[inline(always)]
fn decode_span_body(code: &Code, span: &Span<'_>, skip: usize, out: &mut [u16]) -> Result<(), Error> {
    let checked = CheckedSpan::new(span, skip, out.len())?;
    let end = skip + out.len();
    let wanted = |block: &usize| {
        let symbols = checked.symbols(*block);
        symbols.start < end && symbols.end > skip
    };
    let mut lanes: Vec<Lane> = Vec::new();
    let blocks: Vec<usize> = (0..checked.blocks).filter(wanted).collect();
    for group in blocks.chunks(LANES) {
        lanes.resize_with(LANES.max(group.len()), Lane::new);
        for (lane, &block) in lanes.iter_mut().zip(group) {
            lane.load(&checked, block);
        }
        if let ([a, b, c, d], LANES) = (&mut lanes[..], group.len()) {
            decode_side_by_side(&code.tables, [a, b, c, d]);
        }
        for lane in &mut lanes[..group.len()] {
            decode_side_by_side(&code.tables, [lane]);
        }
        for (lane, &block) in lanes.iter_mut().zip(group) {
            lane.finish(&code.tables)?;
            checked.check_end(block, lane.last_start, lane.bit)?;
            let symbols = checked.symbols(block);
            let from = symbols.start.max(skip);
            let to = symbols.end.min(end);
            let exponents = &lane.exponents[from - symbols.start..to - symbols.start];
            let mantissas = &span.sign_mantissa[from..to];
            for ((word, &e), &sm) in out[from - skip..to - skip].iter_mut().zip(exponents).zip(mantissas) {
                *word = join(e, sm);
            }
        }
    }
    Ok(())
}

/// A block being decoded.
struct Lane {
    /// The block's bytes and a few of the next block's, then zeros.
    stream: Box<[u8; BLOCK_BYTES + SLACK]>,
    gaps: [u8; BLOCK_WINDOWS + 1],
    exponents: Vec<u8>,
    /// Symbols wanted and done.
    count: usize,
    done: usize,
    /// The next code's first bit, and the last one's.
    bit: usize,
    last_start: usize,
    /// Whether a window's first code was not where its gap says.
    wrong_gap: bool,
}

impl Lane {
    fn new() -> Self {
        Self {
            stream: Box::new([0; BLOCK_BYTES + SLACK]),
            gaps: [0; BLOCK_WINDOWS + 1],
            exponents: Vec::new(),
            count: 0,
            done: 0,
            bit: 0,
            last_start: 0,
            wrong_gap: false,
        }
    }

    fn load(&mut self, span: &CheckedSpan<'_>, block: usize) {
        let stream = span.stream(block);
        let len = stream.len().min(BLOCK_BYTES + 8);
        self.stream[..len].copy_from_slice(&stream[..len]);
        self.stream[len..].fill(0);
        self.gaps = span.gaps(block);
        self.count = span.symbols(block).len();
        // Room for whole eight-byte stores.
        self.exponents.resize(self.count + 16, 0);
        self.done = 0;
        self.bit = usize::from(self.gaps[0]);
        self.last_start = 0;
        self.wrong_gap = false;
    }

    /// The 32 bits from a bit of the block on.
    #[inline(always)]
    fn peek(&self, bit: usize) -> u32 {
        let at = (bit / 8) & (BLOCK_BYTES - 1);
        let mut bytes = [0u8; 8];
        bytes.copy_from_slice(&self.stream[at..at + 8]);
        (u64::from_be_bytes(bytes) << (bit % 8) >> 32) as u32
    }

    /// Decodes the rest of the block symbol by symbol.
    fn finish(&mut self, tables: &Tables) -> Result<(), Error> {
        while self.done < self.count {
            if self.bit >= BLOCK_BITS {
                return Err(Error::corrupt(
                    "output_positions",
                    format!("claims {} symbols for a block that starts {}", self.count, self.done),
                ));
            }
            let Some((symbol, length)) = tables.symbol(self.peek(self.bit)) else {
                return Err(Error::corrupt("encoded_exponent", "holds bits that are no code"));
            };
            self.exponents[self.done] = symbol;
            self.done += 1;
            self.last_start = self.bit;
            self.advance(length as usize);
        }
        if self.wrong_gap {
            return Err(Error::corrupt("gaps", "a window's first code is not where its gap says"));
        }
        Ok(())
    }

    /// Passes a single code, checking the gap of a window that it leads to.
    fn advance(&mut self, length: usize) {
        let end = self.bit + length;
        let window = end / 64;
        // Behind the last symbol no code starts; files by the official packer lack that entry.
        if window != self.bit / 64 && window < BLOCK_WINDOWS && self.done < self.count {
            self.wrong_gap |= usize::from(self.gaps[window]) != end % 64;
        }
        self.bit = end;
    }
}

/// Takes look-ups in turns until one of the blocks is near its end.
#[inline(always)]
fn decode_side_by_side<const LANES: usize>(tables: &Tables, mut lanes: [&mut Lane; LANES]) {
    let lookup = &*tables.lookup;
    let mut bit = [0usize; LANES];
    let mut done = [0usize; LANES];
    let mut wrong = [0u64; LANES];
    let mut limit = [0usize; LANES];
    for (i, lane) in lanes.iter().enumerate() {
        bit[i] = lane.bit;
        done[i] = lane.done;
        limit[i] = lane.count.saturating_sub(TURN_LOOKUPS * LOOKUP_SYMBOLS);
    }
    loop {
        let mut running = true;
        for i in 0..LANES {
            running &= done[i] < limit[i] && bit[i] < BLOCK_BITS - 64;
        }
        if !running {
            break;
        }
        for i in 0..LANES {
            let lane = &mut *lanes[i];
            let at = bit[i];
            // `at` is below BLOCK_BITS here: the word lies within the buffer.
            let byte = (at / 8) & (BLOCK_BYTES - 1);
            let mut bytes = [0u8; 8];
            bytes.copy_from_slice(&lane.stream[byte..byte + 8]);
            // At least 57 bits of the stream: enough for four look-ups.
            let mut word = u64::from_be_bytes(bytes) << (at % 8);
            let (mut used, mut starts) = (0usize, 0u64);
            for _ in 0..TURN_LOOKUPS {
                let entry = lookup[(word >> (64 - LOOKUP_BITS)) as usize];
                if entry == 0 {
                    break;
                }
                if let Some(store) = lane.exponents.get_mut(done[i]..done[i] + 8) {
                    store.copy_from_slice(&entry.to_le_bytes());
                }
                done[i] += (entry >> 40) as usize & 7;
                starts |= (entry >> 48) << used;
                let bits = (entry >> 44) as usize & 15;
                used += bits;
                word <<= bits;
            }
            if used == 0 {
                let Some((symbol, length)) = tables.symbol((word >> 32) as u32) else {
                    // No code: the slow path will say so.
                    limit[i] = 0;
                    continue;
                };
                lane.exponents[done[i]] = symbol;
                done[i] += 1;
                (used, starts) = (length as usize, 1);
            }
            // Where the next window begins, seen from here, and the first symbol from there on.
            let ahead = 64 - at % 64;
            let after = (starts | 1 << used) >> ahead.min(63);
            let expected = u64::from(lane.gaps[at / 64 + 1]);
            wrong[i] |= u64::from(after != 0) & u64::from(u64::from(after.trailing_zeros()) != expected);
            bit[i] = at + used;
        }
    }
    for (i, lane) in lanes.iter_mut().enumerate() {
        lane.bit = bit[i];
        lane.done = done[i];
        lane.wrong_gap |= wrong[i] != 0;
        // If nothing is left to `finish`, the last start lies within the last look-up: not past the edge,
        // because the loop stops well before it.
        lane.last_start = bit[i].saturating_sub(1);
    }
}
