//! Decoding, 32 elements at a time.

use super::{ESCAPE, LANES, Model, PROBABILITY_BITS, Parts, START, TOTAL};
use crate::Error;

/// Decodes chunks by one model.
#[derive(Debug)]
pub struct Decoder<'a> {
    pub(super) model: &'a Model,
    /// For each class and slot ([`Model::entries`]).
    pub(super) entries: Vec<u32>,
}

impl<'a> Decoder<'a> {
    /// A decoder: 16 KiB of tables a class.
    #[must_use]
    pub fn new(model: &'a Model) -> Self {
        Self { model, entries: model.entries() }
    }

    /// Decodes a chunk into words: floats of 16 bits; those of 8 have their sign in bit 15 and their magnitude in the lowest 7; what
    /// [`differences`](super::differences) gives, where the model is one without a sign.
    /// `classes` are those of the elements ([`classes`](super::classes)), none where the model has one.
    ///
    /// On an error the content of `out` is unspecified.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where the data break the format; [`Error::Invalid`] where there are more elements than a chunk's or not one
    /// class for each, or a class that the model lacks.
    pub fn decode_chunk(&self, classes: &[u8], data: &[u8], out: &mut [u16]) -> Result<(), Error> {
        let model = self.model;
        let parts = Parts::of(model, data, out.len())?;
        if model.classes() > 1 && classes.len() != out.len() {
            return Err(Error::Invalid(format!("{} classes of {} elements", classes.len(), out.len())));
        }
        let classes = if model.classes() == 1 { &[] } else { classes };
        super::check_classes(model, classes)?;
        let mut progress = Progress { states: parts.states, at: 0, done: 0, places: Vec::new() };
        #[cfg(target_arch = "x86_64")]
        let avx2 = super::avx2::Avx2::detect();
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = avx2 {
            avx2.symbols(self, classes, &parts, out, &mut progress);
        }
        symbols(self, classes, &parts, out, &mut progress);
        parts.check_end(&progress.states, progress.at)?;
        parts.escape(model, &progress.places, out)?;
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = avx2 {
            avx2.unpack(model.stored(), parts.low_bits, out);
            return Ok(());
        }
        model.stored().unpack(parts.low_bits, out);
        Ok(())
    }

    /// [`Decoder::decode_chunk`], one element at a time.
    ///
    /// # Errors
    /// As there.
    #[doc(hidden)]
    pub fn decode_chunk_reference(&self, classes: &[u8], data: &[u8], out: &mut [u16]) -> Result<(), Error> {
        super::reference::decode_chunk(self, classes, data, out)
    }
}

/// How far decoding has come.
pub(super) struct Progress {
    pub(super) states: [u32; LANES],
    /// Words that were taken.
    pub(super) at: usize,
    /// Elements that were decoded, a multiple of 32 while there are more.
    pub(super) done: usize,
    /// Which of them are escapes.
    pub(super) places: Vec<u32>,
}

/// Decodes what is left.
fn symbols(
    decoder: &Decoder<'_>,
    classes: &[u8],
    parts: &Parts<'_>,
    out: &mut [u16],
    progress: &mut Progress,
) {
    let (model, entries) = (decoder.model, &decoder.entries);
    let Progress { states, at, done, places } = progress;
    let stored = parts.rest.get(..2 * parts.words).unwrap_or_default().as_chunks::<2>().0;
    let (low, base) = (model.low(), u32::from(model.base()));
    let first = *done;
    for (number, words) in out.get_mut(first..).unwrap_or_default().chunks_mut(LANES).enumerate() {
        let first = first + number * LANES;
        let mut of_lanes = [0u8; LANES];
        of_lanes
            .iter_mut()
            .zip(classes.get(first..).unwrap_or_default())
            .for_each(|(to, class)| *to = *class);
        let mut escapes = false;
        for ((word, state), &class) in words.iter_mut().zip(states.iter_mut()).zip(&of_lanes) {
            let slot = usize::from(class) << PROBABILITY_BITS | (*state & (TOTAL - 1)) as usize;
            let entry = entries.get(slot).copied().unwrap_or(0);
            let x = ((entry >> 20) + 1) * (*state >> PROBABILITY_BITS) + (entry >> 8 & (TOTAL - 1));
            // Without a branch, which would be guessed wrong one time in three.
            let wants = x < START;
            let next = u32::from(u16::from_le_bytes(stored.get(*at).copied().unwrap_or_default()));
            *state = if wants { x << 16 | next } else { x };
            *at += usize::from(wants);
            let symbol = entry & 0xff;
            escapes |= symbol == u32::from(ESCAPE);
            let part = if symbol == 0 { 0 } else { (base + symbol) << low & 0x7fff };
            *word = if symbol == u32::from(ESCAPE) { ESCAPED } else { part as u16 };
        }
        if escapes {
            note_escapes(words, first, places);
        }
    }
    *done = out.len();
}

/// Stands for an escape until its place is noted: no part has the sign's bit.
pub(super) const ESCAPED: u16 = 0x8000;

/// Notes the places of escapes among `words`, the first of which is element `first`, and clears them.
pub(super) fn note_escapes(words: &mut [u16], first: usize, places: &mut Vec<u32>) {
    for (i, word) in words.iter_mut().enumerate().filter(|(_, word)| **word == ESCAPED) {
        *word = 0;
        // At most a chunk's elements.
        places.push((first + i) as u32);
    }
}
