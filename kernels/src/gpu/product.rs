//! Matrix products with weights of any encoding: `y = x W^T`.
//!
//! One order of additions for every encoding and every shape of block (kernels/cuda/product.cuh), so a lossless encoding gives
//! the same bits as plain weights, and which shape a picker takes never shows.

use super::fixed12::Matrix;
use super::picker::{Picker, Shape as Key};
use super::{Argument, Error, Gpu, Launch, Result, View, size32};

/// The shape of a block: 8 `columns` tokens, `strips` strips of 16 rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens / 8.
    pub columns: usize,
    /// Strips of 16 rows.
    pub strips: usize,
    name: [&'static str; 2],
}

impl Shape {
    /// All shapes of the kernels.
    pub const ALL: [Self; 8] = [
        Self { columns: 1, strips: 1, name: ["dense_1_1", "fixed12_1_1"] },
        Self { columns: 1, strips: 2, name: ["dense_1_2", "fixed12_1_2"] },
        Self { columns: 1, strips: 4, name: ["dense_1_4", "fixed12_1_4"] },
        Self { columns: 2, strips: 1, name: ["dense_2_1", "fixed12_2_1"] },
        Self { columns: 2, strips: 2, name: ["dense_2_2", "fixed12_2_2"] },
        Self { columns: 4, strips: 1, name: ["dense_4_1", "fixed12_4_1"] },
        Self { columns: 4, strips: 2, name: ["dense_4_2", "fixed12_4_2"] },
        Self { columns: 8, strips: 1, name: ["dense_8_1", "fixed12_8_1"] },
    ];

    /// Those that suit a product of `tokens` tokens, the default first.
    #[must_use]
    pub fn candidates(tokens: usize) -> Vec<Self> {
        // The fewest columns that take all tokens at once, so that weights are read once; else the most there are.
        let columns = tokens.div_ceil(8).next_power_of_two().clamp(1, 8);
        Self::ALL.into_iter().filter(|shape| shape.columns == columns).collect()
    }
}

/// The weights of a product.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// `BF16 [rows, cols]`, row-major; `cols` is a multiple of 8.
    Dense {
        /// The words.
        words: View<'a>,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
    },
    /// fixed12: some rows of a matrix.
    Fixed12 {
        /// The matrix.
        matrix: &'a Matrix,
        /// Its rows: from a multiple of 16 on.
        first: usize,
        /// How many.
        rows: usize,
    },
}

impl<'a> Weights<'a> {
    /// All rows of a matrix.
    #[must_use]
    pub fn fixed12(matrix: &'a Matrix) -> Self {
        Self::Fixed12 { matrix, first: 0, rows: matrix.rows() }
    }

    /// Output and input features.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Dense { rows, cols, .. } => (*rows, *cols),
            Self::Fixed12 { matrix, rows, .. } => (*rows, matrix.cols()),
        }
    }

    /// Bytes that a product reads of them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense { rows, cols, .. } => 2 * rows * cols,
            Self::Fixed12 { matrix, rows, .. } => matrix.bytes() / matrix.rows().max(1) * rows,
        }
    }
}

/// The operands of a product besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// `BF16 [tokens, stride]`: zeros from the input features up to the next multiple of 64.
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
    /// Whether the product is added to what `y` holds.
    pub adds: bool,
}

/// Makes a product in a given shape.
///
/// # Errors
/// A buffer is too small; `cols` of dense weights is no multiple of 8; the launch fails.
pub fn product_in(gpu: &Gpu, weights: Weights<'_>, p: &Product<'_>, shape: Shape) -> Result<()> {
    let (rows, cols) = weights.shape();
    if p.tokens == 0 || rows == 0 {
        return Ok(());
    }
    if !p.stride.is_multiple_of(64) || p.stride < cols {
        return Err(Error::Invalid(format!("rows of x of {} elements for {cols} input features", p.stride)));
    }
    p.x.require("x", 2 * p.tokens * p.stride)?;
    p.y.require("y", 4 * ((p.tokens - 1) * p.y_stride + rows))?;
    if let Some(bias) = p.bias {
        bias.require("the bias", 4 * rows)?;
    }
    let (file, kernel, mut arguments) = match weights {
        Weights::Dense { words, rows, cols } => {
            if !cols.is_multiple_of(8) {
                return Err(Error::Unsupported(format!(
                    "a matrix of {cols} columns: products on a GPU take multiples of 8"
                )));
            }
            words.require("the weights", 2 * rows * cols)?;
            ("dense", shape.name[0], vec![words.pointer()])
        }
        Weights::Fixed12 { matrix, first, rows } => {
            if !first.is_multiple_of(16) || first.checked_add(rows).is_none_or(|end| end > matrix.rows()) {
                return Err(Error::Invalid(format!(
                    "{rows} rows from {first} on of a fixed12 matrix of {}",
                    matrix.rows()
                )));
            }
            ("fixed12", shape.name[1], matrix.components_from(first / 16).to_vec())
        }
    };
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
    ]);
    gpu.launch(&Launch {
        file,
        kernel,
        grid: [
            size32("strips", rows.div_ceil(16 * shape.strips))?,
            size32("tokens", p.tokens.div_ceil(8 * shape.columns))?,
            1,
        ],
        block: 256 * shape.strips as u32,
        // The slices' sums of 16 rows a strip.
        shared: (4 * 8 * 16 * 8 * shape.columns * shape.strips) as u32,
        arguments: &arguments,
    })
}

/// Makes a product in the shape that `picker` takes.
///
/// # Errors
/// Those of [`product_in`].
pub fn product(gpu: &Gpu, weights: Weights<'_>, p: &Product<'_>, picker: &Picker) -> Result<()> {
    let (n, k) = weights.shape();
    let candidates = Shape::candidates(p.tokens);
    let kernel = match weights {
        Weights::Dense { .. } => "dense",
        Weights::Fixed12 { .. } => "fixed12",
    };
    // Shapes are tried on another output: this one may hold what the product is added to.
    let mut output = None;
    // Lengths of prompts vary: neighbouring ones share what was picked.
    let m = p.tokens.next_power_of_two();
    let picked = picker.pick(gpu, Key { kernel, n, k, m }, candidates.len(), &mut |i| {
        let output = match &output {
            Some(output) => output,
            None => output.insert(gpu.allocate(p.y.bytes())?),
        };
        product_in(gpu, weights, &Product { y: output.view(), ..*p }, candidates[i])
    })?;
    product_in(gpu, weights, p, candidates[picked])
}
