//! Encoding: the states run backwards, so that decoding runs forwards.
//!
//! ```text
//! words given:   | slack | ............ at --> last element's first |      each goes before those of the elements after it
//! ```

use super::{CHUNK_ELEMENTS, ESCAPE, HEADER_BYTES, LANES, Model, PROBABILITY_BITS, START, SYMBOLS, TOTAL};
use crate::Error;

/// Words below the first that is given: whole vectors are written.
const SLACK: usize = LANES + 8;

/// Encodes chunks by one model. Holds memory that is used again from chunk to chunk.
#[derive(Debug)]
pub struct Encoder {
    model: Model,
    /// For each class and symbol: its first slot, 16 bits, and its frequency, 16 bits.
    steps: Vec<u32>,
    backwards: Backwards,
}

/// What encoding has come to, from the last element to the first.
#[derive(Debug)]
pub(super) struct Backwards {
    pub(super) states: [u32; LANES],
    /// Filled from its end.
    pub(super) words: Vec<u16>,
    /// The first word that was given.
    pub(super) at: usize,
    /// In reverse.
    pub(super) escapes: Vec<u16>,
    /// Elements that are left.
    pub(super) left: usize,
    /// Whether an escape was needed in a class that has none.
    pub(super) lost: bool,
}

impl Encoder {
    /// An encoder.
    #[must_use]
    pub fn new(model: &Model) -> Self {
        let mut steps = Vec::with_capacity(model.classes() * SYMBOLS);
        for frequencies in model.frequencies() {
            let mut first = 0;
            for &frequency in frequencies {
                steps.push(first << 16 | u32::from(frequency));
                first += u32::from(frequency);
            }
        }
        let (words, escapes) = (Vec::new(), Vec::new());
        let backwards = Backwards { states: [START; LANES], words, at: 0, escapes, left: 0, lost: false };
        Self { model: model.clone(), steps, backwards }
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Appends the chunk of `words` to `data`; words and classes are as
    /// [`decode_chunk`](super::Decoder::decode_chunk) has them.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there are more than a chunk's, or not one class for each, or a class that the model lacks, or an
    /// escape is needed in a class that has none.
    pub fn encode_chunk(&mut self, classes: &[u8], words: &[u16], data: &mut Vec<u8>) -> Result<(), Error> {
        self.encode(classes, words, data, true)
    }

    /// [`Encoder::encode_chunk`], one element at a time.
    ///
    /// # Errors
    /// As there.
    #[doc(hidden)]
    pub fn encode_chunk_reference(
        &mut self,
        classes: &[u8],
        words: &[u16],
        data: &mut Vec<u8>,
    ) -> Result<(), Error> {
        self.encode(classes, words, data, false)
    }

    fn encode(&mut self, classes: &[u8], words: &[u16], data: &mut Vec<u8>, fast: bool) -> Result<(), Error> {
        if words.len() > CHUNK_ELEMENTS {
            return Err(Error::Invalid(format!("{} elements are more than a chunk", words.len())));
        }
        let count = self.model.classes();
        if count > 1 && classes.len() != words.len() {
            return Err(Error::Invalid(format!("{} classes of {} elements", classes.len(), words.len())));
        }
        let classes = if count == 1 { &[] } else { classes };
        super::check_classes(&self.model, classes)?;
        let Self { model, steps, backwards } = self;
        backwards.start(words.len());
        let tail = words.len() - words.len() % LANES;
        backwards.run(model, steps, classes, words, tail);
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = super::avx2::Avx2::detect().filter(|_| fast) {
            avx2.states(model, steps, classes, words, backwards);
        }
        backwards.run(model, steps, classes, words, 0);
        if backwards.lost {
            return Err(Error::Invalid("an escape in a class that has none".to_owned()));
        }
        let given = backwards.words.get(backwards.at..).unwrap_or_default();
        backwards.escapes.reverse();
        // Sixteen bytes more are written at a time than are kept.
        let low_bits = model.stored().bytes(words.len()) + 16;
        data.reserve(HEADER_BYTES + 2 * (given.len() + backwards.escapes.len()) + low_bits);
        data.extend_from_slice(&(given.len() as u32).to_le_bytes());
        data.extend_from_slice(&(backwards.escapes.len() as u32).to_le_bytes());
        data.extend_from_slice(bytemuck::cast_slice(&backwards.states));
        data.extend_from_slice(bytemuck::cast_slice(given));
        data.extend_from_slice(bytemuck::cast_slice(&backwards.escapes));
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = super::avx2::Avx2::detect().filter(|_| fast) {
            avx2.pack(model.stored(), words, data);
            return Ok(());
        }
        model.stored().pack(words, data);
        Ok(())
    }
}

/// A word's symbol, if its class has it, and its part.
fn symbol(model: &Model, word: u16) -> (u8, u16) {
    let part = (word & model.magnitude()) >> model.low();
    let symbol = match (part, part.wrapping_sub(model.base())) {
        (0, _) => 0,
        (_, symbol @ 1..=254) => symbol as u8,
        _ => ESCAPE,
    };
    (symbol, part)
}

impl Backwards {
    fn start(&mut self, elements: usize) {
        self.states = [START; LANES];
        self.words.resize(elements + SLACK, 0);
        self.at = self.words.len();
        self.escapes.clear();
        self.left = elements;
        self.lost = false;
    }

    /// Runs elements through the states down to element `end`, one after the other.
    fn run(&mut self, model: &Model, steps: &[u32], classes: &[u8], words: &[u16], end: usize) {
        while self.left > end {
            self.left -= 1;
            let class = usize::from(classes.get(self.left).copied().unwrap_or(0));
            let step = |symbol: u8| steps.get(class * SYMBOLS + usize::from(symbol)).copied().unwrap_or(0);
            let (found, part) = symbol(model, words.get(self.left).copied().unwrap_or(0));
            let mut entry = step(found);
            if found == ESCAPE || entry & 0xffff == 0 {
                entry = step(ESCAPE);
                self.escapes.push(part);
            }
            self.lost |= entry & 0xffff == 0;
            let frequency = (entry & 0xffff).max(1);
            let state = &mut self.states[self.left % LANES];
            // Without a branch, which would be guessed wrong one time in three.
            let full = *state >> (32 - PROBABILITY_BITS) >= frequency;
            if let Some(word) = self.words.get_mut(self.at - 1) {
                *word = *state as u16;
            }
            self.at -= usize::from(full);
            let x = if full { *state >> 16 } else { *state };
            let rest = (x / frequency).wrapping_mul(TOTAL - frequency);
            *state = x.wrapping_add(entry >> 16).wrapping_add(rest);
        }
    }
}
