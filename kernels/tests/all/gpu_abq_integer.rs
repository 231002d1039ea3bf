//! Integer products on a GPU equal their definition bit for bit, for every pair of widths and whatever the shape of block.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::abq::{Kind, Made, Numbers, kinds, same};
use llmpress_emulator::Emulator;
use llmpress_kernels::cpu;
use llmpress_kernels::cpu::abq::Stored;
use llmpress_kernels::gpu::abq::integer::{
    Matrix, Quantising, Variant, Weights, product, product_in, variants, workspace_bytes,
};
use llmpress_kernels::gpu::abq::reference;
use llmpress_kernels::gpu::picker::Picker;
use llmpress_kernels::gpu::product::{Product, Workspace};
use llmpress_kernels::gpu::reference::widen;
use llmpress_kernels::gpu::{Error, Gpu};
use proptest::prelude::*;

/// BF16 activations: rows of `stride`, what lies beyond the columns is not read.
fn activations(numbers: &mut Numbers, cols: usize, tokens: usize) -> (Vec<u16>, usize) {
    let stride = cols.next_multiple_of(64);
    // Tokens of one sign, of zeros, and of other sizes.
    let shift = [0.0f32, 2.0, -2.0, 1e-38];
    let x = (0..tokens * stride).map(|i| {
        let kind = (i / stride + cols) % 6;
        let value = match kind {
            5 => 0.0,
            3 => numbers.float() * 1e-38,
            _ => numbers.float() + shift[kind % 4],
        };
        half::bf16::from_f32(if i % stride < cols { value } else { f32::NAN }).to_bits()
    });
    (x.collect(), stride)
}

fn widened(x: &[u16], stride: usize, cols: usize) -> Vec<f32> {
    x.chunks(stride).flat_map(|x| x[..cols].iter().map(|x| widen(*x))).collect()
}

/// The product of the processor's kernels.
fn on_processor(stored: &Stored<'_>, x: &[f32], tokens: usize) -> Vec<f32> {
    let matrix = cpu::abq::Matrix::new(stored).unwrap();
    let mut panel = vec![0.0; x.len()];
    for (i, x) in x.iter().enumerate() {
        panel[i % stored.cols * tokens + i / stored.cols] = *x;
    }
    let mut inputs = cpu::abq::Inputs::default();
    matrix.prepare(&panel, tokens, &mut inputs).unwrap();
    let mut out = vec![0.0; stored.rows * tokens];
    matrix.multiply(0..stored.rows, &inputs, &mut out);
    (0..out.len()).map(|i| out[i % stored.rows * tokens + i / stored.rows]).collect()
}

/// All variants, or those that suit, give the bits of the definition.
fn check(made: &mut Made, bits: u8, tokens: usize, seed: u64, every: bool) {
    made.activation_bits = Some(bits);
    let mut numbers = Numbers(seed | 1);
    let stored = made.stored();
    let (x, stride) = activations(&mut numbers, made.cols, tokens);
    let wide = widened(&x, stride, made.cols);
    let expected = reference::integer_product(&stored, &wide, u32::from(bits)).unwrap();
    assert!(same(&on_processor(&stored, &wide, tokens), &expected), "the processor");
    let gpu = Gpu::new(if seed & 2 == 0 { Emulator::new() } else { Emulator::backwards() });
    let matrix = Matrix::upload(&gpu, &stored).unwrap();
    let weights = Weights::all(&matrix);
    let all = if every { Variant::all(&gpu, weights) } else { variants(&gpu, weights, tokens) };
    assert!(!all.is_empty());
    let most = all.iter().map(|variant| variant.workspace_bytes(weights, tokens)).max().unwrap();
    let workspace = Workspace::new(&gpu, most).unwrap();
    let (narrow, fault) = (gpu.upload(&x).unwrap(), gpu.upload(&[0u32]).unwrap());
    let all_wide: Vec<f32> = x.iter().map(|x| widen(*x)).collect();
    let wide = gpu.upload(&all_wide).unwrap();
    for (i, variant) in all.into_iter().enumerate() {
        let y_stride = made.rows + 3;
        let y = gpu.upload(&vec![7.0f32; tokens * y_stride]).unwrap();
        let is_wide = (seed as usize + i).is_multiple_of(3);
        let operands = Product {
            x: if is_wide { wide.view() } else { narrow.view() },
            stride,
            tokens,
            y: y.view(),
            y_stride,
            bias: None,
            adds: false,
            workspace: Some(&workspace),
        };
        let quantising = Quantising { wide: is_wide, fault: Some((fault.view(), 5)) };
        let what = format!(
            "w{}{} {:?} {:?} a{bits}, {} x {}, {tokens} tokens, {variant:?}",
            made.bits,
            if made.balanced { "*" } else { "" },
            made.group_size,
            made.kind,
            made.rows,
            made.cols
        );
        product_in(&gpu, weights, &operands, &quantising, variant).unwrap_or_else(|e| panic!("{what}: {e}"));
        let found: Vec<f32> = y.view().read(tokens * y_stride).unwrap();
        for (found, expected) in found.chunks(y_stride).zip(expected.chunks(made.rows)) {
            let (found, rest) = found.split_at(made.rows);
            assert!(same(found, expected), "{what}\n{found:?}\n{expected:?}");
            assert_eq!(rest, [7.0; 3]);
        }
    }
    assert_eq!(fault.view().read::<u32>(1).unwrap(), [0]);
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
        let wide = widened(&x, stride, made.cols);
        let plain = reference::integer_product(&made.stored(), &wide, 8).unwrap();
        made.negate();
        let turned = reference::integer_product(&made.stored(), &wide, 8).unwrap();
        assert!(plain.iter().zip(&turned).all(|(a, b)| *a == -*b), "w{bits} {kind:?}");
        check(&mut made, 8, 5, u64::from(bits), true);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn integer_products_follow_their_definition(
        seed in any::<u64>(), rows in 1usize..70, cols in 1usize..600, tokens in 1usize..20, bits in 1u8..=8,
        activation_bits in 1u8..=8, balanced in any::<bool>(), kind in kinds(),
        group in prop_oneof![Just(None), (1usize..9).prop_map(|n| Some(32 * n)), Just(Some(256))],
    ) {
        let mut numbers = Numbers(seed.wrapping_mul(77) | 1);
        let mut made = Made::new(&mut numbers, (rows, cols), (bits, balanced && bits <= 2), group, kind);
        check(&mut made, activation_bits, tokens, seed, false);
    }
}

#[test]
fn every_pair_of_widths() {
    for bits in 1..=8u8 {
        for activation_bits in 1..=8u8 {
            let mut numbers = Numbers(u64::from(bits * 16 + activation_bits));
            let kind = [Kind::Real, Kind::Integer, Kind::Symmetric][usize::from(bits + activation_bits) % 3];
            let group = [None, Some(128), Some(64)][usize::from(bits * 3 + activation_bits) % 3];
            let mut made = Made::new(&mut numbers, (18, 300), (bits, false), group, kind);
            check(&mut made, activation_bits, 3, u64::from(bits), true);
        }
    }
}

#[test]
fn more_tokens_and_more_groups_than_a_block_takes() {
    for (tokens, group, bits) in [(33, Some(32), 4), (65, None, 8), (70, Some(96), 3)] {
        let mut numbers = Numbers(tokens as u64);
        let mut made = Made::new(&mut numbers, (40, 1700), (bits, false), group, Kind::Real);
        check(&mut made, bits, tokens, tokens as u64, true);
    }
}

#[test]
fn extremes_do_not_overflow() {
    // The most that a piece of a group adds up to, and two pieces.
    let (rows, cols) = (3, 40_000);
    let mut made = Made::new(&mut Numbers(3), (rows, cols), (8, false), None, Kind::Integer);
    made.words = vec![u32::MAX; 8 * rows * cols.div_ceil(32)];
    made.zero = vec![0, 255, 7];
    made.activation_bits = Some(8);
    let gpu = Gpu::new(Emulator::new());
    let matrix = Matrix::upload(&gpu, &made.stored()).unwrap();
    let weights = Weights::all(&matrix);
    let x: Vec<u16> =
        [1.0f32, -1.0].iter().flat_map(|x| vec![half::bf16::from_f32(*x).to_bits(); cols]).collect();
    let wide: Vec<f32> = x.iter().map(|x| widen(*x)).collect();
    let expected = reference::integer_product(&made.stored(), &wide, 8).unwrap();
    let x = gpu.upload(&x).unwrap();
    for variant in variants(&gpu, weights, 2) {
        let workspace = Workspace::new(&gpu, variant.workspace_bytes(weights, 2)).unwrap();
        let y = gpu.allocate(4 * 2 * rows).unwrap();
        let operands = Product {
            x: x.view(),
            stride: cols,
            tokens: 2,
            y: y.view(),
            y_stride: rows,
            bias: None,
            adds: false,
            workspace: Some(&workspace),
        };
        product_in(&gpu, weights, &operands, &Quantising::default(), variant).unwrap();
        let found: Vec<f32> = y.view().read(2 * rows).unwrap();
        assert!(same(&found, &expected), "{variant:?}: {found:?} {expected:?}");
    }
}

#[test]
fn activations_that_are_not_finite_are_told_by_their_label() {
    let mut numbers = Numbers(5);
    let mut made = Made::new(&mut numbers, (20, 140), (4, false), None, Kind::Real);
    made.activation_bits = Some(8);
    let gpu = Gpu::new(Emulator::new());
    let matrix = Matrix::upload(&gpu, &made.stored()).unwrap();
    let weights = Weights::all(&matrix);
    let run = |odd: &[f32], fault: &llmpress_kernels::gpu::Buffer, label| {
        let mut x = vec![0.5f32; 3 * 192];
        x[192 + 100..][..odd.len()].copy_from_slice(odd);
        let x = gpu.upload(&x).unwrap();
        let y = gpu.allocate(4 * 3 * 20).unwrap();
        let bytes = workspace_bytes(&gpu, weights, 3);
        let workspace = Workspace::new(&gpu, bytes).unwrap();
        let operands = Product {
            x: x.view(),
            stride: 192,
            tokens: 3,
            y: y.view(),
            y_stride: 20,
            bias: None,
            adds: false,
            workspace: Some(&workspace),
        };
        let quantising = Quantising { wide: true, fault: Some((fault.view(), label)) };
        product(&gpu, weights, &operands, &quantising, &Picker::trying())
            .map(|()| y.view().read::<f32>(60).unwrap())
    };
    let fine = gpu.upload(&[0u32]).unwrap();
    let y = run(&[], &fine, 3).unwrap();
    assert_eq!(fine.view().read::<u32>(1).unwrap(), [0]);
    for odd in [&[f32::NAN][..], &[f32::INFINITY], &[f32::NEG_INFINITY], &[3e38, -3e38]] {
        let fault = gpu.upload(&[0u32]).unwrap();
        let found = run(odd, &fault, 3).unwrap();
        // The first one stays, other tokens are what they were.
        run(odd, &fault, 9).unwrap();
        assert_eq!(fault.view().read::<u32>(1).unwrap(), [3], "{odd:?}");
        assert!(same(&found[..20], &y[..20]) && same(&found[40..], &y[40..]));
    }
    assert!(matches!(run(&[], &fine, 0), Err(Error::Invalid(_))));
}

#[test]
fn some_rows_are_those_of_the_whole_and_are_added_at_the_end() {
    let mut numbers = Numbers(21);
    let (rows, cols, tokens) = (70, 136, 3);
    let mut made = Made::new(&mut numbers, (rows, cols), (4, false), Some(64), Kind::Real);
    made.activation_bits = Some(6);
    let (x, stride) = activations(&mut numbers, cols, tokens);
    let bias: Vec<f32> = (0..rows).map(|_| numbers.float()).collect();
    let before: Vec<f32> = (0..tokens * rows).map(|_| numbers.float()).collect();
    let gpu = Gpu::new(Emulator::new());
    let all = reference::integer_product(&made.stored(), &widened(&x, stride, cols), 6).unwrap();
    let matrix = Matrix::upload(&gpu, &made.stored()).unwrap();
    let bytes = workspace_bytes(&gpu, Weights::all(&matrix), tokens);
    let (x, workspace) = (gpu.upload(&x).unwrap(), Workspace::new(&gpu, bytes).unwrap());
    let (y, of_bias) = (gpu.upload(&before).unwrap(), gpu.upload(&bias).unwrap());
    let run = |first: usize, count: usize, workspace| {
        y.view().write(&before).unwrap();
        let operands = Product {
            x: x.view(),
            stride,
            tokens,
            y: y.view(),
            y_stride: rows,
            bias: of_bias.view().slice(4 * first..4 * rows).ok(),
            adds: true,
            workspace,
        };
        let weights = Weights { matrix: &matrix, first, rows: count };
        product(&gpu, weights, &operands, &Quantising::default(), &Picker::trying())
    };
    for (first, count) in [(0, 20), (32, 16), (48, 22), (64, 6), (0, 70), (16, 0)] {
        run(first, count, Some(&workspace)).unwrap();
        let found: Vec<f32> = y.view().read(tokens * rows).unwrap();
        for token in 0..tokens {
            let expected: Vec<f32> = (0..count)
                .map(|i| before[token * rows + i] + (all[token * rows + first + i] + bias[first + i]))
                .collect();
            assert!(same(&found[token * rows..][..count], &expected), "{first}, {count}");
        }
    }
    for (first, count) in [(8, 8), (64, 7), (0, usize::MAX)] {
        assert!(matches!(run(first, count, Some(&workspace)), Err(Error::Invalid(_))), "{first}, {count}");
    }
    assert!(matches!(run(0, 16, None), Err(Error::Invalid(_))));
}
