//! Rows times vector: the product of a single token.
//!
//! ```text
//! sum i:  elements i, i + 64, i + 128, ...      64 sums side by side in vector lanes
//! 64 -> 32 -> 16 -> ... -> 1                     added as a tree
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod fixed12_avx512;

use llmpress_entropy::Error;
use llmpress_entropy::fixed12::{StripsRef, TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS};

use super::Elements;
use super::isa::Isa;

/// Partial sums of a dot product: element `k` goes to sum `k % LANES`.
pub const LANES: usize = 64;

/// `out[r] = sum over k of weights[r * stride + k] * x[k]`.
///
/// [`LANES`] partial sums start from +0; element `k` is added to sum `k % LANES` by a fused multiply-add, in
/// ascending `k`. Then sum `i` takes sum `i + 32` for `i < 32`, sum `i + 16` for `i < 16`, and so on
/// down to one.
///
/// # Panics
/// Where `stride` is less than `x.len()` or `weights` is too short.
pub fn dot_rows(weights: Elements<'_>, stride: usize, x: &[f32], out: &mut [f32]) {
    dot_rows_with(Isa::detect(), weights, stride, x, out);
}

fn dot_rows_with(isa: Isa, weights: Elements<'_>, stride: usize, x: &[f32], out: &mut [f32]) {
    let last =
        out.len().checked_sub(1).map(|last| last.checked_mul(stride).and_then(|n| n.checked_add(x.len())));
    assert!(stride >= x.len() && last.is_none_or(|end| end.is_some_and(|end| end <= weights.len())));
    #[allow(unsafe_code)]
    match isa {
        // SAFETY: the features were detected, and the lengths checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::dot_rows(weights, stride, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::dot_rows(weights, stride, x, out) },
        Isa::Portable => reference(weights, stride, x, out),
    }
}

fn reference(weights: Elements<'_>, stride: usize, x: &[f32], out: &mut [f32]) {
    for (r, out) in out.iter_mut().enumerate() {
        let mut sums = [0.0_f32; LANES];
        for (k, &x) in x.iter().enumerate() {
            sums[k % LANES] = weights.get(r * stride + k).mul_add(x, sums[k % LANES]);
        }
        *out = fold(sums);
    }
}

/// The tree that ends a dot product.
fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// [`dot_rows`] of `out.len()` rows of `x.len()` weights that are stored as fixed12 strips: the same bits as
/// decoding them to bfloat16 first, but with AVX-512 only the twelve bits of each weight are read and no
/// weight is written. `out` ends with the matrix or with a strip: rows past it are padding.
///
/// # Errors
/// [`Error::Corrupt`] where the sizes of the components do not fit, or an escape lies outside of its tile. What
/// [`llmpress_entropy::fixed12::decode_strips`] checks beyond that (that the encoding is the only one of
/// its weights) is left to `verify`.
pub fn dot_fixed12(base: i16, strips: &StripsRef<'_>, x: &[f32], out: &mut [f32]) -> Result<(), Error> {
    dot_fixed12_with(Isa::detect(), base, strips, x, out)
}

fn dot_fixed12_with(
    isa: Isa,
    base: i16,
    strips: &StripsRef<'_>,
    x: &[f32],
    out: &mut [f32],
) -> Result<(), Error> {
    let across = x.len().div_ceil(TILE_COLS);
    check(base, strips, across * out.len().div_ceil(TILE_ROWS))?;
    if across == 0 {
        out.fill(0.0);
        return Ok(());
    }
    let mut words = Vec::new();
    for (strip, out) in out.chunks_mut(TILE_ROWS).enumerate() {
        let tiles = strip * across..(strip + 1) * across;
        let first = strips.escape_offsets[0];
        let escapes = (strips.escape_offsets[tiles.start] - first) as usize
            ..(strips.escape_offsets[tiles.end] - first) as usize;
        let strip = StripsRef {
            sign_mantissa: &strips.sign_mantissa[tiles.start * TILE_WEIGHTS..tiles.end * TILE_WEIGHTS],
            codes: &strips.codes[tiles.start * TILE_CODE_BYTES..tiles.end * TILE_CODE_BYTES],
            escape_offsets: &strips.escape_offsets[tiles.start..=tiles.end],
            escape_positions: &strips.escape_positions[escapes.clone()],
            escape_exponents: &strips.escape_exponents[escapes],
        };
        #[allow(unsafe_code)]
        match isa {
            // SAFETY: the features were detected; `check` saw the sizes and positions.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { fixed12_avx512::dot_strip(base, &strip, x, out) },
            _ => {
                words.resize(out.len() * x.len(), 0);
                llmpress_entropy::fixed12::decode_strips(base, x.len(), out.len(), &strip, &mut words)?;
                dot_rows_with(isa, Elements::Bf16(&words), x.len(), x, out);
            }
        }
    }
    Ok(())
}

/// Checks all that the fast path relies on.
fn check(base: i16, strips: &StripsRef<'_>, tiles: usize) -> Result<(), Error> {
    let wrong = |component, what: String| Err(Error::Corrupt { component, what });
    if !(llmpress_entropy::fixed12::MIN_BASE..=llmpress_entropy::fixed12::MAX_BASE).contains(&base) {
        return wrong("base", format!("{base} is out of range"));
    }
    for (component, found, right) in [
        ("sign_mantissa", strips.sign_mantissa.len(), tiles.checked_mul(TILE_WEIGHTS)),
        ("codes", strips.codes.len(), tiles.checked_mul(TILE_CODE_BYTES)),
        ("escape_offsets", strips.escape_offsets.len(), tiles.checked_add(1)),
    ] {
        if right != Some(found) {
            return wrong(component, format!("{found} entries for {tiles} tiles"));
        }
    }
    if !strips.escape_offsets.is_sorted() {
        return wrong("escape_offsets", "not ascending".to_owned());
    }
    let escapes = match strips.escape_offsets {
        [first, .., last] => (last - first) as usize,
        _ => 0,
    };
    for (component, found) in [
        ("escape_positions", strips.escape_positions.len()),
        ("escape_exponents", strips.escape_exponents.len()),
    ] {
        if found != escapes {
            return wrong(component, format!("{found} entries for {escapes} escapes"));
        }
    }
    if strips.escape_positions.iter().any(|&p| usize::from(p) >= TILE_WEIGHTS) {
        return wrong("escape_positions", format!("a position outside of its tile of {TILE_WEIGHTS}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use llmpress_entropy::fixed12::{Strips, decode_strips, encode_strips};
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    proptest! {
        #[test]
        fn every_path_adds_in_the_same_order(rows in 0usize..10, cols in 0usize..200, gap in 0usize..5, seed: u64) {
            let stride = cols + gap;
            let single = values(seed, rows * stride);
            let bf16: Vec<u16> = single.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            let f16: Vec<u16> = single.iter().map(|w| half::f16::from_f32(*w).to_bits()).collect();
            let x = values(seed ^ 1, cols);
            for weights in [Elements::F32(&single), Elements::Bf16(&bf16), Elements::F16(&f16)] {
                let mut expected = vec![f32::NAN; rows];
                reference(weights, stride, &x, &mut expected);
                for isa in Isa::available() {
                    let mut out = vec![f32::NAN; rows];
                    dot_rows_with(isa, weights, stride, &x, &mut out);
                    prop_assert!(same_bits(&out, &expected), "{isa:?} {out:?} {expected:?}");
                }
            }
        }

        #[test]
        fn fixed12_gives_the_bits_of_bf16(
            rows in 0usize..40, cols in 0usize..200, base in 0i16..=239, spread in 1u64..60, seed: u64,
        ) {
            // Exponents around the window, so that some cases are full of escapes and others have none.
            let words: Vec<u16> = values(seed, rows * cols)
                .iter()
                .enumerate()
                .map(|(i, w)| {
                    let exponent = (base as u64 + (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) % spread).min(255);
                    (w.to_bits() >> 16) as u16 & 0x807f | (exponent as u16) << 7
                })
                .collect();
            let mut encoded = Strips::default();
            encode_strips(base, cols, &words, &mut encoded).unwrap();
            let mut offsets = vec![9u32];
            offsets.extend(encoded.escape_counts.iter().scan(9, |sum, n| { *sum += n; Some(*sum) }));
            let strips = StripsRef {
                sign_mantissa: &encoded.sign_mantissa,
                codes: &encoded.codes,
                escape_offsets: &offsets,
                escape_positions: &encoded.escape_positions,
                escape_exponents: &encoded.escape_exponents,
            };
            let x = values(seed ^ 1, cols);
            let mut decoded = vec![0; rows * cols];
            decode_strips(base, cols, rows, &strips, &mut decoded).unwrap();
            prop_assert_eq!(&decoded, &words);
            let mut expected = vec![f32::NAN; rows];
            reference(Elements::Bf16(&words), cols, &x, &mut expected);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows];
                dot_fixed12_with(isa, base, &strips, &x, &mut out).unwrap();
                prop_assert!(same_bits(&out, &expected), "{isa:?} {out:?} {expected:?}");
            }
            if let Some((last, rest)) = encoded.escape_positions.split_last() {
                let mut positions = rest.to_vec();
                positions.push(last | 1024);
                let strips = StripsRef { escape_positions: &positions, ..strips };
                prop_assert!(dot_fixed12(base, &strips, &x, &mut vec![0.0; rows]).is_err());
                let strips = StripsRef { escape_positions: rest, ..strips };
                prop_assert!(dot_fixed12(base, &strips, &x, &mut vec![0.0; rows]).is_err());
            }
        }
    }
}
