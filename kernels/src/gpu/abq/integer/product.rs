//! How integer products are made: activations are quantised, then multiplied.

use std::fmt;

use super::super::super::picker::{Picker, Shape as Key};
use super::super::super::product::{COUNTERS, Product, Workspace, check_operands};
use super::super::super::{Argument, Error, Gpu, Launch, Result, View, size32};
use super::super::layout::TILE_ROWS;
use super::super::{FILES, of_each_width};
use super::planes::{Matrix, tile_bytes};

const WARPS: usize = 8;
const THREADS: usize = 256;
/// Outputs that a thread has at most.
const OUTPUTS: usize = 4;
/// Bytes of shared memory for the sums of groups.
const SUMS_BYTES: usize = 32 << 10;
/// Warps that are enough for a product: slices are made up to so many.
const ENOUGH_WARPS: usize = 4096;
/// Bytes of shared memory for the sums of a token's groups: what every launch may have.
const QUANTISING_BYTES: usize = 40 << 10;

/// What becomes of the codes of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Planes: so many fragments of 16 rows of them a block.
    Bits(usize),
    /// Bytes: so many times 8 tokens a block.
    Bytes(usize),
}

/// One way to make a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    form: Form,
    /// Warps that share the columns of a strip.
    slices: usize,
}

/// The kernels of the sources, of each width.
const KERNELS: [(Form, [&str; 8]); 5] = [
    (Form::Bits(1), of_each_width!("bits_1")),
    (Form::Bits(2), of_each_width!("bits_2")),
    (Form::Bytes(1), of_each_width!("bytes_1")),
    (Form::Bytes(2), of_each_width!("bytes_2")),
    (Form::Bytes(8), of_each_width!("bytes_8")),
];

/// Rows of a fragment that a token's planes take.
fn slot(matrix: &Matrix) -> usize {
    matrix.activation_bits().next_power_of_two() as usize
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
}

impl<'a> Weights<'a> {
    /// All rows.
    #[must_use]
    pub fn all(matrix: &'a Matrix) -> Self {
        Self { matrix, first: 0, rows: matrix.rows() }
    }

    /// Bytes that a product reads of them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.matrix.bytes() / self.matrix.rows().max(1) * self.rows
    }
}

/// What quantising is told besides the operands of a product.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quantising<'a> {
    /// Whether `x` is `F32 [tokens, stride]`, not BF16.
    pub wide: bool,
    /// A `u32` of the device, and what goes there if it is 0 and x has a NaN, an infinity, or values too far apart: never 0.
    pub fault: Option<(View<'a>, u32)>,
}

/// Where quantised activations lie in a workspace.
struct Places {
    /// Tokens, with those that fill up fragments.
    padded: usize,
    codes: usize,
    steps: usize,
    zeros: usize,
    sums: usize,
    end: usize,
}

impl Variant {
    /// All ways that a GPU has to make a product with such weights.
    #[must_use]
    pub fn all(gpu: &Gpu, weights: Weights<'_>) -> Vec<Self> {
        let limit = gpu.backend().shared_limit() as usize;
        let forms = KERNELS.into_iter().map(|(form, _)| form);
        let all = forms.flat_map(|form| [1, 2, 4, 8].map(|slices| Self { form, slices }));
        all.filter(|variant| {
            let (block, tokens) = (WARPS / variant.slices, variant.block_tokens(weights.matrix));
            (weights.matrix.has_whole_tiles() || matches!(variant.form, Form::Bytes(_)))
                && block * TILE_ROWS * tokens <= OUTPUTS * THREADS
                && variant.shared(weights.matrix) <= limit
        })
        .collect()
    }

    /// Tokens of a block.
    fn block_tokens(self, matrix: &Matrix) -> usize {
        match self.form {
            Form::Bits(fragments) => fragments * 16 / slot(matrix),
            Form::Bytes(columns) => 8 * columns,
        }
    }

    /// Groups that are added up at a time.
    fn chunk(self, matrix: &Matrix) -> usize {
        let (groups, _) = matrix.groups();
        let each = 4 * WARPS / self.slices * TILE_ROWS * self.block_tokens(matrix);
        // So many that they end with a tile, whatever their length.
        let fit = SUMS_BYTES / each / 4 * 4;
        groups.min(fit.max(4))
    }

    /// Bytes of shared memory.
    fn shared(self, matrix: &Matrix) -> usize {
        // The constant of the source.
        let stages = if matrix.planes() <= 2 { 8 } else { 4 };
        let sums = 4 * WARPS / self.slices * self.chunk(matrix) * TILE_ROWS * self.block_tokens(matrix);
        WARPS * stages * tile_bytes(matrix.planes()) + sums
    }

    fn places(self, matrix: &Matrix, tokens: usize) -> Places {
        let each = match self.form {
            Form::Bits(_) => 16 / slot(matrix),
            Form::Bytes(_) => 8,
        };
        let padded = tokens.next_multiple_of(each);
        let codes = match self.form {
            Form::Bits(_) => padded / each * matrix.across() * 256,
            Form::Bytes(_) => padded * matrix.across() * 128,
        };
        let after = |start: usize, bytes: usize| (start + bytes).next_multiple_of(256);
        let steps = after(4 * COUNTERS, codes);
        let zeros = after(steps, 4 * padded);
        let sums = after(zeros, 4 * padded);
        let end = after(sums, 4 * padded * matrix.groups().0);
        Places { padded, codes: 4 * COUNTERS, steps, zeros, sums, end }
    }

    /// Bytes of [`Workspace`] that it needs: for the quantised activations.
    #[must_use]
    pub fn workspace_bytes(self, weights: Weights<'_>, tokens: usize) -> usize {
        self.places(weights.matrix, tokens).end
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = TILE_ROWS * WARPS / self.slices;
        match self.form {
            Form::Bits(fragments) => write!(f, "bits, {fragments} x 16 planes x {rows} rows"),
            Form::Bytes(columns) => write!(f, "bytes, {} tokens x {rows} rows", 8 * columns),
        }
    }
}

/// Token counts with the same variants: the most of them.
fn bucket(tokens: usize) -> usize {
    tokens.next_power_of_two()
}

/// The ways that suit a product of so many tokens on a GPU, the default first.
#[must_use]
pub fn variants(gpu: &Gpu, weights: Weights<'_>, tokens: usize) -> Vec<Variant> {
    let tokens = bucket(tokens);
    let strips = weights.rows.div_ceil(TILE_ROWS).max(1);
    let wanted = 1 << (ENOUGH_WARPS / strips).clamp(1, 8).ilog2();
    let mut all = Variant::all(gpu, weights);
    let fewest = |all: &[Variant], form| all.iter().filter(|v| v.form == form).map(|v| v.slices).min();
    let forms = all.clone();
    all.retain(|variant| {
        let most = variant.block_tokens(weights.matrix);
        let fits = match variant.form {
            Form::Bits(1) => tokens <= most,
            Form::Bits(_) => tokens <= most && 2 * tokens > most,
            Form::Bytes(1) => tokens <= 8,
            Form::Bytes(2) => tokens <= 16 && tokens > 8,
            Form::Bytes(_) => tokens > 16,
        };
        let slices = wanted.max(fewest(&forms, variant.form).unwrap_or(8));
        fits && (variant.slices == slices || variant.slices == 8)
    });
    // Stable: bits before bytes, as they are listed; taller blocks first.
    all
}

/// The most workspace that a product of up to `tokens` tokens takes on a GPU, whichever variant it is.
#[must_use]
pub fn workspace_bytes(gpu: &Gpu, weights: Weights<'_>, tokens: usize) -> usize {
    let counts = (0..usize::BITS - 1).map(|bits| 1usize << bits).take_while(|&count| count <= bucket(tokens));
    let bytes = counts.map(|count| {
        variants(gpu, weights, count)
            .into_iter()
            .map(|v| v.workspace_bytes(weights, count))
            .max()
            .unwrap_or(0)
    });
    bytes.max().unwrap_or(0)
}

fn check(weights: Weights<'_>, p: &Product<'_>, quantising: &Quantising<'_>) -> Result<()> {
    let Weights { matrix, first, rows } = weights;
    if !first.is_multiple_of(TILE_ROWS) || first.checked_add(rows).is_none_or(|end| end > matrix.rows()) {
        return Err(Error::Invalid(format!(
            "{rows} rows from {first} on of an abq matrix of {}",
            matrix.rows()
        )));
    }
    check_operands(rows, matrix.cols(), p)?;
    if quantising.wide {
        p.x.require("x", p.tokens.saturating_mul(p.stride).saturating_mul(4))?;
    }
    if let Some((fault, label)) = quantising.fault {
        fault.require("the fault", 4)?;
        fault.require_aligned("the fault", 4)?;
        if label == 0 {
            return Err(Error::Invalid("the label of a fault is 0".to_owned()));
        }
    }
    if 4 * matrix.groups().0 > QUANTISING_BYTES {
        return Err(Error::Unsupported(format!("an integer product of {} groups a row", matrix.groups().0)));
    }
    Ok(())
}

/// Makes a product in a given way: `p.x` is quantised to the activations' width of the matrix.
///
/// # Errors
/// A buffer is too small or not aligned; the workspace is too small; the launch fails.
pub fn product_in(
    gpu: &Gpu,
    weights: Weights<'_>,
    p: &Product<'_>,
    quantising: &Quantising<'_>,
    variant: Variant,
) -> Result<()> {
    let Weights { matrix, first, rows } = weights;
    if p.tokens == 0 || rows == 0 {
        return Ok(());
    }
    check(weights, p, quantising)?;
    let places = variant.places(matrix, p.tokens);
    let given = p.workspace.map_or(0, Workspace::bytes);
    let Some(workspace) = p.workspace.filter(|_| given >= places.end) else {
        return Err(Error::Invalid(format!(
            "a workspace of {given} bytes; the product needs {}",
            places.end
        )));
    };
    let workspace = workspace.view();
    let piece = |from: usize, to: usize| Ok::<_, Error>(workspace.slice(from..to)?.pointer());
    let made = [
        piece(places.codes, places.steps)?,
        piece(places.steps, places.zeros)?,
        piece(places.zeros, places.sums)?,
        piece(places.sums, places.end)?,
    ];
    let (groups, length) = matrix.groups();
    let tokens = Argument::U32(size32("tokens", p.tokens)?);
    let slot = Argument::U32(size32("planes", slot(matrix))?);
    let mut arguments = vec![
        p.x.pointer(),
        Argument::U32(size32("the stride of x", p.stride)?),
        tokens,
        Argument::U32(size32("input features", matrix.cols())?),
        Argument::U32(matrix.activation_bits()),
        slot,
        Argument::U32(size32("groups", groups)?),
        Argument::U32(size32("columns of a group", length)?),
    ];
    arguments.extend(made);
    let (fault, label) =
        quantising.fault.map_or((Argument::Pointer(0), 0), |(view, label)| (view.pointer(), label));
    arguments.extend([fault, Argument::U32(label)]);
    gpu.launch(&Launch {
        file: "abq_quantise",
        kernel: match (variant.form, quantising.wide) {
            (Form::Bits(_), false) => "quantise_bits_bf16",
            (Form::Bits(_), true) => "quantise_bits_f32",
            (Form::Bytes(_), false) => "quantise_bytes_bf16",
            (Form::Bytes(_), true) => "quantise_bytes_f32",
        },
        grid: [size32("tokens", places.padded)?, 1, 1],
        block: THREADS as u32,
        shared: 3 * 4 * WARPS as u32 + 4 * groups.next_multiple_of(4) as u32,
        arguments: &arguments,
        overlaps: true,
    })?;

    let block_tokens = variant.block_tokens(matrix);
    let mut arguments = matrix.arguments_from(first / TILE_ROWS)?.to_vec();
    arguments.extend([Argument::U64(rows as u64), Argument::U64(matrix.cols() as u64)]);
    arguments.extend(made);
    arguments.extend([
        slot,
        Argument::U32(size32("groups", variant.chunk(matrix))?),
        tokens,
        p.y.pointer(),
        Argument::U64(p.y_stride as u64),
        p.bias.map_or(Argument::Pointer(0), |bias| bias.pointer()),
        Argument::U32(u32::from(p.adds)),
        Argument::U32(variant.slices.ilog2()),
    ]);
    let Some((_, kernels)) = KERNELS.iter().find(|(form, _)| *form == variant.form) else {
        return Err(Error::Unsupported(format!("a product by {variant}")));
    };
    let down = rows.div_ceil(TILE_ROWS * WARPS / variant.slices);
    gpu.launch(&Launch {
        file: FILES[matrix.planes() - 1],
        kernel: kernels[matrix.planes() - 1],
        grid: [size32("blocks", down.saturating_mul(p.tokens.div_ceil(block_tokens)))?, 1, 1],
        block: THREADS as u32,
        shared: variant.shared(matrix) as u32,
        arguments: &arguments,
        overlaps: true,
    })
}

/// Makes a product in the way that `picker` takes.
///
/// # Errors
/// Those of [`product_in`].
pub fn product(
    gpu: &Gpu,
    weights: Weights<'_>,
    p: &Product<'_>,
    quantising: &Quantising<'_>,
    picker: &Picker,
) -> Result<()> {
    let (n, k) = (weights.rows, weights.matrix.cols());
    if p.tokens == 0 || n == 0 {
        return Ok(());
    }
    check(weights, p, quantising)?;
    let candidates = variants(gpu, weights, p.tokens);
    let kernel = KERNELS[0].1[weights.matrix.planes() - 1];
    // Variants are tried on another output: this one may hold what the product is added to.
    let mut output = None;
    // The width of activations takes the place of the number of slices.
    let slices = weights.matrix.activation_bits() as usize;
    let key = Key { kernel, n, k, m: bucket(p.tokens), slices };
    let picked = picker.pick(gpu, key, candidates.len(), &mut |i| {
        let output = match &output {
            Some(output) => output,
            None => output.insert(gpu.allocate(p.y.bytes())?),
        };
        product_in(gpu, weights, &Product { y: output.view(), ..*p }, quantising, candidates[i])
    })?;
    let Some(&variant) = candidates.get(picked).or(candidates.first()) else {
        return Err(Error::Unsupported(format!("an integer product of {n} x {k} with {} tokens", p.tokens)));
    };
    product_in(gpu, weights, p, quantising, variant)
}
