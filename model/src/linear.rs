//! Matrix products with weights of any encoding.
//!
//! ```text
//! plain weights:   mapped, read where they lie
//! fixed12:         mapped; one token is multiplied from the twelve bits, more from decoded rows
//! anything else:   decoded some rows at a time into a small buffer of each thread
//! ```
//!
//! The words that a product sees are those of the original whatever the encoding, and the order of additions
//! depends on the shapes alone: a lossless encoding gives the same bits.

use std::cell::RefCell;
use std::ops::Range;

use llmpress_entropy::fixed12::{Grid, StripsRef, TILE_CODE_BYTES, TILE_ROWS, TILE_WEIGHTS};
use llmpress_formats::{Checkpoint, Dtype, Encoding, Error, Result, encoding};
use llmpress_kernels::cpu::{Elements, dot_fixed12, dot_rows, multiply};
use rayon::prelude::*;

use crate::Panels;

/// Weights that a thread decodes at a time: enough that the ends of entropy-coded runs cost little.
const DECODED_ELEMENTS: usize = 256 << 10;
/// Weights of a task over plain rows for a single token.
const PLAIN_ELEMENTS: usize = 128 << 10;
/// Rows that are widened and multiplied with every panel in turn: many enough that panels are read seldom.
const WIDENED_ROWS: usize = 128;
/// Their most bytes: they stay in the cache.
const WIDENED_BYTES: usize = 2560 << 10;

/// `y = W x (+ b)`: a matrix of `rows` x `cols` weights, stored as `[rows, cols]`.
#[derive(Debug)]
pub struct Linear {
    tensor: String,
    rows: usize,
    cols: usize,
    dtype: Dtype,
    source: Source,
    bias: Option<Vec<f32>>,
}

/// Where the weights come from.
#[derive(Debug)]
enum Source {
    Mapped { unit: String },
    Fixed12 { unit: String, base: i16, grid: Grid },
    Decoded,
}

impl Linear {
    /// Finds `tensor` and checks that it is `rows` x `cols`; with `bias`, likewise that one of `rows` values.
    ///
    /// # Errors
    /// A missing tensor, another shape, a dtype other than F32, BF16 and F16: named.
    pub fn open(
        checkpoint: &Checkpoint,
        tensor: &str,
        rows: usize,
        cols: usize,
        bias: Option<&str>,
    ) -> Result<Self> {
        let dtype = check(checkpoint, tensor, &[rows, cols])?;
        let stored = checkpoint.tied().get(tensor).map_or(tensor, String::as_str);
        let info = checkpoint.tensor(stored)?;
        let unit = checkpoint.unit_of(info)?;
        let source = match unit.encoding() {
            _ if info.is_zero() => Source::Decoded,
            Encoding::Raw if mapped(checkpoint, &info.unit, dtype).is_ok() => {
                Source::Mapped { unit: info.unit.clone() }
            }
            Encoding::Fixed12 { base } => match Grid::new(rows as u64, cols as u64) {
                Some(grid) => {
                    let source = Fixed12 { checkpoint, unit: &info.unit, base: *base, grid };
                    // Also reads and checks the small tables, so that a faulty unit is found now.
                    checkpoint.read(stored, 0, &mut [])?;
                    match source.check() {
                        Ok(()) => Source::Fixed12 { unit: info.unit.clone(), base: *base, grid },
                        Err(_) => Source::Decoded,
                    }
                }
                None => Source::Decoded,
            },
            _ => Source::Decoded,
        };
        let bias = bias.map(|name| vector(checkpoint, name, rows)).transpose()?;
        Ok(Self { tensor: stored.to_owned(), rows, cols, dtype, source, bias })
    }

    /// The stored tensor.
    pub fn tensor(&self) -> &str {
        &self.tensor
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What is added to the output.
    pub(crate) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// One row in single precision.
    pub(crate) fn row(&self, checkpoint: &Checkpoint, row: usize, out: &mut [f32]) -> Result<()> {
        BUFFERS.with_borrow_mut(|buffers| {
            self.elements(checkpoint, row..row + 1, &mut buffers.words)?.widen(0, out);
            Ok(())
        })
    }

    /// Rows of a task: whole strips, and few enough that all threads get some.
    fn task_rows(&self, rows: usize, tokens: usize) -> usize {
        let threads = rayon::current_num_threads();
        let tasks = match self.source {
            Source::Decoded => (rows * self.cols).div_ceil(DECODED_ELEMENTS),
            _ if tokens == 1 => (rows * self.cols).div_ceil(PLAIN_ELEMENTS),
            _ => rows.div_ceil(WIDENED_ROWS),
        };
        let tasks = tasks.next_multiple_of(threads).max(1);
        rows.div_ceil(tasks).max(1).next_multiple_of(TILE_ROWS)
    }

    /// The weights of some rows: where they lie, or decoded into `words`.
    fn elements<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let range = rows.start * self.cols..rows.end * self.cols;
        if let Source::Mapped { unit } = &self.source {
            return Ok(match mapped(checkpoint, unit, self.dtype)? {
                Elements::F32(x) => Elements::F32(&x[range]),
                Elements::Bf16(x) => Elements::Bf16(&x[range]),
                Elements::F16(x) => Elements::F16(&x[range]),
            });
        }
        let bytes = range.len() * self.dtype.bits() as usize / 8;
        words.resize(bytes.div_ceil(8), 0);
        let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(words)[..bytes];
        checkpoint.read_rows(&self.tensor, rows.start as u64..rows.end as u64, bytes)?;
        Ok(typed(bytes, self.dtype).unwrap_or(Elements::F32(&[])))
    }

    /// One task: `rows` of the product, into their part of each panel.
    fn run(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        x: &Panels,
        parts: &mut [&mut [f32]],
        buffers: &mut Buffers,
    ) -> Result<()> {
        if let (1, [out]) = (x.tokens(), &mut *parts) {
            match &self.source {
                Source::Fixed12 { unit, base, grid } => {
                    Fixed12 { checkpoint, unit, base: *base, grid: *grid }.dot(
                        rows.clone(),
                        x.panel(0),
                        out,
                    )?;
                }
                _ => {
                    let elements = self.elements(checkpoint, rows.clone(), &mut buffers.words)?;
                    dot_rows(elements, self.cols, x.panel(0), out);
                }
            }
        } else {
            let elements = self.elements(checkpoint, rows.clone(), &mut buffers.words)?;
            let step = (WIDENED_BYTES / (4 * self.cols)).next_multiple_of(8).clamp(8, WIDENED_ROWS);
            for first in (0..rows.len()).step_by(step) {
                let count = step.min(rows.len() - first);
                let weights = match elements {
                    Elements::F32(x) => &x[first * self.cols..][..count * self.cols],
                    _ => {
                        buffers.widened.resize(count * self.cols, 0.0);
                        elements.widen(first * self.cols, &mut buffers.widened);
                        &buffers.widened
                    }
                };
                for (panel, part) in parts.iter_mut().enumerate() {
                    let width = x.width(panel);
                    let out = &mut part[first * width..][..count * width];
                    multiply(weights, self.cols, x.panel(panel), width, out);
                }
            }
        }
        if let Some(bias) = &self.bias {
            for (panel, part) in parts.iter_mut().enumerate() {
                for (out, bias) in part.chunks_exact_mut(x.width(panel)).zip(&bias[rows.clone()]) {
                    out.iter_mut().for_each(|y| *y += bias);
                }
            }
        }
        Ok(())
    }
}

/// A product to be made: `out` becomes `rows` of `linear` times `x`.
pub(crate) struct Product<'a> {
    pub(crate) linear: &'a Linear,
    pub(crate) rows: Range<usize>,
    pub(crate) x: &'a Panels,
    pub(crate) out: &'a mut Panels,
}

impl<'a> Product<'a> {
    /// Of all rows.
    pub(crate) fn new(linear: &'a Linear, x: &'a Panels, out: &'a mut Panels) -> Self {
        Self { linear, rows: 0..linear.rows, x, out }
    }
}

/// Makes products side by side on the threads of the current pool.
pub(crate) fn multiply_all(checkpoint: &Checkpoint, products: &mut [Product<'_>]) -> Result<()> {
    let mut tasks = Vec::new();
    for Product { linear, rows, x, out } in products {
        debug_assert_eq!(x.features(), linear.cols);
        out.resize(rows.len(), x.tokens());
        let step = linear.task_rows(rows.len(), x.tokens());
        for (i, parts) in out.row_blocks_mut(step).into_iter().enumerate() {
            let first = rows.start + i * step;
            tasks.push((*linear, first..(first + step).min(rows.end), *x, parts));
        }
    }
    tasks.into_par_iter().with_max_len(1).try_for_each(|(linear, rows, x, mut parts)| {
        BUFFERS.with_borrow_mut(|buffers| linear.run(checkpoint, rows, x, &mut parts, buffers))
    })
}

/// What a thread needs to decode and widen weights.
#[derive(Default)]
struct Buffers {
    words: Vec<u64>,
    widened: Vec<f32>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// A fixed12 unit where it lies.
struct Fixed12<'a> {
    checkpoint: &'a Checkpoint,
    unit: &'a str,
    base: i16,
    grid: Grid,
}

impl<'a> Fixed12<'a> {
    fn view<T: bytemuck::AnyBitPattern>(&self, component: &str) -> Result<&'a [T]> {
        let bytes = self.checkpoint.view(self.unit, component)?;
        bytemuck::try_cast_slice(bytes)
            .map_err(|e| Error::Invalid(format!("unit {}: {component}: {e}", self.unit)))
    }

    /// Whether every component can be read in place.
    fn check(&self) -> Result<()> {
        self.strips(0..0).map(|_| ())
    }

    fn strips(&self, strips: Range<usize>) -> Result<StripsRef<'a>> {
        use encoding::fixed12::{CODES, ESCAPE_EXPONENTS, ESCAPE_OFFSETS, ESCAPE_POSITIONS, SIGN_MANTISSA};
        let across = self.grid.tiles_across() as usize;
        let (first, last) = (strips.start * across, strips.end * across);
        let missing = |component: &str| {
            Error::Invalid(format!("unit {}: {component} ends before tile {last}", self.unit))
        };
        fn part<T>(all: &[T], range: Range<usize>) -> Option<&[T]> {
            all.get(range)
        }
        let offsets: &[u32] = self.view(ESCAPE_OFFSETS)?;
        let offsets = part(offsets, first..last + 1).ok_or_else(|| missing(ESCAPE_OFFSETS))?;
        let escapes = match offsets {
            [first, .., last] => *first as usize..*last as usize,
            _ => 0..0,
        };
        Ok(StripsRef {
            sign_mantissa: part(self.view(SIGN_MANTISSA)?, first * TILE_WEIGHTS..last * TILE_WEIGHTS)
                .ok_or_else(|| missing(SIGN_MANTISSA))?,
            codes: part(self.view(CODES)?, first * TILE_CODE_BYTES..last * TILE_CODE_BYTES)
                .ok_or_else(|| missing(CODES))?,
            escape_offsets: offsets,
            escape_positions: part(self.view(ESCAPE_POSITIONS)?, escapes.clone())
                .ok_or_else(|| missing(ESCAPE_POSITIONS))?,
            escape_exponents: part(self.view(ESCAPE_EXPONENTS)?, escapes)
                .ok_or_else(|| missing(ESCAPE_EXPONENTS))?,
        })
    }

    fn dot(&self, rows: Range<usize>, x: &[f32], out: &mut [f32]) -> Result<()> {
        let strips = self.strips(rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS))?;
        dot_fixed12(self.base, &strips, x, out)
            .map_err(|e| Error::corrupt(self.checkpoint.root(), Some(self.unit), e.to_string()))
    }
}

/// A stored tensor's elements where they lie.
fn mapped<'a>(checkpoint: &'a Checkpoint, unit: &str, dtype: Dtype) -> Result<Elements<'a>> {
    typed(checkpoint.view(unit, "data")?, dtype)
        .ok_or_else(|| Error::Invalid(format!("unit {unit} does not lie on whole {} elements", dtype.name())))
}

/// Bytes as elements; `None` where their address or dtype forbids it.
fn typed(bytes: &[u8], dtype: Dtype) -> Option<Elements<'_>> {
    Some(match dtype {
        Dtype::F32 => Elements::F32(bytemuck::try_cast_slice(bytes).ok()?),
        Dtype::BF16 => Elements::Bf16(bytemuck::try_cast_slice(bytes).ok()?),
        Dtype::F16 => Elements::F16(bytemuck::try_cast_slice(bytes).ok()?),
        _ => return None,
    })
}

/// Checks shape and dtype of a tensor.
pub(crate) fn check(checkpoint: &Checkpoint, tensor: &str, shape: &[usize]) -> Result<Dtype> {
    let info = checkpoint.tensor(tensor)?;
    if !info.shape.iter().map(|&n| n as usize).eq(shape.iter().copied()) {
        return Err(Error::corrupt(
            checkpoint.root(),
            Some(tensor),
            format!("has shape {:?} where config.json makes it {shape:?}", info.shape),
        ));
    }
    match info.dtype {
        Dtype::F32 | Dtype::BF16 | Dtype::F16 => Ok(info.dtype),
        other => Err(Error::unsupported(
            checkpoint.root(),
            Some(tensor),
            format!("is {}; models run from F32, BF16 and F16 weights", other.name()),
        )),
    }
}

/// A small tensor in single precision.
pub(crate) fn vector(checkpoint: &Checkpoint, tensor: &str, len: usize) -> Result<Vec<f32>> {
    let dtype = check(checkpoint, tensor, &[len])?;
    let mut words = vec![0u64; (len * 4).div_ceil(8)];
    let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..len * dtype.bits() as usize / 8];
    checkpoint.read(tensor, 0, bytes)?;
    let mut out = vec![0.0; len];
    if let Some(elements) = typed(bytes, dtype) {
        elements.widen(0, &mut out);
    }
    Ok(out)
}
