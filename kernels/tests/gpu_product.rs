//! Products on a GPU equal the stated order of additions bit for bit, whatever the encoding and the shape of block.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_entropy::fixed12::{Histogram, Strips, StripsRef, encode_strips};
use llmpress_kernels::gpu::fixed12::Matrix;
use llmpress_kernels::gpu::picker::Picker;
use llmpress_kernels::gpu::product::{Product, Shape, Weights, product, product_in};
use llmpress_kernels::gpu::{Error, Gpu};
use proptest::prelude::*;

fn wide(word: u16) -> f32 {
    f32::from_bits(u32::from(word) << 16)
}

/// The order that kernels/cuda/product.cuh states. `x` has rows of `stride`.
fn reference(w: &[u16], rows: usize, cols: usize, x: &[u16], stride: usize, tokens: usize) -> Vec<f32> {
    let tiles = cols.div_ceil(64);
    let mut y = vec![0.0; tokens * rows];
    for token in 0..tokens {
        for n in 0..rows {
            let slices = (0..8).map(|slice| {
                let mut sum = 0.0f32;
                for tile in tiles * slice / 8..tiles * (slice + 1) / 8 {
                    for (half, part) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                        for pair in [0, 2] {
                            for q in 0..4 {
                                for i in 0..2 {
                                    let k = tile * 64 + 32 * half + 8 * q + 4 * part + pair + i;
                                    let weight = if k < cols { wide(w[n * cols + k]) } else { 0.0 };
                                    sum = weight.mul_add(wide(x[token * stride + k]), sum);
                                }
                            }
                        }
                    }
                }
                sum
            });
            y[token * rows + n] = slices.reduce(|a, b| a + b).unwrap();
        }
    }
    y
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

/// A matrix on the device in fixed12.
fn fixed12(gpu: &Gpu, words: &[u16], rows: usize, cols: usize) -> Matrix {
    let mut histogram = Histogram::new();
    histogram.add(words);
    let base = histogram.best_window().base;
    let mut strips = Strips::default();
    encode_strips(base, cols, words, &mut strips).unwrap();
    let mut offsets = vec![0u32];
    offsets.extend(strips.escape_counts.iter().scan(0, |sum, n| {
        *sum += n;
        Some(*sum)
    }));
    let strips = StripsRef {
        sign_mantissa: &strips.sign_mantissa,
        codes: &strips.codes,
        escape_offsets: &offsets,
        escape_positions: &strips.escape_positions,
        escape_exponents: &strips.escape_exponents,
    };
    Matrix::upload(gpu, rows, cols, base, &strips).unwrap()
}

struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Weights like a model's, with so many in a thousand of any bits at all.
    fn words(&mut self, count: usize, wild: u64) -> Vec<u16> {
        let one = |bits: u64| {
            if bits >> 20 & 1023 < wild {
                return (bits >> 40) as u16;
            }
            let sum: i64 = (0..4).map(|i| (bits >> (12 * i) & 0xfff) as i64 - 2048).sum();
            half::bf16::from_f32(sum as f32 / 60_000.0).to_bits()
        };
        (0..count).map(|_| one(self.next())).collect()
    }

    fn finite(&mut self, count: usize) -> Vec<u16> {
        self.words(count, 0)
    }
}

/// `x` with rows of whole tiles that end in zeros.
fn padded(x: &[u16], cols: usize) -> (Vec<u16>, usize) {
    let stride = cols.next_multiple_of(64);
    let mut out = vec![0; x.len() / cols * stride];
    for (to, from) in out.chunks_mut(stride).zip(x.chunks(cols)) {
        to[..cols].copy_from_slice(from);
    }
    (out, stride)
}

fn check(seed: u64, rows: usize, cols: usize, tokens: usize, wild: u64) {
    let mut numbers = Numbers(seed | 1);
    let words = numbers.words(rows * cols, wild);
    let (x, stride) = padded(&numbers.finite(tokens * cols), cols);
    let expected = reference(&words, rows, cols, &x, stride, tokens);
    let gpu = Gpu::new(if seed & 2 == 0 { Emulator::new() } else { Emulator::backwards() });
    let (dense, encoded) = (gpu.upload(&words).unwrap(), fixed12(&gpu, &words, rows, cols));
    let decoded = gpu.allocate(2 * words.len()).unwrap();
    encoded.decode(&gpu, decoded.view()).unwrap();
    assert_eq!(decoded.view().read::<u16>(words.len()).unwrap(), words, "{rows} x {cols}");
    let x = gpu.upload(&x).unwrap();
    // Room between the tokens' outputs, which must stay as it is.
    let y_stride = rows + 3;
    for shape in Shape::candidates(tokens) {
        for weights in [Weights::Dense { words: dense.view(), rows, cols }, Weights::fixed12(&encoded)] {
            let y = gpu.upload(&vec![7.0f32; tokens * y_stride]).unwrap();
            let operands =
                Product { x: x.view(), stride, tokens, y: y.view(), y_stride, bias: None, adds: false };
            product_in(&gpu, weights, &operands, shape).unwrap();
            let found: Vec<f32> = y.view().read(tokens * y_stride).unwrap();
            for (found, expected) in found.chunks(y_stride).zip(expected.chunks(rows)) {
                assert!(same(&found[..rows], expected), "{rows} x {cols}, {tokens} tokens, {shape:?}");
                assert_eq!(found[rows..], [7.0; 3]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn products_and_decoding_follow_the_stated_order(
        seed in any::<u64>(), rows in 1usize..70, cols in 1usize..40, tokens in 1usize..18,
        wild in prop_oneof![Just(0u64), Just(2), Just(60), Just(1000)],
    ) {
        check(seed, rows, 8 * cols, tokens, wild);
    }
}

#[test]
fn many_tokens_and_many_tiles() {
    check(5, 33, 8, 64, 30);
    check(6, 20, 136, 65, 3);
    check(7, 17, 64 * 19, 3, 50);
    check(8, 130, 72, 33, 0);
    check(9, 16, 64, 130, 0);
}

#[test]
fn biases_and_what_is_there_are_added_at_the_end() {
    let (rows, cols, tokens) = (21, 72, 5);
    let mut numbers = Numbers(99);
    let words = numbers.finite(rows * cols);
    let (x, stride) = padded(&numbers.finite(tokens * cols), cols);
    let bias: Vec<f32> = numbers.finite(rows).into_iter().map(wide).collect();
    let before: Vec<f32> = numbers.finite(tokens * rows).into_iter().map(wide).collect();
    let plain = reference(&words, rows, cols, &x, stride, tokens);
    let gpu = Gpu::new(Emulator::new());
    let encoded = fixed12(&gpu, &words, rows, cols);
    let (x, b) = (gpu.upload(&x).unwrap(), gpu.upload(&bias).unwrap());
    for adds in [false, true] {
        let y = gpu.upload(&before).unwrap();
        let operands =
            Product { x: x.view(), stride, tokens, y: y.view(), y_stride: rows, bias: Some(b.view()), adds };
        // A picker that tries shapes leaves no trace in y.
        product(&gpu, Weights::fixed12(&encoded), &operands, &Picker::trying()).unwrap();
        let expected: Vec<f32> = plain
            .iter()
            .enumerate()
            .map(|(i, sum)| {
                let sum = sum + bias[i % rows];
                if adds { before[i] + sum } else { sum }
            })
            .collect();
        let found = y.view().read(tokens * rows).unwrap();
        assert!(same(&found, &expected), "adds: {adds}");
    }
}

#[test]
fn some_rows_of_a_matrix_are_those_of_the_whole() {
    let (rows, cols, tokens) = (70, 136, 3);
    let mut numbers = Numbers(5);
    let words = numbers.words(rows * cols, 40);
    let (x, stride) = padded(&numbers.finite(tokens * cols), cols);
    let all = reference(&words, rows, cols, &x, stride, tokens);
    let gpu = Gpu::new(Emulator::new());
    let encoded = fixed12(&gpu, &words, rows, cols);
    let (x, y) = (gpu.upload(&x).unwrap(), gpu.allocate(4 * tokens * rows).unwrap());
    let run = |first, rows| {
        let operands =
            Product { x: x.view(), stride, tokens, y: y.view(), y_stride: rows, bias: None, adds: false };
        product_in(&gpu, Weights::Fixed12 { matrix: &encoded, first, rows }, &operands, Shape::ALL[0])
    };
    for (first, count) in [(0, 20), (32, 16), (48, 22), (64, 6), (16, 0)] {
        run(first, count).unwrap();
        let found: Vec<f32> = y.view().read(tokens * count).unwrap();
        for token in 0..tokens {
            let expected = &all[token * rows + first..][..count];
            assert!(same(&found[token * count..][..count], expected), "{first}, {count}");
        }
    }
    for (first, count) in [(8, 8), (64, 7), (80, 1), (0, usize::MAX)] {
        assert!(matches!(run(first, count), Err(Error::Invalid(_))), "{first}, {count}");
    }
}

#[test]
fn wrong_operands_are_refused() {
    let gpu = Gpu::new(Emulator::new());
    let buffer = gpu.allocate(64 * 64 * 2).unwrap();
    let ok = Product {
        x: buffer.view(),
        stride: 64,
        tokens: 2,
        y: buffer.view(),
        y_stride: 16,
        bias: None,
        adds: false,
    };
    let dense = Weights::Dense { words: buffer.view(), rows: 16, cols: 64 };
    let run = |weights, p: Product<'_>| product_in(&gpu, weights, &p, Shape::ALL[0]);
    assert!(matches!(run(dense, Product { stride: 63, ..ok }), Err(Error::Invalid(_))));
    assert!(matches!(run(dense, Product { stride: 0, ..ok }), Err(Error::Invalid(_))));
    assert!(matches!(run(dense, Product { tokens: 100, ..ok }), Err(Error::Invalid(_))));
    assert!(matches!(run(dense, Product { y_stride: 5000, ..ok }), Err(Error::Invalid(_))));
    let odd = Weights::Dense { words: buffer.view(), rows: 16, cols: 60 };
    assert!(matches!(run(odd, ok), Err(Error::Unsupported(_))));
    let large = Weights::Dense { words: buffer.view(), rows: 1 << 20, cols: 64 };
    assert!(run(large, Product { tokens: 1, ..ok }).is_err());
    assert!(run(dense, Product { tokens: 0, ..ok }).is_ok());
}

#[test]
fn hostile_fixed12_matrices_are_refused() {
    let gpu = Gpu::new(Emulator::new());
    let (bytes, codes) = (vec![0u8; 1024], vec![0u8; 512]);
    let upload = |base, offsets: &[u32], positions: &[u16], exponents: &[u8]| {
        let strips = StripsRef {
            sign_mantissa: &bytes,
            codes: &codes,
            escape_offsets: offsets,
            escape_positions: positions,
            escape_exponents: exponents,
        };
        Matrix::upload(&gpu, 16, 64, base, &strips).is_ok()
    };
    assert!(upload(100, &[0, 1], &[1023], &[3]));
    assert!(!upload(240, &[0, 0], &[], &[]));
    assert!(!upload(-1, &[0, 0], &[], &[]));
    assert!(!upload(100, &[0, 2], &[1], &[3]));
    assert!(!upload(100, &[1, 1], &[1], &[3]));
    assert!(!upload(100, &[0, 1], &[1024], &[3]));
    assert!(!upload(100, &[0, 1], &[1], &[]));
    assert!(!upload(100, &[0], &[], &[]));
    assert!(!upload(100, &[0, u32::MAX, 1], &[1], &[3]));
}
