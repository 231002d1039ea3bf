//! Words as their difference from those of another tensor of the same shape: a fine-tune's from its base's.
//!
//! ```text
//! word, base --in the order of the numbers--> integers --difference, modulo 2^16--> folded: 0, -1, 1, -2, ... are 0, 1, 2, 3, ...
//! class      of an element: how far the exponent of its base lies below `top`
//! ```
//!
//! An update is about equally large whatever the weight is, and what it comes to in units of the last place follows from the weight's
//! exponent: so classes are exponents, and need nothing stored.

use super::model::{MAX_CLASSES, SYMBOLS};
use super::survey::{Layout, cost, frequencies};
use super::{ESCAPE, Model, TOTAL};
use crate::Error;

/// Differences up to which each has a bin of its own.
const DIRECT: usize = 256;
/// Bins of each octave above.
const OCTAVE: usize = 128;
/// All of them.
const BINS: usize = DIRECT + 8 * OCTAVE;
/// Of a sample, one element in so many is above the top exponent at most.
const ABOVE_TOP: usize = 256;

/// What the coder of words takes, where every word is a difference.
#[derive(Debug, Clone)]
pub struct DifferenceChoice {
    /// The model, of words without a sign.
    pub model: Model,
    /// The exponent of class 0.
    pub top: u8,
    /// Bits that the elements counted and the frequencies are expected to take.
    pub expected_bits: f64,
}

impl DifferenceChoice {
    /// For tensors in memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there are no words, or not as many of both.
    pub fn of(layout: Layout, base: &[u16], words: &[u16]) -> Result<Self, Error> {
        let mut counts = Differences::new(layout, layout.top(base));
        counts.add(base, words)?;
        counts.choose()
    }
}

impl Layout {
    /// The exponent field of a word.
    fn exponent(self, word: u16) -> u8 {
        ((word & 0x7fff) >> self.mantissa) as u8
    }

    /// The exponent of class 0 by a sample of the base: few elements have a higher one.
    #[must_use]
    pub fn top(self, sample: &[u16]) -> u8 {
        let mut counts = [0usize; 256];
        sample.iter().for_each(|&word| counts[usize::from(self.exponent(word))] += 1);
        let mut above = 0;
        let allowed = sample.len() / ABOVE_TOP;
        let found = (0..=255u8).rev().zip(counts.iter().rev()).find(|(_, count)| {
            above += **count;
            above > allowed
        });
        found.map_or(0, |(exponent, _)| exponent)
    }
}

/// Integers in the order of the numbers, -0 before +0.
fn ordered(word: u16) -> u16 {
    word ^ (((word as i16) >> 15) as u16 | 0x8000)
}

/// The inverse of [`ordered`].
fn unordered(integer: u16) -> u16 {
    integer ^ (!((integer as i16) >> 15) as u16 | 0x8000)
}

/// Puts into `out` how far each word is from its base's.
///
/// # Errors
/// [`Error::Invalid`] where there are not as many of both.
pub fn differences(base: &[u16], words: &[u16], out: &mut Vec<u16>) -> Result<(), Error> {
    check_lengths(base, words)?;
    out.clear();
    out.extend(words.iter().zip(base).map(|(&word, &base)| {
        let difference = ordered(word).wrapping_sub(ordered(base));
        difference << 1 ^ ((difference as i16) >> 15) as u16
    }));
    Ok(())
}

/// The inverse of [`differences`], in place.
///
/// # Errors
/// As there.
pub fn add_to_base(base: &[u16], words: &mut [u16]) -> Result<(), Error> {
    check_lengths(base, words)?;
    for (word, &base) in words.iter_mut().zip(base) {
        let difference = *word >> 1 ^ (*word & 1).wrapping_neg();
        *word = unordered(ordered(base).wrapping_add(difference));
    }
    Ok(())
}

/// The class of each element, by its base: nothing where there is one class.
pub fn classes_of_base(layout: Layout, top: u8, classes: usize, base: &[u16], out: &mut Vec<u8>) {
    out.clear();
    if classes > 1 {
        let last = (classes - 1).min(255) as u8;
        out.extend(base.iter().map(|&word| top.saturating_sub(layout.exponent(word)).min(last)));
    }
}

fn check_lengths(base: &[u16], words: &[u16]) -> Result<(), Error> {
    if base.len() == words.len() {
        return Ok(());
    }
    Err(Error::Invalid(format!("{} words and {} of the base", words.len(), base.len())))
}

/// How often each difference occurs beside each exponent of the base. Sums of parts are the same in any order.
#[derive(Debug, Clone)]
pub struct Differences {
    layout: Layout,
    top: u8,
    counts: Vec<u64>,
}

impl Differences {
    /// None yet; `top` is the exponent of class 0.
    #[must_use]
    pub fn new(layout: Layout, top: u8) -> Self {
        Self { layout, top, counts: vec![0; MAX_CLASSES * BINS] }
    }

    /// Counts elements.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there are not as many words as of the base.
    pub fn add(&mut self, base: &[u16], words: &[u16]) -> Result<(), Error> {
        let (mut of_elements, mut found) = (Vec::new(), Vec::new());
        differences(base, words, &mut found)?;
        classes_of_base(self.layout, self.top, MAX_CLASSES, base, &mut of_elements);
        for (&difference, &class) in found.iter().zip(&of_elements) {
            self.counts[usize::from(class) * BINS + bin(difference)] += 1;
        }
        Ok(())
    }

    /// Adds another one.
    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(all, count)| *all += count);
    }

    /// Elements that were counted.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The model that is expected to come to least.
    ///
    /// # Errors
    /// [`Error::Invalid`] where nothing was counted.
    pub fn choose(&self) -> Result<DifferenceChoice, Error> {
        let elements = self.elements();
        if elements == 0 {
            return Err(Error::Invalid("a histogram of nothing".to_owned()));
        }
        let mut best: Option<(f64, u32, Vec<[u64; SYMBOLS]>)> = None;
        for low in 0..=Model::MAX_LOW_WITHOUT_SIGN {
            let fine: Vec<[u64; SYMBOLS]> = self.counts.chunks(BINS).map(|bins| symbols(low, bins)).collect();
            for classes in [1, 2, 3, 4, 6, 8, 12, MAX_CLASSES] {
                let (own, joined) = fine.split_at(classes - 1);
                let mut last = [0; SYMBOLS];
                for class in joined {
                    last.iter_mut().zip(class).for_each(|(all, count): (&mut u64, _)| *all += count);
                }
                let mut tables = own.to_vec();
                tables.push(last);
                tables.iter_mut().for_each(escape_rare);
                let bits = elements as f64 * f64::from(low) + tables.iter().map(cost).sum::<f64>();
                if best.as_ref().is_none_or(|(least, ..)| bits < *least) {
                    best = Some((bits, low, tables));
                }
            }
        }
        let (expected_bits, low, tables) =
            best.ok_or_else(|| Error::Invalid("a histogram of nothing".to_owned()))?;
        let model = Model::without_sign(low, tables.iter().map(frequencies).collect())?;
        Ok(DifferenceChoice { model, top: self.top, expected_bits })
    }
}

/// The bin of a difference: above the first ones, as fine as the symbols that it may be part of.
fn bin(difference: u16) -> usize {
    let difference = usize::from(difference);
    if difference < DIRECT {
        return difference;
    }
    let octave = difference.ilog2() as usize - 7;
    DIRECT + (octave - 1) * OCTAVE + (difference >> octave) - OCTAVE
}

/// The least difference of a bin.
fn least_of(bin: usize) -> usize {
    match bin.checked_sub(DIRECT) {
        None => bin,
        Some(above) => (above % OCTAVE + OCTAVE) << (above / OCTAVE + 1),
    }
}

/// Symbols' counts of a class by those of its bins.
fn symbols(low: u32, bins: &[u64]) -> [u64; SYMBOLS] {
    let mut symbols = [0; SYMBOLS];
    for (at, &count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
        symbols[(least_of(at) >> low).min(usize::from(ESCAPE))] += count;
    }
    symbols
}

/// Makes escapes of what is so rare that its frequency would cost others more, and lets every class have them: whatever comes can be
/// encoded, also where a part of the elements was counted.
fn escape_rare(symbols: &mut [u64; SYMBOLS]) {
    let n: u64 = symbols.iter().sum();
    let Some((escape, others)) = symbols.split_last_mut() else { return };
    for count in others.iter_mut().filter(|count| count.saturating_mul(u64::from(TOTAL) * 16) < n) {
        *escape += std::mem::take(count);
    }
    *escape = (*escape).max(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_in_the_order_of_the_numbers() {
        for word in 0..=u16::MAX {
            assert_eq!(unordered(ordered(word)), word);
        }
        let number = |word: u16| f32::from_bits(u32::from(word) << 16);
        let finite: Vec<u16> = (0..=u16::MAX).filter(|&word| number(word).is_finite()).collect();
        let mut sorted = finite;
        sorted.sort_by_key(|&word| ordered(word));
        assert!(sorted.windows(2).all(|pair| number(pair[0]) <= number(pair[1])));
        assert_eq!(ordered(0x8000) + 1, ordered(0));
    }

    #[test]
    fn bins_are_as_fine_as_symbols() {
        for low in 0..=Model::MAX_LOW_WITHOUT_SIGN {
            for difference in 0..=u16::MAX {
                let of = |difference: usize| (difference >> low).min(255);
                let at = bin(difference);
                assert!(at < BINS && least_of(at) <= usize::from(difference));
                assert_eq!(of(least_of(at)), of(usize::from(difference)), "{low} {difference}");
            }
        }
    }
}
