//! Sums of blocks of activations.

use super::{Argument, Error, Gpu, Launch, Result, View, size32};

/// Threads of a block of the kernel.
const THREADS: usize = 256;

/// `out[t][j]`: the sum of `block` consecutive inputs of token t from `j * block` on, of those that there are. x `BF16 [tokens, stride]`,
/// of whose rows `cols` count; out `BF16 [tokens, out_stride]`, zero past the last sum. Added in order in F32, then rounded.
///
/// # Errors
/// A buffer is too small; rows of `out` that do not hold all sums; the launch fails.
#[expect(clippy::too_many_arguments, reason = "the operands, with their sizes")]
pub fn block_sums(
    gpu: &Gpu,
    x: View<'_>,
    stride: usize,
    tokens: usize,
    cols: usize,
    block: usize,
    out: View<'_>,
    out_stride: usize,
) -> Result<()> {
    if tokens == 0 || out_stride == 0 {
        return Ok(());
    }
    if block == 0 || cols > stride || cols.div_ceil(block) > out_stride {
        return Err(Error::Invalid(format!(
            "sums of {block} of {cols} columns, rows of {stride}, into rows of {out_stride}"
        )));
    }
    let bytes = |elements: usize| tokens.checked_mul(elements).and_then(|n| n.checked_mul(2));
    let too_large = || Error::Invalid(format!("sums of {tokens} tokens: too large"));
    x.require("x", bytes(stride).ok_or_else(too_large)?)?;
    let needed = bytes(out_stride).ok_or_else(too_large)?;
    out.require("the sums", needed)?;
    gpu.launch(&Launch {
        file: "block_sums",
        kernel: "block_sums",
        grid: [size32("sums", (needed / 2).div_ceil(THREADS))?, 1, 1],
        block: THREADS as u32,
        shared: 0,
        arguments: &[
            x.pointer(),
            Argument::U32(size32("the stride of x", stride)?),
            Argument::U32(size32("tokens", tokens)?),
            Argument::U32(size32("input features", cols)?),
            Argument::U32(size32("columns of a sum", block)?),
            out.pointer(),
            Argument::U32(size32("the stride of sums", out_stride)?),
        ],
        overlaps: true,
    })
}
