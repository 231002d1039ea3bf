//! What a tensor's chunks share: which bits are symbols, and how frequent each is.
//!
//! ```text
//! stored:   a zstd frame of low bytes of the frequencies [classes, 256] | high bytes | rows, i8 | cols, i8     (the last two: of classes)
//! entry:    frequency - 1, 12 bits | slot - first slot, 12 bits | symbol, 8 bits                for each class and slot
//! ```

use zstd::zstd_safe::{CCtx, CParameter, DCtx};

use super::low_bits::Stored;
use super::{PROBABILITY_BITS, Scales, TOTAL};
use crate::Error;

/// Symbols of a class.
pub const SYMBOLS: usize = 256;
/// The most classes.
pub const MAX_CLASSES: usize = 16;
/// The most bits below a symbol.
const MAX_LOW: u32 = 12;
/// The widest shift of scales.
const MAX_SHIFT: u32 = 7;

/// zstd's, for the frame: some kilobytes a tensor.
const LEVEL: i32 = 9;

/// What is said of a model beside its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// Bits of a magnitude that no symbol takes.
    pub low: u32,
    /// The part of symbol 1, less 1.
    pub base: u16,
    /// By how many bits the sum of scales is shifted to give a class.
    pub shift: u32,
    /// Classes.
    pub classes: usize,
}

/// Parameters and frequencies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    low: u32,
    base: u16,
    shift: u32,
    /// Whether bit 15 of a word is a sign, which is stored as it is.
    sign: bool,
    frequencies: Vec<[u16; SYMBOLS]>,
}

impl Model {
    /// A model of parts above `low` bits, the first symbol's being `base + 1`, with one table of frequencies a class.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where a parameter is out of its range or frequencies do not sum to 4096.
    pub fn new(low: u32, base: u16, shift: u32, frequencies: Vec<[u16; SYMBOLS]>) -> Result<Self, Error> {
        let corrupt = |what: String| Error::corrupt("model", what);
        if low > MAX_LOW || shift > MAX_SHIFT {
            return Err(corrupt(format!("{low} low bits and a shift of {shift}")));
        }
        if u32::from(base) > 0x7fff >> low {
            return Err(corrupt(format!("a base of {base} above {low} low bits")));
        }
        if frequencies.is_empty() || frequencies.len() > MAX_CLASSES {
            return Err(corrupt(format!("{} classes", frequencies.len())));
        }
        for (class, frequencies) in frequencies.iter().enumerate() {
            let sum: u32 = frequencies.iter().map(|&f| u32::from(f)).sum();
            if sum != TOTAL {
                return Err(corrupt(format!("the frequencies of class {class} sum to {sum}, not {TOTAL}")));
            }
        }
        Ok(Self { low, base, shift, sign: true, frequencies })
    }

    /// The most low bits of words without a sign: so the part of no symbol but an escape has bit 15.
    pub const MAX_LOW_WITHOUT_SIGN: u32 = 7;

    /// A model of words without a sign ([`differences`](super::differences)): parts are all bits above `low`, the first symbol's is 1.
    ///
    /// # Errors
    /// As for [`Model::new`]; more low bits than [`Model::MAX_LOW_WITHOUT_SIGN`].
    pub fn without_sign(low: u32, frequencies: Vec<[u16; SYMBOLS]>) -> Result<Self, Error> {
        if low > Self::MAX_LOW_WITHOUT_SIGN {
            return Err(Error::corrupt("model", format!("{low} low bits of words without a sign")));
        }
        Ok(Self { sign: false, ..Self::new(low, 0, 0, frequencies)? })
    }

    /// Bits of the magnitude below a symbol.
    #[must_use]
    pub fn low(&self) -> u32 {
        self.low
    }

    /// The part of symbol 1, less 1.
    #[must_use]
    pub fn base(&self) -> u16 {
        self.base
    }

    /// By how many bits the sum of scales is shifted to give a class.
    #[must_use]
    pub fn shift(&self) -> u32 {
        self.shift
    }

    /// How many classes there are.
    #[must_use]
    pub fn classes(&self) -> usize {
        self.frequencies.len()
    }

    /// The frequencies of each class.
    #[must_use]
    pub fn frequencies(&self) -> &[[u16; SYMBOLS]] {
        &self.frequencies
    }

    /// For each class and slot its symbol, and what the state becomes.
    pub(super) fn entries(&self) -> Vec<u32> {
        let mut entries = Vec::with_capacity(self.frequencies.len() << PROBABILITY_BITS);
        for frequencies in &self.frequencies {
            for (symbol, &frequency) in (0u32..).zip(frequencies).filter(|(_, frequency)| **frequency > 0) {
                let frequency = u32::from(frequency);
                let rest = (frequency - 1) << (8 + PROBABILITY_BITS) | symbol;
                entries.extend((0..frequency).map(|slot| rest | slot << 8));
            }
        }
        entries
    }

    /// The part of a symbol that is no escape.
    #[inline]
    pub(super) fn part(&self, symbol: u8) -> u16 {
        // Of a corrupt model it may be more than there is: the word keeps its lower bits.
        if symbol == 0 { 0 } else { self.base.wrapping_add(u16::from(symbol)) }
    }

    pub(super) fn largest_part(&self) -> u16 {
        self.magnitude() >> self.low
    }

    /// The bits of a word that are no sign.
    #[inline]
    pub(super) fn magnitude(&self) -> u16 {
        if self.sign { 0x7fff } else { 0xffff }
    }

    /// The bits of a word that are stored as they are.
    #[inline]
    pub(super) fn stored(&self) -> Stored {
        Stored { low: self.low, sign: self.sign }
    }

    /// The model and its scales, where it has classes, as they are stored: a zstd frame.
    ///
    /// # Errors
    /// [`Error::Invalid`] where zstd refuses.
    pub fn pack(&self, scales: &Scales) -> Result<Vec<u8>, Error> {
        let all = || self.frequencies.iter().flatten();
        let mut bytes: Vec<u8> = all().map(|f| *f as u8).chain(all().map(|f| (f >> 8) as u8)).collect();
        if self.classes() > 1 {
            bytes.extend(scales.rows.iter().chain(&scales.cols).map(|&scale| scale as u8));
        }
        let mut context = CCtx::create();
        let level = CParameter::CompressionLevel(LEVEL);
        context.set_parameter(level).map_err(crate::planes::refused)?;
        let mut frame = Vec::new();
        crate::planes::compress(&mut context, &bytes, &mut frame)?;
        Ok(frame)
    }

    /// What [`Model::pack`] stored of a model without a sign.
    ///
    /// # Errors
    /// As for [`Model::unpack`] and [`Model::without_sign`].
    pub fn unpack_without_sign(low: u32, classes: usize, frame: &[u8]) -> Result<Self, Error> {
        if !(1..=MAX_CLASSES).contains(&classes) {
            return Err(Error::corrupt("model", format!("{classes} classes")));
        }
        let mut tables = vec![0; classes * 2 * SYMBOLS];
        crate::planes::decompress(&mut DCtx::create(), frame, &mut tables)?;
        Self::without_sign(low, tables_of(&tables))
    }

    /// What [`Model::pack`] stored, for a matrix of `rows` and `cols`. Of one class there are no scales.
    ///
    /// Allocates what the frame holds by these sizes: the caller knows that they are those of a tensor.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where the frame holds anything else, and as for [`Model::new`].
    pub fn unpack(
        parameters: Parameters,
        rows: usize,
        cols: usize,
        frame: &[u8],
    ) -> Result<(Self, Scales), Error> {
        let Parameters { low, base, shift, classes } = parameters;
        if !(1..=MAX_CLASSES).contains(&classes) {
            return Err(Error::corrupt("model", format!("{classes} classes")));
        }
        let (rows, cols) = if classes == 1 { (0, 0) } else { (rows, cols) };
        let tables = classes * SYMBOLS;
        let bytes = rows.checked_add(cols).and_then(|scales| scales.checked_add(2 * tables));
        let bytes = bytes.ok_or_else(|| Error::Invalid("sizes overflow".to_owned()))?;
        let mut unpacked = vec![0; bytes];
        crate::planes::decompress(&mut DCtx::create(), frame, &mut unpacked)?;
        let (frequencies, scales) = unpacked.split_at(2 * tables);
        let model = Self::new(low, base, shift, tables_of(frequencies))?;
        let (rows, cols) = scales.split_at(rows);
        let signed = |scales: &[u8]| scales.iter().map(|&scale| scale as i8).collect();
        Ok((model, Scales { rows: signed(rows), cols: signed(cols) }))
    }
}

/// Frequencies as they are stored: the low bytes of all, then the high ones.
fn tables_of(stored: &[u8]) -> Vec<[u16; SYMBOLS]> {
    let (lower, upper) = stored.split_at(stored.len() / 2);
    let both = lower.chunks_exact(SYMBOLS).zip(upper.chunks_exact(SYMBOLS));
    let tables = both.map(|(lower, upper)| {
        let mut table = [0; SYMBOLS];
        let bytes = lower.iter().zip(upper);
        table.iter_mut().zip(bytes).for_each(|(f, (&low, &high))| *f = u16::from_le_bytes([low, high]));
        table
    });
    tables.collect()
}
