//! Products of every variant: near the reference, and the same bits from all of them and from every encoding.

use half::f16;

use super::numbers::Numbers;
use super::{Court, Result};
use crate::gpu::dense::{self, Element};
use crate::gpu::fixed12::Matrix;
use crate::gpu::product::{Product, Variant, Weights, Workspace, product_in, variants};
use crate::gpu::reference;

/// What the sums of a tensor core may be off by, as a share of the sum of the terms' sizes.
const PRECISION: f32 = 1e-5;

/// Rows, columns, tokens, escapes in 1,024.
const SHAPES: [(usize, usize, usize, u64); 15] = [
    (1, 8, 1, 0),
    (39, 600, 5, 3),
    (150, 136, 19, 100),
    (20, 600, 31, 3),
    (130, 72, 33, 0),
    (33, 8, 64, 30),
    (17, 130, 65, 1024),
    (300, 64, 130, 1),
    (16, 17_920, 2, 40),
    (3, 17_920, 20, 90),
    (4096, 304, 3, 2),
    (8192, 136, 17, 0),
    (16_384, 72, 9, 5),
    (272, 4096, 128, 0),
    (2048, 1024, 300, 1),
];

fn padded(x: &[u16], cols: usize) -> (Vec<u16>, usize) {
    let stride = cols.next_multiple_of(64);
    let mut out = vec![0; x.len() / cols * stride];
    for (to, from) in out.chunks_mut(stride).zip(x.chunks(cols)) {
        to[..cols].copy_from_slice(from);
    }
    (out, stride)
}

/// Rows, columns and tokens for weights of F16 and F32.
const SHAPES_OF_PIECES: [(usize, usize, usize); 6] =
    [(1, 8, 1), (39, 600, 5), (150, 136, 19), (33, 12, 64), (8192, 136, 17), (2048, 1024, 128)];

pub(super) fn prove(court: &mut Court<'_>) -> Result<()> {
    for (seed, (rows, cols, tokens)) in SHAPES_OF_PIECES.into_iter().enumerate() {
        if court.too_large(3 * rows * cols * tokens) {
            continue;
        }
        let mut numbers = Numbers::new(71 + seed as u64);
        let (x, stride) = padded(&numbers.weights(tokens * cols, 0), cols);
        let single: Vec<f32> = numbers.floats(rows * cols, 0).iter().map(|w| w / 40.0).collect();
        let half: Vec<f16> = single.iter().map(|w| f16::from_f32(*w)).collect();
        let sizes: Vec<f32> = single.iter().map(|w| w.abs()).collect();
        let x_sizes: Vec<u16> = x.iter().map(|word| word & 0x7fff).collect();
        let allowed = reference::product_of_pieces(&sizes, |w| [w], rows, cols, &x_sizes, stride, tokens);
        let allowed: Vec<f32> = allowed.iter().map(|size| PRECISION * size).collect();
        let shape = format!("{rows} x {cols}, {tokens} tokens");
        let cut = |w: f16| reference::pieces::<2>(w.to_f32());
        let of_half = reference::product_of_pieces(&half, cut, rows, cols, &x, stride, tokens);
        let of_single =
            reference::product_of_pieces(&single, reference::pieces::<3>, rows, cols, &x, stride, tokens);
        court.case("product", &shape, |court| {
            let gpu = court.gpu;
            let words: Vec<u16> = half.iter().map(|w| w.to_bits()).collect();
            let x = gpu.upload(&x)?;
            for (name, element, table, expected) in [
                ("dense F16", Element::F16, dense::upload(gpu, rows, cols, &words)?, of_half),
                ("dense F32", Element::F32, dense::upload(gpu, rows, cols, &single)?, of_single),
            ] {
                let weights = Weights::plain(table.view(), element, rows, cols);
                let mut first: Option<Vec<f32>> = None;
                for variant in Variant::all(gpu, weights) {
                    let kernel = format!("{name} {variant}");
                    court.case(&kernel, &shape, |court| {
                        let workspace = Workspace::new(gpu, variant.workspace_bytes(weights, tokens))?;
                        let y = gpu.allocate(4 * tokens * rows)?;
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
                        product_in(gpu, weights, &operands, variant)?;
                        let found: Vec<f32> = y.view().read(tokens * rows)?;
                        match &first {
                            None => court.near(&kernel, &shape, &found, &expected, &allowed),
                            Some(first) => {
                                court.same(&kernel, &format!("{shape}, as the first"), &found, first)
                            }
                        }
                        first.get_or_insert(found);
                        Ok(())
                    })?;
                }
            }
            Ok(())
        })?;
    }
    for (seed, (rows, cols, tokens, odd)) in SHAPES.into_iter().enumerate() {
        if court.too_large(rows * cols * tokens) {
            continue;
        }
        let mut numbers = Numbers::new(31 + seed as u64);
        let words = numbers.weights(rows * cols, odd);
        let (x, stride) = padded(&numbers.weights(tokens * cols, 0), cols);
        let before: Vec<f32> = numbers.floats(tokens * rows, 0);
        let bias: Vec<f32> = numbers.floats(rows, 0);
        let mut expected = reference::product(&words, rows, cols, &x, stride, tokens);
        let sizes = |words: &[u16]| words.iter().map(|word| word & 0x7fff).collect::<Vec<u16>>();
        let mut allowed = reference::product(&sizes(&words), rows, cols, &sizes(&x), stride, tokens);
        for (i, (y, size)) in expected.iter_mut().zip(&mut allowed).enumerate() {
            *y = before[i] + (*y + bias[i % rows]);
            *size = PRECISION * (*size + bias[i % rows].abs() + before[i].abs());
        }
        let shape = format!("{rows} x {cols}, {tokens} tokens, {odd} in 1,024 escape");
        court.case("product", &shape, |court| {
            let gpu = court.gpu;
            let plain = dense::upload(gpu, rows, cols, &words)?;
            let encoded = Matrix::encode(gpu, rows, cols, &words)?;
            let (x, bias) = (gpu.upload(&x)?, gpu.upload(&bias)?);
            let mut first: Option<Vec<f32>> = None;
            for (name, weights) in
                [("dense", Weights::dense(plain.view(), rows, cols)), ("fixed12", Weights::fixed12(&encoded))]
            {
                // All there are where that is quick, else those that would be picked from.
                let all = if rows * cols * tokens < 1 << 20 {
                    Variant::all(gpu, weights)
                } else {
                    variants(gpu, weights, tokens)
                };
                for variant in all {
                    let kernel = format!("{name} {variant}");
                    court.case(&kernel, &shape, |court| {
                        let workspace = Workspace::new(gpu, variant.workspace_bytes(weights, tokens))?;
                        let y = gpu.upload(&before)?;
                        let operands = Product {
                            x: x.view(),
                            stride,
                            tokens,
                            y: y.view(),
                            y_stride: rows,
                            bias: Some(bias.view()),
                            adds: true,
                            workspace: Some(&workspace),
                        };
                        product_in(gpu, weights, &operands, variant)?;
                        let found: Vec<f32> = y.view().read(tokens * rows)?;
                        match &first {
                            None => court.near(&kernel, &shape, &found, &expected, &allowed),
                            Some(first) => {
                                court.same(&kernel, &format!("{shape}, as the first"), &found, first)
                            }
                        }
                        first.get_or_insert(found);
                        Ok(())
                    })?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}
