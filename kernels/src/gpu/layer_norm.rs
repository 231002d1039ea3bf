//! Layer norm of the residual stream (Ba et al., 2016).
//!
//! Sums are added in the order of [`rms_norm`](super::rms_norm): first those of features, then those of the squares of what is left without
//! their mean.

use super::{Argument, Gpu, Launch, Result, View, size32};

/// Threads of a block.
const THREADS: u32 = 1024;
/// Two sums of each warp.
const SHARED: u32 = 256;

/// `x[t] = (h[t] - mean) / sqrt(mean of (h[t] - mean)^2 + eps) * weight + bias`: h `F32 [tokens, hidden]`, weight and bias `F32 [hidden]`, x
/// `BF16 [tokens, ld]` with zeros from `hidden` on.
///
/// # Errors
/// A buffer is too small; the launch fails.
#[expect(clippy::too_many_arguments, reason = "the operands of a norm")]
pub fn layer_norm(
    gpu: &Gpu,
    h: View<'_>,
    weight: View<'_>,
    bias: Option<View<'_>>,
    hidden: usize,
    tokens: usize,
    eps: f32,
    x: View<'_>,
    ld: usize,
) -> Result<()> {
    h.require("the norm's input", 4 * tokens * hidden)?;
    weight.require("the norm's weight", 4 * hidden)?;
    if let Some(bias) = bias {
        bias.require("the norm's bias", 4 * hidden)?;
    }
    x.require("x", 2 * tokens * ld.max(hidden))?;
    if tokens == 0 {
        return Ok(());
    }
    gpu.launch(&Launch {
        file: "layer_norm",
        kernel: "layer_norm",
        grid: [size32("tokens", tokens)?, 1, 1],
        block: THREADS,
        shared: SHARED,
        arguments: &[
            h.pointer(),
            weight.pointer(),
            bias.map_or(Argument::Pointer(0), |bias| bias.pointer()),
            Argument::U32(size32("hidden", hidden)?),
            Argument::F32(eps),
            x.pointer(),
            Argument::U32(size32("ld", ld)?),
        ],
        overlaps: true,
    })
}
