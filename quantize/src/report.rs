//! What became of each tensor.

use llmpress_formats::encoding::abq::Packed;
use serde::{Deserialize, Serialize};

use crate::Rung;

/// What became of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The tensor.
    pub tensor: String,
    /// How it was quantised.
    pub rung: Rung,
    /// Why not as it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead: Option<String>,
    /// Calibration tokens that went through it.
    pub tokens: usize,
    /// What was added to the Hessian's diagonal, of its mean, where there is one: more than 0.01 where it was not positive
    /// definite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damping: Option<f64>,
    /// The mean square of the change of its outputs over that of its outputs, on the calibration tokens; where there are
    /// none, that of its weights.
    pub relative_error: f64,
    /// Bits a weight, with scales and zero points.
    pub bits_per_weight: f64,
    /// How long it took.
    pub seconds: f64,
}

/// A finished tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Its name.
    pub tensor: String,
    /// What is stored.
    pub unit: Packed<'static>,
    /// What became of it.
    pub report: Report,
}
