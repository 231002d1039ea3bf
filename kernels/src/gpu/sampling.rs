//! The next token, and what moves on with it.

use super::{Argument, Gpu, Launch, Result, View, size32};

/// `ids[0]` becomes the id of the largest logit (`F32 [vocab]`), of equals the lowest; 0 where the first logit is a NaN. Other
/// NaNs are never the largest.
///
/// # Errors
/// A buffer is too small; there are no logits; the launch fails.
pub fn argmax(gpu: &Gpu, logits: View<'_>, vocab: usize, ids: View<'_>) -> Result<()> {
    logits.require("logits", 4 * vocab.max(1))?;
    ids.require("ids", 4)?;
    gpu.launch(&Launch {
        file: "sampling",
        kernel: "argmax",
        grid: [1, 1, 1],
        block: 1024,
        shared: 256,
        arguments: &[logits.pointer(), Argument::U32(size32("vocabulary", vocab)?), ids.pointer()],
    })
}

/// `*position += tokens` (U32).
///
/// # Errors
/// The launch fails.
pub fn advance(gpu: &Gpu, position: View<'_>, tokens: usize) -> Result<()> {
    position.require("position", 4)?;
    gpu.launch(&Launch {
        file: "sampling",
        kernel: "advance",
        grid: [1, 1, 1],
        block: 1,
        shared: 0,
        arguments: &[position.pointer(), Argument::U32(size32("tokens", tokens)?)],
    })
}

/// Each of `count` logits l (F32) becomes `cap tanh(l / cap)`, by the operations of the processor's decoder.
///
/// # Errors
/// A buffer is too small; the launch fails.
pub fn soft_cap(gpu: &Gpu, logits: View<'_>, count: usize, cap: f32) -> Result<()> {
    logits.require("logits", 4 * count)?;
    if count == 0 {
        return Ok(());
    }
    gpu.launch(&Launch {
        file: "sampling",
        kernel: "soft_cap",
        grid: [size32("logits", count.div_ceil(256))?, 1, 1],
        block: 256,
        shared: 0,
        arguments: &[logits.pointer(), Argument::U64(count as u64), Argument::F32(cap)],
    })
}
