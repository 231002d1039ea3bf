//! abq: multiplied from the codes, which lie in memory in the order of the kernels.
//!
//! ```text
//! components --check, regroup--> Matrix     inputs (quantised where the encoding says so) --> product, group by group
//! ```

use std::borrow::Cow;
use std::ops::Range;

use llmpress_formats::encoding::abq::{Abq, Floats, OFFSET, PLANES, Packed, SCALE, ZERO, Zero};
use llmpress_formats::{Checkpoint, Dtype, Encoding, Error, Result, Tensor};
use llmpress_kernels::cpu::Elements;
use llmpress_kernels::cpu::abq::{self as kernel, Inputs, Matrix};

use super::source::{Source, Stored, typed};
use crate::Panels;

/// A quantised matrix.
#[derive(Debug)]
pub(super) struct Quantised {
    abq: Abq,
    matrix: Matrix,
}

/// Opens an abq matrix: every code and scale is checked.
pub(super) fn open(stored: &Stored<'_>) -> Result<Option<Box<dyn Source>>> {
    let Encoding::Abq(abq) = *stored.encoding()? else { return Ok(None) };
    let components =
        Components::read(stored.checkpoint, stored.tensor, stored.info, abq, stored.rows, stored.cols)?;
    components.open(stored)
}

/// The components of a matrix as kernels take them.
#[derive(Debug)]
pub(crate) struct Components<'a> {
    pub(crate) abq: Abq,
    rows: usize,
    cols: usize,
    packed: Packed<'a>,
    scale: Words,
    zero: Words,
}

impl<'a> Components<'a> {
    /// Finds them, and checks every code and scale. Those of another tool are read in whole.
    pub(crate) fn read(
        checkpoint: &'a Checkpoint,
        tensor: &str,
        info: &Tensor,
        abq: Abq,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        if let Some(codes) = checkpoint.codes(tensor)? {
            return Ok(Self::of(codes.held()?.packed()?.into_owned()));
        }
        let components = checkpoint.unit_of(info)?.components();
        let floats = |name: &str| {
            let dtype = components.get(name).map_or(Dtype::F32, |component| component.dtype());
            Floats::new(dtype, checkpoint.view(&info.unit, name)?)
        };
        let packed = if components.contains_key(PLANES) {
            let planes = checkpoint.view(&info.unit, PLANES)?;
            let planes: Cow<'a, [u32]> = match bytemuck::try_cast_slice(planes) {
                Ok(words) => Cow::Borrowed(words),
                Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(planes)),
            };
            let zero = if components.contains_key(OFFSET) {
                Zero::Real(floats(OFFSET)?)
            } else if components.contains_key(ZERO) {
                Zero::Integer(checkpoint.view(&info.unit, ZERO)?.into())
            } else {
                Zero::Symmetric
            };
            let packed = Packed::new(abq, rows, cols, planes, floats(SCALE)?, zero)?;
            packed.check().map_err(|e| Error::corrupt(checkpoint.root(), Some(tensor), e.to_string()))?;
            packed
        } else {
            // Coded: decoded now, and checked.
            checkpoint.packed_rows(tensor, 0..rows as u64)?
        };
        Ok(Self::of(packed))
    }

    /// Of a matrix that was checked.
    pub(crate) fn of(packed: Packed<'a>) -> Self {
        let (scale, zero) = (Words::of(packed.scale()), Words::of_zero(packed.zero()));
        Self { abq: *packed.abq(), rows: packed.rows(), cols: packed.cols(), packed, scale, zero }
    }

    /// Regroups them for products.
    fn open(&self, stored: &Stored<'_>) -> Result<Option<Box<dyn Source>>> {
        let matrix = Matrix::new(&self.stored());
        let matrix = matrix
            .map_err(|e| Error::corrupt(stored.checkpoint.root(), Some(stored.tensor), e.to_string()))?;
        Ok(Some(Box::new(Quantised { abq: self.abq, matrix })))
    }

    pub(crate) fn stored(&self) -> kernel::Stored<'_> {
        kernel::Stored {
            rows: self.rows,
            cols: self.cols,
            bits: self.abq.bits,
            planes: self.abq.planes() as u8,
            group_size: self.abq.group_size.map(|size| size as usize),
            activation_bits: self.abq.activation_bits,
            words: self.packed.planes(),
            scale: self.scale.elements(),
            zero: match self.packed.zero() {
                Zero::Symmetric => kernel::Zero::Symmetric,
                Zero::Integer(zeros) => kernel::Zero::Integer(zeros),
                Zero::Real(_) => kernel::Zero::Real(self.zero.elements()),
            },
        }
    }
}

/// Scales or offsets at an address that their dtype allows.
#[derive(Debug)]
struct Words {
    words: Vec<u64>,
    dtype: Dtype,
    bytes: usize,
}

impl Words {
    fn of(floats: &Floats<'_>) -> Self {
        let bytes = floats.bytes();
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Self { words, dtype: floats.dtype(), bytes: bytes.len() }
    }

    fn of_zero(zero: &Zero<'_>) -> Self {
        match zero {
            Zero::Real(offsets) => Self::of(offsets),
            _ => Self { words: Vec::new(), dtype: Dtype::F32, bytes: 0 },
        }
    }

    fn elements(&self) -> Elements<'_> {
        let bytes = &bytemuck::cast_slice::<u64, u8>(&self.words)[..self.bytes];
        typed(bytes, self.dtype).unwrap_or(Elements::F32(&[]))
    }
}

impl Source for Quantised {
    fn elements<'a>(
        &'a self,
        _checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let cols = self.matrix.cols();
        let count = rows.len() * cols;
        words.resize(count.div_ceil(2), 0);
        let values = &mut bytemuck::cast_slice_mut::<u64, f32>(words)[..count];
        for (row, out) in rows.zip(values.chunks_exact_mut(cols.max(1))) {
            self.matrix.row(row, out);
        }
        Ok(Elements::F32(values))
    }

    fn quantised(&self) -> Option<&Quantised> {
        Some(self)
    }
}

impl Quantised {
    /// Codes in memory, regrouped for products.
    pub(super) fn of(stored: &Stored<'_>, packed: Packed<'_>) -> Result<Option<Box<dyn Source>>> {
        Components::of(packed).open(stored)
    }

    /// The parameters: what is prepared for one matrix does for others that have the same.
    pub(super) fn abq(&self) -> Abq {
        self.abq
    }

    /// Bits to which inputs are quantised.
    pub(super) fn activation_bits(&self) -> Option<u8> {
        self.abq.activation_bits
    }

    /// Prepares the panels of `x`.
    ///
    /// # Errors
    /// The token that has a value which cannot be quantised.
    pub(super) fn prepare(&self, x: &Panels) -> Result<Vec<Inputs>, usize> {
        let panels = (0..x.count()).map(|panel| {
            let mut inputs = Inputs::default();
            let done = self.matrix.prepare(x.panel(panel), x.width(panel), &mut inputs);
            done.map(|()| inputs).map_err(|e| x.range(panel).start + e.token)
        });
        panels.collect()
    }

    /// `rows` of the product with prepared panels, into their part of each.
    pub(super) fn multiply(&self, rows: Range<usize>, inputs: &[Inputs], parts: &mut [&mut [f32]]) {
        for (inputs, part) in inputs.iter().zip(parts) {
            self.matrix.multiply(rows.clone(), inputs, part);
        }
    }
}
