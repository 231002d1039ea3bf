//! Products with weights of which two of four are kept: the larger two, as often as the working set asks.

use llmpress_kernels::gpu::product::{Product, Weights, Workspace};
use llmpress_kernels::gpu::sparse24::{Matrix, Part};
use llmpress_kernels::gpu::{Gpu, Result};

use super::{Bench, KernelShape, Sample};

/// A matrix of two in four.
pub(super) struct Kept {
    pub(super) n: usize,
    pub(super) k: usize,
    /// `BF16 [n, k / 2]`.
    pub(super) values: Vec<u16>,
    /// `[n, ceil(k / 8)]`.
    pub(super) positions: Vec<u8>,
}

impl Kept {
    /// The two largest of each four of some words; none where there are no fours.
    pub(super) fn of(words: &[u16], n: usize, k: usize) -> Option<Self> {
        if k == 0 || !k.is_multiple_of(4) {
            return None;
        }
        let (mut values, mut positions) = (Vec::new(), Vec::new());
        for row in words.chunks_exact(k) {
            let mut nibbles = Vec::with_capacity(k / 4);
            for quad in row.chunks_exact(4) {
                let mut order = [0usize, 1, 2, 3];
                order.sort_by_key(|&i| std::cmp::Reverse(quad[i] & 0x7fff));
                let (first, second) = (order[0].min(order[1]), order[0].max(order[1]));
                values.extend([quad[first], quad[second]]);
                nibbles.push((first | second << 2) as u8);
            }
            positions.extend(nibbles.chunks(2).map(|two| two[0] | two.get(1).copied().unwrap_or(0) << 4));
        }
        Some(Self { n, k, values, positions })
    }

    /// A row with its zeros.
    pub(super) fn dense(&self, row: usize) -> Vec<u16> {
        let mut out = vec![0; self.k];
        let positions = &self.positions[row * self.k.div_ceil(8)..];
        for (quad, out) in out.chunks_exact_mut(4).enumerate() {
            let nibble = positions[quad / 2] >> (4 * (quad % 2));
            let from = &self.values[(row * self.k / 4 + quad) * 2..];
            (out[usize::from(nibble & 3)], out[usize::from(nibble >> 2 & 3)]) = (from[0], from[1]);
        }
        out
    }
}

/// The same matrix in a GPU's memory, plain and in fixed12.
pub(super) struct Copies {
    kept: Kept,
    plain: Vec<Matrix>,
    fixed12: Vec<Matrix>,
}

impl Copies {
    pub(super) fn new(
        gpu: &Gpu,
        words: &[u16],
        shape: &KernelShape,
        working_set: usize,
    ) -> Result<Option<Self>> {
        let Some(kept) = Kept::of(words, shape.n, shape.k) else { return Ok(None) };
        let stack = |in_fixed12: bool| {
            let bytes = Matrix::bytes_of(shape.n, shape.k, in_fixed12) as usize;
            let copies = working_set.div_ceil(bytes.max(1)).clamp(1, 64);
            let part =
                || Part { rows: kept.n, values: (&kept.values[..]).into(), positions: &kept.positions };
            (0..copies).map(|_| Matrix::stack(gpu, kept.k, &[part()], in_fixed12)).collect::<Result<Vec<_>>>()
        };
        let (plain, fixed12) = (stack(false)?, stack(true)?);
        Ok(Some(Self { kept, plain, fixed12 }))
    }
}

impl Bench<'_> {
    /// The rows of products with one shape's copies. `operands`: those of the other products.
    pub(super) fn sparse_products(
        &mut self,
        shape: &KernelShape,
        copies: &Copies,
        (x, stride): (&[u16], usize),
        operands: Product<'_>,
    ) -> Result<()> {
        let KernelShape { n, k, .. } = *shape;
        let dense: Vec<u16> = (0..n).flat_map(|row| copies.kept.dense(row)).collect();
        let reference = Sample::new(&dense, n, k, x, stride, operands.tokens);
        let mut first = None;
        for (kernel, matrices) in [("sparse24", &copies.plain), ("sparse24 fixed12", &copies.fixed12)] {
            let weights: Vec<Weights<'_>> = matrices.iter().map(Weights::sparse24).collect();
            let needed = weights.first().map_or(0, |w| w.workspace_bytes(self.gpu, operands.tokens));
            let workspace = Workspace::new(self.gpu, needed)?;
            let operands = Product { workspace: Some(&workspace), ..operands };
            self.variants(shape, kernel, &weights, &operands, &reference, &mut first)?;
        }
        Ok(())
    }
}
