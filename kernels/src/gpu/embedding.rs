//! Rows of an embedding, widened and scaled.

use super::attention::Sequences;
use super::dense::{Element, row_stride};
use super::fixed12::Matrix;
use super::{Argument, Gpu, Launch, Result, View, size32};

/// Tokens of a step: ids in device memory, and where the residual stream goes.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// `U32 [tokens]`. An id beyond the vocabulary reads the last row.
    pub ids: View<'a>,
    /// How many.
    pub tokens: usize,
    /// What each element is multiplied by.
    pub scale: f32,
    /// `F32 [tokens, hidden]`.
    pub h: View<'a>,
}

impl Gather<'_> {
    fn launch(&self, gpu: &Gpu, kernel: &'static str, hidden: usize, table: &[Argument]) -> Result<()> {
        self.ids.require("ids", 4 * self.tokens)?;
        self.h.require("h", 4 * self.tokens * hidden)?;
        if self.tokens == 0 {
            return Ok(());
        }
        let mut arguments = table.to_vec();
        arguments.extend([self.ids.pointer(), Argument::F32(self.scale), self.h.pointer()]);
        gpu.launch(&Launch {
            file: "embedding",
            kernel,
            grid: [size32("tokens", self.tokens)?, 1, 1],
            block: 256,
            shared: 0,
            arguments: &arguments,
            overlaps: true,
        })
    }
}

/// `h[t] = table[ids[t]] * scale` from `[vocab, hidden]` of such elements, its rows [`row_stride`] apart.
///
/// # Errors
/// A buffer is too small; the table is empty; the launch fails.
pub fn embed(
    gpu: &Gpu,
    table: View<'_>,
    element: Element,
    vocab: usize,
    hidden: usize,
    gather: &Gather<'_>,
) -> Result<()> {
    let stride = row_stride(hidden);
    table.require("the embedding", element.bytes() * vocab.max(1) * stride)?;
    let [hidden32, stride] = [size32("hidden", hidden)?, size32("hidden", stride)?].map(Argument::U32);
    let table = [table.pointer(), Argument::U64(vocab as u64), hidden32, stride];
    let kernel = match element {
        Element::Bf16 => "embed_bf16",
        Element::F16 => "embed_f16",
        Element::F32 => "embed_f32",
    };
    gather.launch(gpu, kernel, hidden, &table)
}

/// The same from a fixed12 matrix.
///
/// # Errors
/// A buffer is too small; the launch fails.
pub fn embed_fixed12(gpu: &Gpu, table: &Matrix, gather: &Gather<'_>) -> Result<()> {
    let mut arguments = table.components_from(0).to_vec();
    arguments.extend([Argument::U64(table.rows() as u64), Argument::U32(size32("hidden", table.cols())?)]);
    gather.launch(gpu, "embed_fixed12", table.cols(), &arguments)
}

/// `h[t] += table[position of t]`: table `F32 [rows, hidden]` of learned positions, h `F32 [tokens, hidden]`. A position beyond the table reads its last
/// row.
///
/// # Errors
/// A buffer is too small; the table is empty; the launch fails.
pub fn add_positions(
    gpu: &Gpu,
    table: View<'_>,
    rows: usize,
    hidden: usize,
    sequences: Sequences<'_>,
    h: View<'_>,
) -> Result<()> {
    sequences.check()?;
    table.require("the positions' embedding", 4 * rows.max(1) * hidden)?;
    h.require("h", 4 * sequences.tokens() * hidden)?;
    if sequences.tokens() == 0 {
        return Ok(());
    }
    gpu.launch(&Launch {
        file: "embedding",
        kernel: "add_positions",
        grid: [size32("tokens", sequences.tokens())?, 1, 1],
        block: 256,
        shared: 0,
        arguments: &[
            table.pointer(),
            Argument::U32(size32("positions", rows)?),
            Argument::U32(size32("hidden", hidden)?),
            sequences.positions.pointer(),
            Argument::U32(size32("tokens", sequences.each)?),
            h.pointer(),
        ],
        overlaps: true,
    })
}
