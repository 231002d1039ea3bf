//! Products with weights of which two of four are kept: near the reference, and the same bits from every variant and from both forms of
//! the kept values.

use super::numbers::Numbers;
use super::{Court, Result};
use crate::gpu::product::{Product, Variant, Weights, Workspace, product_in, variants};
use crate::gpu::reference;
use crate::gpu::sparse24::{Matrix, Part};

/// What the sums of a tensor core may be off by, as a share of the sum of the terms' sizes.
const PRECISION: f32 = 1e-5;

/// Rows, columns, tokens, values in 1,024 that fixed12 has no code for.
const SHAPES: [(usize, usize, usize, u64); 10] = [
    (1, 4, 1, 0),
    (39, 600, 5, 3),
    (150, 136, 19, 100),
    (20, 604, 31, 3),
    (33, 12, 64, 30),
    (130, 192, 65, 1024),
    (16, 17_920, 2, 40),
    (4096, 304, 3, 2),
    (272, 4096, 128, 0),
    (2048, 1024, 1100, 1),
];

/// The nibbles that there are.
const NIBBLES: [u8; 6] = [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110];

pub(super) fn prove(court: &mut Court<'_>) -> Result<()> {
    for (seed, (rows, cols, tokens, odd)) in SHAPES.into_iter().enumerate() {
        if court.too_large(rows * cols * tokens) {
            continue;
        }
        let mut numbers = Numbers::new(53 + seed as u64);
        let values = numbers.weights(rows * cols / 2, odd);
        let mut row = |_| {
            let quads: Vec<u8> =
                (0..cols / 4).map(|_| NIBBLES[(numbers.next() >> 40) as usize % 6]).collect();
            quads.chunks(2).map(|two| two[0] | two.get(1).unwrap_or(&0) << 4).collect::<Vec<u8>>()
        };
        let positions: Vec<u8> = (0..rows).flat_map(&mut row).collect();
        let stride = cols.next_multiple_of(64);
        let mut x = vec![0; tokens * stride];
        for (to, from) in x.chunks_mut(stride).zip(numbers.weights(tokens * cols, 0).chunks(cols)) {
            to[..cols].copy_from_slice(from);
        }
        let of = |values: &[u16], x: &[u16]| {
            reference::sparse_product(values, &positions, rows, cols, x, stride, tokens)
        };
        let sizes = |words: &[u16]| words.iter().map(|word| word & 0x7fff).collect::<Vec<u16>>();
        let expected = of(&values, &x);
        let allowed: Vec<f32> = of(&sizes(&values), &sizes(&x)).iter().map(|size| PRECISION * size).collect();
        let shape = format!("{rows} x {cols}, {tokens} tokens, {odd} in 1,024 escape");
        court.case("sparse24", &shape, |court| {
            let gpu = court.gpu;
            let x = gpu.upload(&x)?;
            let mut first: Option<Vec<f32>> = None;
            for (name, in_fixed12) in [("sparse24", false), ("sparse24 fixed12", true)] {
                let part = Part { rows, values: (&values[..]).into(), positions: &positions };
                let matrix = Matrix::stack(gpu, cols, &[part], in_fixed12)?;
                let weights = Weights::sparse24(&matrix);
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
    Ok(())
}
