//! Experts: which ones a token goes through, and the products of all of them in one launch each.
//!
//! ```text
//! logits -> route -> choices -> group -> slots by expert, jobs -> product -> combine -> h
//! ```
//!
//! Choice k of token t is slot `t top_k + k`; a token's choices are kept in the order of the experts' numbers. Everything is decided
//! on the device: grids have room for the most jobs that there may be, so that a step can be recorded.

use super::dense::{Element, row_stride};
use super::fixed12::ExpertMatrix;
use super::product::{expert_shared_bytes, slices};
use super::{Argument, Error, Gpu, Launch, Result, View, size32};

/// Warps of a block that routes, a token each.
const ROUTE_WARPS: usize = 4;
/// Threads of the block that groups: an expert each.
const GROUP_THREADS: usize = 1024;
/// Choices of a token: a lane each.
const MOST_CHOICES: usize = 32;
/// Rows of a stream's strip, and of a panel's block.
const STREAM_ROWS: usize = 16;
const PANEL_ROWS: usize = 128;
const WARPS: usize = 8;

/// How tokens find their experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    /// How many there are.
    pub experts: usize,
    /// How many a token goes through.
    pub top_k: usize,
    /// Whether a token's weights are made to add up to one.
    pub normalise: bool,
}

impl Routing {
    /// Refuses what the kernels do not do.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check(self) -> Result<()> {
        let Self { experts, top_k, .. } = self;
        if top_k == 0 || top_k > experts || experts > GROUP_THREADS || top_k > MOST_CHOICES {
            return Err(Error::Unsupported(format!(
                "{top_k} of {experts} experts; a GPU takes up to {MOST_CHOICES} of {GROUP_THREADS}"
            )));
        }
        Ok(())
    }

    /// Slots of so many tokens.
    #[must_use]
    pub fn slots(self, tokens: usize) -> usize {
        tokens * self.top_k
    }

    /// The most jobs of so many tokens: each expert may have one that is not full.
    #[must_use]
    pub fn jobs(self, tokens: usize, width: Width) -> usize {
        let slots = self.slots(tokens);
        slots.min(self.experts) + slots / width.slots()
    }

    /// Bytes of [`Plan`]'s buffers for up to `tokens` tokens: choices, weights, slots, jobs, counts.
    #[must_use]
    pub fn bytes(self, tokens: usize) -> [usize; 5] {
        let slots = 4 * self.slots(tokens).max(1);
        [slots, slots, slots, 16 * self.jobs(tokens, Width::Stream8).max(1), 4 * self.experts]
    }
}

/// Slots of a job, and the loop that takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// Eight, weights streamed.
    Stream8,
    /// 32, weights streamed.
    Stream32,
    /// 64, with their activations in shared memory.
    Panel64,
}

impl Width {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Stream8, Self::Stream32, Self::Panel64];

    /// Slots of a job.
    #[must_use]
    pub fn slots(self) -> usize {
        match self {
            Self::Stream8 => 8,
            Self::Stream32 => 32,
            Self::Panel64 => 64,
        }
    }

    /// The one for so many tokens: wide enough for the slots of an expert that has its share.
    #[must_use]
    pub fn of(gpu: &Gpu, routing: Routing, tokens: usize, weights: &[ExpertWeights<'_>]) -> Self {
        let slots = routing.slots(tokens);
        let share = slots.div_ceil(slots.min(routing.experts).max(1));
        let fits = |width: Self| weights.iter().all(|weights| weights.fits(gpu, width));
        match share {
            0..=8 => Self::Stream8,
            33.. if fits(Self::Panel64) => Self::Panel64,
            _ if fits(Self::Stream32) => Self::Stream32,
            _ => Self::Stream8,
        }
    }
}

/// Which slots belong to which expert: buffers of [`Routing::bytes`].
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// `U32 [slots]`: a token's experts, ascending.
    pub chosen: View<'a>,
    /// `F32 [slots]`.
    pub weights: View<'a>,
    /// `U32 [slots]`: those of expert 0 first.
    pub slots: View<'a>,
    /// `U32 [jobs, 4]`.
    pub jobs: View<'a>,
    /// `U32 [experts]`: slots of each.
    pub counts: View<'a>,
}

/// Finds the experts of tokens by their logits (`F32 [tokens, experts]`): the softmax over all experts, of which a token takes the
/// `top_k` largest, of equals the first.
///
/// # Errors
/// More experts than a GPU takes; a buffer is too small; the launch fails.
pub fn route(gpu: &Gpu, routing: Routing, logits: View<'_>, tokens: usize, plan: &Plan<'_>) -> Result<()> {
    let Routing { experts, top_k, normalise } = routing;
    routing.check()?;
    logits.require("the router's logits", 4 * tokens * experts)?;
    plan.chosen.require("choices", 4 * routing.slots(tokens))?;
    plan.weights.require("weights of choices", 4 * routing.slots(tokens))?;
    if tokens == 0 {
        return Ok(());
    }
    gpu.launch(&Launch {
        file: "experts",
        kernel: "route_tokens",
        grid: [size32("tokens", tokens.div_ceil(ROUTE_WARPS))?, 1, 1],
        block: 32 * ROUTE_WARPS as u32,
        shared: (4 * ROUTE_WARPS * experts).next_multiple_of(16) as u32,
        arguments: &[
            logits.pointer(),
            Argument::U32(size32("tokens", tokens)?),
            Argument::U32(experts as u32),
            Argument::U32(top_k as u32),
            Argument::U32(u32::from(normalise)),
            plan.chosen.pointer(),
            plan.weights.pointer(),
        ],
        overlaps: true,
    })
}

/// Puts the slots of tokens that were routed in the order of their experts, and cuts them into jobs.
///
/// # Errors
/// More experts than a GPU takes; a buffer is too small; the launch fails.
pub fn group(gpu: &Gpu, routing: Routing, tokens: usize, width: Width, plan: &Plan<'_>) -> Result<()> {
    routing.check()?;
    let (slots, jobs) = (routing.slots(tokens), routing.jobs(tokens, width));
    plan.chosen.require("choices", 4 * slots)?;
    plan.slots.require("slots", 4 * slots)?;
    plan.jobs.require("jobs", 16 * jobs)?;
    plan.jobs.require_aligned("jobs", 16)?;
    plan.counts.require("counts of experts", 4 * routing.experts)?;
    let piece = |words: usize| (4 * words).next_multiple_of(16);
    gpu.launch(&Launch {
        file: "experts",
        kernel: "group_tokens",
        grid: [1, 1, 1],
        block: GROUP_THREADS as u32,
        shared: (2 * piece(routing.experts) + 2 * piece(GROUP_THREADS / 32)) as u32,
        arguments: &[
            plan.chosen.pointer(),
            Argument::U32(size32("slots", slots)?),
            Argument::U32(routing.experts as u32),
            Argument::U32(width.slots() as u32),
            Argument::U32(size32("jobs", jobs)?),
            plan.slots.pointer(),
            plan.jobs.pointer(),
            plan.counts.pointer(),
        ],
        overlaps: true,
    })
}

/// The weights of all experts of a layer for one of their products.
#[derive(Clone, Copy, Debug)]
pub enum ExpertWeights<'a> {
    /// Plain, each expert's `[rows, cols]` with rows of [`row_stride`] elements.
    Dense {
        /// The elements.
        words: View<'a>,
        /// Of which kind.
        element: Element,
        /// `U64 [experts]`: where each one's begin, which must be inside `words` with all its rows.
        firsts: View<'a>,
        /// Output features of an expert.
        rows: usize,
        /// Input features.
        cols: usize,
        /// Rows of the matrix that these are part of.
        whole: usize,
    },
    /// fixed12.
    Fixed12 {
        /// All of them.
        matrix: &'a ExpertMatrix,
        /// Rows of the matrix that these are part of.
        whole: usize,
    },
}

impl ExpertWeights<'_> {
    fn shape(&self) -> (usize, usize, usize) {
        match self {
            Self::Dense { rows, cols, whole, .. } => (*rows, *cols, *whole),
            Self::Fixed12 { matrix, whole } => (matrix.rows(), matrix.cols(), *whole),
        }
    }

    /// 16-byte vectors of a lane's part of a tile, and whether tiles have escapes.
    fn lane(&self) -> (usize, bool) {
        match self {
            Self::Dense { element, .. } => (2 * element.bytes(), false),
            Self::Fixed12 { .. } => (3, true),
        }
    }

    /// Whether a GPU has the shared memory that jobs of this width take.
    #[must_use]
    pub fn fits(&self, gpu: &Gpu, width: Width) -> bool {
        self.shared_bytes(width) <= gpu.backend().shared_limit() as usize
    }

    fn shared_bytes(&self, width: Width) -> usize {
        let (vectors, escapes) = self.lane();
        let several = slices(self.shape().2) > 1;
        match width {
            Width::Stream8 => expert_shared_bytes(false, 1, 3, vectors, escapes, several),
            Width::Stream32 => expert_shared_bytes(false, 4, 3, vectors, escapes, several),
            Width::Panel64 => expert_shared_bytes(true, 8, 2, vectors, escapes, several),
        }
    }

    /// Source and kernel.
    fn kernel(&self, width: Width) -> (&'static str, &'static str) {
        macro_rules! of {
            ($file:literal) => {
                (
                    $file,
                    match width {
                        Width::Stream8 => concat!($file, "_stream_1_1_3"),
                        Width::Stream32 => concat!($file, "_stream_4_1_3"),
                        Width::Panel64 => concat!($file, "_panel_8_1_2"),
                    },
                )
            };
        }
        match self {
            Self::Dense { element: Element::Bf16, .. } => of!("experts_bf16"),
            Self::Dense { element: Element::F16, .. } => of!("experts_f16"),
            Self::Dense { element: Element::F32, .. } => of!("experts_f32"),
            Self::Fixed12 { .. } => of!("experts_fixed12"),
        }
    }
}

/// The operands of [`product`] besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct ExpertProduct<'a> {
    /// `BF16 [tokens or slots, stride]`: zeros from the input features up to the next multiple of 64.
    pub x: View<'a>,
    /// Elements of a row of `x`: a multiple of 64.
    pub stride: usize,
    /// Whether `x` has a row a slot; else it has one a token.
    pub by_slot: bool,
    /// How many tokens.
    pub tokens: usize,
    /// F32: a slot's output at `slot * y_stride`.
    pub y: View<'a>,
    /// Elements from one slot's output to the next one's.
    pub y_stride: usize,
}

/// `y[slot] = W x` with the weights of the slot's expert: for all slots of tokens that were grouped with this width. The order of
/// additions is that of [`super::product`].
///
/// # Errors
/// A buffer is too small or not aligned; a width that takes more shared memory than there is; the launch fails.
pub fn product(
    gpu: &Gpu,
    routing: Routing,
    weights: ExpertWeights<'_>,
    p: &ExpertProduct<'_>,
    width: Width,
    plan: &Plan<'_>,
) -> Result<()> {
    routing.check()?;
    let (rows, cols, whole) = weights.shape();
    let slots = routing.slots(p.tokens);
    if slots == 0 || rows == 0 {
        return Ok(());
    }
    if !p.stride.is_multiple_of(64) || p.stride < cols || p.y_stride < rows {
        return Err(Error::Invalid(format!(
            "rows of {} and {} elements for experts of {rows} x {cols}",
            p.stride, p.y_stride
        )));
    }
    let x_rows = if p.by_slot { slots } else { p.tokens };
    p.x.require("x", 2 * x_rows * p.stride)?;
    p.x.require_aligned("x", 16)?;
    p.y.require("y", 4 * ((slots - 1) * p.y_stride + rows))?;
    plan.slots.require("slots", 4 * slots)?;
    let jobs = routing.jobs(p.tokens, width);
    plan.jobs.require("jobs", 16 * jobs)?;
    let mut arguments = match weights {
        ExpertWeights::Dense { words, element, firsts, .. } => {
            words.require("the experts' weights", element.bytes() * rows * row_stride(cols))?;
            words.require_aligned("the experts' weights", 16)?;
            firsts.require("where experts begin", 8 * routing.experts)?;
            vec![words.pointer(), firsts.pointer()]
        }
        ExpertWeights::Fixed12 { matrix, .. } => {
            if matrix.experts() != routing.experts {
                return Err(Error::Invalid(format!(
                    "weights of {} experts for {}",
                    matrix.experts(),
                    routing.experts
                )));
            }
            matrix.components().to_vec()
        }
    };
    let slices = slices(whole);
    arguments.extend([
        Argument::U64(rows as u64),
        Argument::U64(cols as u64),
        p.x.pointer(),
        Argument::U32(size32("the stride of x", p.stride)?),
        p.y.pointer(),
        Argument::U64(p.y_stride as u64),
        Argument::U32(slices.ilog2()),
        plan.slots.pointer(),
        Argument::U32(if p.by_slot { 1 } else { routing.top_k as u32 }),
        plan.jobs.pointer(),
    ]);
    let blocks = match width {
        Width::Panel64 => rows.div_ceil(PANEL_ROWS),
        _ => rows.div_ceil(STREAM_ROWS * (WARPS / slices)),
    };
    let (file, kernel) = weights.kernel(width);
    gpu.launch(&Launch {
        file,
        kernel,
        grid: [size32("strips", blocks)?, 1, size32("jobs", jobs)?],
        block: 32 * WARPS as u32,
        shared: weights.shared_bytes(width) as u32,
        arguments: &arguments,
        // They wait before they read anything.
        overlaps: true,
    })
}

/// `h[t] += sum of weight * y[slot]` over a token's slots: y `F32 [slots, hidden]`, h `F32 [tokens, hidden]`.
///
/// # Errors
/// A buffer is too small; the launch fails.
pub fn combine(
    gpu: &Gpu,
    routing: Routing,
    y: View<'_>,
    hidden: usize,
    tokens: usize,
    plan: &Plan<'_>,
    h: View<'_>,
) -> Result<()> {
    let slots = routing.slots(tokens);
    y.require("the experts' outputs", 4 * slots * hidden)?;
    plan.weights.require("weights of choices", 4 * slots)?;
    h.require("h", 4 * tokens * hidden)?;
    if tokens == 0 || hidden == 0 {
        return Ok(());
    }
    gpu.launch(&Launch {
        file: "experts",
        kernel: "combine_experts",
        grid: [size32("hidden", hidden.div_ceil(256))?, size32("tokens", tokens)?, 1],
        block: 256,
        shared: 0,
        arguments: &[
            y.pointer(),
            plan.weights.pointer(),
            Argument::U32(routing.top_k as u32),
            Argument::U32(size32("hidden", hidden)?),
            h.pointer(),
        ],
        overlaps: true,
    })
}
