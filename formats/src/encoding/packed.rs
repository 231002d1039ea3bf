//! Matrices in memory as they are stored, of the encodings that passes make.

use super::{ComponentSpec, Encoding, abq, lowrank, raw, sparse24};
use crate::{Error, Result};

/// A matrix as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum PackedUnit {
    /// Codes of all weights.
    Abq(abq::Packed<'static>),
    /// Codes of two of four weights.
    Sparse24(sparse24::Packed<'static>),
    /// Those, and the sums that lay beside.
    Lowrank(lowrank::Packed<'static>),
    /// Values as they are: of a vector, as a row.
    Raw(abq::Floats<'static>),
}

impl PackedUnit {
    /// Codes of all weights.
    pub fn abq(&self) -> Option<&abq::Packed<'static>> {
        match self {
            Self::Abq(packed) => Some(packed),
            _ => None,
        }
    }

    /// The encoding of its components.
    pub fn encoding(&self) -> Encoding {
        match self {
            Self::Abq(packed) => Encoding::Abq(*packed.abq()),
            Self::Sparse24(packed) => packed.encoding(),
            Self::Lowrank(packed) => packed.encoding(),
            Self::Raw(_) => Encoding::Raw,
        }
    }

    /// The components, in order.
    pub fn components(&self) -> Vec<(ComponentSpec, &[u8])> {
        match self {
            Self::Abq(packed) => packed.components(),
            Self::Sparse24(packed) => packed.components(),
            Self::Lowrank(packed) => packed.components(),
            Self::Raw(values) => {
                let specs = raw::components(values.dtype(), &[values.len() as u64]);
                specs.into_iter().map(|spec| (spec, values.bytes())).collect()
            }
        }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        match self {
            Self::Abq(packed) => packed.rows(),
            Self::Sparse24(packed) => packed.rows(),
            Self::Lowrank(packed) => packed.rows(),
            Self::Raw(_) => 1,
        }
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        match self {
            Self::Abq(packed) => packed.cols(),
            Self::Sparse24(packed) => packed.cols(),
            Self::Lowrank(packed) => packed.cols(),
            Self::Raw(values) => values.len(),
        }
    }

    /// Bits of the components over weights, zeros included.
    pub fn bits_per_weight(&self) -> f64 {
        match self {
            Self::Abq(packed) => packed.bits_per_weight(),
            Self::Sparse24(packed) => packed.bits_per_weight(),
            Self::Lowrank(packed) => packed.bits_per_weight(),
            Self::Raw(values) => f64::from(values.dtype().bits()),
        }
    }

    /// The values of a row, in single precision.
    ///
    /// # Errors
    /// Components that break their format.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Abq(packed) => packed.decode_row(row, out),
            Self::Sparse24(packed) => packed.decode_row(row, out),
            Self::Lowrank(packed) => packed.decode_row(row, out),
            Self::Raw(values) if row == 0 && out.len() == values.len() => {
                out.iter_mut().enumerate().for_each(|(at, out)| *out = values.get(at));
                Ok(())
            }
            Self::Raw(values) => {
                Err(Error::Invalid(format!("row {row} of {} values of a vector", values.len())))
            }
        }
    }
}
