//! Root mean square norm of the residual stream (Zhang and Sennrich).
//!
//! Thread t of 1,024 adds the squares of features t, t + 1024, ... with fused multiply-adds; then lanes 16, 8, 4, 2 and 1
//! apart are added, then the 32 warps likewise.

use super::{Argument, Gpu, Launch, Result, View, size32};

/// Threads of a block.
const THREADS: u32 = 1024;
/// A sum of each warp.
const SHARED: u32 = 128;

/// `x[t] = h[t] / sqrt(mean h[t]^2 + eps) * weight`: h `F32 [tokens, hidden]`, weight `F32 [hidden]`, x `BF16 [tokens, ld]` with
/// zeros from `hidden` on.
///
/// # Errors
/// A buffer is too small; `ld` is smaller than `hidden`; the launch fails.
#[expect(clippy::too_many_arguments, reason = "the operands of a norm")]
pub fn rms_norm(
    gpu: &Gpu,
    h: View<'_>,
    weight: View<'_>,
    hidden: usize,
    tokens: usize,
    eps: f32,
    x: View<'_>,
    ld: usize,
) -> Result<()> {
    check(h, weight, hidden, tokens)?;
    x.require("x", 2 * tokens * ld.max(hidden))?;
    let arguments = [
        h.pointer(),
        weight.pointer(),
        Argument::U32(size32("hidden", hidden)?),
        Argument::F32(eps),
        x.pointer(),
        Argument::U32(size32("ld", ld)?),
    ];
    launch(gpu, "rms_norm", tokens, &arguments)
}

/// `h[t] += y[t] / sqrt(mean y[t]^2 + eps) * weight`: the norm of a sub-layer's output, all F32.
///
/// # Errors
/// A buffer is too small; the launch fails.
pub fn add_rms_norm(
    gpu: &Gpu,
    y: View<'_>,
    weight: View<'_>,
    hidden: usize,
    tokens: usize,
    eps: f32,
    h: View<'_>,
) -> Result<()> {
    check(y, weight, hidden, tokens)?;
    h.require("h", 4 * tokens * hidden)?;
    let arguments = [
        y.pointer(),
        weight.pointer(),
        Argument::U32(size32("hidden", hidden)?),
        Argument::F32(eps),
        h.pointer(),
    ];
    launch(gpu, "add_rms_norm", tokens, &arguments)
}

fn check(h: View<'_>, weight: View<'_>, hidden: usize, tokens: usize) -> Result<()> {
    h.require("the norm's input", 4 * tokens * hidden)?;
    weight.require("the norm's weight", 4 * hidden)
}

fn launch(gpu: &Gpu, kernel: &'static str, tokens: usize, arguments: &[Argument]) -> Result<()> {
    if tokens == 0 {
        return Ok(());
    }
    let grid = [size32("tokens", tokens)?, 1, 1];
    gpu.launch(&Launch {
        file: "rms_norm",
        kernel,
        grid,
        block: THREADS,
        shared: SHARED,
        arguments,
        overlaps: true,
    })
}
