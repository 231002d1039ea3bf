//! What transformations ask of a decoder whenever a token is read (section 2.2 of the format).
//!
//! ```text
//! ids -> embedding -> R1 -> [ ... q, k, v -> quantised -> cache ... inner -> R4 -> down ] x layers -> R1 back -> norm -> head
//! ```

use std::sync::Arc;

use llmpress_formats::{Error, QuantizeSite, Result, RotationSite, Transform};
use llmpress_kernels::cpu::{Hadamard, HeadCodes, quantize_columns};
use rayon::prelude::*;

use crate::Panels;

/// The online operations of a model, but those that belong to a matrix.
#[derive(Clone, Debug, Default)]
pub(crate) struct Online {
    /// R1, between the embedding and the last norm.
    pub(crate) residual: Option<Hadamard>,
    /// R4 by their sizes.
    pub(crate) down: Vec<Arc<Hadamard>>,
    /// Bits of each head's query, and of key and value where no cache says how these are held.
    pub(crate) qkv_bits: Option<u8>,
    /// How the cache holds each head's key and value.
    pub(crate) cache: Option<HeadCodes>,
}

impl Online {
    /// Those of a list, in a model whose heads have so many features.
    ///
    /// # Errors
    /// A size that no rotation has; a cache of other bits than 4 and 8.
    pub(crate) fn of(transforms: &[Transform], head_dim: usize) -> Result<Self> {
        let mut online = Self::default();
        for transform in transforms {
            match transform {
                Transform::Rotation { site: RotationSite::Residual, rotation } => {
                    online.residual = Some(hadamard(rotation)?);
                }
                Transform::Rotation { site: RotationSite::Down, rotation } => {
                    online.down.push(Arc::new(hadamard(rotation)?));
                }
                Transform::Quantize { site: QuantizeSite::Qkv, bits } => online.qkv_bits = Some(*bits),
                Transform::Quantize { site: QuantizeSite::Cache, bits } => {
                    let unknown = || Error::Invalid(format!("a cache of {bits} bits: 4 or 8 it may have"));
                    online.cache = Some(HeadCodes::new(head_dim, *bits).ok_or_else(unknown)?);
                }
                Transform::Rotation { site: RotationSite::Value, .. }
                | Transform::Scale { .. }
                | Transform::Permutation { .. } => {}
            }
        }
        Ok(online)
    }
}

/// How a part of attention is rounded whenever a token is read: each head of each token by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadRounding {
    /// Bits of a code.
    pub bits: u8,
    /// Features of a head that share a grid, which may be more than it has.
    pub group: usize,
}

impl Online {
    /// That of query, key and value.
    pub(crate) fn rounding(&self) -> [Option<HeadRounding>; 3] {
        let query = self.qkv_bits.map(|bits| HeadRounding { bits, group: usize::MAX });
        let held = self.cache.map(|codes| HeadRounding { bits: codes.bits(), group: HeadCodes::GROUP });
        [query, held.or(query), held.or(query)]
    }
}

/// The matrix that a manifest describes.
pub(crate) fn hadamard(rotation: &llmpress_formats::Rotation) -> Result<Hadamard> {
    Hadamard::with_factors(rotation.size as usize, &rotation.factors, rotation.seed).map_err(Error::Invalid)
}

/// Turns every token, forward or back.
pub(crate) fn turn(by: &Hadamard, x: &mut Panels, forward: bool) {
    let widths: Vec<usize> = (0..x.count()).map(|panel| x.width(panel)).collect();
    let one = |(panel, data): (usize, &mut [f32])| {
        if forward { by.forward(data, widths[panel]) } else { by.back(data, widths[panel]) }
    };
    let panels: Vec<_> = x.panels_mut().enumerate().collect();
    if panels.len() == 1 {
        panels.into_iter().for_each(one);
    } else {
        panels.into_par_iter().for_each(one);
    }
}

/// Quantises each head of each token to `bits` and back; false where a value is NaN or infinite.
pub(crate) fn quantize_heads(x: &mut Panels, head_dim: usize, bits: u8) -> bool {
    let widths: Vec<usize> = (0..x.count()).map(|panel| x.width(panel)).collect();
    let one = |(panel, data): (usize, &mut [f32])| {
        let width = widths[panel];
        data.chunks_exact_mut(head_dim * width).all(|head| quantize_columns(head, width, bits))
    };
    let panels: Vec<_> = x.panels_mut().enumerate().collect();
    panels.into_par_iter().map(one).reduce(|| true, |a, b| a && b)
}
