//! Products with weights of which two of four are kept equal their stated order of additions bit for bit, whatever form the kept values
//! have and whatever the shape of block.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::product::{Product, Variant, Weights, Workspace, product_in, variants};
use llmpress_kernels::gpu::sparse24::{Matrix, Part};
use llmpress_kernels::gpu::{Error, Gpu, reference};
use llmpress_numbers::Numbers;
use proptest::prelude::*;

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

/// The nibbles that there are.
const NIBBLES: [u8; 6] = [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110];

/// A matrix as it is stored.
struct Stored {
    rows: usize,
    values: Vec<u16>,
    positions: Vec<u8>,
}

impl Stored {
    /// Values like a model's, with so many in a thousand that are zero or too large for fixed12's codes.
    fn new(numbers: &mut Numbers, rows: usize, cols: usize, odd: u64) -> Self {
        let mut value = |_| {
            let bits = numbers.bits();
            let large = ((128 + (bits >> 40 & 3)) << 7 | (bits >> 50 & 0x7f)) as u16;
            match bits >> 20 & 1023 < odd {
                true => (if bits >> 60 & 1 == 0 { 0 } else { large }) | (bits >> 62 << 15) as u16,
                false => half::bf16::from_f32(numbers.share() / 8.0 - 0.0625).to_bits(),
            }
        };
        let values = (0..rows * cols / 2).map(&mut value).collect();
        let mut row = |_| {
            let quads: Vec<u8> =
                (0..cols / 4).map(|_| NIBBLES[(numbers.bits() >> 40) as usize % 6]).collect();
            quads.chunks(2).map(|two| two[0] | two.get(1).unwrap_or(&0) << 4).collect::<Vec<u8>>()
        };
        let positions = (0..rows).flat_map(&mut row).collect();
        Self { rows, values, positions }
    }

    fn part(&self) -> Part<'_> {
        Part { rows: self.rows, values: (&self.values[..]).into(), positions: &self.positions }
    }

    fn product(&self, cols: usize, x: &[u16], stride: usize, tokens: usize) -> Vec<f32> {
        reference::sparse_product(&self.values, &self.positions, self.rows, cols, x, stride, tokens)
    }
}

/// Rows of whole tiles that end in zeros.
fn activations(numbers: &mut Numbers, tokens: usize, cols: usize) -> (Vec<u16>, usize) {
    let stride = cols.next_multiple_of(64);
    let mut x = vec![0; tokens * stride];
    for row in x.chunks_mut(stride) {
        row[..cols].iter_mut().for_each(|x| *x = half::bf16::from_f32(numbers.share() * 2.0 - 1.0).to_bits());
    }
    (x, stride)
}

/// Both forms of a matrix, in every variant or in those that suit.
fn check(seed: u64, rows: usize, cols: usize, tokens: usize, odd: u64, all: bool) {
    let mut numbers = Numbers::new(seed);
    let stored = Stored::new(&mut numbers, rows, cols, odd);
    let (x, stride) = activations(&mut numbers, tokens, cols);
    let expected = stored.product(cols, &x, stride, tokens);
    let gpu = Gpu::new(if seed & 2 == 0 { Emulator::new() } else { Emulator::backwards() });
    let x = gpu.upload(&x).unwrap();
    for in_fixed12 in [false, true] {
        let matrix = Matrix::stack(&gpu, cols, &[stored.part()], in_fixed12).unwrap();
        let weights = Weights::sparse24(&matrix);
        let tried = if all { Variant::all(&gpu, weights) } else { variants(&gpu, weights, tokens) };
        assert!(!tried.is_empty());
        for variant in tried {
            let workspace = Workspace::new(&gpu, variant.workspace_bytes(weights, tokens)).unwrap();
            // Room between the tokens' outputs, which must stay as it is.
            let y_stride = rows + 3;
            let y = gpu.upload(&vec![7.0f32; tokens * y_stride]).unwrap();
            let operands = Product {
                x: x.view(),
                stride,
                tokens,
                y: y.view(),
                y_stride,
                bias: None,
                adds: false,
                workspace: Some(&workspace),
            };
            product_in(&gpu, weights, &operands, variant).unwrap();
            let found: Vec<f32> = y.view().read(tokens * y_stride).unwrap();
            for (found, expected) in found.chunks(y_stride).zip(expected.chunks(rows)) {
                let (found, rest) = found.split_at(rows);
                assert!(same(found, expected), "{in_fixed12} {rows} x {cols}, {tokens} tokens, {variant}");
                assert_eq!(rest, [7.0; 3]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn products_of_two_in_four_follow_their_order(
        seed in any::<u64>(), rows in 1usize..70, quads in 1usize..90, tokens in 1usize..18,
        odd in prop_oneof![Just(0u64), Just(2), Just(60), Just(1024)],
    ) {
        check(seed, rows, 4 * quads, tokens, odd, false);
    }
}

#[test]
fn products_of_two_in_four_follow_their_order_in_every_variant() {
    for (seed, rows, cols, tokens, odd) in [
        (1, 1, 4, 1, 0),
        (3, 39, 600, 5, 3),
        (4, 17, 128, 9, 1024),
        (8, 150, 136, 19, 100),
        (6, 33, 12, 65, 0),
        (10, 16, 128 * 9 - 60, 3, 40),
        (11, 130, 192, 130, 1),
    ] {
        check(seed, rows, cols, tokens, odd, true);
    }
}

#[test]
fn matrices_of_two_in_four_one_below_the_other_are_one() {
    let (cols, tokens) = (260, 3);
    let mut numbers = Numbers::new(5);
    let parts = [(32, 0), (16, 30), (21, 1024)].map(|(rows, odd)| Stored::new(&mut numbers, rows, cols, odd));
    let all = Stored {
        rows: 69,
        values: parts.iter().flat_map(|part| part.values.clone()).collect(),
        positions: parts.iter().flat_map(|part| part.positions.clone()).collect(),
    };
    let (x, stride) = activations(&mut numbers, tokens, cols);
    let expected = all.product(cols, &x, stride, tokens);
    let gpu = Gpu::new(Emulator::new());
    let list: Vec<Part<'_>> = parts.iter().map(Stored::part).collect();
    let (x, y) = (gpu.upload(&x).unwrap(), gpu.allocate(4 * tokens * 69).unwrap());
    for in_fixed12 in [false, true] {
        let matrix = Matrix::stack(&gpu, cols, &list, in_fixed12).unwrap();
        assert!(matrix.bytes() as u64 >= Matrix::bytes_of(69, cols, in_fixed12));
        // All rows, and some of them, which are added up as all are.
        for (first, rows) in [(0, 69), (32, 20), (48, 21)] {
            let weights = Weights::Sparse24 { matrix: &matrix, first, rows, whole: 69 };
            let operands = Product {
                x: x.view(),
                stride,
                tokens,
                y: y.view(),
                y_stride: rows,
                bias: None,
                adds: false,
                workspace: None,
            };
            let variant = variants(&gpu, weights, tokens)[0];
            product_in(&gpu, weights, &operands, variant).unwrap();
            let found: Vec<f32> = y.view().read(tokens * rows).unwrap();
            let expected: Vec<f32> =
                expected.chunks(69).flat_map(|row| row[first..first + rows].to_vec()).collect();
            assert!(same(&found, &expected), "{in_fixed12}, rows from {first} on");
        }
        let wrong = Weights::Sparse24 { matrix: &matrix, first: 8, rows: 16, whole: 69 };
        let operands = Product {
            x: x.view(),
            stride,
            tokens,
            y: y.view(),
            y_stride: 16,
            bias: None,
            adds: false,
            workspace: None,
        };
        let variant = variants(&gpu, wrong, tokens)[0];
        assert!(matches!(product_in(&gpu, wrong, &operands, variant), Err(Error::Invalid(_))));
    }
    // A strip belongs to one matrix.
    assert!(matches!(
        Matrix::stack(&gpu, cols, &[list[2].clone(), list[0].clone()], false),
        Err(Error::Invalid(_))
    ));
}

#[test]
fn hostile_matrices_of_two_in_four_are_refused() {
    let gpu = Gpu::new(Emulator::new());
    let stack = |cols: usize, values: &[u16], positions: &[u8]| {
        let part = Part { rows: 2, values: values.into(), positions };
        Matrix::stack(&gpu, cols, &[part], false).map(|_| ())
    };
    let words = [0x3f80u16; 16];
    assert!(stack(8, &words[..8], &[0x44, 0xe9]).is_ok());
    assert!(stack(12, &words[..12], &[0x44, 4, 0x44, 4]).is_ok());
    assert!(stack(8, &words[..7], &[0x44, 0x44]).is_err());
    assert!(stack(8, &words[..8], &[0x44]).is_err());
    assert!(stack(6, &words[..6], &[0x44, 0x44]).is_err());
    assert!(stack(0, &[], &[]).is_err());
    for nibble in (0..16).filter(|nibble| !NIBBLES.contains(nibble)) {
        assert!(stack(8, &words[..8], &[0x44, 0x40 | nibble]).is_err(), "{nibble}");
        assert!(stack(8, &words[..8], &[nibble << 4 | 4, 0x44]).is_err(), "{nibble}");
    }
}
