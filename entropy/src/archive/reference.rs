//! One element after the other.

use super::decode::Decoder;
use super::{ESCAPE, LANES, PROBABILITY_BITS, Parts, START, TOTAL};
use crate::Error;

/// [`Decoder::decode_chunk`], one element at a time.
pub(super) fn decode_chunk(
    decoder: &Decoder<'_>,
    classes: &[u8],
    data: &[u8],
    out: &mut [u16],
) -> Result<(), Error> {
    let model = decoder.model;
    let parts = Parts::of(model, data, out.len())?;
    let mut places = Vec::new();
    let (mut states, mut at) = (parts.states, 0);
    for (i, word) in out.iter_mut().enumerate() {
        let class = usize::from(classes.get(i).copied().unwrap_or(0));
        let state = &mut states[i % LANES];
        let entry = decoder
            .entries
            .get((class << PROBABILITY_BITS) + (*state & (TOTAL - 1)) as usize)
            .copied()
            .ok_or_else(|| Error::Invalid(format!("class {class} of {}", model.classes())))?;
        let (frequency, offset) = ((entry >> 20) + 1, entry >> 8 & (TOTAL - 1));
        *state = frequency * (*state >> PROBABILITY_BITS) + offset;
        if *state < START {
            *state = *state << 16 | u32::from(parts.word(at).unwrap_or(0));
            at += 1;
        }
        let symbol = entry as u8;
        *word = if symbol == ESCAPE {
            places.push(i as u32);
            0
        } else {
            model.part(symbol) << model.low() & 0x7fff
        };
    }
    parts.check_end(&states, at)?;
    parts.escape(model, &places, out)?;
    model.stored().unpack(parts.low_bits, out);
    Ok(())
}
