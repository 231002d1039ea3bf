//! Products of weights of 1 to 8 bits with activations in BF16.
//!
//! ```text
//! few tokens    Stream    a warp a slice of some strips of 16 rows, x from the caches
//! dozens        Panel     a block 128 rows x 32 or 64 tokens, x and codes through shared memory
//! hundreds      Decoded   codes become integers in BF16 in the workspace, then the same
//! ```
//!
//! One order of additions for all of them (kernels/cuda/abq.cuh), so the same bits.

use std::fmt;

use super::super::dense::row_stride;
use super::super::picker::{Picker, Shape as Key};
use super::super::product::{COUNTERS, Product, Workspace, check_operands, slices};
use super::super::{Argument, Error, Gpu, Launch, Result, View, size32};
use super::layout::{HALF_COLS, TILE_COLS, TILE_ROWS, tile_bytes};
use super::matrix::Matrix;
use super::{FILES, of_each_width};

const WARPS: usize = 8;
const THREADS: usize = 256;
/// Products are split only where their sums stay in the caches.
const PARTIALS_LIMIT: usize = 32 << 20;
/// Blocks from which on a panel is not split: about the multiprocessors of a large GPU.
const WANTED_BLOCKS: usize = 128;
/// Bytes of a decoded tile.
const DECODED_BYTES: usize = 2 * TILE_ROWS * TILE_COLS;

/// Which tile loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loop {
    Stream,
    Panel,
    Decoded,
}

/// A compiled tile loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    kind: Loop,
    /// Tokens of a block / 8.
    columns: usize,
    /// Strips of 16 rows of a warp.
    strips: usize,
    /// Of each width; the same one where codes are decoded before.
    names: [&'static str; 8],
}

/// Those of the sources.
const TILES: [Tile; 7] = [
    Tile { kind: Loop::Stream, columns: 1, strips: 1, names: of_each_width!("stream_1_1") },
    Tile { kind: Loop::Stream, columns: 1, strips: 2, names: of_each_width!("stream_1_2") },
    Tile { kind: Loop::Stream, columns: 2, strips: 2, names: of_each_width!("stream_2_2") },
    Tile { kind: Loop::Panel, columns: 4, strips: 1, names: of_each_width!("panel_4_1") },
    Tile { kind: Loop::Panel, columns: 8, strips: 1, names: of_each_width!("panel_8_1") },
    Tile { kind: Loop::Decoded, columns: 8, strips: 1, names: ["abq_panel_8_1_2"; 8] },
    Tile { kind: Loop::Decoded, columns: 8, strips: 2, names: ["abq_panel_8_2_3"; 8] },
];
const DECODERS: [&str; 8] = of_each_width!("decode");

impl Tile {
    /// Tiles are asked for one fewer early: the constants of the sources.
    fn depth(&self, planes: usize) -> usize {
        match self.kind {
            Loop::Stream if planes * self.strips <= 4 => 8,
            Loop::Stream | Loop::Panel => 4,
            Loop::Decoded => self.strips + 1,
        }
    }
}

/// Some rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// The matrix.
    pub matrix: &'a Matrix,
    /// The first row: a multiple of 16.
    pub first: usize,
    /// How many.
    pub rows: usize,
    /// Rows of the matrix that all of it is part of.
    pub whole: usize,
}

impl<'a> Weights<'a> {
    /// All rows.
    #[must_use]
    pub fn all(matrix: &'a Matrix) -> Self {
        Self { matrix, first: 0, rows: matrix.rows(), whole: matrix.rows() }
    }

    fn across(&self) -> usize {
        self.matrix.cols().div_ceil(TILE_COLS)
    }

    fn slices(&self) -> usize {
        slices(self.whole)
    }

    /// Bytes that a product reads of them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.matrix.bytes() / self.matrix.rows().max(1) * self.rows
    }
}

/// One way to make a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    tile: Tile,
    /// Whether a block takes one slice, not all.
    split: bool,
    /// Whether a block that takes all slices in turn keeps what they add up to in the workspace, not in shared memory.
    outside: bool,
}

impl Variant {
    /// All ways that a GPU has to make a product with such weights.
    #[must_use]
    pub fn all(gpu: &Gpu, weights: Weights<'_>) -> Vec<Self> {
        let limit = gpu.backend().shared_limit() as usize;
        let mut all = Vec::new();
        for tile in TILES {
            let whole = Self { tile, split: false, outside: false };
            all.push(whole);
            if whole.totals(weights) > 0 {
                all.push(Self { split: true, ..whole });
                all.push(Self { outside: true, ..whole });
            }
        }
        all.retain(|variant| variant.shared(weights) <= limit);
        all
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

    /// Bytes of what the slices of a block add up to, where it takes several in turn.
    fn totals(self, weights: Weights<'_>) -> usize {
        let several = self.tile.kind != Loop::Stream && weights.slices() > 1;
        if several { 16 * self.tile.strips * self.tile.columns * THREADS } else { 0 }
    }

    /// Bytes of shared memory.
    fn shared(self, weights: Weights<'_>) -> usize {
        let Tile { kind, columns, strips, .. } = self.tile;
        let planes = weights.matrix.planes();
        let depth = self.tile.depth(planes);
        let tile = if kind == Loop::Decoded { DECODED_BYTES } else { tile_bytes(planes) };
        if kind == Loop::Stream {
            // The sums of a warp take the place of its ring.
            return WARPS * (depth * strips * tile).max(512 * strips * columns);
        }
        let width = 8 * columns;
        let stage = width * 2 * TILE_COLS + 2 * 4 * width + WARPS * strips * tile;
        let totals = if self.outside || self.split { 0 } else { self.totals(weights) };
        depth * stage + 16 + totals
    }

    /// Bytes of decoded weights, of what x adds up to, and of the sums of slices.
    fn pieces(self, weights: Weights<'_>, tokens: usize) -> [usize; 3] {
        if self.tile.kind == Loop::Stream {
            return [0; 3];
        }
        let decoded = if self.tile.kind == Loop::Decoded {
            2 * weights.rows * row_stride(weights.matrix.cols())
        } else {
            0
        };
        let of_x = if weights.matrix.has_offsets() {
            4 * 2 * weights.across() * tokens.next_multiple_of(8)
        } else {
            0
        };
        let sums = match (self.split, self.outside) {
            (true, _) => self.sums_bytes(weights, weights.slices(), tokens),
            (_, true) => self.sums_bytes(weights, 1, tokens),
            _ => 0,
        };
        [decoded, of_x, sums].map(|bytes| bytes.next_multiple_of(256))
    }

    fn sums_bytes(self, weights: Weights<'_>, slices: usize, tokens: usize) -> usize {
        let (height, width) = self.block();
        let (down, across) = self.blocks(weights.rows, tokens);
        4 * slices * down * across * height * width
    }

    /// Bytes of [`Workspace`] that it needs.
    #[must_use]
    pub fn workspace_bytes(self, weights: Weights<'_>, tokens: usize) -> usize {
        match self.pieces(weights, tokens).into_iter().sum() {
            0 => 0,
            bytes => 4 * COUNTERS + bytes,
        }
    }

    /// Whether it is worth a try with so many tokens.
    fn suits(self, weights: Weights<'_>, tokens: usize) -> bool {
        let (down, across) = self.blocks(weights.rows, tokens);
        let columns = (tokens / 8).max(1);
        let few = down * across <= WANTED_BLOCKS;
        let split = !self.split
            || few
                && self.sums_bytes(weights, weights.slices(), tokens) <= PARTIALS_LIMIT
                && down * across <= COUNTERS;
        split
            && match self.tile.kind {
                // The widest serves any number, where there is no workspace.
                Loop::Stream => self.tile.columns == columns || self.tile.columns == 2 && columns > 2,
                Loop::Panel => columns >= 4 && self.tile.columns <= columns,
                Loop::Decoded => columns > 8,
            }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { kind, columns, strips, .. } = self.tile;
        let warps = if kind == Loop::Stream { 1 } else { WARPS };
        let name = if kind == Loop::Stream { "stream" } else { "panel" };
        write!(f, "{name} of {} tokens x {} rows", 8 * columns, TILE_ROWS * strips * warps)?;
        f.write_str(if self.split { ", split" } else { "" })?;
        f.write_str(if self.outside { ", sums outside" } else { "" })?;
        f.write_str(if kind == Loop::Decoded { ", decoded first" } else { "" })
    }
}

/// Token counts with the same variants: the most of them.
fn bucket(tokens: usize) -> usize {
    tokens.next_power_of_two().max(8)
}

/// Tokens from which on the default is to decode first.
const DECODED_FROM: usize = 256;

/// The ways that suit a product of so many tokens on a GPU, the default first. They need [`Variant::workspace_bytes`]; at least one
/// of them needs none.
#[must_use]
pub fn variants(gpu: &Gpu, weights: Weights<'_>, tokens: usize) -> Vec<Variant> {
    let tokens = bucket(tokens);
    let mut suited = Variant::all(gpu, weights);
    suited.retain(|variant| variant.suits(weights, tokens));
    let inside = |variant: &Variant| Variant { outside: false, ..*variant };
    let all = suited.clone();
    // What lies outside need not where it fits inside.
    suited.retain(|variant| !variant.outside || !all.contains(&inside(variant)));
    // Stable: the order of the list decides among equals.
    suited.sort_by_key(|variant| {
        let Tile { kind, columns, strips, .. } = variant.tile;
        let late = tokens > 16 && kind == Loop::Stream;
        let early = (kind == Loop::Decoded) != (tokens >= DECODED_FROM);
        let few = variant.blocks(weights.rows, tokens).0 < WANTED_BLOCKS;
        let whole = kind != Loop::Stream && few && !variant.split;
        (late, early && kind != Loop::Stream, columns * 8 < tokens.min(64), whole, strips == 2 && few)
    });
    suited
}

/// The most workspace that a product of up to `tokens` tokens takes on a GPU, whichever variant it is.
#[must_use]
pub fn workspace_bytes(gpu: &Gpu, weights: Weights<'_>, tokens: usize) -> usize {
    let counts = (3..usize::BITS - 1).map(|bits| 1usize << bits).take_while(|&count| count <= bucket(tokens));
    let bytes = counts.map(|count| {
        variants(gpu, weights, count)
            .into_iter()
            .map(|v| v.workspace_bytes(weights, count))
            .max()
            .unwrap_or(0)
    });
    bytes.max().unwrap_or(0)
}

fn check(weights: Weights<'_>, p: &Product<'_>) -> Result<()> {
    let Weights { matrix, first, rows, .. } = weights;
    if !first.is_multiple_of(TILE_ROWS) || first.checked_add(rows).is_none_or(|end| end > matrix.rows()) {
        return Err(Error::Invalid(format!(
            "{rows} rows from {first} on of an abq matrix of {}",
            matrix.rows()
        )));
    }
    check_operands(rows, matrix.cols(), p)
}

/// Makes a product in a given way.
///
/// # Errors
/// A buffer is too small or `x` is not aligned to 16 bytes; the workspace is too small; the launch fails.
pub fn product_in(gpu: &Gpu, weights: Weights<'_>, p: &Product<'_>, variant: Variant) -> Result<()> {
    let Weights { matrix, first, rows, .. } = weights;
    if p.tokens == 0 || rows == 0 {
        return Ok(());
    }
    check(weights, p)?;
    let strip = first / TILE_ROWS;
    let [decoded, of_x, sums] = variant.pieces(weights, p.tokens);
    let needed = variant.workspace_bytes(weights, p.tokens);
    let workspace = match p.workspace {
        _ if needed == 0 => None,
        Some(workspace) if workspace.bytes() >= needed => Some(workspace.view()),
        workspace => {
            let given = workspace.map_or(0, Workspace::bytes);
            return Err(Error::Invalid(format!("a workspace of {given} bytes; the product needs {needed}")));
        }
    };
    let piece = |first: usize, bytes: usize| -> Result<Option<View<'_>>> {
        let first = 4 * COUNTERS + first;
        workspace.filter(|_| bytes > 0).map(|view| view.slice(first..first + bytes)).transpose()
    };
    let (words, of_x, sums) = (piece(0, decoded)?, piece(decoded, of_x)?, piece(decoded + of_x, sums)?);
    let pointer = |view: Option<View<'_>>| view.map_or(Argument::Pointer(0), |view| view.pointer());
    let tile = variant.tile;
    let shape = [Argument::U64(rows as u64), Argument::U64(matrix.cols() as u64)];
    let slices = weights.slices();
    let width = matrix.planes() - 1;
    let mut arguments = match words {
        Some(words) => {
            let mut decode = matrix.codes_from(strip).to_vec();
            decode.extend(shape);
            decode.extend([words.pointer(), Argument::U64(row_stride(matrix.cols()) as u64)]);
            let tiles = rows.div_ceil(TILE_ROWS) * weights.across();
            gpu.launch(&Launch {
                file: FILES[width],
                kernel: DECODERS[width],
                grid: [size32("tiles", tiles.div_ceil(WARPS))?, 1, 1],
                block: THREADS as u32,
                shared: 0,
                arguments: &decode,
                overlaps: true,
            })?;
            vec![words.pointer()]
        }
        None => matrix.codes_from(strip).to_vec(),
    };
    if let Some(of_x) = of_x {
        add_x(gpu, weights, p, of_x)?;
    }
    arguments.extend(matrix.groups_from(strip)?);
    arguments.extend(shape);
    arguments.extend([
        p.x.pointer(),
        Argument::U32(size32("the stride of x", p.stride)?),
        Argument::U32(size32("tokens", p.tokens)?),
        p.y.pointer(),
        Argument::U64(p.y_stride as u64),
        p.bias.map_or(Argument::Pointer(0), |bias| bias.pointer()),
        Argument::U32(u32::from(p.adds)),
        Argument::U32(slices.ilog2()),
    ]);
    let grid = if tile.kind == Loop::Stream {
        let down = rows.div_ceil(TILE_ROWS * WARPS / slices * tile.strips);
        [size32("strips", down)?, size32("tokens", p.tokens.div_ceil(8 * tile.columns))?, 1]
    } else {
        let (down, across) = variant.blocks(rows, p.tokens);
        if variant.split && down * across > COUNTERS {
            return Err(Error::Unsupported(format!(
                "a product of {} tiles split by its columns",
                down * across
            )));
        }
        let counters = workspace.filter(|_| variant.split);
        arguments.extend([pointer(of_x), pointer(sums), pointer(counters)]);
        [size32("tiles", down * across)?, if variant.split { slices as u32 } else { 1 }, 1]
    };
    gpu.launch(&Launch {
        file: if tile.kind == Loop::Decoded { "abq_decoded" } else { FILES[width] },
        kernel: tile.names[width],
        grid,
        block: THREADS as u32,
        shared: variant.shared(weights) as u32,
        arguments: &arguments,
        overlaps: words.is_none(),
    })
}

/// Adds up x over the parts of groups that slices have.
fn add_x(gpu: &Gpu, weights: Weights<'_>, p: &Product<'_>, of_x: View<'_>) -> Result<()> {
    let (across, slices) = (weights.across(), weights.slices());
    let length = weights.matrix.group_halves();
    // Most parts of a slice, as the kernel counts them.
    let halves = across.div_ceil(slices) * (TILE_COLS / HALF_COLS);
    let parts = (halves / length as usize + 2) * slices;
    gpu.launch(&Launch {
        file: "abq_decoded",
        kernel: "add_x",
        grid: [size32("parts", parts.div_ceil(WARPS))?, size32("tokens", p.tokens.div_ceil(8))?, 1],
        block: THREADS as u32,
        shared: 0,
        arguments: &[
            p.x.pointer(),
            Argument::U32(size32("the stride of x", p.stride)?),
            Argument::U32(size32("tokens", p.tokens)?),
            Argument::U64(weights.matrix.cols() as u64),
            Argument::U32(length),
            Argument::U32(slices.ilog2()),
            of_x.pointer(),
        ],
        overlaps: true,
    })
}

/// Makes a product in the way that `picker` takes.
///
/// # Errors
/// Those of [`product_in`].
pub fn product(gpu: &Gpu, weights: Weights<'_>, p: &Product<'_>, picker: &Picker) -> Result<()> {
    let (n, k) = (weights.rows, weights.matrix.cols());
    if p.tokens == 0 || n == 0 {
        return Ok(());
    }
    check(weights, p)?;
    let bytes = p.workspace.map_or(0, Workspace::bytes);
    let mut candidates = variants(gpu, weights, p.tokens);
    candidates.retain(|variant| variant.workspace_bytes(weights, bucket(p.tokens)) <= bytes);
    let kernel = TILES[0].names[weights.matrix.planes() - 1];
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
