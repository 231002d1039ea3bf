//! The next token, and what moves on with it.

use crate::cpu::Limits;

use super::{Argument, Error, Gpu, Launch, Result, View, size32};

/// `ids[i]` becomes the id of the largest of row i of `rows` x `vocab` logits (F32), of equals the lowest; 0 where the first logit is
/// a NaN. Other NaNs are never the largest. `workspace` has [`argmax_workspace_bytes`] and lies at a multiple of 8.
///
/// # Errors
/// A buffer is too small; there are no logits; a launch fails.
pub fn argmax(
    gpu: &Gpu,
    logits: View<'_>,
    rows: usize,
    vocab: usize,
    workspace: View<'_>,
    ids: View<'_>,
) -> Result<()> {
    logits.require("logits", 4 * rows.max(1) * vocab.max(1))?;
    workspace.require("the workspace", argmax_workspace_bytes(rows, vocab))?;
    ids.require("ids", 4 * rows)?;
    if rows == 0 {
        return Ok(());
    }
    let count = size32("rows", rows)?;
    let blocks = size32("vocabulary", vocab)?.div_ceil(BEST_LOGITS);
    let launch = |kernel, grid, arguments: &[Argument]| {
        gpu.launch(&Launch {
            file: "sampling",
            kernel,
            grid,
            block: 256,
            shared: 8 * 8,
            arguments,
            overlaps: true,
        })
    };
    let (logits, vocab, parts) = (logits.pointer(), Argument::U32(vocab as u32), workspace.pointer());
    launch("argmax_parts", [blocks, count, 1], &[logits, vocab, parts])?;
    launch("argmax", [count, 1, 1], &[logits, vocab, parts, Argument::U32(blocks), ids.pointer()])
}

/// Logits of a block of [`argmax`].
const BEST_LOGITS: u32 = 2048;

/// Bytes of workspace of [`argmax`] for some rows.
#[must_use]
pub fn argmax_workspace_bytes(rows: usize, vocab: usize) -> usize {
    8 * rows * vocab.div_ceil(BEST_LOGITS as usize)
}

/// `positions[i] += tokens` for `count` sequences (U32).
///
/// # Errors
/// A buffer is too small; the launch fails.
pub fn advance(gpu: &Gpu, positions: View<'_>, count: usize, tokens: usize) -> Result<()> {
    positions.require("positions", 4 * count)?;
    if count == 0 {
        return Ok(());
    }
    gpu.launch(&Launch {
        file: "sampling",
        kernel: "advance",
        grid: [size32("sequences", count.div_ceil(128))?, 1, 1],
        block: 128,
        shared: 0,
        arguments: &[
            positions.pointer(),
            Argument::U32(size32("sequences", count)?),
            Argument::U32(size32("tokens", tokens)?),
        ],
        overlaps: true,
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
        overlaps: true,
    })
}

/// Bytes of workspace of [`draw`].
pub const DRAW_WORKSPACE_BYTES: usize =
    8 * (1 + SEARCHES * LEVELS * 3 + HISTOGRAM * (1 + SEARCHES * (LEVELS - 1)));
/// Top-k, top-p, the draw.
const SEARCHES: usize = 3;
/// Eight bits of a logit each.
const LEVELS: usize = 4;
/// Counts and weights.
const HISTOGRAM: usize = 2 * 256;
/// Tokens of a block.
const DRAW_TOKENS: usize = 2048;
/// So that all weights together fit 64 bits.
const MOST_TOKENS: usize = 1 << 22;

/// The operands of [`draw`].
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// `F32 [vocab]`.
    pub logits: View<'a>,
    /// How many.
    pub vocab: usize,
    /// Which tokens may be drawn.
    pub limits: Limits,
    /// U64: a number out of all there are.
    pub random: View<'a>,
    /// [`DRAW_WORKSPACE_BYTES`].
    pub workspace: View<'a>,
    /// U32: what is drawn.
    pub ids: View<'a>,
}

/// `ids[0]` becomes the token that [`crate::cpu::draw`] draws.
///
/// # Errors
/// Limits out of range; more than 2^22 logits, or none; a buffer is too small; a launch fails.
pub fn draw(gpu: &Gpu, d: &Draw<'_>) -> Result<()> {
    let Limits { temperature, top_k, top_p } = d.limits;
    if !d.limits.valid() {
        return Err(Error::Invalid(format!(
            "temperature {temperature} must be above 0, and top-p {top_p} above 0 and at most 1"
        )));
    }
    if d.vocab == 0 || d.vocab > MOST_TOKENS {
        return Err(Error::Unsupported(format!(
            "a vocabulary of {}: it must be 1 to {MOST_TOKENS}",
            d.vocab
        )));
    }
    d.logits.require("logits", 4 * d.vocab)?;
    d.random.require("the random number", 8)?;
    d.workspace.require("the workspace", DRAW_WORKSPACE_BYTES)?;
    d.ids.require("ids", 4)?;
    let top_k = if top_k < d.vocab { top_k } else { 0 };
    let [logits, vocab] = [d.logits.pointer(), Argument::U32(size32("vocabulary", d.vocab)?)];
    let workspace = d.workspace.pointer();
    let limits = [
        logits,
        vocab,
        Argument::F32(temperature),
        Argument::U32(top_k as u32),
        Argument::F32(top_p),
        d.random.pointer(),
    ];
    let blocks = d.vocab.div_ceil(DRAW_TOKENS) as u32;
    // What looks into histograms: sums of the warps, what was found, a total.
    let looking = 2 * 8 * 8 + 32 + 16;
    let launch = |kernel, blocks, block, shared, arguments: &[Argument]| {
        gpu.launch(&Launch {
            file: "sampling",
            kernel,
            grid: [blocks, 1, 1],
            block,
            shared,
            arguments,
            overlaps: true,
        })
    };
    launch("draw_clear", 1, 1024, 0, &[workspace])?;
    launch("draw_best", blocks, 256, 0, &[logits, vocab, workspace])?;
    let count = |search: usize, level: usize| {
        let mut arguments = limits.to_vec();
        arguments.extend([Argument::U32(search as u32), Argument::U32(level as u32), workspace]);
        launch("draw_count", blocks, 256, looking + 3 * 4 * 256, &arguments)
    };
    // The first level is the same for all.
    count(0, 0)?;
    let needed = [top_k != 0, top_p < 1.0, true];
    for search in (0..SEARCHES).filter(|&search| needed[search]) {
        (1..LEVELS).try_for_each(|level| count(search, level))?;
    }
    let mut arguments = limits.to_vec();
    arguments.extend([workspace, d.ids.pointer()]);
    launch("draw_pick", 1, 256, looking + 4 * 8, &arguments)
}
