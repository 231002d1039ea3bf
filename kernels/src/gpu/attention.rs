//! Self-attention with grouped queries, a cache and windows, by tensor cores.
//!
//! A sequence is cut into tiles of [`TILE`] positions counted from 0, and what each contributes is joined in order
//! (kernels/cuda/attention.cu states every order of additions). Two forms give the same bits: one walks over the tiles,
//! for many tokens; one takes all tiles at once and joins them afterwards, so that few tokens keep a whole GPU busy.

use super::cache_codes::{Codes, Layout};
use super::{Argument, Error, Gpu, Launch, Result, View, size32};

/// Positions of a tile.
pub const TILE: usize = 64;
/// Rows (token and query head of one key-value head) of a warp.
const ROWS: usize = 16;
/// Threads of a block of one tile.
const TILE_THREADS: u32 = 128;
/// Threads of a block that joins tiles.
const JOIN_THREADS: u32 = 128;

/// The heads of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, of which `heads` is a multiple.
    pub kv_heads: usize,
    /// Features of a head: at most 256.
    pub head_dim: usize,
}

impl Heads {
    /// Features of a head in the cache: a multiple of 8.
    #[must_use]
    pub fn width(self) -> usize {
        self.head_dim.next_multiple_of(8)
    }

    /// Refuses what the kernels do not do.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check(self) -> Result<()> {
        let Self { heads, kv_heads, head_dim } = self;
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) || heads >= 1 << 16 {
            return Err(Error::Unsupported(format!("{heads} query heads over {kv_heads} key-value heads")));
        }
        if head_dim == 0 || head_dim > 256 {
            return Err(Error::Unsupported(format!(
                "heads of {head_dim} features; the GPU's attention takes up to 256"
            )));
        }
        Ok(())
    }
}

/// The tokens of a step: as many of each of several sequences, one sequence after the other.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// How many sequences.
    pub count: usize,
    /// Tokens of each.
    pub each: usize,
    /// `U32 [count]`: the position of the first token of each.
    pub positions: View<'a>,
    /// `U32 [count]`: which of the cache's sequences each is. They differ, and are less than [`Cache::sequences`].
    pub places: View<'a>,
}

impl Sequences<'_> {
    /// All tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.count * self.each
    }

    pub(super) fn check(&self) -> Result<()> {
        // A grid has no more blocks in its third direction.
        if self.count >= 1 << 16 || size32("tokens", self.tokens()).is_err() {
            return Err(Error::Unsupported(format!("{} sequences of {} tokens", self.count, self.each)));
        }
        self.positions.require("positions", 4 * self.count)?;
        self.places.require("places", 4 * self.count)
    }
}

/// Keys and values of a layer in BF16, where P is the capacity rounded up to a multiple of 8, and W [`Heads::width`]; or as codes.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// The keys: `[sequences, kv_heads, P, W]`, with zeros beyond a head's features; as codes, see [`super::cache_codes`].
    pub keys: View<'a>,
    /// The values: `[sequences, kv_heads, P / 8, W, 8]`, the last index that of the position; as codes likewise.
    pub values: View<'a>,
    /// Whether they are codes.
    pub codes: Option<Codes<'a>>,
    /// Positions that it holds.
    pub capacity: usize,
    /// Sequences that it holds.
    pub sequences: usize,
}

impl Cache<'_> {
    /// Bytes of the keys, and of the values, of a sequence, in BF16 or as codes of so many bits.
    #[must_use]
    pub fn bytes(heads: Heads, capacity: usize, bits: Option<u8>) -> usize {
        let head = bits.map_or(2 * heads.width(), |bits| Layout::new(heads.head_dim, bits).all_bytes());
        head * heads.kv_heads * capacity.next_multiple_of(8)
    }

    pub(super) fn check(&self, heads: Heads) -> Result<()> {
        heads.check()?;
        // So that the end of the last tile is a position too.
        if u32::try_from(self.capacity.saturating_add(TILE)).is_err() {
            return Err(Error::Unsupported(format!("a cache of {} positions", self.capacity)));
        }
        let bits = self.codes.map(|codes| codes.bits);
        if let Some(codes) = self.codes {
            codes.check()?;
            self.keys.require_aligned("keys", 8)?;
            self.values.require_aligned("values", 8)?;
        }
        let bytes = self.sequences.saturating_mul(Self::bytes(heads, self.capacity, bits));
        self.keys.require("keys", bytes)?;
        self.values.require("values", bytes)
    }
}

/// Bytes of workspace of [`Form::Tiles`] for `tokens` tokens that see at most `length` positions.
#[must_use]
pub fn workspace_bytes(heads: Heads, tokens: usize, length: usize) -> usize {
    let slots = length.div_ceil(TILE) * tokens * heads.heads;
    slots * 4 * heads.width() + slots * 8
}

/// How attention is spread over the GPU. The bits are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A block takes some rows and walks over the tiles that they see: for many tokens. It needs no workspace.
    Rows,
    /// A block takes one tile: for few tokens.
    Tiles,
}

/// What attention is computed for.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// The heads.
    pub heads: Heads,
    /// `F32 [tokens, ...]`, heads side by side at the start of rows of `stride`, aligned to 16 bytes.
    pub queries: View<'a>,
    /// Elements from one token's queries to the next one's.
    pub stride: usize,
    /// The tokens.
    pub sequences: Sequences<'a>,
    /// Most positions that are seen, for which the grid has room: the capacity, or the length where it is known.
    pub length: usize,
    /// Positions that a token sees, itself included; all where there is no limit.
    pub window: Option<usize>,
    /// What queries are multiplied by.
    pub scale: f32,
    /// What scores are held below, as `c tanh(score / c)`: positive.
    pub cap: Option<f32>,
    /// The layer's keys and values, those of these tokens included.
    pub cache: Cache<'a>,
    /// Of any size: with [`workspace_bytes`] or more, few tokens are spread over the whole GPU.
    pub workspace: View<'a>,
    /// `BF16 [tokens, ld]`: heads side by side, then zeros.
    pub x: View<'a>,
    /// Elements of a row of `x`: an even number.
    pub ld: usize,
}

/// Attention of some tokens over the cache, in the form that fits.
///
/// # Errors
/// Those of [`attend_in`].
pub fn attend(gpu: &Gpu, a: &Attend<'_>) -> Result<()> {
    let Heads { heads, kv_heads, head_dim } = a.heads;
    a.heads.check()?;
    let (_, warps) = variant(head_dim);
    let Sequences { count, each, .. } = a.sequences;
    let blocks = (each * (heads / kv_heads)).div_ceil(ROWS * warps) * kv_heads * count;
    // Where most of the GPU would be idle, tiles are worth their way through memory.
    let idle = 4 * blocks <= gpu.backend().multiprocessors() as usize;
    let fits = a.workspace.bytes() >= workspace_bytes(a.heads, count * each, a.length.min(a.cache.capacity));
    attend_in(gpu, a, if idle && fits { Form::Tiles } else { Form::Rows })
}

/// Attention of some tokens over the cache, in a given form.
///
/// # Errors
/// Heads that the kernels do not do; strides that they cannot read; a buffer is too small; the launch fails.
pub fn attend_in(gpu: &Gpu, a: &Attend<'_>, form: Form) -> Result<()> {
    let Heads { heads, kv_heads, head_dim } = a.heads;
    a.cache.check(a.heads)?;
    a.sequences.check()?;
    let Sequences { count, each, positions, places } = a.sequences;
    let tokens = a.sequences.tokens();
    if tokens == 0 || a.length == 0 || a.cache.capacity == 0 {
        return Ok(());
    }
    if a.stride < heads * head_dim {
        return Err(Error::Invalid(format!("queries {} elements apart", a.stride)));
    }
    if a.cap.is_some_and(|cap| !(cap > 0.0 && cap.is_finite())) {
        return Err(Error::Invalid(format!("scores held below {:?}", a.cap)));
    }
    if !a.ld.is_multiple_of(2) || a.ld < heads * head_dim {
        return Err(Error::Invalid(format!("rows of {} for {heads} heads of {head_dim}", a.ld)));
    }
    a.x.require("x", 2 * tokens * a.ld)?;
    a.queries.require_aligned("queries", 16)?;
    a.queries.require("queries", 4 * ((tokens - 1) * a.stride + heads * head_dim))?;
    let group = heads / kv_heads;
    let window = match a.window {
        Some(window) => u32::try_from(window).unwrap_or(0),
        None => 0,
    };
    let each32 = Argument::U32(size32("tokens", each)?);
    let [heads_argument, dim] = [heads, head_dim].map(|n| Argument::U32(n as u32));
    let (size, warps) = variant(head_dim);
    let capacity = Argument::U64(a.cache.capacity as u64);
    let mut arguments = vec![
        a.queries.pointer(),
        Argument::U32(size32("stride", a.stride)?),
        a.cache.keys.pointer(),
        a.cache.values.pointer(),
    ];
    arguments.extend(a.cache.codes.map(|codes| Argument::U32(u32::from(codes.bits))));
    arguments.extend([
        capacity,
        positions.pointer(),
        places.pointer(),
        each32,
        heads_argument,
        Argument::U32(group as u32),
        dim,
        Argument::U32(window),
        Argument::F32(a.scale),
        Argument::F32(a.cap.unwrap_or(0.0)),
    ]);
    let (file, [rows_kernel, tile_kernel]) = match a.cache.codes {
        None => ("attention", size.words),
        Some(_) => ("attention_codes", size.codes),
    };
    let ld = Argument::U32(size32("ld", a.ld)?);
    if form == Form::Rows {
        arguments.extend([a.x.pointer(), ld]);
        let rows = (each * group).div_ceil(ROWS * warps);
        // Wide heads park their queries.
        let parked = if size.dim == 256 { warps * size.dim / 16 * 32 * 16 } else { 0 };
        return gpu.launch(&Launch {
            file,
            kernel: rows_kernel,
            grid: [size32("rows", rows)?, kv_heads as u32, count as u32],
            block: 32 * warps as u32,
            shared: (parked + size.tiles()) as u32,
            arguments: &arguments,
            overlaps: true,
        });
    }
    let tiles = a.length.min(a.cache.capacity).div_ceil(TILE);
    a.workspace.require("the workspace", workspace_bytes(a.heads, tokens, tiles * TILE))?;
    let slots = tiles * tokens * heads;
    // Pairs first: they need the greater alignment.
    let scales = a.workspace.slice(0..8 * slots)?;
    let sums = a.workspace.slice(8 * slots..8 * slots + 4 * slots * a.heads.width())?;
    arguments.extend([sums.pointer(), scales.pointer()]);
    let depth = size32("heads of sequences", kv_heads * count)?;
    gpu.launch(&Launch {
        file,
        kernel: tile_kernel,
        grid: [size32("tiles", tiles)?, size32("rows", (each * group).div_ceil(ROWS))?, depth],
        block: TILE_THREADS,
        // Four fragments of a warp and four maxima a row besides.
        shared: (size.tiles() + 4 * 32 * 16 + 4 * 4 * ROWS) as u32,
        arguments: &arguments,
        overlaps: true,
    })?;
    gpu.launch(&Launch {
        file: "attention",
        kernel: "join_tiles",
        grid: [heads as u32, size32("tokens", tokens)?, 1],
        block: JOIN_THREADS,
        shared: 4 * (3 * JOIN_THREADS + JOIN_THREADS / 32),
        arguments: &[
            sums.pointer(),
            scales.pointer(),
            capacity,
            positions.pointer(),
            each32,
            heads_argument,
            dim,
            Argument::U32(window),
            a.x.pointer(),
            ld,
        ],
        overlaps: true,
    })
}

/// The kernels for heads of up to `dim` features.
struct Variant {
    dim: usize,
    /// Many rows, and one tile: from a cache in BF16.
    words: [&'static str; 2],
    /// The same from codes.
    codes: [&'static str; 2],
}

impl Variant {
    const ALL: [Self; 4] = [
        Self {
            dim: 64,
            words: ["attend_rows_64", "attend_tile_64"],
            codes: ["attend_code_rows_64", "attend_code_tile_64"],
        },
        Self {
            dim: 96,
            words: ["attend_rows_96", "attend_tile_96"],
            codes: ["attend_code_rows_96", "attend_code_tile_96"],
        },
        Self {
            dim: 128,
            words: ["attend_rows_128", "attend_tile_128"],
            codes: ["attend_code_rows_128", "attend_code_tile_128"],
        },
        Self {
            dim: 256,
            words: ["attend_rows_256", "attend_tile_256"],
            codes: ["attend_code_rows_256", "attend_code_tile_256"],
        },
    ];

    /// Bytes of shared memory of a tile's keys and values, padded as the kernels do.
    const fn tiles(&self) -> usize {
        let key_stride = if self.dim / 32 % 2 == 1 { self.dim } else { self.dim + 32 };
        2 * (TILE * key_stride + TILE / 8 * (8 * self.dim + 16))
    }
}

/// The narrowest kernels for a head, and the warps of a block of rows.
fn variant(head_dim: usize) -> (&'static Variant, usize) {
    let [first, rest @ ..] = &Variant::ALL;
    let fits = rest.iter().fold(first, |taken, next| if taken.dim < head_dim { next } else { taken });
    (fits, if fits.dim == 256 { 2 } else { 4 })
}
