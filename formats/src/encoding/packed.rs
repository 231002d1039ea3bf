//! Matrices in memory as they are stored, of the encodings that passes make.

use super::{ComponentSpec, Encoding, abq, lowrank, sparse24};
use crate::Result;

/// A matrix as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum PackedUnit {
    /// Codes of all weights.
    Abq(abq::Packed<'static>),
    /// Codes of two of four weights.
    Sparse24(sparse24::Packed<'static>),
    /// Those, and the sums that lay beside.
    Lowrank(lowrank::Packed<'static>),
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
        }
    }

    /// The components, in order.
    pub fn components(&self) -> Vec<(ComponentSpec, &[u8])> {
        match self {
            Self::Abq(packed) => packed.components(),
            Self::Sparse24(packed) => packed.components(),
            Self::Lowrank(packed) => packed.components(),
        }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        match self {
            Self::Abq(packed) => packed.rows(),
            Self::Sparse24(packed) => packed.rows(),
            Self::Lowrank(packed) => packed.rows(),
        }
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        match self {
            Self::Abq(packed) => packed.cols(),
            Self::Sparse24(packed) => packed.cols(),
            Self::Lowrank(packed) => packed.cols(),
        }
    }

    /// Bits of the components over weights, zeros included.
    pub fn bits_per_weight(&self) -> f64 {
        match self {
            Self::Abq(packed) => packed.bits_per_weight(),
            Self::Sparse24(packed) => packed.bits_per_weight(),
            Self::Lowrank(packed) => packed.bits_per_weight(),
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
        }
    }
}
