//! Products with weights of 1 to 8 bits on a GPU equal the stated order of additions bit for bit, whatever the shape of block.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::abq::{Kind, Made, Numbers, kinds, same};
use llmpress_emulator::Emulator;
use llmpress_kernels::cpu::abq::{Stored, Zero};
use llmpress_kernels::gpu::abq::{
    Matrix, Variant, Weights, product, product_in, reference, variants, workspace_bytes,
};
use llmpress_kernels::gpu::picker::Picker;
use llmpress_kernels::gpu::product::{Product, Workspace};
use llmpress_kernels::gpu::{Error, Gpu};
use proptest::prelude::*;

/// `x` with rows of whole tiles that end in zeros.
fn activations(numbers: &mut Numbers, cols: usize, tokens: usize) -> (Vec<u16>, usize) {
    let stride = cols.next_multiple_of(64);
    let mut x = vec![0; tokens * stride];
    for row in x.chunks_mut(stride) {
        for to in &mut row[..cols] {
            *to = half::bf16::from_f32(3.0 * numbers.float()).to_bits();
        }
    }
    (x, stride)
}

/// All variants, or those that suit, give the bits of the reference.
fn check(made: &Made, tokens: usize, seed: u64, every: bool) {
    let mut numbers = Numbers(seed | 1);
    let stored = made.stored();
    let (x, stride) = activations(&mut numbers, made.cols, tokens);
    let expected = reference::product(&stored, &x, stride, tokens).unwrap();
    let gpu = Gpu::new(if seed & 2 == 0 { Emulator::new() } else { Emulator::backwards() });
    let matrix = Matrix::upload(&gpu, &stored).unwrap();
    let weights = Weights::all(&matrix);
    let all = if every { Variant::all(&gpu, weights) } else { variants(&gpu, weights, tokens) };
    let x = gpu.upload(&x).unwrap();
    for variant in all {
        let workspace = Workspace::new(&gpu, variant.workspace_bytes(weights, tokens)).unwrap();
        let y_stride = made.rows + 3;
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
        product_in(&gpu, weights, &operands, variant)
            .unwrap_or_else(|e| panic!("{variant:?}: {e}; {} x {}, {tokens} tokens", made.rows, made.cols));
        let found: Vec<f32> = y.view().read(tokens * y_stride).unwrap();
        for (found, expected) in found.chunks(y_stride).zip(expected.chunks(made.rows)) {
            let (found, rest) = found.split_at(made.rows);
            assert!(
                same(found, expected),
                "{} x {}, w{} {:?} {:?}, {tokens} tokens, {variant:?}\n{found:?}\n{expected:?}",
                made.rows,
                made.cols,
                made.bits,
                made.group_size,
                made.kind,
            );
            assert_eq!(rest, [7.0; 3]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn products_of_any_width_follow_the_stated_order(
        seed in any::<u64>(), rows in 1usize..70, cols in 1usize..420, tokens in 1usize..20, bits in 1u8..=8,
        balanced in any::<bool>(), kind in kinds(), group in prop_oneof![Just(None), (1usize..9).prop_map(|n| Some(32 * n))],
    ) {
        let mut numbers = Numbers(seed.wrapping_mul(77) | 1);
        let made = Made::new(&mut numbers, (rows, cols), (bits, balanced && bits <= 2), group, kind);
        check(&made, tokens, seed, false);
    }
}

#[test]
fn every_variant_of_every_width_gives_the_same_bits() {
    for bits in 1..=8 {
        let mut numbers = Numbers(u64::from(bits) + 10);
        let kind = [Kind::Real, Kind::Integer, Kind::Symmetric][usize::from(bits) % 3];
        let group = [Some(96), None, Some(32), Some(128)][usize::from(bits) % 4];
        let made = Made::new(&mut numbers, (39, 600), (bits, false), group, kind);
        check(&made, 19, u64::from(bits), true);
    }
}

#[test]
fn scales_of_the_other_sign_give_products_of_the_other_sign() {
    for (bits, kind) in [(4, Kind::Symmetric), (2, Kind::Integer), (3, Kind::Real)] {
        let mut numbers = Numbers(u64::from(bits) + 30);
        let mut made = Made::new(&mut numbers, (39, 200), (bits, false), Some(64), kind);
        assert!(
            made.scale.iter().any(|scale| scale >> 15 == 1)
                && made.scale.iter().any(|scale| scale >> 15 == 0)
        );
        let (x, stride) = activations(&mut numbers, made.cols, 5);
        let plain = reference::product(&made.stored(), &x, stride, 5).unwrap();
        made.negate();
        let turned = reference::product(&made.stored(), &x, stride, 5).unwrap();
        assert!(plain.iter().zip(&turned).all(|(a, b)| *a == -*b), "w{bits} {kind:?}");
        check(&made, 5, u64::from(bits), true);
    }
}

#[test]
fn more_tokens_than_a_block_takes() {
    for (tokens, group, kind) in
        [(33, Some(64), Kind::Real), (65, None, Kind::Real), (130, Some(160), Kind::Symmetric)]
    {
        let mut numbers = Numbers(tokens as u64);
        let made = Made::new(&mut numbers, (50, 330), (3, false), group, kind);
        check(&made, tokens, tokens as u64, false);
    }
}

#[test]
fn fewer_slices_of_taller_matrices() {
    for rows in [8192, 12_288, 32_784] {
        let mut numbers = Numbers(rows as u64);
        let made = Made::new(&mut numbers, (rows, 72), (4, false), Some(32), Kind::Real);
        check(&made, 3, rows as u64, false);
    }
    let mut numbers = Numbers(3);
    let made = Made::new(&mut numbers, (8200, 200), (2, true), None, Kind::Symmetric);
    check(&made, 40, 2, false);
}

#[test]
fn gpus_with_less_shared_memory_have_a_variant_for_everything() {
    let mut numbers = Numbers(8);
    // What compute capability 8.6 has.
    let gpu = Gpu::new(Emulator::with_shared_limit(99 << 10));
    for bits in 1..=8 {
        let made = Made::new(&mut numbers, (32, 64), (bits, false), None, Kind::Real);
        let matrix = Matrix::upload(&gpu, &made.stored()).unwrap();
        for tokens in [1, 16, 33, 64, 100, 3000] {
            let suited = variants(&gpu, Weights::all(&matrix), tokens);
            assert!(
                suited.iter().any(|v| v.workspace_bytes(Weights::all(&matrix), tokens) == 0),
                "{bits} bits, {tokens} tokens: {suited:?}"
            );
            let panel = suited.iter().any(|variant| variant.to_string().starts_with("panel"));
            assert_eq!(panel, tokens > 16, "{bits} bits, {tokens} tokens: {suited:?}");
        }
    }
}

#[test]
fn some_rows_of_a_matrix_are_those_of_the_whole_and_are_added_at_the_end() {
    let mut numbers = Numbers(21);
    let (rows, cols, tokens) = (70, 136, 3);
    let made = Made::new(&mut numbers, (rows, cols), (4, false), Some(64), Kind::Real);
    let (x, stride) = activations(&mut numbers, cols, tokens);
    let bias: Vec<f32> = (0..rows).map(|_| numbers.float()).collect();
    let before: Vec<f32> = (0..tokens * rows).map(|_| numbers.float()).collect();
    let gpu = Gpu::new(Emulator::new());
    let all = reference::product(&made.stored(), &x, stride, tokens).unwrap();
    let matrix = Matrix::upload(&gpu, &made.stored()).unwrap();
    let bytes = workspace_bytes(&gpu, Weights::all(&matrix), tokens);
    let (x, workspace) = (gpu.upload(&x).unwrap(), Workspace::new(&gpu, bytes).unwrap());
    let (y, of_bias) = (gpu.upload(&before).unwrap(), gpu.upload(&bias).unwrap());
    let run = |first: usize, count: usize| {
        y.view().write(&before).unwrap();
        let operands = Product {
            x: x.view(),
            stride,
            tokens,
            y: y.view(),
            y_stride: rows,
            bias: of_bias.view().slice(4 * first..4 * rows).ok(),
            adds: true,
            workspace: Some(&workspace),
        };
        // A picker that tries shapes leaves no trace in y.
        product(
            &gpu,
            Weights { matrix: &matrix, first, rows: count, whole: rows },
            &operands,
            &Picker::trying(),
        )
    };
    for (first, count) in [(0, 20), (32, 16), (48, 22), (64, 6), (0, 70), (16, 0)] {
        run(first, count).unwrap();
        let found: Vec<f32> = y.view().read(tokens * rows).unwrap();
        for token in 0..tokens {
            let expected: Vec<f32> = (0..count)
                .map(|i| before[token * rows + i] + (all[token * rows + first + i] + bias[first + i]))
                .collect();
            assert!(same(&found[token * rows..][..count], &expected), "{first}, {count}");
        }
    }
    for (first, count) in [(8, 8), (64, 7), (0, usize::MAX)] {
        assert!(matches!(run(first, count), Err(Error::Invalid(_))), "{first}, {count}");
    }
}

#[test]
fn stacked_matrices_are_one_matrix() {
    let mut numbers = Numbers(6);
    let (cols, tokens) = (200, 2);
    let parts: Vec<Made> = [(32, Kind::Real), (16, Kind::Symmetric), (21, Kind::Integer)]
        .map(|(rows, kind)| Made::new(&mut numbers, (rows, cols), (3, false), Some(32), kind))
        .into();
    let (x, stride) = activations(&mut numbers, cols, tokens);
    let gpu = Gpu::new(Emulator::new());
    let stored: Vec<_> = parts.iter().map(Made::stored).collect();
    let matrix = Matrix::stack(&gpu, &stored).unwrap();
    let expected: Vec<Vec<f32>> =
        stored.iter().map(|part| reference::product(part, &x, stride, tokens).unwrap()).collect();
    let (x, y) = (gpu.upload(&x).unwrap(), gpu.allocate(4 * tokens * 69).unwrap());
    let operands = Product {
        x: x.view(),
        stride,
        tokens,
        y: y.view(),
        y_stride: 69,
        bias: None,
        adds: false,
        workspace: None,
    };
    product(&gpu, Weights::all(&matrix), &operands, &Picker::first()).unwrap();
    let found: Vec<f32> = y.view().read(tokens * 69).unwrap();
    for (token, found) in found.chunks(69).enumerate() {
        let of_token = |(part, rows): (&Vec<f32>, usize)| part[token * rows..][..rows].to_vec();
        let expected: Vec<f32> = expected.iter().zip([32, 16, 21]).flat_map(of_token).collect();
        // A sum of nothing but zeros may get the other sign where another part has offsets.
        assert!(found.iter().zip(&expected).all(|(a, b)| a == b), "token {token}");
    }
    // A strip belongs to one matrix.
    assert!(matches!(Matrix::stack(&gpu, &[stored[2], stored[0]]), Err(Error::Invalid(_))));
    let other = Made::new(&mut numbers, (16, cols), (4, false), Some(32), Kind::Real);
    assert!(matches!(Matrix::stack(&gpu, &[stored[0], other.stored()]), Err(Error::Invalid(_))));
}

#[test]
fn hostile_matrices_are_refused() {
    let gpu = Gpu::new(Emulator::new());
    let made = Made::new(&mut Numbers(4), (16, 64), (2, false), Some(32), Kind::Integer);
    let ok = made.stored();
    assert!(Matrix::upload(&gpu, &ok).is_ok());
    for wrong in [
        Stored { bits: 0, planes: 0, ..ok },
        Stored { bits: 9, planes: 9, ..ok },
        Stored { planes: 4, ..ok },
        Stored { rows: 17, ..ok },
        Stored { rows: 0, ..ok },
        Stored { cols: 65, ..ok },
        Stored { cols: usize::MAX, ..ok },
        Stored { group_size: Some(0), ..ok },
        Stored { group_size: Some(33), ..ok },
        Stored { group_size: None, ..ok },
        Stored { words: &ok.words[1..], ..ok },
        Stored { zero: Zero::Integer(&[1]), ..ok },
    ] {
        assert!(matches!(Matrix::upload(&gpu, &wrong), Err(Error::Invalid(_))), "{wrong:?}");
    }
}
