//! Self-attention with grouped queries, a cache and windows.
//!
//! A sequence is cut into chunks of [`CHUNK`] positions counted from 0; a chunk's part is computed by itself and the parts
//! are joined in order (kernels/cuda/attention.cu states every order of additions).

use super::{Argument, Error, Gpu, Launch, Result, View, size32};

/// Positions of a chunk.
pub const CHUNK: usize = 256;
/// Rows (token and query head of one key-value head) of a block.
const ROWS: usize = 8;
/// Threads of a block.
const THREADS: u32 = 256;

/// The heads of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, of which `heads` is a multiple.
    pub kv_heads: usize,
    /// Features of a head: a multiple of 8, at most 256.
    pub head_dim: usize,
}

impl Heads {
    /// Refuses what the kernels do not do.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check(self) -> Result<()> {
        let Self { heads, kv_heads, head_dim } = self;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || heads > 1 << 16 {
            return Err(Error::Unsupported(format!("{heads} query heads over {kv_heads} key-value heads")));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(8) || head_dim > 256 {
            return Err(Error::Unsupported(format!(
                "heads of {head_dim} features; the GPU's attention takes multiples of 8 up to 256"
            )));
        }
        Ok(())
    }
}

/// Keys and values of a layer: `BF16 [kv_heads, capacity, head_dim]` each.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// The keys.
    pub keys: View<'a>,
    /// The values.
    pub values: View<'a>,
    /// Positions that it holds.
    pub capacity: usize,
}

impl Cache<'_> {
    /// Bytes of the keys, and of the values.
    #[must_use]
    pub fn bytes(heads: Heads, capacity: usize) -> usize {
        2 * heads.kv_heads * capacity * heads.head_dim
    }

    pub(super) fn check(&self, heads: Heads) -> Result<()> {
        heads.check()?;
        self.keys.require("keys", Self::bytes(heads, self.capacity))?;
        self.values.require("values", Self::bytes(heads, self.capacity))
    }
}

/// Bytes of workspace for `tokens` tokens that see at most `length` positions.
#[must_use]
pub fn workspace_bytes(heads: Heads, tokens: usize, length: usize) -> usize {
    let slots = length.div_ceil(CHUNK) * tokens * heads.heads;
    slots * 4 * heads.head_dim + slots * 8
}

/// What attention is computed for.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// The heads.
    pub heads: Heads,
    /// `F32 [tokens, ...]`, heads side by side at the start of rows of `stride`.
    pub queries: View<'a>,
    /// Elements from one token's queries to the next one's.
    pub stride: usize,
    /// How many tokens, the first at `position`.
    pub tokens: usize,
    /// U32 in device memory.
    pub position: View<'a>,
    /// Most positions that are seen, for which the grid has room: the capacity, or the length where it is known.
    pub length: usize,
    /// Positions that a token sees, itself included; all where there is no limit.
    pub window: Option<usize>,
    /// What queries are multiplied by.
    pub scale: f32,
    /// The layer's keys and values, those of these tokens included.
    pub cache: Cache<'a>,
    /// [`workspace_bytes`].
    pub workspace: View<'a>,
    /// `BF16 [tokens, ld]`: heads side by side, then zeros.
    pub x: View<'a>,
    /// Elements of a row of `x`.
    pub ld: usize,
}

/// Attention of some tokens over the cache.
///
/// # Errors
/// Heads that the kernels do not do; a buffer is too small; the launch fails.
pub fn attend(gpu: &Gpu, a: &Attend<'_>) -> Result<()> {
    let Heads { heads, kv_heads, head_dim } = a.heads;
    a.cache.check(a.heads)?;
    a.position.require("position", 4)?;
    a.workspace.require("the workspace", workspace_bytes(a.heads, a.tokens, a.length))?;
    a.x.require("x", 2 * a.tokens * a.ld.max(heads * head_dim))?;
    if a.tokens == 0 || a.length == 0 {
        return Ok(());
    }
    a.queries.require("queries", 4 * ((a.tokens - 1) * a.stride + heads * head_dim))?;
    let chunks = a.length.min(a.cache.capacity).div_ceil(CHUNK);
    let slots = chunks * a.tokens * heads;
    // Pairs first: they need the greater alignment.
    let scales = a.workspace.slice(0..8 * slots)?;
    let sums = a.workspace.slice(8 * slots..8 * slots + 4 * slots * head_dim)?;
    let group = heads / kv_heads;
    let window = match a.window {
        Some(window) => u32::try_from(window).unwrap_or(0),
        None => 0,
    };
    let tokens = Argument::U32(size32("tokens", a.tokens)?);
    let [heads_argument, dim] = [heads, head_dim].map(|n| Argument::U32(n as u32));
    let width = head_dim.next_power_of_two().max(32);
    let piece = |floats: usize| (4 * floats).next_multiple_of(16) as u32;
    debug_assert!(width <= 256);
    gpu.launch(&Launch {
        file: "attention",
        kernel: "attend_chunk",
        grid: [
            size32("chunks", chunks)?,
            size32("rows", (a.tokens * group).div_ceil(ROWS))?,
            size32("key-value heads", kv_heads)?,
        ],
        block: THREADS,
        shared: piece(ROWS * head_dim) + piece(ROWS * CHUNK) + piece(THREADS as usize * ROWS),
        arguments: &[
            a.queries.pointer(),
            Argument::U32(size32("stride", a.stride)?),
            a.cache.keys.pointer(),
            a.cache.values.pointer(),
            Argument::U64(a.cache.capacity as u64),
            a.position.pointer(),
            tokens,
            heads_argument,
            Argument::U32(group as u32),
            dim,
            Argument::U32(window),
            Argument::F32(a.scale),
            sums.pointer(),
            scales.pointer(),
        ],
    })?;
    gpu.launch(&Launch {
        file: "attention",
        kernel: "join_chunks",
        grid: [size32("tokens", a.tokens)?, 1, 1],
        block: 256,
        shared: 0,
        arguments: &[
            sums.pointer(),
            scales.pointer(),
            a.position.pointer(),
            tokens,
            heads_argument,
            dim,
            Argument::U32(window),
            a.x.pointer(),
            Argument::U32(size32("ld", a.ld)?),
        ],
    })
}
