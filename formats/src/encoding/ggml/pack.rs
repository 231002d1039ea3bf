//! Codes of `abq` as blocks of ggml that stand for the same numbers.
//!
//! ```text
//! groups of 32 n columns, scale, zero point --> n blocks: d = scale, (m,) codes moved to where the type begins to count
//! ```
//!
//! A product of a half precision scale and a small integer is exact in single precision, so both sides round the same numbers.

use half::f16;

use super::Blocks;
use crate::encoding::abq::{Abq, Floats, Packed, Zero};
use crate::{Error, Result};

/// Weights of a block.
const WEIGHTS: usize = 32;

/// The types that hold a matrix of `cols` columns to the bit, the smallest first.
///
/// # Errors
/// Why there is none, as the end of a sentence.
pub fn holding(abq: &Abq, cols: u64, scale: &Floats<'_>, zero: &Zero<'_>) -> Result<Vec<Blocks>, String> {
    if !cols.is_multiple_of(WEIGHTS as u64) {
        return Err(format!("has rows of {cols} weights, and blocks of codes have {WEIGHTS}"));
    }
    if !scale.iter().all(is_half) {
        return Err("has scales that are no numbers in half precision".to_owned());
    }
    let levels = abq.levels() as i32;
    let (low, high) = match zero {
        Zero::Real(offsets) => {
            if !offsets.iter().all(is_half) {
                return Err("has zero points that are no numbers in half precision".to_owned());
            }
            let types = [(Blocks::Q4_1, 16), (Blocks::Q5_1, 32)];
            let types: Vec<Blocks> =
                types.into_iter().filter(|(_, most)| levels <= *most).map(|(blocks, _)| blocks).collect();
            return match types.is_empty() {
                true => Err(format!("has real zero points and codes of {} bits: 5 is the most", abq.bits)),
                false => Ok(types),
            };
        }
        Zero::Symmetric => (-i32::from(abq.centre()), levels - 1 - i32::from(abq.centre())),
        Zero::Integer(zeros) => {
            let most = zeros.iter().copied().max().unwrap_or(0);
            let least = zeros.iter().copied().min().unwrap_or(0);
            (-i32::from(most), levels - 1 - i32::from(least))
        }
    };
    let minima = matches!(zero, Zero::Integer(zeros) if zeros.iter().enumerate().all(|(at, zero)| {
        // Of zero times something, and of a scale below zero, the sign of a zero would be another.
        let scale = scale.get(at);
        scale > 0.0 && is_half(-scale * f32::from(*zero))
    }));
    let fits = |blocks: Blocks| match blocks {
        Blocks::Q4_1 => minima && levels <= 16,
        Blocks::Q5_1 => minima && levels <= 32,
        _ => {
            let least = lowest(blocks);
            low >= least && high < -least
        }
    };
    let all = [Blocks::Q4_0, Blocks::Q4_1, Blocks::Q5_0, Blocks::Q5_1, Blocks::Q8_0];
    let types: Vec<Blocks> = all.into_iter().filter(|blocks| fits(*blocks)).collect();
    match types.is_empty() {
        true => Err(format!("has codes from {low} to {high} around zero, and blocks have -128 to 127")),
        false => Ok(types),
    }
}

/// The least code of a type without minima.
fn lowest(blocks: Blocks) -> i32 {
    match blocks {
        Blocks::Q4_0 => -8,
        Blocks::Q5_0 => -16,
        _ => -128,
    }
}

/// Whether a number is one in half precision, with its sign where it is zero.
fn is_half(value: f32) -> bool {
    f16::from_f32(value).to_f32().to_bits() == value.to_bits()
}

/// Rows as blocks of a type that [`holding`] named, one after the other.
///
/// # Errors
/// [`Error::Invalid`] for codes or rows that the type does not hold.
pub fn pack_rows(packed: &Packed<'_>, blocks: Blocks) -> Result<Vec<u8>> {
    let (cols, groups) = (packed.cols(), packed.groups());
    let step = packed.abq().group_columns(cols);
    let bytes =
        blocks.bytes(&[packed.rows() as u64, cols as u64]).and_then(|bytes| usize::try_from(bytes).ok());
    let does_not = || Error::Invalid(format!("{} holds no such codes", blocks.name()));
    let mut out = vec![0; bytes.ok_or_else(does_not)?];
    let mut codes = vec![0; cols];
    let mut levels = [0u8; WEIGHTS];
    let of_row = out.len() / packed.rows().max(1);
    for row in 0..packed.rows() {
        packed.codes(row, &mut codes);
        let line = out.get_mut(row * of_row..(row + 1) * of_row).unwrap_or_default();
        let each = codes.chunks_exact(WEIGHTS).zip(line.chunks_exact_mut(blocks.block_bytes() as usize));
        for (number, (codes, block)) in each.enumerate() {
            let group = row * groups + number * WEIGHTS / step;
            let scale = packed.scale().get(group);
            let zero = match packed.zero() {
                Zero::Integer(zeros) => zeros.get(group).copied().unwrap_or(0),
                _ => packed.abq().centre(),
            };
            let minimum = match packed.zero() {
                Zero::Real(offsets) => offsets.get(group),
                _ => -scale * f32::from(zero),
            };
            for (level, code) in levels.iter_mut().zip(codes) {
                let value = match blocks {
                    Blocks::Q4_1 | Blocks::Q5_1 => i32::from(*code),
                    _ => i32::from(*code) - i32::from(zero) - lowest(blocks),
                };
                *level = u8::try_from(value).map_err(|_| does_not())?;
            }
            write_block(blocks, scale, minimum, &levels, block).ok_or_else(does_not)?;
        }
    }
    Ok(out)
}

/// Writes a block of levels, counted from the least code of the type; `None` where they are too large.
fn write_block(blocks: Blocks, d: f32, m: f32, levels: &[u8; WEIGHTS], out: &mut [u8]) -> Option<()> {
    let (scales, codes) =
        out.split_at_mut_checked(if matches!(blocks, Blocks::Q4_1 | Blocks::Q5_1) { 4 } else { 2 })?;
    let (first, second) = scales.split_at_mut_checked(2)?;
    first.copy_from_slice(&f16::from_f32(d).to_le_bytes());
    if !second.is_empty() {
        second.copy_from_slice(&f16::from_f32(m).to_le_bytes());
    }
    let (low, high) = levels.split_at(WEIGHTS / 2);
    match blocks {
        Blocks::Q8_0 => {
            for (out, level) in codes.iter_mut().zip(levels) {
                *out = level.wrapping_sub(128);
            }
            return Some(());
        }
        Blocks::Q4_0 | Blocks::Q4_1 if levels.iter().all(|level| *level < 16) => {
            for ((out, low), high) in codes.iter_mut().zip(low).zip(high) {
                *out = low | high << 4;
            }
        }
        Blocks::Q5_0 | Blocks::Q5_1 if levels.iter().all(|level| *level < 32) => {
            let (fifths, codes) = codes.split_at_mut_checked(4)?;
            let word =
                levels.iter().enumerate().fold(0u32, |word, (at, level)| word | u32::from(level >> 4) << at);
            fifths.copy_from_slice(&word.to_le_bytes());
            for ((out, low), high) in codes.iter_mut().zip(low).zip(high) {
                *out = low & 15 | high << 4;
            }
        }
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use llmpress_numbers::Numbers;
    use proptest::prelude::*;

    use super::*;
    use crate::Dtype;

    /// A matrix of random codes; scales of few digits, as models have them.
    fn matrix(seed: u64, abq: Abq, rows: usize, cols: usize, kind: u8) -> Packed<'static> {
        let mut numbers = Numbers::new(seed);
        let mut next = |below: u32| (numbers.bits() >> 11) as u32 % below;
        let groups = abq.groups(cols) * rows;
        let codes: Vec<u8> = (0..rows * cols).map(|_| next(abq.levels()).min(255) as u8).collect();
        let mut floats = |signed: bool| {
            let values: Vec<f32> = (0..groups)
                .map(|_| {
                    let size = (1.0 + next(128) as f32 / 128.0) * 2f32.powi(-4 - next(8) as i32);
                    if signed && next(2) == 1 { -size } else { size }
                })
                .collect();
            Floats::round(Dtype::BF16, &values).unwrap()
        };
        let scale = floats(kind == 0);
        let offsets = floats(true);
        let zero = match kind {
            0 => Zero::Symmetric,
            1 => Zero::Integer(
                (0..groups).map(|_| next(abq.levels()).min(255) as u8).collect::<Vec<u8>>().into(),
            ),
            _ => Zero::Real(offsets),
        };
        Packed::from_codes(abq, cols, &codes, scale, zero).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn blocks_decode_to_the_numbers_of_the_codes(
            seed in any::<u64>(), bits in 1u8..=8, balanced in any::<bool>(), groups in 0usize..3, rows in 1usize..4,
            blocks in 1usize..9, kind in 0u8..3,
        ) {
            let group_size = [None, Some(32), Some(64)][groups];
            let abq = Abq { bits, balanced: balanced && bits <= 2 && kind == 0, group_size, activation_bits: None };
            let cols = blocks * 32;
            let packed = matrix(seed, abq, rows, cols, kind);
            let Ok(types) = holding(&abq, cols as u64, packed.scale(), packed.zero()) else { return Ok(()) };
            prop_assert!(!types.is_empty());
            let mut expected = vec![0.0; cols];
            for blocks in types {
                let bytes = pack_rows(&packed, blocks).unwrap();
                let mut decoded = vec![0.0; rows * cols];
                blocks.decode(&bytes, &mut decoded);
                for row in 0..rows {
                    packed.decode_row(row, &mut expected).unwrap();
                    let same = expected.iter().zip(&decoded[row * cols..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    prop_assert!(same, "{} {:?}", blocks.name(), abq);
                }
            }
        }
    }

    #[test]
    fn the_smallest_type_that_holds_a_width_comes_first() {
        let first = |bits, kind, balanced| {
            let abq = Abq { balanced, group_size: Some(32), ..Abq::new(bits) };
            let packed = matrix(3, abq, 2, 64, kind);
            holding(&abq, 64, packed.scale(), packed.zero()).map(|types| types[0])
        };
        for (bits, blocks) in
            [(1, Blocks::Q4_0), (4, Blocks::Q4_0), (5, Blocks::Q5_0), (6, Blocks::Q8_0), (8, Blocks::Q8_0)]
        {
            assert_eq!(first(bits, 0, false), Ok(blocks), "{bits}");
        }
        assert_eq!(first(2, 0, true), Ok(Blocks::Q4_0));
        assert_eq!((first(4, 2, false), first(5, 2, false)), (Ok(Blocks::Q4_1), Ok(Blocks::Q5_1)));
        assert!(first(6, 2, false).is_err_and(|why| why.contains("5 is the most")));
        assert!(first(8, 1, false).is_err_and(|why| why.contains("-128 to 127")));
        // Scales of many digits, and rows of no whole blocks.
        let scale = Floats::round(Dtype::F32, &[0.1]).unwrap();
        let why = holding(&Abq::new(4), 32, &scale, &Zero::Symmetric).unwrap_err();
        assert!(why.contains("half precision"), "{why}");
        assert!(holding(&Abq::new(4), 33, &scale, &Zero::Symmetric).is_err());
    }
}
