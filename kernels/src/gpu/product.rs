//! Matrix products with weights of any encoding: `y = x W^T`.
//!
//! ```text
//! few tokens    Stream   a warp a slice of some strips of 16 rows, x from the caches
//! more tokens   Panel    a block 128 or 256 rows x 16 to 128 tokens, x and weights through shared memory;
//!                        split: a block a slice, the last one to end adds them
//! many tokens            the same; fixed12 may be decoded to plain BF16 first
//! ```
//!
//! One order of additions for every encoding and every variant (kernels/cuda/product.cuh): it depends on the matrix's rows and
//! columns alone. So a lossless encoding gives the same bits as plain weights, and which variant a picker takes never shows. Weights of
//! two in four, which sparse tensor cores multiply, have an order of their own: the same for plain values and those in fixed12.

use std::fmt;

use super::dense::{Element, row_stride};
use super::fixed12::Matrix;
use super::picker::{Picker, Shape as Key};
use super::sparse24;
use super::{Argument, Buffer, Error, Gpu, Launch, Result, View, size32};

const TILE_ROWS: usize = 16;
const TILE_COLS: usize = 64;
const WARPS: usize = 8;
const THREADS: usize = 256;
/// Bytes of a vector, the unit of shared memory here.
const VECTOR: usize = 16;
/// Vectors of the escapes that come with a tile.
const ESCAPE_VECTORS: usize = 16;
/// Tiles of a split product, each of which counts the blocks that are done.
pub(super) const COUNTERS: usize = 1024;
/// Products are split only where their sums stay in the caches.
const PARTIALS_LIMIT: usize = 32 << 20;
/// Warps that are enough for a product: slices are made up to so many.
const ENOUGH_WARPS: usize = 4096;
/// Blocks of a panel from which on it is not split: about the multiprocessors of a large GPU.
const WANTED_BLOCKS: usize = 128;

/// The slices into which the columns are cut, each of which is added up by itself: 1, 2, 4 or 8, the fewer the more rows
/// there are.
#[must_use]
pub fn slices(rows: usize) -> usize {
    let strips = rows.div_ceil(TILE_ROWS).max(1);
    1 << (ENOUGH_WARPS / strips).clamp(1, 8).ilog2()
}

/// Which tile loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loop {
    Stream,
    Panel,
}

/// A compiled tile loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    kind: Loop,
    /// Tokens of a block / 8.
    columns: usize,
    /// Strips of 16 rows of a warp.
    strips: usize,
    /// Stages: tiles are asked for one fewer early.
    depth: usize,
    /// For plain weights of BF16, F16 and F32, for fixed12, and for two in four of BF16 and of fixed12.
    names: [&'static str; 6],
}

macro_rules! tiles {
    ($($kind:ident $name:literal $columns:literal $strips:literal $depth:literal;)*) => {
        [$(Tile {
            kind: Loop::$kind,
            columns: $columns,
            strips: $strips,
            depth: $depth,
            names: [
                concat!("dense_", $name, "_", $columns, "_", $strips, "_", $depth),
                concat!("dense_f16_", $name, "_", $columns, "_", $strips, "_", $depth),
                concat!("dense_f32_", $name, "_", $columns, "_", $strips, "_", $depth),
                concat!("fixed12_", $name, "_", $columns, "_", $strips, "_", $depth),
                concat!("sparse24_", $name, "_", $columns, "_", $strips, "_", $depth),
                concat!("sparse24_fixed12_", $name, "_", $columns, "_", $strips, "_", $depth),
            ],
        }),*]
    };
}

/// The lists of kernels/cuda/product.cuh; of equal columns the default first.
const TILES: [Tile; 17] = tiles! {
    Stream "stream" 1 1 4;
    Stream "stream" 1 1 8;
    Stream "stream" 1 2 4;
    Stream "stream" 2 1 4;
    Stream "stream" 2 1 8;
    Stream "stream" 2 2 4;
    Stream "stream" 4 1 4;
    Stream "stream" 4 2 3;
    Stream "stream" 8 2 3;
    Panel "panel" 2 1 4;
    Panel "panel" 4 1 4;
    Panel "panel" 4 2 3;
    Panel "panel" 8 1 4;
    Panel "panel" 8 2 3;
    Panel "panel" 16 1 3;
    Panel "panel" 16 2 3;
    Panel "panel" 16 2 2;
};

/// The same for weights in several pieces: F16 and F32.
const TILES_OF_PIECES: [Tile; 5] = tiles! {
    Stream "stream" 1 1 3;
    Stream "stream" 2 1 3;
    Stream "stream" 4 1 3;
    Panel "panel" 4 1 2;
    Panel "panel" 8 1 2;
};

/// One way to make a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    tile: Tile,
    /// Whether a block takes one slice, not all.
    split: bool,
    /// Whether the weights are decoded first.
    decoded: bool,
    /// Whether a block that takes all slices in turn keeps what they add up to in the workspace, not in shared memory.
    outside: bool,
}

impl Variant {
    /// All ways that a GPU has to make a product with such weights, fit or not.
    #[must_use]
    pub fn all(gpu: &Gpu, weights: Weights<'_>) -> Vec<Self> {
        let mut all = Vec::new();
        let limit = gpu.backend().shared_limit() as usize;
        let decoded: &[bool] =
            if matches!(weights, Weights::Fixed12 { .. }) { &[false, true] } else { &[false] };
        for &decoded in decoded {
            for &tile in weights.tiles() {
                let whole = Self { tile, split: false, decoded, outside: false };
                all.push(whole);
                if whole.totals(weights) > 0 {
                    all.push(Self { split: true, ..whole });
                    // Only where there is no other way.
                    if whole.shared(weights) > limit {
                        all.push(Self { outside: true, ..whole });
                    }
                }
            }
        }
        all.retain(|variant| variant.shared(weights) <= limit);
        all
    }

    /// Bytes of [`Workspace`] that it needs.
    #[must_use]
    pub fn workspace_bytes(self, weights: Weights<'_>, tokens: usize) -> usize {
        match self.scratch_bytes(weights) + self.partial_bytes(weights, tokens) {
            0 => 0,
            bytes => 4 * COUNTERS + bytes,
        }
    }

    /// Of them, bytes for decoded weights.
    fn scratch_bytes(self, weights: Weights<'_>) -> usize {
        let (rows, cols) = weights.shape();
        if self.decoded { (2 * rows * row_stride(cols)).next_multiple_of(256) } else { 0 }
    }

    /// Of them, bytes for the sums of slices.
    fn partial_bytes(self, weights: Weights<'_>, tokens: usize) -> usize {
        let rows = weights.shape().0;
        match (self.split, self.outside) {
            (true, _) => self.sums_bytes(rows, weights.slices(), tokens),
            (_, true) => self.sums_bytes(rows, 1, tokens),
            _ => 0,
        }
    }

    fn sums_bytes(self, rows: usize, slices: usize, tokens: usize) -> usize {
        let (height, width) = self.block();
        let (down, across) = self.blocks(rows, tokens);
        4 * slices * down * across * height * width
    }

    /// Whether a product may be split, and should: where there are fewer blocks than multiprocessors.
    fn splits(self, rows: usize, slices: usize, tokens: usize) -> bool {
        let (down, across) = self.blocks(rows, tokens);
        self.tile.kind == Loop::Panel
            && slices > 1
            && down * across <= WANTED_BLOCKS
            && self.sums_bytes(rows, slices, tokens) <= PARTIALS_LIMIT
    }

    /// Vectors of what the slices of a block add up to, where it takes several in turn.
    fn totals(self, weights: Weights<'_>) -> usize {
        let several = self.tile.kind == Loop::Panel && weights.slices() > 1;
        if several { self.tile.strips * self.tile.columns * THREADS } else { 0 }
    }

    /// Rows and tokens of a block.
    fn block(self) -> (usize, usize) {
        (TILE_ROWS * WARPS * self.tile.strips, 8 * self.tile.columns)
    }

    /// Blocks of a product, slices apart, along the rows and the tokens: of a panel.
    fn blocks(self, rows: usize, tokens: usize) -> (usize, usize) {
        let (height, width) = self.block();
        (rows.div_ceil(height), tokens.div_ceil(width))
    }

    /// Bytes of shared memory.
    fn shared(self, weights: Weights<'_>) -> usize {
        let Tile { kind, columns, strips, depth, .. } = self.tile;
        let (lane_vectors, escapes) = match weights {
            Weights::Fixed12 { .. } if !self.decoded => (3, true),
            Weights::Dense { element, .. } => (2 * element.bytes(), false),
            Weights::Fixed12 { .. } => (4, false),
            // Positions take half a vector.
            Weights::Sparse24 { matrix, .. } if matrix.in_fixed12() => (3 + 1, true),
            Weights::Sparse24 { .. } => (4 + 1, false),
        };
        let totals = if self.outside || self.split { 0 } else { self.totals(weights) };
        let bytes = shared_bytes(kind, columns, strips * depth, depth, lane_vectors, escapes, totals);
        // Tiles are as wide again.
        let wide = kind == Loop::Panel && matches!(weights, Weights::Sparse24 { .. });
        bytes + if wide { VECTOR * 64 * columns * depth } else { 0 }
    }
}

/// Bytes of shared memory of a block whose lanes hold so many vectors of a tile: `tiles` of a warp at a time, in `depth` stages.
fn shared_bytes(
    kind: Loop,
    columns: usize,
    tiles: usize,
    depth: usize,
    lane_vectors: usize,
    escapes: bool,
    totals: usize,
) -> usize {
    let escapes = if escapes { WARPS * ESCAPE_VECTORS } else { 0 };
    let weights = tiles * (lane_vectors * THREADS + escapes);
    match kind {
        Loop::Stream => VECTOR * weights,
        Loop::Panel => VECTOR * (64 * columns * depth + weights + 1 + totals),
    }
}

/// The same of the products of experts (kernels/cuda/experts.cuh), a strip a warp. `several`: whether there is more than one slice.
pub(super) fn expert_shared_bytes(
    panel: bool,
    columns: usize,
    depth: usize,
    lane_vectors: usize,
    escapes: bool,
    several: bool,
) -> usize {
    let (kind, totals) =
        if panel { (Loop::Panel, if several { columns * THREADS } else { 0 }) } else { (Loop::Stream, 0) };
    shared_bytes(kind, columns, depth, depth, lane_vectors, escapes, totals)
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { kind, columns, strips, depth, .. } = self.tile;
        let warps = if kind == Loop::Panel { WARPS } else { 1 };
        let name = if kind == Loop::Panel { "panel" } else { "stream" };
        write!(f, "{name} of {} tokens x {} rows, {depth} deep", 8 * columns, TILE_ROWS * strips * warps)?;
        f.write_str(if self.split { ", split" } else { "" })?;
        f.write_str(if self.outside { ", sums outside" } else { "" })?;
        f.write_str(if self.decoded { ", decoded first" } else { "" })
    }
}

/// Token counts with the same variants: the most of them.
fn bucket(tokens: usize) -> usize {
    tokens.next_power_of_two().max(8)
}

/// Tokens from which on the default is to decode fixed12 weights first: before, products wait for weights more than for the
/// multipliers.
const DECODED_FROM: usize = 1024;

/// The ways that suit a product of so many tokens on a GPU, the default first. They need [`Variant::workspace_bytes`]; at least one
/// of them needs none.
#[must_use]
pub fn variants(gpu: &Gpu, weights: Weights<'_>, tokens: usize) -> Vec<Variant> {
    let rows = weights.shape().0;
    let tokens = bucket(tokens);
    let suits = |variant: &Variant| {
        (!variant.decoded || tokens > 128 && variant.tile.kind == Loop::Panel)
            && (!variant.split || variant.splits(rows, weights.slices(), tokens))
    };
    let all: Vec<Variant> = Variant::all(gpu, weights).into_iter().filter(suits).collect();
    // The fewest columns that take all tokens at once, so that weights are read once; else the most there are. Where shared
    // memory is scarce, fewer.
    // Half as many are worth a try where they are most: blocks are smaller then.
    let mut columns = (tokens / 8).min(16);
    let mut suited: Vec<Variant> = Vec::new();
    let most = columns;
    while columns > 0
        && (suited.iter().all(|variant| variant.split || variant.decoded || variant.outside)
            || most == 16 && columns == 8)
    {
        suited.extend(all.iter().filter(|variant| variant.tile.columns == columns));
        columns /= 2;
    }
    // Stable: the order of the list decides among equals.
    suited.sort_by_key(|variant| {
        let late = variant.decoded != (tokens >= DECODED_FROM) && matches!(weights, Weights::Fixed12 { .. });
        let (down, across) = variant.blocks(rows, tokens);
        // Tall blocks read x half as often: right where there are blocks enough.
        let short = variant.tile.strips == 1 && tokens > 64 && down * across >= WANTED_BLOCKS;
        let narrow = variant.tile.columns < (tokens / 8).min(16);
        (late, narrow, short, variant.tile.kind == Loop::Panel && !variant.split)
    });
    suited
}

/// Memory that products work in. One serves all products that are started one after the other.
#[derive(Debug)]
pub struct Workspace(Buffer);

impl Workspace {
    /// A workspace of so many bytes: the largest of [`Weights::workspace_bytes`] or of [`split_bytes`].
    ///
    /// # Errors
    /// Not so much memory.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let buffer = gpu.allocate(bytes.max(4 * COUNTERS))?;
        // Products leave the counters at zero.
        buffer.slice(0..4 * COUNTERS)?.write(&[0u32; COUNTERS])?;
        Ok(Self(buffer))
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// All of it: counters of four bytes, which products leave at zero, then what they like.
    pub(super) fn view(&self) -> View<'_> {
        self.0.view()
    }
}

/// The weights of a product.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// `[rows, cols]`, row-major, the rows [`row_stride`] apart.
    Dense {
        /// The elements.
        words: View<'a>,
        /// Of which kind.
        element: Element,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
        /// Rows of the matrix that these are part of.
        whole: usize,
        /// Whether what was started before makes the words: a product may not read them early.
        fresh: bool,
    },
    /// fixed12: some rows of a matrix.
    Fixed12 {
        /// The matrix.
        matrix: &'a Matrix,
        /// Its rows: from a multiple of 16 on.
        first: usize,
        /// How many.
        rows: usize,
        /// Rows of the matrix that all of it is part of.
        whole: usize,
    },
    /// Two in four: some rows of a matrix.
    Sparse24 {
        /// The matrix.
        matrix: &'a sparse24::Matrix,
        /// Its rows: from a multiple of 16 on.
        first: usize,
        /// How many.
        rows: usize,
        /// Rows of the matrix that all of it is part of.
        whole: usize,
    },
}

impl<'a> Weights<'a> {
    /// A plain matrix of BF16.
    #[must_use]
    pub fn dense(words: View<'a>, rows: usize, cols: usize) -> Self {
        Self::plain(words, Element::Bf16, rows, cols)
    }

    /// A plain matrix.
    #[must_use]
    pub fn plain(words: View<'a>, element: Element, rows: usize, cols: usize) -> Self {
        Self::Dense { words, element, rows, cols, whole: rows, fresh: false }
    }

    /// The tile loops that are compiled for them.
    fn tiles(&self) -> &'static [Tile] {
        match self {
            Self::Dense { element: Element::F16 | Element::F32, .. } => &TILES_OF_PIECES,
            _ => &TILES,
        }
    }

    /// The source of their products, and its place in the list of a tile loop's names.
    fn family(&self) -> (&'static str, usize) {
        match self {
            Self::Dense { element, .. } => (element.file(), *element as usize),
            Self::Fixed12 { .. } => ("fixed12", 3),
            Self::Sparse24 { matrix, .. } if matrix.in_fixed12() => ("sparse24_fixed12", 5),
            Self::Sparse24 { .. } => ("sparse24", 4),
        }
    }

    /// All rows of a matrix.
    #[must_use]
    pub fn fixed12(matrix: &'a Matrix) -> Self {
        Self::Fixed12 { matrix, first: 0, rows: matrix.rows(), whole: matrix.rows() }
    }

    /// All rows of a matrix.
    #[must_use]
    pub fn sparse24(matrix: &'a sparse24::Matrix) -> Self {
        Self::Sparse24 { matrix, first: 0, rows: matrix.rows(), whole: matrix.rows() }
    }

    /// Output and input features.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Dense { rows, cols, .. } => (*rows, *cols),
            Self::Fixed12 { matrix, rows, .. } => (*rows, matrix.cols()),
            Self::Sparse24 { matrix, rows, .. } => (*rows, matrix.cols()),
        }
    }

    /// [`slices`] of the whole matrix: some of its rows are added up as all are.
    fn slices(&self) -> usize {
        match self {
            Self::Dense { whole, .. } | Self::Fixed12 { whole, .. } | Self::Sparse24 { whole, .. } => {
                slices(*whole)
            }
        }
    }

    fn fresh(&self) -> bool {
        matches!(self, Self::Dense { fresh: true, .. })
    }

    /// Bytes that a product reads of them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense { element, rows, cols, .. } => element.bytes() * rows * row_stride(*cols),
            Self::Fixed12 { matrix, rows, .. } => matrix.bytes() / matrix.rows().max(1) * rows,
            Self::Sparse24 { matrix, rows, .. } => matrix.bytes() / matrix.rows().max(1) * rows,
        }
    }

    /// The most workspace that a product of up to `tokens` tokens takes on a GPU, whichever variant it is. With
    /// [`split_bytes`] fixed12 weights are never decoded first, and all else is as fast.
    #[must_use]
    pub fn workspace_bytes(&self, gpu: &Gpu, tokens: usize) -> usize {
        most(tokens, |count| {
            let bytes =
                variants(gpu, *self, count).into_iter().map(|variant| variant.workspace_bytes(*self, count));
            bytes.max().unwrap_or(0)
        })
    }
}

/// The most workspace that the slices' sums of a product of `rows` of `whole` rows with up to `tokens` tokens take.
#[must_use]
pub fn split_bytes(rows: usize, whole: usize, tokens: usize) -> usize {
    let bytes = |tile: Tile, count| {
        let variant = Variant { tile, split: true, decoded: false, outside: false };
        if variant.splits(rows, slices(whole), count) {
            variant.sums_bytes(rows, slices(whole), count)
        } else {
            0
        }
    };
    let tiles = || TILES.into_iter().chain(TILES_OF_PIECES);
    let sums = most(tokens, |count| tiles().map(|tile| bytes(tile, count)).max().unwrap_or(0));
    if sums == 0 { 0 } else { 4 * COUNTERS + sums }
}

/// The most over the token counts up to `tokens` whose variants differ.
fn most(tokens: usize, bytes: impl Fn(usize) -> usize) -> usize {
    let counts = (3..usize::BITS - 1).map(|bits| 1usize << bits).take_while(|&count| count <= bucket(tokens));
    counts.map(bytes).max().unwrap_or(0)
}

/// The operands of a product besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// `BF16 [tokens, stride]`: zeros from the input features up to the next multiple of 64, which the caller sees to.
    pub x: View<'a>,
    /// Elements of a row of `x`: a multiple of 64.
    pub stride: usize,
    /// How many tokens.
    pub tokens: usize,
    /// F32: token t's output at `t * y_stride`.
    pub y: View<'a>,
    /// Elements from one token's output to the next one's.
    pub y_stride: usize,
    /// `F32 [rows]`, added at the end.
    pub bias: Option<View<'a>>,
    /// Whether the product, bias included, is added to what `y` holds.
    pub adds: bool,
    /// Without one, or with too small a one, variants that need it are left out.
    pub workspace: Option<&'a Workspace>,
}

/// Refuses operands that no variant can take: from here on all sizes are those of buffers.
fn check(weights: Weights<'_>, p: &Product<'_>) -> Result<()> {
    let (rows, cols) = weights.shape();
    let part = match weights {
        Weights::Dense { .. } => None,
        Weights::Fixed12 { matrix, first, .. } => Some((first, matrix.rows())),
        Weights::Sparse24 { matrix, first, .. } => Some((first, matrix.rows())),
    };
    if let Some((first, all)) = part
        && (!first.is_multiple_of(TILE_ROWS) || first.checked_add(rows).is_none_or(|end| end > all))
    {
        return Err(Error::Invalid(format!("{rows} rows from {first} on of a matrix of tiles of {all}")));
    }
    check_operands(rows, cols, p)?;
    let bytes = |elements, each| bytes(rows, p, elements, each);
    if let Weights::Dense { words, element, rows, cols, .. } = weights {
        let elements = cols.checked_next_multiple_of(8).and_then(|n| n.checked_mul(rows));
        words.require("the weights", bytes(elements, element.bytes())?)?;
        words.require_aligned("the weights", 16)?;
    }
    Ok(())
}

/// So many elements of so many bytes of a product of `rows` rows.
fn bytes(rows: usize, p: &Product<'_>, elements: Option<usize>, each: usize) -> Result<usize> {
    let too_large = || Error::Invalid(format!("a product of {} tokens and {rows} rows: too large", p.tokens));
    elements.and_then(|n| n.checked_mul(each)).ok_or_else(too_large)
}

/// Refuses operands besides the weights that no product of `rows` rows and `cols` columns takes.
pub(super) fn check_operands(rows: usize, cols: usize, p: &Product<'_>) -> Result<()> {
    if !p.stride.is_multiple_of(TILE_COLS) || p.stride < cols {
        return Err(Error::Invalid(format!("rows of x of {} elements for {cols} input features", p.stride)));
    }
    let bytes = |elements, each| bytes(rows, p, elements, each);
    p.x.require("x", bytes(p.tokens.checked_mul(p.stride), 2)?)?;
    p.x.require_aligned("x", 16)?;
    let before = (p.tokens - 1).checked_mul(p.y_stride);
    p.y.require("y", bytes(before.and_then(|n| n.checked_add(rows)), 4)?)?;
    p.y.require_aligned("y", 4)?;
    if let Some(bias) = p.bias {
        bias.require("the bias", 4 * rows)?;
        bias.require_aligned("the bias", 4)?;
    }
    Ok(())
}

/// Makes a product in a given way.
///
/// # Errors
/// A buffer is too small or not aligned (`x` and plain weights to 16 bytes); the workspace is too small; the launch fails.
pub fn product_in(gpu: &Gpu, weights: Weights<'_>, p: &Product<'_>, variant: Variant) -> Result<()> {
    let (rows, cols) = weights.shape();
    if p.tokens == 0 || rows == 0 {
        return Ok(());
    }
    check(weights, p)?;
    let needed = variant.workspace_bytes(weights, p.tokens);
    if needed == 0 {
        return start(gpu, weights, p, variant, None);
    }
    let given = p.workspace.map_or(0, Workspace::bytes);
    let Some(workspace) = p.workspace.filter(|_| given >= needed) else {
        return Err(Error::Invalid(format!("a workspace of {given} bytes; the product needs {needed}")));
    };
    // Counters, decoded weights, sums.
    let (first, second) = (4 * COUNTERS, 4 * COUNTERS + variant.scratch_bytes(weights));
    let counters = workspace.0.slice(0..first)?;
    let words = workspace.0.slice(first..second)?;
    let split = Some((workspace.0.slice(second..needed)?, counters));
    match weights {
        Weights::Fixed12 { matrix, first, rows, whole } if variant.decoded => {
            matrix.decode_rows(gpu, first, rows, words)?;
            let variant = Variant { decoded: false, ..variant };
            let decoded = Weights::Dense { words, element: Element::Bf16, rows, cols, whole, fresh: true };
            start(gpu, decoded, p, variant, split)
        }
        _ => start(gpu, weights, p, variant, split),
    }
}

/// Launches the kernel of a variant on weights as they are. `split`: the slices' sums and the counters.
fn start(
    gpu: &Gpu,
    weights: Weights<'_>,
    p: &Product<'_>,
    variant: Variant,
    split: Option<(View<'_>, View<'_>)>,
) -> Result<()> {
    let (rows, cols) = weights.shape();
    let tile = variant.tile;
    size32("input features", cols.next_multiple_of(2 * TILE_COLS))?;
    let (file, name) = weights.family();
    let mut arguments = match weights {
        Weights::Dense { words, .. } => vec![words.pointer()],
        Weights::Fixed12 { matrix, first, .. } => matrix.components_from(first / TILE_ROWS).to_vec(),
        Weights::Sparse24 { matrix, first, .. } => matrix.components_from(first / TILE_ROWS),
    };
    let slices = weights.slices();
    arguments.extend([
        Argument::U64(rows as u64),
        Argument::U64(cols as u64),
        p.x.pointer(),
        Argument::U32(size32("the stride of x", p.stride)?),
        Argument::U32(size32("tokens", p.tokens)?),
        p.y.pointer(),
        Argument::U64(p.y_stride as u64),
        p.bias.map_or(Argument::Pointer(0), |bias| bias.pointer()),
        Argument::U32(u32::from(p.adds)),
        Argument::U32(slices.ilog2()),
    ]);
    let grid = match tile.kind {
        Loop::Stream => {
            let strips = WARPS / slices * tile.strips;
            let down = rows.div_ceil(TILE_ROWS * strips);
            [size32("strips", down)?, size32("tokens", p.tokens.div_ceil(8 * tile.columns))?, 1]
        }
        Loop::Panel => {
            let (down, across) = variant.blocks(rows, p.tokens);
            let parts = if variant.split { slices } else { 1 };
            if variant.split && down * across > COUNTERS {
                return Err(Error::Unsupported(format!(
                    "a product of {} tiles split by its columns",
                    down * across
                )));
            }
            // A block that finds a buffer for sums keeps them there.
            let [sums, counters] = match split.filter(|_| variant.split || variant.outside) {
                Some((sums, counters)) => [sums.pointer(), counters.pointer()],
                None => [Argument::Pointer(0); 2],
            };
            arguments.extend([sums, counters]);
            [size32("tiles", down * across)?, parts as u32, 1]
        }
    };
    gpu.launch(&Launch {
        file,
        kernel: tile.names[name],
        grid,
        block: THREADS as u32,
        shared: variant.shared(weights) as u32,
        arguments: &arguments,
        overlaps: !weights.fresh(),
    })
}

/// Makes a product in the way that `picker` takes.
///
/// # Errors
/// Those of [`product_in`].
pub fn product(gpu: &Gpu, weights: Weights<'_>, p: &Product<'_>, picker: &Picker) -> Result<()> {
    let (n, k) = weights.shape();
    if p.tokens == 0 || n == 0 {
        return Ok(());
    }
    check(weights, p)?;
    let bytes = p.workspace.map_or(0, Workspace::bytes);
    let mut candidates = variants(gpu, weights, p.tokens);
    candidates.retain(|variant| variant.workspace_bytes(weights, bucket(p.tokens)) <= bytes);
    let (kernel, _) = weights.family();
    // Variants are tried on another output: this one may hold what the product is added to.
    let mut output = None;
    let key = Key { kernel, n, k, m: bucket(p.tokens), slices: weights.slices() };
    let picked = picker.pick(gpu, key, candidates.len(), &mut |i| {
        let output = match &output {
            Some(output) => output,
            None => output.insert(gpu.allocate(p.y.bytes())?),
        };
        product_in(gpu, weights, &Product { y: output.view(), ..*p }, candidates[i])
    })?;
    // Another workspace than when it was picked may leave fewer.
    let Some(&variant) = candidates.get(picked).or(candidates.first()) else {
        return Err(Error::Unsupported(format!("a product of {n} x {k} with {} tokens", p.tokens)));
    };
    product_in(gpu, weights, p, variant)
}
