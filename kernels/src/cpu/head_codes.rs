//! Keys and values as a cache holds them: codes of 8 or 4 bits, with a scale and a zero point for each group of features.
//!
//! ```text
//! 8 bits   byte i: feature i           4 bits   byte i: feature i | feature i + half << 4      half = ceil(features / 2)
//! group    128 features of a head of a token, the last one shorter
//! ```
//!
//! The grid is that of [`super::quantize_columns`] (dynamic, asymmetric) with a zero point that is a code. It depends on one head of one
//! token alone: it does not matter how a sequence is cut into steps.

use std::ops::Range;

use super::isa::{Isa, multiversion};
use super::quantize_columns::{MOST, grids};

/// How a head of one token is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadCodes {
    features: usize,
    bits: u8,
}

/// Where a feature's code lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodePlace {
    /// The byte of the head.
    pub byte: usize,
    /// The lowest bit in it.
    pub shift: u32,
    /// The group.
    pub group: usize,
}

impl HeadCodes {
    /// Features that share a scale and a zero point.
    pub const GROUP: usize = 128;

    /// Of heads of so many features; none where codes are not of 4 or 8 bits.
    #[must_use]
    pub fn new(features: usize, bits: u8) -> Option<Self> {
        matches!(bits, 4 | 8).then_some(Self { features, bits })
    }

    /// Bits of a code.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Features of a head.
    #[must_use]
    pub fn features(self) -> usize {
        self.features
    }

    /// Bytes of the codes of a head.
    #[must_use]
    pub fn bytes(self) -> usize {
        if self.bits == 8 { self.features } else { self.features.div_ceil(2) }
    }

    /// Groups of a head, each with a scale in F32 and a zero point in a byte.
    #[must_use]
    pub fn groups(self) -> usize {
        self.features.div_ceil(Self::GROUP)
    }

    /// Bytes that a head of one token takes, scales and zero points included.
    #[must_use]
    pub fn all_bytes(self) -> usize {
        self.bytes() + 5 * self.groups()
    }

    /// Where a feature's code lies.
    #[must_use]
    pub fn place(self, feature: usize) -> CodePlace {
        let (bytes, group) = (self.bytes(), feature / Self::GROUP);
        match feature.checked_sub(bytes) {
            Some(byte) => CodePlace { byte, shift: 4, group },
            None => CodePlace { byte: feature, shift: 0, group },
        }
    }

    /// Quantises a head of each of `width` tokens, `x[feature * width + token]`: to `codes[byte * width + token]`,
    /// `scales[group * width + token]`, and `zeros` likewise. False, and these unspecified, where a value is NaN or infinite, or
    /// a group too wide for single precision.
    ///
    /// With lo the least and hi the greatest of 0 and a group, s = (hi - lo) / (2^bits - 1), or 1 where that is 0; z = -lo / s rounded,
    /// and a code x / s rounded, plus z, both held between 0 and 2^bits - 1. Ties go to even.
    ///
    /// # Panics
    /// Where `width` is not 1 to [`super::PANEL`], or a slice has another length.
    pub fn quantize(
        self,
        x: &[f32],
        width: usize,
        codes: &mut [u8],
        scales: &mut [f32],
        zeros: &mut [u8],
    ) -> bool {
        self.quantize_with(Isa::detect(), x, width, codes, scales, zeros)
    }

    /// Values of a head of some tokens, `out[token * features + feature]`, from `codes[token * bytes + byte]`, `scales[token * groups + group]`
    /// and `zeros` likewise: s (code - z), each operation rounded.
    ///
    /// # Panics
    /// Where slices are not of as many tokens.
    pub fn dequantize_tokens(self, codes: &[u8], scales: &[f32], zeros: &[u8], out: &mut [f32]) {
        self.dequantize_tokens_with(Isa::detect(), codes, scales, zeros, out);
    }

    /// Values of some features of a head of some tokens, `out[(feature - first) * tokens + token]`, from `codes[byte * stride + token]`,
    /// `scales[group * stride + token]` and `zeros` likewise: s (code - z), each operation rounded.
    ///
    /// # Panics
    /// Where there are not so many features, or slices are too short.
    pub fn dequantize_features(
        self,
        features: Range<usize>,
        codes: &[u8],
        scales: &[f32],
        zeros: &[u8],
        stride: usize,
        out: &mut [f32],
    ) {
        self.dequantize_features_with(Isa::detect(), features, codes, scales, zeros, stride, out);
    }

    fn top(self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    fn quantize_with(
        self,
        isa: Isa,
        x: &[f32],
        width: usize,
        codes: &mut [u8],
        scales: &mut [f32],
        zeros: &mut [u8],
    ) -> bool {
        #[inline(always)]
        fn body(
            of: HeadCodes,
            x: &[f32],
            width: usize,
            codes: &mut [u8],
            scales: &mut [f32],
            zeros: &mut [u8],
        ) -> bool {
            let (top, low) = (of.top(), of.bytes() * width);
            let groups = x.chunks(HeadCodes::GROUP * width);
            let grids_of = scales.chunks_exact_mut(width).zip(zeros.chunks_exact_mut(width));
            for (group, (x, (scales, zeros))) in groups.zip(grids_of).enumerate() {
                let (mut scale, mut zero) = ([1.0f32; MOST], [0.0f32; MOST]);
                if !grids(x, width, top, &mut scale, &mut zero) {
                    return false;
                }
                zero.iter_mut().for_each(|z| *z = z.min(top));
                scales.copy_from_slice(&scale[..width]);
                zeros.iter_mut().zip(&zero).for_each(|(to, z)| *to = *z as u8);
                let first = group * HeadCodes::GROUP * width;
                for (row, x) in x.chunks_exact(width).enumerate() {
                    let at = first + row * width;
                    let code =
                        |x: f32, s: f32, z: f32| ((x / s).round_ties_even() + z).max(0.0).min(top) as u8;
                    // The second half of a head comes after the first: its codes go beside codes that are there.
                    if at < low {
                        for (((to, x), s), z) in codes[at..][..width].iter_mut().zip(x).zip(&scale).zip(&zero)
                        {
                            *to = code(*x, *s, *z);
                        }
                    } else {
                        let to = &mut codes[at - low..][..width];
                        for (((to, x), s), z) in to.iter_mut().zip(x).zip(&scale).zip(&zero) {
                            *to |= code(*x, *s, *z) << 4;
                        }
                    }
                }
            }
            true
        }
        assert!((1..=MOST).contains(&width) && x.len() == self.features * width);
        assert!(codes.len() == self.bytes() * width);
        assert!(scales.len() == self.groups() * width && zeros.len() == scales.len());
        let of = self;
        multiversion!(isa, body(of: HeadCodes, x: &[f32], width: usize, codes: &mut [u8], scales: &mut [f32], zeros: &mut [u8]) -> bool)
    }

    fn dequantize_tokens_with(self, isa: Isa, codes: &[u8], scales: &[f32], zeros: &[u8], out: &mut [f32]) {
        #[inline(always)]
        fn body(of: HeadCodes, codes: &[u8], scales: &[f32], zeros: &[u8], out: &mut [f32]) {
            let (bytes, groups) = (of.bytes(), of.groups());
            let tokens = out.chunks_exact_mut(of.features).zip(codes.chunks_exact(bytes));
            let grids = scales.chunks_exact(groups).zip(zeros.chunks_exact(groups));
            for ((out, codes), (scales, zeros)) in tokens.zip(grids) {
                if of.bits == 8 {
                    out.iter_mut().zip(codes).for_each(|(x, code)| *x = f32::from(*code));
                } else {
                    let (low, high) = out.split_at_mut(bytes);
                    low.iter_mut().zip(codes).for_each(|(x, code)| *x = f32::from(*code & 15));
                    high.iter_mut().zip(codes).for_each(|(x, code)| *x = f32::from(*code >> 4));
                }
                for ((x, s), z) in out.chunks_mut(HeadCodes::GROUP).zip(scales).zip(zeros) {
                    let z = f32::from(*z);
                    x.iter_mut().for_each(|x| *x = s * (*x - z));
                }
            }
        }
        let tokens = out.len().checked_div(self.features).unwrap_or(0);
        assert!(out.len() == tokens * self.features && codes.len() == tokens * self.bytes());
        assert!(scales.len() == tokens * self.groups() && zeros.len() == scales.len());
        if tokens == 0 {
            return;
        }
        let of = self;
        multiversion!(isa, body(of: HeadCodes, codes: &[u8], scales: &[f32], zeros: &[u8], out: &mut [f32]));
    }

    #[expect(clippy::too_many_arguments, reason = "three kinds of rows of one stride")]
    fn dequantize_features_with(
        self,
        isa: Isa,
        features: Range<usize>,
        codes: &[u8],
        scales: &[f32],
        zeros: &[u8],
        stride: usize,
        out: &mut [f32],
    ) {
        #[inline(always)]
        fn body(codes: &[u8], shift: u32, mask: u8, scales: &[f32], zeros: &[u8], out: &mut [f32]) {
            for (((x, code), s), z) in out.iter_mut().zip(codes).zip(scales).zip(zeros) {
                *x = s * (f32::from((code >> shift) & mask) - f32::from(*z));
            }
        }
        let tokens = out.len().checked_div(features.len()).unwrap_or(0);
        assert!(features.end <= self.features && out.len() == tokens * features.len() && tokens <= stride);
        let mask = if self.bits == 8 { u8::MAX } else { 15 };
        for (feature, out) in features.zip(out.chunks_exact_mut(tokens.max(1))) {
            let CodePlace { byte, shift, group } = self.place(feature);
            let codes = &codes[byte * stride..][..tokens];
            let grid = group * stride..group * stride + tokens;
            let (scales, zeros) = (&scales[grid.clone()], &zeros[grid]);
            multiversion!(isa, body(codes: &[u8], shift: u32, mask: u8, scales: &[f32], zeros: &[u8], out: &mut [f32]));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    /// Codes, scales and zero points of a head of one token by the definition.
    fn reference(x: &[f32], bits: u8) -> Option<(Vec<u8>, Vec<f32>, Vec<u8>)> {
        let top = (1u32 << bits) as f32 - 1.0;
        let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
        for x in x.chunks(128) {
            let low = x.iter().copied().fold(0.0f32, f32::min);
            let high = x.iter().copied().fold(0.0f32, f32::max);
            let s = (high - low) / top;
            if x.iter().any(|x| !x.is_finite()) || !s.is_finite() {
                return None;
            }
            let s = if s == 0.0 { 1.0 } else { s };
            let z = (-low / s).round_ties_even().clamp(0.0, top);
            codes.extend(x.iter().map(|x| ((x / s).round_ties_even() + z).clamp(0.0, top) as u8));
            scales.push(s);
            zeros.push(z as u8);
        }
        Some((codes, scales, zeros))
    }

    /// What they stand for by the definition.
    fn stand_for(codes: &[u8], scales: &[f32], zeros: &[u8]) -> Vec<f32> {
        let one = |(i, code): (usize, &u8)| scales[i / 128] * (f32::from(*code) - f32::from(zeros[i / 128]));
        codes.iter().enumerate().map(one).collect()
    }

    fn column<T: Copy>(x: &[T], width: usize, column: usize) -> Vec<T> {
        x.iter().skip(column).step_by(width).copied().collect()
    }

    proptest! {
        #[test]
        fn every_path_gives_the_codes_and_values_of_the_definition(
            features in prop_oneof![0usize..4, 4usize..100, 120usize..300], width in 1usize..49, gap in 0usize..5,
            wide: bool, seed: u64,
        ) {
            let of = HeadCodes::new(features, if wide { 8 } else { 4 }).unwrap();
            let x = values(seed, features * width);
            let expected: Vec<_> = (0..width).map(|t| reference(&column(&x, width, t), of.bits())).collect();
            let (bytes, groups) = (of.bytes(), of.groups());
            for isa in Isa::available() {
                let (mut codes, mut scales) = (vec![0xa5; bytes * width], vec![f32::NAN; groups * width]);
                let mut zeros = vec![0xa5; groups * width];
                let good = of.quantize_with(isa, &x, width, &mut codes, &mut scales, &mut zeros);
                prop_assert_eq!(good, expected.iter().all(Option::is_some), "{:?}", isa);
                if !good {
                    continue;
                }
                // The same as rows of tokens, and as rows of bytes that are further apart.
                let (mut of_tokens, mut scales_of, mut zeros_of) = (Vec::new(), Vec::new(), Vec::new());
                let stride = width + gap;
                let apart = |rows: usize| vec![0u8; rows * stride];
                let (mut of_bytes, mut far_scales) = (apart(bytes), vec![f32::NAN; groups * stride]);
                let mut far_zeros = apart(groups);
                for row in 0..bytes {
                    of_bytes[row * stride..][..width].copy_from_slice(&codes[row * width..][..width]);
                }
                for row in 0..groups {
                    far_scales[row * stride..][..width].copy_from_slice(&scales[row * width..][..width]);
                    far_zeros[row * stride..][..width].copy_from_slice(&zeros[row * width..][..width]);
                }
                for (t, expected) in expected.iter().flatten().enumerate() {
                    let bytes_of = column(&codes, width, t);
                    let found: Vec<u8> = (0..features)
                        .map(|feature| {
                            let CodePlace { byte, shift, .. } = of.place(feature);
                            (bytes_of[byte] >> shift) & if wide { u8::MAX } else { 15 }
                        })
                        .collect();
                    prop_assert_eq!(&found, &expected.0, "{:?}", isa);
                    prop_assert!(same_bits(&column(&scales, width, t), &expected.1), "{isa:?}");
                    prop_assert_eq!(&column(&zeros, width, t), &expected.2);
                    of_tokens.extend(bytes_of);
                    scales_of.extend(&expected.1);
                    zeros_of.extend(&expected.2);
                }
                let mut by_token = vec![f32::NAN; features * width];
                of.dequantize_tokens_with(isa, &of_tokens, &scales_of, &zeros_of, &mut by_token);
                let from = features / 3;
                let mut by_feature = vec![f32::NAN; (features - from) * width];
                let some = from..features;
                of.dequantize_features_with(isa, some, &of_bytes, &far_scales, &far_zeros, stride, &mut by_feature);
                for (t, (codes, scales, zeros)) in expected.iter().flatten().enumerate() {
                    let expected = stand_for(codes, scales, zeros);
                    prop_assert!(same_bits(&by_token[t * features..][..features], &expected), "{isa:?}");
                    prop_assert!(same_bits(&column(&by_feature, width, t), &expected[from..]), "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn heads_of_one_group_stand_for_what_quantised_columns_are() {
        for (bits, features) in [(4, 64), (8, 128), (4, 33)] {
            let of = HeadCodes::new(features, bits).unwrap();
            let mut x = values(5, features);
            let (mut codes, mut scale, mut zero) = (vec![0; of.bytes()], [0.0], [0]);
            assert!(of.quantize(&x, 1, &mut codes, &mut scale, &mut zero));
            let mut found = vec![0.0; features];
            of.dequantize_tokens(&codes, &scale, &zero, &mut found);
            assert!(crate::cpu::quantize_columns(&mut x, 1, bits) && same_bits(&found, &x));
        }
    }

    #[test]
    fn zero_points_of_the_narrowest_ranges_are_codes_too() {
        // s is one unit of the smallest numbers, which the range has more of than there are codes.
        let low = -f32::from_bits(22);
        let of = HeadCodes::new(2, 4).unwrap();
        let (mut codes, mut scale, mut zero) = ([0], [0.0], [0]);
        assert!(of.quantize(&[low, 0.0], 1, &mut codes, &mut scale, &mut zero));
        assert_eq!((codes, scale, zero), ([0xf0], [f32::from_bits(1)], [15]));
    }

    #[test]
    fn other_widths_are_none() {
        assert!([0, 1, 2, 3, 5, 6, 7, 9, 16].into_iter().all(|bits| HeadCodes::new(64, bits).is_none()));
        let sizes = |features, bits| HeadCodes::new(features, bits).map(HeadCodes::all_bytes);
        assert_eq!((sizes(64, 8), sizes(64, 4), sizes(128, 4)), (Some(69), Some(37), Some(69)));
        assert_eq!((sizes(129, 8), sizes(129, 4), sizes(0, 4)), (Some(139), Some(75), Some(0)));
    }
}
