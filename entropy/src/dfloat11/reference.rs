//! The scalar twins: the format bit by bit, with no thought of speed.
//!
//! ```text
//! encode: a list of bits, then cut     decode: match bits against the codes until one fits
//! ```

use std::collections::HashMap;

use super::decode::CheckedSpan;
use super::{
    BLOCK_BITS, BLOCK_BYTES, BLOCK_WINDOWS, Code, EncodedUnit, Histogram, Layout, MAX_BLOCK_SYMBOLS, Piece,
    Position, Span, Unrepresentable,
};
use crate::Error;
use crate::bf16::{exponent, join, sign_mantissa};

/// [`super::encode_piece`], a bit at a time.
pub fn encode_piece_reference(code: &Code, start: Position, words: &[u16], out: &mut Piece) {
    out.restart(start);
    out.sign_mantissa.clear();
    out.windows.clear();
    out.gaps.clear();
    let mut at = start;
    for &word in words {
        out.sign_mantissa.push(sign_mantissa(word));
        let codeword = code.words()[usize::from(exponent(word))];
        at.element += 1;
        for i in (0..codeword.length).rev() {
            let bit = u64::from(codeword.bits >> i & 1);
            out.partial |= bit << (63 - at.bit % 64);
            at.bit += 1;
            if at.bit.is_multiple_of(64) {
                out.windows.push(std::mem::take(&mut out.partial));
                // The bits of this code that are left spill into the new window.
                out.gaps.push(i as u8);
                if at.bit.is_multiple_of(BLOCK_BITS as u64) {
                    out.block_starts.push(at.element as u32);
                }
            }
        }
    }
    out.complete = out.windows.len();
    out.end = at;
}

/// [`super::encode`], from the description of the format.
pub fn encode_reference(words: &[u16]) -> Result<EncodedUnit, Unrepresentable> {
    let mut histogram = Histogram::new();
    histogram.add(words);
    let code = Code::build(&histogram)?;
    let layout = Layout::new(&code, &histogram)?;
    let mut bits: Vec<bool> = Vec::new();
    let mut starts: Vec<usize> = Vec::new();
    for &word in words {
        starts.push(bits.len());
        let codeword = code.words()[usize::from(exponent(word))];
        bits.extend((0..codeword.length).rev().map(|i| codeword.bits >> i & 1 == 1));
    }
    // In a last byte that is not full the end symbol's code starts.
    if !bits.len().is_multiple_of(8) {
        starts.push(bits.len());
    }
    let end = code.end();
    let mut tail = (0..end.length).rev().map(|i| end.bits >> i & 1 == 1);
    while !bits.len().is_multiple_of(8) {
        bits.push(tail.next().unwrap_or(false));
    }
    let encoded_exponent: Vec<u8> =
        bits.chunks(8).map(|byte| byte.iter().fold(0, |b, &bit| b << 1 | u8::from(bit))).collect();
    let blocks = layout.blocks as usize;
    let mut gap_bits = Vec::new();
    for window in 0..blocks * BLOCK_WINDOWS {
        let first = starts.get(starts.partition_point(|s| s / 64 < window)).filter(|&&s| s / 64 == window);
        let gap = first.map_or(0, |s| s % 64);
        gap_bits.extend((0..5).rev().map(|i| gap >> i & 1 == 1));
    }
    let gaps = gap_bits.chunks(8).map(|byte| byte.iter().fold(0, |b, &bit| b << 1 | u8::from(bit))).collect();
    let mut positions: Vec<u32> = (0..blocks)
        .map(|block| starts[..words.len()].partition_point(|&s| s < block * BLOCK_BITS) as u32)
        .collect();
    positions.push(words.len() as u32);
    let most = positions.windows(2).map(|p| u64::from(p[1] - p[0])).max().unwrap_or(0);
    if most > MAX_BLOCK_SYMBOLS {
        return Err(Unrepresentable::BlockSymbols(most));
    }
    Ok(EncodedUnit {
        luts: code.luts().to_vec(),
        encoded_exponent,
        sign_mantissa: words.iter().map(|&w| sign_mantissa(w)).collect(),
        output_positions: positions.iter().flat_map(|p| p.to_le_bytes()).collect(),
        gaps,
    })
}

/// [`super::decode_span`], a symbol at a time.
pub fn decode_span_reference(
    code: &Code,
    span: &Span<'_>,
    skip: usize,
    out: &mut [u16],
) -> Result<(), Error> {
    if out.is_empty() {
        return Ok(());
    }
    let checked = CheckedSpan::new(span, skip, out.len())?;
    let symbols: HashMap<(u32, u32), u8> = code
        .words()
        .iter()
        .enumerate()
        .filter(|(_, w)| w.length > 0)
        .map(|(symbol, w)| ((w.length, w.bits), symbol as u8))
        .collect();
    for block in 0..checked.blocks {
        let numbers = checked.symbols(block);
        if numbers.start >= skip + out.len() || numbers.end <= skip {
            continue;
        }
        let stream = checked.stream(block);
        let stream = &stream[..stream.len().min(BLOCK_BYTES + 8)];
        let bit = |at: usize| stream.get(at / 8).is_some_and(|byte| byte >> (7 - at % 8) & 1 == 1);
        let gaps = checked.gaps(block);
        let mut at = usize::from(gaps[0]);
        let mut last_start = 0;
        let mut wrong_gap = false;
        for (done, number) in numbers.clone().enumerate() {
            if at >= BLOCK_BITS {
                return Err(Error::corrupt(
                    "output_positions",
                    format!("claims {} symbols for a block that starts {done}", numbers.len()),
                ));
            }
            let mut bits = 0;
            let found = (1..=32).find_map(|length| {
                bits = bits << 1 | u32::from(bit(at + length as usize - 1));
                Some((*symbols.get(&(length, bits))?, length))
            });
            let Some((symbol, length)) = found else {
                return Err(Error::corrupt("encoded_exponent", "holds bits that are no code"));
            };
            let end = at + length as usize;
            if end / 64 != at / 64 && end / 64 < BLOCK_WINDOWS && done + 1 < numbers.len() {
                wrong_gap |= usize::from(gaps[end / 64]) != end % 64;
            }
            last_start = at;
            at = end;
            if let Some(word) = number.checked_sub(skip).and_then(|i| out.get_mut(i)) {
                *word = join(symbol, span.sign_mantissa[number]);
            }
        }
        if wrong_gap {
            return Err(Error::corrupt("gaps", "a window's first code is not where its gap says"));
        }
        checked.check_end(block, last_start, at)?;
    }
    Ok(())
}
