//! Products on a GPU equal the stated order of additions bit for bit, whatever the encoding and the shape of block.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_entropy::fixed12::StripsRef;
use llmpress_kernels::gpu::dense::{self, Element};
use llmpress_kernels::gpu::fixed12::{Encoded, Matrix, Part};
use llmpress_kernels::gpu::picker::Picker;
use llmpress_kernels::gpu::product::{
    Product, Variant, Weights, Workspace, product, product_in, slices, variants,
};
use llmpress_kernels::gpu::reference::{self, widen as wide};
use llmpress_kernels::gpu::{Buffer, Error, Gpu};
use proptest::prelude::*;

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

/// Weights that fixed12 has no code for, in a thousand.
#[derive(Clone, Copy, Debug)]
enum Odd {
    /// Any bits at all: infinities and NaNs spread to whole rows of sums.
    Any(u64),
    /// Those that leave every other weight's share of a sum to be seen.
    Finite(u64),
}

struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Weights like a model's, with so many in a thousand of others.
    fn words(&mut self, count: usize, odd: Odd) -> Vec<u16> {
        let one = |bits: u64| {
            match odd {
                Odd::Any(wild) if bits >> 20 & 1023 < wild => return (bits >> 40) as u16,
                Odd::Finite(wild) if bits >> 20 & 1023 < wild => {
                    // Zeros of both signs, and weights that are a little too large for the codes.
                    let large = ((128 + (bits >> 40 & 3)) << 7 | (bits >> 50 & 0x7f)) as u16;
                    return if bits >> 60 & 1 == 0 { 0 } else { large } | (bits >> 62 << 15) as u16;
                }
                _ => {}
            }
            let sum: i64 = (0..4).map(|i| (bits >> (12 * i) & 0xfff) as i64 - 2048).sum();
            half::bf16::from_f32(sum as f32 / 60_000.0).to_bits()
        };
        (0..count).map(|_| one(self.next())).collect()
    }

    fn finite(&mut self, count: usize) -> Vec<u16> {
        self.words(count, Odd::Any(0))
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

/// A matrix, activations and their product.
struct Case {
    gpu: Gpu,
    rows: usize,
    cols: usize,
    tokens: usize,
    plain: Buffer,
    encoded: Matrix,
    x: Buffer,
    stride: usize,
    workspace: Workspace,
    expected: Vec<f32>,
}

impl Case {
    fn new(seed: u64, rows: usize, cols: usize, tokens: usize, odd: Odd) -> Self {
        let emulator = if seed & 2 == 0 { Emulator::new() } else { Emulator::backwards() };
        Self::on(emulator, seed, rows, cols, tokens, odd)
    }

    fn on(emulator: Emulator, seed: u64, rows: usize, cols: usize, tokens: usize, odd: Odd) -> Self {
        let mut numbers = Numbers(seed | 1);
        let words = numbers.words(rows * cols, odd);
        let (x, stride) = padded(&numbers.finite(tokens * cols), cols);
        let expected = reference::product(&words, rows, cols, &x, stride, tokens);
        let gpu = Gpu::new(emulator);
        let plain = dense::upload(&gpu, rows, cols, &words).unwrap();
        let encoded = Matrix::encode(&gpu, rows, cols, &words).unwrap();
        let decoded = gpu.allocate(2 * words.len()).unwrap();
        encoded.decode(&gpu, decoded.view()).unwrap();
        assert_eq!(decoded.view().read::<u16>(words.len()).unwrap(), words, "{rows} x {cols}");
        let x = gpu.upload(&x).unwrap();
        let needed = |variant: Variant| variant.workspace_bytes(Weights::fixed12(&encoded), tokens);
        let bytes = Variant::all(&gpu, Weights::fixed12(&encoded)).into_iter().map(needed).max().unwrap();
        let workspace = Workspace::new(&gpu, bytes).unwrap();
        Self { gpu, rows, cols, tokens, plain, encoded, x, stride, workspace, expected }
    }

    fn weights(&self) -> [Weights<'_>; 2] {
        let plain = Weights::dense(self.plain.view(), self.rows, self.cols);
        [plain, Weights::fixed12(&self.encoded)]
    }

    fn check(&self, weights: Weights<'_>, variant: Variant) {
        // Room between the tokens' outputs, which must stay as it is.
        let y_stride = self.rows + 3;
        let y = self.gpu.upload(&vec![7.0f32; self.tokens * y_stride]).unwrap();
        let operands = Product {
            x: self.x.view(),
            stride: self.stride,
            tokens: self.tokens,
            y: y.view(),
            y_stride,
            bias: None,
            adds: false,
            workspace: Some(&self.workspace),
        };
        product_in(&self.gpu, weights, &operands, variant).unwrap();
        let found: Vec<f32> = y.view().read(self.tokens * y_stride).unwrap();
        for (found, expected) in found.chunks(y_stride).zip(self.expected.chunks(self.rows)) {
            let (found, rest) = found.split_at(self.rows);
            assert!(
                same(found, expected),
                "{} x {}, {} tokens, {variant:?}",
                self.rows,
                self.cols,
                self.tokens
            );
            assert_eq!(rest, [7.0; 3]);
        }
    }

    /// Every variant that suits.
    fn check_suited(&self) {
        for weights in self.weights() {
            for variant in variants(&self.gpu, weights, self.tokens) {
                self.check(weights, variant);
            }
        }
    }

    /// Every variant.
    fn check_all(&self) {
        for weights in self.weights() {
            for variant in Variant::all(&self.gpu, weights) {
                self.check(weights, variant);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn products_and_decoding_follow_the_stated_order(
        seed in any::<u64>(), rows in 1usize..70, cols in 1usize..320, tokens in 1usize..18,
        odd in prop_oneof![
            Just(Odd::Any(0)), Just(Odd::Any(1)), Just(Odd::Any(1024)), Just(Odd::Finite(2)), Just(Odd::Finite(60)),
            Just(Odd::Finite(200)),
        ],
    ) {
        Case::new(seed, rows, cols, tokens, odd).check_suited();
    }
}

/// Products of F16 and F32 weights in every variant against the stated order.
fn check_pieces(seed: u64, rows: usize, cols: usize, tokens: usize, any: bool) {
    let mut numbers = Numbers(seed | 1);
    let bits: Vec<u32> = (0..rows * cols).map(|_| (numbers.next() >> 20) as u32).collect();
    // Any bits at all, or those of numbers around one.
    let single: Vec<f32> =
        bits.iter().map(|b| f32::from_bits(if any { *b } else { b & 0x83ff_ffff | 0x3c00_0000 })).collect();
    let half: Vec<u16> =
        bits.iter().map(|b| if any { *b as u16 } else { *b as u16 & 0x9fff | 0x2000 }).collect();
    let (x, stride) = padded(&numbers.finite(tokens * cols), cols);
    let cut = |word: u16| reference::pieces::<2>(half::f16::from_bits(word).to_f32());
    let of_half = reference::product_of_pieces(&half, cut, rows, cols, &x, stride, tokens);
    let of_single =
        reference::product_of_pieces(&single, reference::pieces::<3>, rows, cols, &x, stride, tokens);
    let gpu = Gpu::new(if seed & 2 == 0 { Emulator::new() } else { Emulator::backwards() });
    let x = gpu.upload(&x).unwrap();
    let tables =
        [dense::upload(&gpu, rows, cols, &half).unwrap(), dense::upload(&gpu, rows, cols, &single).unwrap()];
    for (table, (element, expected)) in
        tables.iter().zip([(Element::F16, &of_half), (Element::F32, &of_single)])
    {
        let weights = Weights::plain(table.view(), element, rows, cols);
        for variant in Variant::all(&gpu, weights) {
            let workspace = Workspace::new(&gpu, variant.workspace_bytes(weights, tokens)).unwrap();
            let y = gpu.upload(&vec![7.0f32; tokens * rows]).unwrap();
            let operands = Product {
                x: x.view(),
                stride,
                tokens,
                y: y.view(),
                y_stride: rows,
                bias: None,
                adds: false,
                workspace: Some(&workspace),
            };
            product_in(&gpu, weights, &operands, variant).unwrap();
            let found: Vec<f32> = y.view().read(tokens * rows).unwrap();
            assert!(same(&found, expected), "{element:?} {rows} x {cols}, {tokens} tokens, {variant}");
        }
        assert!(!variants(&gpu, weights, tokens).is_empty());
    }
}

#[test]
fn f16_and_f32_weights_follow_the_stated_order_in_every_variant() {
    for (seed, rows, cols, tokens, any) in [
        (1, 1, 1, 1, false),
        (2, 39, 200, 5, false),
        (7, 17, 70, 9, true),
        (12, 150, 136, 19, false),
        (9, 33, 12, 65, true),
        (4, 16, 64 * 33, 3, false),
    ] {
        check_pieces(seed, rows, cols, tokens, any);
    }
}

#[test]
fn pieces_add_up_to_the_number() {
    for word in 0..=u16::MAX {
        let x = half::f16::from_bits(word).to_f32();
        let [a, b] = reference::pieces(x);
        assert!(x.is_nan() && a.is_nan() && b == 0.0 || a + b == x, "{x}");
        assert!([a, b].iter().all(|p| p.to_bits() & 0xffff == 0 || p.is_nan()));
    }
    for bits in (0..=u32::MAX).step_by(99_991) {
        let x = f32::from_bits(bits);
        let [a, b, c] = reference::pieces(x).map(f64::from);
        let exact = (f64::from(x) - (a + b + c)).abs() <= 2f64.powi(-133);
        assert!(x.is_nan() && a.is_nan() || x.is_infinite() && a + b + c == f64::from(x) || exact, "{x}");
    }
}

#[test]
fn every_variant_gives_the_same_bits() {
    Case::new(12, 39, 600, 5, Odd::Finite(3)).check_all();
    Case::new(15, 150, 136, 19, Odd::Finite(100)).check_all();
}

#[test]
fn more_tokens() {
    Case::new(4, 20, 600, 31, Odd::Finite(3)).check_suited();
    Case::new(6, 130, 72, 33, Odd::Any(0)).check_suited();
    Case::new(5, 33, 8, 64, Odd::Finite(30)).check_suited();
    Case::new(7, 17, 130, 65, Odd::Any(1024)).check_suited();
    Case::new(8, 16, 64, 130, Odd::Finite(1)).check_suited();
}

#[test]
fn gpus_with_less_shared_memory_have_a_variant_for_everything() {
    // What compute capability 8.6 has.
    for tokens in [1, 16, 33, 64, 100] {
        let case = Case::on(Emulator::with_shared_limit(99 << 10), 21, 150, 136, tokens, Odd::Finite(3));
        case.check_suited();
        for weights in case.weights() {
            let suited = variants(&case.gpu, weights, tokens);
            assert!(suited.iter().any(|variant| variant.workspace_bytes(weights, tokens) == 0), "{suited:?}");
        }
    }
}

#[test]
fn more_tiles_than_are_looked_at_together() {
    // A slice of 35 tiles, some of which have more escapes than are loaded early.
    Case::new(9, 16, 64 * 280, 2, Odd::Finite(40)).check_suited();
    Case::new(10, 3, 64 * 280, 20, Odd::Finite(90)).check_suited();
}

#[test]
fn fewer_slices_of_taller_matrices() {
    for (rows, cols, count) in [(8192, 300, 8), (12_288, 130, 4), (32_768, 72, 2), (32_784, 72, 1)] {
        assert_eq!(slices(rows), count);
        Case::new(rows as u64, rows, cols, 3, Odd::Finite(2)).check_suited();
        Case::new(2 + rows as u64, rows, 64, 17, Odd::Any(0)).check_suited();
    }
}

#[test]
fn biases_and_what_is_there_are_added_at_the_end() {
    let (rows, cols, tokens) = (21, 72, 5);
    let mut numbers = Numbers(99);
    let words = numbers.finite(rows * cols);
    let (x, stride) = padded(&numbers.finite(tokens * cols), cols);
    let bias: Vec<f32> = numbers.finite(rows).into_iter().map(wide).collect();
    let before: Vec<f32> = numbers.finite(tokens * rows).into_iter().map(wide).collect();
    let plain = reference::product(&words, rows, cols, &x, stride, tokens);
    let gpu = Gpu::new(Emulator::new());
    let encoded = Matrix::encode(&gpu, rows, cols, &words).unwrap();
    let (x, b) = (gpu.upload(&x).unwrap(), gpu.upload(&bias).unwrap());
    for adds in [false, true] {
        let y = gpu.upload(&before).unwrap();
        let operands = Product {
            x: x.view(),
            stride,
            tokens,
            y: y.view(),
            y_stride: rows,
            bias: Some(b.view()),
            adds,
            workspace: None,
        };
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
    let words = numbers.words(rows * cols, Odd::Finite(40));
    let (x, stride) = padded(&numbers.finite(tokens * cols), cols);
    let all = reference::product(&words, rows, cols, &x, stride, tokens);
    let gpu = Gpu::new(Emulator::new());
    let encoded = Matrix::encode(&gpu, rows, cols, &words).unwrap();
    let (x, y) = (gpu.upload(&x).unwrap(), gpu.allocate(4 * tokens * rows).unwrap());
    let run = |first, rows| {
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
        let weights = Weights::Fixed12 { matrix: &encoded, first, rows, whole: encoded.rows() };
        product_in(&gpu, weights, &operands, variants(&gpu, weights, tokens)[0])
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
fn stacked_matrices_are_one_matrix_with_a_base_for_each() {
    let (cols, tokens) = (136, 3);
    let mut numbers = Numbers(17);
    // Exponents far apart, so that the bases differ.
    let parts: Vec<(usize, Vec<u16>)> = [(32, 0), (16, 9), (21, 4)]
        .into_iter()
        .map(|(rows, shift)| {
            let words = numbers.words(rows * cols, Odd::Finite(20));
            let smaller = |word: u16| if word & 0x7f80 > 20 << 7 { word - (shift << 7) } else { word };
            (rows, words.into_iter().map(smaller).collect())
        })
        .collect();
    let (x, stride) = padded(&numbers.finite(tokens * cols), cols);
    let all: Vec<u16> = parts.iter().flat_map(|(_, words)| words.clone()).collect();
    let rows = 32 + 16 + 21;
    let expected = reference::product(&all, rows, cols, &x, stride, tokens);
    let gpu = Gpu::new(Emulator::new());
    let encoded: Vec<Encoded> =
        parts.iter().map(|(rows, words)| Encoded::new(*rows, cols, words).unwrap()).collect();
    let list: Vec<Part<'_>> = encoded.iter().map(Encoded::part).collect();
    assert!(list[0].base != list[1].base && list[1].base != list[2].base);
    let matrix = Matrix::stack(&gpu, cols, &list).unwrap();
    let decoded = gpu.allocate(2 * all.len()).unwrap();
    matrix.decode(&gpu, decoded.view()).unwrap();
    assert_eq!(decoded.view().read::<u16>(all.len()).unwrap(), all);
    let (x, y) = (gpu.upload(&x).unwrap(), gpu.allocate(4 * tokens * rows).unwrap());
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
    let weights = Weights::fixed12(&matrix);
    for variant in Variant::all(&gpu, weights).into_iter().filter(|v| v.workspace_bytes(weights, tokens) == 0)
    {
        product_in(&gpu, weights, &operands, variant).unwrap();
        assert!(same(&y.view().read::<f32>(tokens * rows).unwrap(), &expected), "{variant:?}");
    }
    // A strip belongs to one matrix.
    assert!(matches!(Matrix::stack(&gpu, cols, &[list[2], list[0]]), Err(Error::Invalid(_))));
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
        workspace: None,
    };
    let dense = Weights::dense(buffer.view(), 16, 64);
    let run =
        |weights, p: Product<'_>| product_in(&gpu, weights, &p, variants(&gpu, weights, p.tokens.min(8))[0]);
    assert!(matches!(run(dense, Product { stride: 63, ..ok }), Err(Error::Invalid(_))));
    assert!(matches!(run(dense, Product { stride: 0, ..ok }), Err(Error::Invalid(_))));
    assert!(matches!(run(dense, Product { tokens: 100, ..ok }), Err(Error::Invalid(_))));
    assert!(matches!(run(dense, Product { y_stride: 5000, ..ok }), Err(Error::Invalid(_))));
    let odd = Product { x: buffer.view().slice(2..8192).unwrap(), ..ok };
    assert!(matches!(run(dense, odd), Err(Error::Invalid(_))));
    let split = |workspace| {
        let needs = |variant: &Variant| variant.workspace_bytes(dense, ok.tokens) > 0;
        let variant = Variant::all(&gpu, dense).into_iter().find(needs).unwrap();
        product_in(&gpu, dense, &Product { workspace, ..ok }, variant)
    };
    assert!(matches!(split(None), Err(Error::Invalid(_))));
    let small = Workspace::new(&gpu, 0).unwrap();
    assert!(matches!(split(Some(&small)), Err(Error::Invalid(_))));
    let large = Weights::dense(buffer.view(), 1 << 20, 64);
    assert!(run(large, Product { tokens: 1, ..ok }).is_err());
    assert!(run(dense, Product { tokens: 0, ..ok }).is_ok());
    // Sizes that no buffer has are refused before anything is computed from them.
    let picked = |weights, p: Product<'_>| product(&gpu, weights, &p, &Picker::first());
    let huge = Weights::dense(buffer.view(), usize::MAX, 64);
    assert!(matches!(picked(huge, ok), Err(Error::Invalid(_))));
    assert!(matches!(picked(dense, Product { tokens: usize::MAX, ..ok }), Err(Error::Invalid(_))));
    assert!(matches!(picked(dense, Product { y_stride: usize::MAX, ..ok }), Err(Error::Invalid(_))));
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
    assert!(!upload(100, &[0, 2], &[5, 5], &[3, 3]));
    assert!(!upload(100, &[0], &[], &[]));
    assert!(!upload(100, &[0, u32::MAX, 1], &[1], &[3]));
}
