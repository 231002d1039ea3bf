//! Matrix products with weights of any encoding.
//!
//! ```text
//! plain weights:   mapped, read where they lie
//! fixed12:         mapped; one token is multiplied from the twelve bits, more from decoded rows
//! abq:             regrouped when the model is opened, multiplied from the codes
//! sparse24:        mapped (values in abq decoded when the model is opened); one token is multiplied from values and positions,
//!                  more from rows in single precision
//! lowrank:         as what it adds to, and block sums of the inputs by the sums that it adds
//! of other tools:  codes brought into memory when the model is opened, multiplied from them where abq holds them
//! anything else:   decoded some rows at a time into a small buffer of each thread
//! or in memory:    decoded or encoded anew when the model is opened
//! ```
//!
//! The words that a product sees are those of the original whatever the lossless encoding, and the order of additions
//! depends on the shapes alone: a lossless encoding gives the same bits.

pub(crate) mod abq;
mod decoded;
mod fixed12;
mod foreign;
mod inputs;
mod loaded;
mod lowrank;
mod raw;
mod side_by_side;
mod source;
mod sparse24;
mod stacked;
mod within;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use llmpress_entropy::fixed12::TILE_ROWS;
use llmpress_formats::{Checkpoint, Dtype, Encoding, Error, Result};
use llmpress_kernels::cpu::abq::STRIP_ROWS;
use llmpress_kernels::cpu::{Elements, multiply};
use rayon::prelude::*;

use crate::{Panels, Weights};
use decoded::Decoded;
use inputs::Inputs;
pub use inputs::rounded;
use loaded::Plain;
pub(crate) use side_by_side::multiply_side_by_side;
use source::{Source, Stored, typed};
pub(crate) use stacked::Stack;

/// Weights that a thread decodes at a time: enough that the ends of entropy-coded runs cost little.
const DECODED_ELEMENTS: usize = 256 << 10;
/// Weights of a task over plain rows for a single token.
const PLAIN_ELEMENTS: usize = 128 << 10;
/// Rows that are widened and multiplied with every panel in turn: many enough that panels are read seldom.
const WIDENED_ROWS: usize = 128;
/// Their most bytes: they stay in the cache.
const WIDENED_BYTES: usize = 2560 << 10;

/// Encodings that products run from where they lie; all others are decoded.
const IN_PLACE: [source::Open; 6] =
    [raw::open, fixed12::open, abq::open, sparse24::open, lowrank::open, foreign::open];

/// `y = W x (+ b)`: a matrix of `rows` x `cols` weights, stored as `[rows, cols]`.
#[derive(Debug)]
pub struct Linear {
    tensor: String,
    rows: usize,
    cols: usize,
    dtype: Dtype,
    /// Whether its stored form is this one already.
    stored_as: Weights,
    /// Whether the tensor is stored as `[cols, rows]`.
    transposed: bool,
    /// Which matrix of the tensor it is, where this is a stack.
    stack: Option<Stack>,
    source: Arc<dyn Source>,
    /// What `source` and `activation_bits` were before other weights took its place.
    replaced: Option<(Arc<dyn Source>, Option<u8>)>,
    bias: Option<Vec<f32>>,
    /// Bits to which what it multiplies is quantised, whatever form the weights have.
    activation_bits: Option<u8>,
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
        let tensor = checkpoint.tied().get(tensor).map_or(tensor, String::as_str);
        let info = checkpoint.tensor(tensor)?;
        let stored = Stored { checkpoint, tensor, info, dtype, rows, cols };
        let mut source = None;
        // What is zero or made anew is not what its unit stores.
        for open in IN_PLACE.iter().filter(|_| info.is_stored()) {
            source = match source {
                None => open(&stored)?,
                found => found,
            };
        }
        let stored_as = match (source.is_some(), stored.encoding()?) {
            (true, Encoding::Fixed12 { .. }) => Weights::Fixed12,
            (true, Encoding::Raw) => Weights::Bf16,
            (false, Encoding::Dfloat11) if info.is_stored() => Weights::Dfloat11,
            _ => Weights::Stored,
        };
        let source = source.map_or_else(|| Arc::new(Decoded::new(&stored)) as Arc<dyn Source>, Arc::from);
        let bias = bias.map(|name| vector(checkpoint, name, rows)).transpose()?;
        let activation_bits = match stored.encoding()? {
            Encoding::Foreign(foreign) if info.is_stored() => foreign.activation_bits,
            _ => source.quantised().and_then(abq::Quantised::activation_bits),
        };
        Ok(Self {
            tensor: tensor.to_owned(),
            rows,
            cols,
            dtype,
            stored_as,
            transposed: false,
            stack: None,
            source,
            replaced: None,
            bias,
            activation_bits,
        })
    }

    /// Finds `tensor`, which is stored as `cols` x `rows`, and brings it into memory as products take it, in its own dtype.
    ///
    /// # Errors
    /// Those of [`Self::open`]; weights that cannot be read.
    pub(crate) fn open_transposed(
        checkpoint: &Checkpoint,
        tensor: &str,
        rows: usize,
        cols: usize,
        bias: Option<&str>,
    ) -> Result<Self> {
        let dtype = check(checkpoint, tensor, &[cols, rows])?;
        let tensor = checkpoint.tied().get(tensor).map_or(tensor, String::as_str);
        let plain = Plain::read(checkpoint, tensor, dtype, cols, rows)?.transposed(cols);
        Ok(Self {
            tensor: tensor.to_owned(),
            rows,
            cols,
            dtype,
            stored_as: Weights::Bf16,
            transposed: true,
            stack: None,
            source: Arc::new(plain),
            replaced: None,
            bias: bias.map(|name| vector(checkpoint, name, rows)).transpose()?,
            activation_bits: None,
        })
    }

    /// Finds a stack of matrices and takes one of `rows` x `cols`, to whose output `bias` is added.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub(crate) fn open_stacked(
        checkpoint: &Checkpoint,
        tensor: &str,
        stack: Stack,
        rows: usize,
        cols: usize,
        bias: Option<Vec<f32>>,
    ) -> Result<Self> {
        let dtype = check(checkpoint, tensor, &stack.shape(rows, cols))?;
        let tensor = checkpoint.tied().get(tensor).map_or(tensor, String::as_str);
        let source = stacked::Stacked::open(checkpoint, tensor, stack, dtype, rows, cols)?;
        Ok(Self {
            tensor: tensor.to_owned(),
            rows,
            cols,
            dtype,
            stored_as: if source.in_place() { Weights::Bf16 } else { Weights::Stored },
            transposed: false,
            stack: Some(stack),
            source: Arc::new(source),
            replaced: None,
            bias,
            activation_bits: None,
        })
    }

    /// Whether its tensor is stored as `[cols, rows]`.
    pub(crate) fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// Whether its tensor holds other matrices too.
    pub(crate) fn is_stacked(&self) -> bool {
        self.stack.is_some()
    }

    /// Brings the weights into memory in another form. What a form does not hold becomes plain.
    pub(crate) fn load(&mut self, checkpoint: &Checkpoint, weights: Weights) -> Result<()> {
        if weights == Weights::Stored || weights == self.stored_as {
            return Ok(());
        }
        if self.dtype != Dtype::BF16 && self.stored_as == Weights::Bf16 {
            // Plain, and what the encodings do not hold.
            return Ok(());
        }
        let plain = match self.transposed {
            _ if self.stack.is_some() => {
                let step = self.task_rows(self.rows, 2);
                Plain::of(checkpoint, &*self.source, self.dtype, self.rows, self.cols, step)?
            }
            false => Plain::read(checkpoint, &self.tensor, self.dtype, self.rows, self.cols)?,
            true => {
                Plain::read(checkpoint, &self.tensor, self.dtype, self.cols, self.rows)?.transposed(self.cols)
            }
        };
        let encoded = plain.bf16(self.rows).and_then(|words| -> Option<Arc<dyn Source>> {
            match weights {
                Weights::Fixed12 => Some(Arc::new(loaded::Fixed12::encode(words, self.cols)?)),
                Weights::Dfloat11 => Some(Arc::new(loaded::Dfloat11::encode(words, self.cols)?)),
                Weights::Stored | Weights::Bf16 => None,
            }
        });
        self.source = encoded.unwrap_or_else(|| Arc::new(plain));
        Ok(())
    }

    /// All weights in single precision.
    pub(crate) fn weights(&self, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.rows * self.cols];
        let step = self.task_rows(self.rows, 2);
        let parts = out.par_chunks_mut((step * self.cols).max(1)).enumerate();
        parts.try_for_each(|(i, out)| {
            let rows = i * step..(i * step + step).min(self.rows);
            BUFFERS.with_borrow_mut(|buffers| {
                self.source.elements(checkpoint, rows, &mut buffers.words)?.widen(0, out);
                Ok::<_, Error>(())
            })
        })?;
        Ok(out)
    }

    /// Takes other weights until [`Self::restore`], and multiplies inputs quantised to so many bits with them.
    pub(crate) fn replace(&mut self, weights: Vec<f32>, activation_bits: Option<u8>) -> Result<()> {
        if weights.len() != self.rows * self.cols {
            return Err(Error::Invalid(format!(
                "{}: {} weights do not take the place of {} x {}",
                self.tensor,
                weights.len(),
                self.rows,
                self.cols
            )));
        }
        let other: Arc<dyn Source> = Arc::new(loaded::Single::new(weights, self.cols));
        let former = std::mem::replace(&mut self.source, other);
        self.replaced.get_or_insert((former, self.activation_bits));
        self.activation_bits = activation_bits;
        Ok(())
    }

    /// Takes its own weights again.
    pub(crate) fn restore(&mut self) {
        if let Some(former) = self.replaced.take() {
            (self.source, self.activation_bits) = former;
        }
    }

    /// Another one of the same weights, which are in memory once, without a bias.
    pub(crate) fn shared(&self) -> Self {
        Self {
            tensor: self.tensor.clone(),
            source: self.source.clone(),
            replaced: self.replaced.clone(),
            bias: None,
            ..*self
        }
    }

    /// Takes the weights of another one of the same tensor, so that they are in memory once.
    pub(crate) fn share(&mut self, other: &Self) {
        if self.tensor == other.tensor {
            self.source = other.source.clone();
        }
    }

    /// Bytes that are decoded whenever a token is read; 0 where the weights are read as they lie.
    pub(crate) fn decoded_bytes(&self) -> u64 {
        if self.source.in_place() {
            0
        } else {
            (self.rows * self.cols) as u64 * u64::from(self.dtype.bits()) / 8
        }
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

    /// The tensor that is added to the output, where there is one.
    pub(crate) fn bias_tensor(&self) -> String {
        format!("{}bias", self.tensor.strip_suffix("weight").unwrap_or(&self.tensor))
    }

    /// Adds other values to the output.
    pub(crate) fn set_bias(&mut self, bias: Vec<f32>) {
        self.bias = Some(bias);
    }

    /// Of the weights.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bits to which its inputs are quantised.
    pub fn activation_bits(&self) -> Option<u8> {
        self.activation_bits
    }

    /// What is added to the output.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// The product with every token of `x`, on the threads of the current pool: `out` becomes rows x tokens.
    ///
    /// # Errors
    /// Other features than the columns; weights that cannot be read; a value that cannot be quantised.
    pub fn multiply(&self, checkpoint: &Checkpoint, x: &Panels, out: &mut Panels) -> Result<()> {
        if x.features() != self.cols {
            let (cols, found) = (self.cols, x.features());
            return Err(Error::Invalid(format!("{}: multiplies {cols} features, not {found}", self.tensor)));
        }
        multiply_all(checkpoint, &mut [Product::new(self, x, out)])
    }

    /// One row in single precision.
    pub(crate) fn row(&self, checkpoint: &Checkpoint, row: usize, out: &mut [f32]) -> Result<()> {
        BUFFERS.with_borrow_mut(|buffers| {
            self.source.elements(checkpoint, row..row + 1, &mut buffers.words)?.widen(0, out);
            Ok(())
        })
    }

    /// Rows of a task: whole strips, and few enough that all threads get some.
    fn task_rows(&self, rows: usize, tokens: usize) -> usize {
        let threads = rayon::current_num_threads();
        if self.source.at_once() {
            return rows.max(1).next_multiple_of(TILE_ROWS);
        }
        let tasks = match self.source.in_place() {
            false => (rows * self.cols).div_ceil(DECODED_ELEMENTS),
            true if tokens == 1 => (rows * self.cols).div_ceil(PLAIN_ELEMENTS),
            true => rows.div_ceil(WIDENED_ROWS),
        };
        let tasks = tasks.next_multiple_of(threads).max(1);
        let whole = if self.source.quantised().is_some() { STRIP_ROWS } else { TILE_ROWS };
        rows.div_ceil(tasks).max(1).next_multiple_of(whole)
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
            self.source.dot(checkpoint, rows.clone(), x.panel(0), out, &mut buffers.words)?;
        } else {
            let elements = self.source.elements(checkpoint, rows.clone(), &mut buffers.words)?;
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
        self.add_bias(rows, parts);
        Ok(())
    }

    fn add_bias(&self, rows: Range<usize>, parts: &mut [&mut [f32]]) {
        let Some(bias) = &self.bias else { return };
        for part in parts {
            let width = (part.len() / rows.len().max(1)).max(1);
            for (out, bias) in part.chunks_exact_mut(width).zip(&bias[rows.clone()]) {
                out.iter_mut().for_each(|y| *y += bias);
            }
        }
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
    let mut prepared = Inputs::default();
    for Product { linear, rows, x, out } in products {
        debug_assert_eq!(x.features(), linear.cols);
        let input = prepared.add(checkpoint, linear, x)?;
        out.resize(rows.len(), x.tokens());
        let step = linear.task_rows(rows.len(), x.tokens());
        for (i, parts) in out.row_blocks_mut(step).into_iter().enumerate() {
            let first = rows.start + i * step;
            tasks.push((*linear, first..(first + step).min(rows.end), input, parts));
        }
    }
    let prepared = &prepared;
    tasks.into_par_iter().with_max_len(1).try_for_each(|(linear, rows, input, mut parts)| {
        if let (Some(codes), Some(inputs)) = (linear.source.quantised(), prepared.codes(input)) {
            codes.multiply(rows.clone(), inputs, &mut parts);
            linear.add_bias(rows, &mut parts);
            return Ok(());
        }
        let x = prepared.values(input);
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
    small(checkpoint, tensor, &[len])
}

/// The elements of a small tensor of this shape in single precision.
pub(crate) fn small(checkpoint: &Checkpoint, tensor: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let dtype = check(checkpoint, tensor, shape)?;
    some(checkpoint, tensor, dtype, 0, shape.iter().product())
}

/// One of `count` rows of `len` elements in single precision.
pub(crate) fn small_row(
    checkpoint: &Checkpoint,
    tensor: &str,
    [count, len]: [usize; 2],
    row: usize,
) -> Result<Vec<f32>> {
    let dtype = check(checkpoint, tensor, &[count, len])?;
    some(checkpoint, tensor, dtype, row * len, len)
}

/// Some elements in single precision.
fn some(checkpoint: &Checkpoint, tensor: &str, dtype: Dtype, first: usize, len: usize) -> Result<Vec<f32>> {
    let mut words = vec![0u64; (len * 4).div_ceil(8)];
    let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..len * dtype.bits() as usize / 8];
    checkpoint.read(tensor, (first * dtype.bits() as usize / 8) as u64, bytes)?;
    let mut out = vec![0.0; len];
    if let Some(elements) = typed(bytes, dtype) {
        elements.widen(0, &mut out);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::Model;

    #[test]
    fn a_tied_head_and_its_embedding_are_in_memory_once() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm");
        let mut model = Model::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap();
        assert!(Arc::ptr_eq(&model.head.source, &model.embedding.source));
        model.load(Weights::Fixed12).unwrap();
        assert!(Arc::ptr_eq(&model.head.source, &model.embedding.source));
    }
}
