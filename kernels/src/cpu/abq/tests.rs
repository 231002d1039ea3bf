//! Every path against the others bit for bit, and against the formula over decoded weights.

use llmpress_numbers::Numbers;
use proptest::prelude::*;

use super::*;
use crate::cpu::test_values::{same_bits, values};

/// A stored matrix of its own.
#[derive(Debug)]
struct Owned {
    rows: usize,
    cols: usize,
    bits: u8,
    planes: u8,
    group_size: Option<usize>,
    activation_bits: Option<u8>,
    codes: Vec<u8>,
    words: Vec<u32>,
    scale: Vec<u16>,
    real: Vec<f32>,
    zero: Vec<u8>,
    kind: usize,
}

fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut numbers = Numbers::new(seed);
    move || numbers.bits() >> 11
}

impl Owned {
    #[allow(clippy::too_many_arguments, reason = "a shape and its widths")]
    fn new(
        rows: usize,
        cols: usize,
        bits: u8,
        balanced: bool,
        group_size: Option<usize>,
        activation_bits: Option<u8>,
        kind: usize,
        seed: u64,
    ) -> Self {
        let mut next = random(seed);
        let balanced = balanced && bits <= 2;
        let levels = (1u64 << bits) + u64::from(balanced);
        let planes = bits + u8::from(balanced);
        let codes: Vec<u8> = (0..rows * cols).map(|_| (next() % levels) as u8).collect();
        let across = cols.div_ceil(32);
        let mut words = vec![0u32; usize::from(planes) * rows * across];
        for (i, code) in codes.iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            for plane in 0..usize::from(planes) {
                words[(plane * rows + row) * across + col / 32] |= u32::from(code >> plane & 1) << (col % 32);
            }
        }
        let groups = cols.div_ceil(group_size.unwrap_or(cols.max(1)));
        let count = rows * groups;
        let mut value = || (next() % 2001) as f32 / 1000.0 - 1.0;
        let scale = (0..count).map(|_| half::f16::from_f32(value()).to_bits()).collect();
        let real = (0..count).map(|_| value()).collect();
        let zero = (0..count).map(|_| (next() % levels) as u8).collect();
        Self { rows, cols, bits, planes, group_size, activation_bits, codes, words, scale, real, zero, kind }
    }

    fn stored(&self) -> Stored<'_> {
        let &Self { rows, cols, bits, planes, group_size, activation_bits, .. } = self;
        // The same bits as bfloat16 are other finite values, or not: those of f16 up to 1 have exponents below 128.
        let scale = match self.kind % 2 {
            0 => Elements::F16(&self.scale),
            _ => Elements::Bf16(&self.scale),
        };
        let zero = match self.kind {
            0 | 1 => Zero::Symmetric,
            2 | 3 => Zero::Integer(&self.zero),
            4 => Zero::Real(Elements::F32(&self.real)),
            _ => Zero::Real(scale),
        };
        Stored { rows, cols, bits, planes, group_size, activation_bits, words: &self.words, scale, zero }
    }

    fn group(&self) -> usize {
        self.group_size.unwrap_or(self.cols.max(1))
    }

    /// A weight in double precision.
    fn weight(&self, row: usize, col: usize) -> f64 {
        let stored = self.stored();
        let at = row * self.cols.div_ceil(self.group()) + col / self.group();
        let (code, scale) = (f64::from(self.codes[row * self.cols + col]), f64::from(stored.scale.get(at)));
        match stored.zero {
            Zero::Symmetric => scale * (code - f64::from(1 << (self.bits - 1))),
            Zero::Integer(zero) => scale * (code - f64::from(zero[at])),
            Zero::Real(offset) => scale * code + f64::from(offset.get(at)),
        }
    }
}

fn product(matrix: &Matrix, isa: Isa, x: &[f32], tokens: usize, rows: Range<usize>) -> Option<Vec<f32>> {
    let mut inputs = Inputs::default();
    matrix.prepare_with(isa, x, tokens, &mut inputs).ok()?;
    let mut out = vec![f32::NAN; rows.len() * tokens];
    matrix.multiply_with(isa, rows, &inputs, &mut out);
    Some(out)
}

fn shapes() -> impl Strategy<Value = (usize, usize, Option<usize>)> {
    let group = prop_oneof![Just(None), (1usize..6).prop_map(|n| Some(32 * n))];
    (prop_oneof![0usize..3, 0usize..90], prop_oneof![0usize..3, 0usize..300], group)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn every_path_gives_the_same_bits(
        (rows, cols, group) in shapes(), bits in 1u8..=8, balanced: bool,
        activation in prop_oneof![1 => Just(None), 3 => (1u8..=8).prop_map(Some)],
        kind in 0usize..6, tokens in 0usize..20, cut in 0usize..20, seed: u64,
    ) {
        let owned = Owned::new(rows, cols, bits, balanced, group, activation, kind, seed);
        let matrix = Matrix::new(&owned.stored()).unwrap();
        let x = values(seed, cols * tokens);
        let expected = product(&matrix, Isa::Portable, &x, tokens, 0..rows);
        let finite = x.iter().all(|x| x.is_finite());
        if activation.is_none() {
            prop_assert!(expected.is_some());
        } else if !finite {
            prop_assert!(expected.is_none());
        }
        for isa in Isa::available() {
            let all = product(&matrix, isa, &x, tokens, 0..rows);
            prop_assert_eq!(all.is_some(), expected.is_some());
            let (Some(all), Some(expected)) = (all, &expected) else { continue };
            prop_assert!(same_bits(&all, expected), "{:?} {:?} {:?}", isa, all, expected);
            // Any rows of it, and any tokens, are the same.
            let cut = cut.min(rows);
            let some = product(&matrix, isa, &x, tokens, cut..rows).unwrap();
            prop_assert!(same_bits(&some, &expected[cut * tokens..]));
            for token in 0..tokens.min(3) {
                let one: Vec<f32> = x.iter().skip(token).step_by(tokens).copied().collect();
                let one = product(&matrix, isa, &one, 1, 0..rows).unwrap();
                let expected: Vec<f32> = expected.iter().skip(token).step_by(tokens).copied().collect();
                prop_assert!(same_bits(&one, &expected));
            }
        }
    }

    #[test]
    fn scales_of_the_other_sign_give_products_of_the_other_sign(
        (rows, cols, group) in shapes(), bits in 1u8..=8, balanced: bool,
        activation in prop_oneof![Just(None), (1u8..=8).prop_map(Some)],
        kind in 0usize..6, tokens in 1usize..20, seed: u64,
    ) {
        let mut owned = Owned::new(rows, cols, bits, balanced, group, activation, kind, seed);
        let mut next = random(seed ^ 9);
        let x: Vec<f32> = (0..cols * tokens).map(|_| (next() % 4001) as f32 / 1000.0 - 1.7).collect();
        let matrix = Matrix::new(&owned.stored()).unwrap();
        let all = Isa::available().into_iter().map(|isa| (isa, product(&matrix, isa, &x, tokens, 0..rows).unwrap()));
        let all: Vec<_> = all.collect();
        owned.scale.iter_mut().for_each(|scale| *scale ^= 0x8000);
        owned.real.iter_mut().for_each(|offset| *offset = -*offset);
        let matrix = Matrix::new(&owned.stored()).unwrap();
        for (isa, expected) in all {
            // Every operation rounds to the nearest, whatever the sign.
            let found = product(&matrix, isa, &x, tokens, 0..rows).unwrap();
            prop_assert!(found.iter().zip(&expected).all(|(a, b)| *a == -*b), "{isa:?} {found:?} {expected:?}");
        }
    }

    #[test]
    fn products_are_those_of_the_decoded_weights(
        (rows, cols, group) in shapes(), bits in 1u8..=8, balanced: bool,
        activation in prop_oneof![Just(None), (1u8..=8).prop_map(Some)],
        kind in 0usize..6, tokens in 1usize..20, seed: u64,
    ) {
        let owned = Owned::new(rows, cols, bits, balanced, group, activation, kind, seed);
        let matrix = Matrix::new(&owned.stored()).unwrap();
        let mut next = random(seed ^ 5);
        let x: Vec<f32> = (0..cols * tokens).map(|_| (next() % 4001) as f32 / 1000.0 - 1.7).collect();
        let out = product(&matrix, Isa::detect(), &x, tokens, 0..rows).unwrap();
        let mut decoded = vec![0.0; cols];
        for t in 0..tokens {
            let token: Vec<f32> = x.iter().skip(t).step_by(tokens).copied().collect();
            let seen: Vec<f64> = match activation {
                None => token.iter().map(|x| f64::from(*x)).collect(),
                Some(bits) => {
                    let mut codes = vec![0; cols];
                    let grid = quantise(&token, bits, &mut codes).unwrap();
                    codes.iter().map(|c| f64::from(grid.step) * (f64::from(*c) - f64::from(grid.zero))).collect()
                }
            };
            for row in 0..rows {
                matrix.row(row, &mut decoded);
                let (mut exact, mut size) = (0.0, 0.0);
                for (k, x) in seen.iter().enumerate() {
                    let weight = owned.weight(row, k);
                    prop_assert!((f64::from(decoded[k]) - weight).abs() <= 1e-6 * (1.0 + weight.abs()) * 256.0);
                    exact += weight * x;
                    let at = row * cols.div_ceil(owned.group()) + k / owned.group();
                    let scale = f64::from(owned.stored().scale.get(at)).abs();
                    size += (scale * f64::from(1u32 << bits) + weight.abs()) * x.abs();
                }
                let found = f64::from(out[row * tokens + t]);
                prop_assert!((found - exact).abs() <= 1e-5 * size + 1e-30, "{} {} {}", found, exact, size);
            }
        }
    }
}

#[test]
fn exact_integers_hold_in_the_longest_rows_and_at_the_ends_of_their_range() {
    // All codes 255 against activations of 255 and 0, the product of which is beyond 24 bits; three pieces.
    let cols = 2 * MOST_COLS + 77;
    let mut owned = Owned::new(2, cols, 8, false, None, Some(8), 0, 3);
    owned.words.fill(u32::MAX);
    let last = cols.div_ceil(32) - 1;
    for row in owned.words.chunks_exact_mut(last + 1) {
        row[last] &= (1 << (cols % 32)) - 1;
    }
    owned.scale.fill(half::f16::ONE.to_bits());
    let matrix = Matrix::new(&owned.stored()).unwrap();
    let mut x = vec![255.0; cols];
    x[5] = 0.0;
    for isa in Isa::available() {
        let out = product(&matrix, isa, &x, 1, 0..2).unwrap();
        let expected = (255.0 - 128.0) * 255.0 * (cols - 1) as f32;
        assert!(out.iter().all(|y| (y / expected - 1.0).abs() < 1e-6), "{isa:?} {out:?}");
    }
}

#[test]
fn an_activation_that_is_no_number_names_its_token() {
    let owned = Owned::new(4, 40, 4, false, None, Some(8), 0, 3);
    let matrix = Matrix::new(&owned.stored()).unwrap();
    let mut x = vec![1.0; 40 * 20];
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        x[7 * 20 + 18] = odd;
        let mut inputs = Inputs::default();
        assert_eq!(matrix.prepare(&x, 20, &mut inputs), Err(NotFinite { token: 18 }));
    }
}

#[test]
fn components_of_another_size_are_refused() {
    let owned = Owned::new(5, 70, 3, false, Some(32), None, 4, 3);
    let stored = owned.stored();
    assert!(Matrix::new(&stored).is_ok());
    let short = Stored { words: &owned.words[1..], ..stored };
    assert!(matches!(Matrix::new(&short), Err(Fault::Size { component: "planes", .. })));
    let short = Stored { scale: Elements::F16(&owned.scale[1..]), ..stored };
    assert!(matches!(Matrix::new(&short), Err(Fault::Size { component: "scale", expected: 15, found: 14 })));
    let short = Stored { zero: Zero::Real(Elements::F32(&owned.real[1..])), ..stored };
    assert!(matches!(Matrix::new(&short), Err(Fault::Size { component: "offset", .. })));
    let short = Stored { zero: Zero::Integer(&owned.zero[1..]), ..stored };
    assert!(matches!(Matrix::new(&short), Err(Fault::Size { component: "zero", .. })));
    for (bits, planes) in [(0, 0), (0, 1), (3, 2), (3, 5), (9, 9), (8, 9)] {
        assert!(matches!(Matrix::new(&Stored { bits, planes, ..stored }), Err(Fault::Shape(_))));
    }
    for group_size in [Some(0), Some(33)] {
        assert!(matches!(Matrix::new(&Stored { group_size, ..stored }), Err(Fault::Shape(_))));
    }
    for bits in [0, 9] {
        let activation_bits = Some(bits);
        assert!(matches!(Matrix::new(&Stored { activation_bits, ..stored }), Err(Fault::Shape(_))));
    }
    assert!(matches!(Matrix::new(&Stored { rows: usize::MAX, ..stored }), Err(Fault::Size { .. })));
}

#[test]
fn a_matrix_takes_little_more_than_its_codes() {
    for (bits, activation) in [(4, None), (4, Some(8)), (2, Some(8)), (1, Some(1))] {
        let owned = Owned::new(256, 1024, bits, false, Some(128), activation, 0, 3);
        let bytes = Matrix::new(&owned.stored()).unwrap().bytes();
        let codes = 256 * 1024 * usize::from(bits) / 8;
        let groups = 256 * 8;
        assert!(bytes <= codes + groups * 4, "{bits} {activation:?}: {bytes}");
    }
}

#[test]
#[should_panic(expected = "fits")]
fn inputs_of_another_width_are_not_taken() {
    let one = Matrix::new(&Owned::new(4, 40, 1, false, None, Some(4), 0, 3).stored()).unwrap();
    let other = Matrix::new(&Owned::new(4, 40, 4, false, None, Some(8), 0, 3).stored()).unwrap();
    let mut inputs = Inputs::default();
    one.prepare(&[1.0; 40], 1, &mut inputs).unwrap();
    other.multiply(0..4, &inputs, &mut [0.0; 4]);
}
