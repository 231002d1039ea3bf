//! Root mean square norm of the residual stream (Zhang and Sennrich).
//!
//! Thread t of 1,024 adds the squares of features t, t + 1024, ... with fused multiply-adds; then lanes 16, 8, 4, 2 and 1
//! apart are added, then the 32 warps likewise.

use super::{Argument, Error, Gpu, Launch, Result, View, size32};

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

/// `y[t] = y[t] / sqrt(mean y[t]^2 + eps) * weight` in place: y `F32 [tokens, width]` with rows `stride` apart, weight `F32 [width]`.
///
/// # Errors
/// A buffer is too small; rows overlap; the launch fails.
pub fn rms_norm_rows(
    gpu: &Gpu,
    y: View<'_>,
    stride: usize,
    weight: View<'_>,
    width: usize,
    tokens: usize,
    eps: f32,
) -> Result<()> {
    if stride < width {
        return Err(Error::Invalid(format!("rows of {width} elements, {stride} apart")));
    }
    y.require("the norm's input", 4 * (tokens.saturating_sub(1) * stride + width))?;
    weight.require("the norm's weight", 4 * width)?;
    let arguments = [
        y.pointer(),
        Argument::U32(size32("stride", stride)?),
        weight.pointer(),
        Argument::U32(size32("width", width)?),
        Argument::F32(eps),
    ];
    launch(gpu, "rms_norm_rows", tokens, &arguments)
}

/// `x[t] = h[t]` in BF16: h `F32 [tokens, hidden]`, x `BF16 [tokens, ld]` with zeros from `hidden` on.
///
/// # Errors
/// A buffer is too small; the launch fails.
pub fn round_rows(
    gpu: &Gpu,
    h: View<'_>,
    hidden: usize,
    tokens: usize,
    x: View<'_>,
    ld: usize,
) -> Result<()> {
    h.require("h", 4 * tokens * hidden)?;
    x.require("x", 2 * tokens * ld.max(hidden))?;
    let arguments = [
        h.pointer(),
        Argument::U32(size32("hidden", hidden)?),
        x.pointer(),
        Argument::U32(size32("ld", ld)?),
    ];
    launch(gpu, "round_rows", tokens, &arguments)
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
