//! archive: floats for storage and transfer, as small as their magnitudes allow.
//!
//! ```text
//! word         sign | symbol's part: the upper bits of the magnitude | low bits          16 bits (floats of 8 are widened)
//! symbol       0: the part is 0    1..=254: the part is base + symbol    255: an escape, the part is stored
//! class        of element [r, c]: clamp((rows[r] + cols[c]) >> shift, 0, classes - 1)    each has a table of frequencies
//!
//! chunk        of 2^18 elements:
//!   u32 W, u32 E | 32 states, u32 | W words, u16 | E escapes, u16 | sign and low bits, 8 elements in low + 1 bytes
//! ```
//!
//! Symbols go through rANS: 32 states in turn, 12-bit frequencies, 16 bits at a time. Sign and low bits are as good as random and are
//! stored as they are. Rows and columns of trained matrices differ in scale, which shifts the distribution of exponents: classes follow
//! the sum of a row's and a column's scale. Words that are differences ([`differences`]) have no sign: their part is all of the upper
//! bits, and `low` bits an element are stored as they are.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod decode;
mod difference;
mod encode;
mod low_bits;
mod model;
mod reference;
mod survey;

use crate::Error;
pub use decode::Decoder;
pub use difference::{DifferenceChoice, Differences, add_to_base, classes_of_base, differences};
pub use encode::Encoder;
pub use model::{MAX_CLASSES, Model, Parameters, SYMBOLS};
pub use survey::{Choice, Histogram, Layout, Means, Scales, counted, sampled};

/// Elements of a chunk; only a tensor's last chunk has fewer.
pub const CHUNK_ELEMENTS: usize = 1 << 18;
/// States that are used in turn.
pub const LANES: usize = 32;
/// Bits of a frequency: those of a class sum to `1 << PROBABILITY_BITS`.
pub const PROBABILITY_BITS: u32 = 12;
/// The symbol of parts that have none of their own.
pub const ESCAPE: u8 = 255;

/// What a state is before the first symbol is encoded, and after the last one is decoded.
const START: u32 = 1 << 16;
/// Of all frequencies of a class.
const TOTAL: u32 = 1 << PROBABILITY_BITS;
/// Two counts and the states.
const HEADER_BYTES: usize = 8 + 4 * LANES;

/// The parts of an encoded chunk.
#[derive(Debug, Clone, Copy)]
struct Parts<'a> {
    states: [u32; LANES],
    /// From the first word to the end of the chunk: whoever reads past the words reads what comes after them.
    rest: &'a [u8],
    words: usize,
    escapes: &'a [u8],
    low_bits: &'a [u8],
}

impl<'a> Parts<'a> {
    /// Takes the chunk of `elements` apart.
    fn of(model: &Model, data: &'a [u8], elements: usize) -> Result<Self, Error> {
        if elements > CHUNK_ELEMENTS {
            return Err(Error::Invalid(format!("{elements} elements are more than a chunk")));
        }
        let short = || Error::corrupt("data", format!("a chunk of {} bytes is too short", data.len()));
        let (header, rest) = data.split_at_checked(HEADER_BYTES).ok_or_else(short)?;
        let at = |i: usize| {
            header.get(4 * i..4 * i + 4).map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap_or_default()))
        };
        let (words, escapes) = (at(0) as usize, at(1) as usize);
        let mut states = [0; LANES];
        states.iter_mut().enumerate().for_each(|(lane, state)| *state = at(2 + lane));
        if states.iter().any(|&state| state < START) {
            return Err(Error::corrupt("data", "a state is too small"));
        }
        if words > elements || escapes > elements {
            return Err(Error::corrupt(
                "data",
                format!("{words} words and {escapes} escapes of {elements} elements"),
            ));
        }
        let (_, after) = rest.split_at_checked(2 * words).ok_or_else(short)?;
        let (escapes, low_bits) = after.split_at_checked(2 * escapes).ok_or_else(short)?;
        let wanted = model.stored().bytes(elements);
        if low_bits.len() != wanted {
            return Err(Error::corrupt(
                "data",
                format!("{} bytes of low bits, not {wanted}", low_bits.len()),
            ));
        }
        Ok(Self { states, rest, words, escapes, low_bits })
    }

    fn word(&self, at: usize) -> Option<u16> {
        (at < self.words).then(|| self.rest.get(2 * at..2 * at + 2))?.map(u16_of)
    }

    /// Whether all was used up and nothing more; `at` words were.
    fn check_end(&self, states: &[u32; LANES], at: usize) -> Result<(), Error> {
        if at != self.words || states.iter().any(|&state| state != START) {
            return Err(Error::corrupt("data", "the states do not end as they began"));
        }
        Ok(())
    }

    /// Puts the escapes into their places: words whose part was not known yet are listed in order.
    fn escape(&self, model: &Model, places: &[u32], words: &mut [u16]) -> Result<(), Error> {
        if 2 * places.len() != self.escapes.len() {
            let stored = self.escapes.len() / 2;
            return Err(Error::corrupt("data", format!("{} escapes and {stored} stored", places.len())));
        }
        for (&place, part) in places.iter().zip(self.escapes.chunks_exact(2).map(u16_of)) {
            if part > model.largest_part() {
                return Err(Error::corrupt("data", format!("an escape of {part}")));
            }
            if let Some(word) = words.get_mut(place as usize) {
                *word |= part << model.low();
            }
        }
        Ok(())
    }
}

fn u16_of(bytes: &[u8]) -> u16 {
    u16::from_le_bytes(bytes.try_into().unwrap_or_default())
}

/// The classes of elements `first..` of a matrix of `cols.len()` columns, one a byte: nothing where there is one class.
///
/// # Errors
/// [`Error::Invalid`] where the elements lie outside the matrix.
pub fn classes(
    model: &Model,
    rows: &[i8],
    cols: &[i8],
    first: u64,
    elements: usize,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    out.clear();
    if model.classes() == 1 {
        return Ok(());
    }
    let outside = || Error::Invalid("elements outside of the matrix".to_owned());
    let width = cols.len() as u64;
    let mut row = usize::try_from(first.checked_div(width).ok_or_else(outside)?).map_err(|_| outside())?;
    let mut col = (first % width) as usize;
    let (shift, last) = (model.shift(), (model.classes() - 1) as i8);
    while out.len() < elements {
        let scale = *rows.get(row).ok_or_else(outside)?;
        let take = (cols.len() - col).min(elements - out.len());
        classes_of_row(scale, cols.get(col..col + take).unwrap_or_default(), shift, last, out);
        (row, col) = (row + 1, 0);
    }
    Ok(())
}

/// Refuses classes that a model lacks.
fn check_classes(model: &Model, classes: &[u8]) -> Result<(), Error> {
    // A fold is done sixteen at a time and more, a search for the largest is not.
    let largest = classes.iter().fold(0, |largest, &class| largest.max(class));
    if usize::from(largest) >= model.classes() {
        return Err(Error::Invalid(format!("class {largest} of {}", model.classes())));
    }
    Ok(())
}

/// Appends the classes of a part of a row.
fn classes_of_row(row: i8, cols: &[i8], shift: u32, last: i8, out: &mut Vec<u8>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = avx2::Avx2::detect() {
        avx2.classes(row, cols, shift, last, out);
        return;
    }
    classes_one_by_one(row, cols, shift, last, out);
}

fn classes_one_by_one(row: i8, cols: &[i8], shift: u32, last: i8, out: &mut Vec<u8>) {
    let (row, last) = (i16::from(row), i16::from(last));
    out.extend(cols.iter().map(|&col| ((row + i16::from(col)) >> shift).clamp(0, last) as u8));
}

/// Floats of eight bits as words: the sign in bit 15, the magnitude in the lowest 7.
pub fn widen(bytes: &[u8], words: &mut Vec<u16>) {
    words.clear();
    words.extend(bytes.iter().map(|&byte| u16::from(byte & 0x80) << 8 | u16::from(byte & 0x7f)));
}

/// The inverse of [`widen`]. Bits that such words do not have are dropped.
pub fn narrow(words: &[u16], bytes: &mut [u8]) {
    for (byte, word) in bytes.iter_mut().zip(words) {
        *byte = (word >> 8) as u8 & 0x80 | *word as u8 & 0x7f;
    }
}
