//! What became of each tensor.

use llmpress_formats::encoding::PackedUnit;
use llmpress_learn::Outcome;
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
    /// What learning it came to, where it was to be learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned: Option<Learned>,
    /// Why it is as its rung left it though it was to be learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unlearned: Option<String>,
    /// Before it was learned: the mean square of the change of its outputs over that of its outputs, on the calibration tokens; where there are
    /// none, that of its weights.
    pub relative_error: f64,
    /// Bits a weight, with scales and zero points.
    pub bits_per_weight: f64,
    /// How long it took.
    pub seconds: f64,
}

/// What learning came to: of a sub-layer on windows that no step saw; of a matrix by itself under its second moments, which are
/// of all windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// Where error feedback had left it: squares of differences from what it is to give out, over squares of that. NaN, in JSON
    /// null, where that is NaN or infinite.
    #[serde(with = "crate::lesson::number")]
    pub before: f64,
    /// After the last step; none where a loss was NaN or infinite.
    pub after: Option<f64>,
    /// Whether that is better, and was taken; else the start stays.
    pub taken: bool,
}

impl Learned {
    pub(crate) fn of(outcome: Outcome) -> Self {
        Self {
            before: outcome.before,
            after: Some(outcome.after).filter(|after| after.is_finite()),
            taken: outcome.is_better(),
        }
    }
}

/// A finished tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Its name.
    pub tensor: String,
    /// What is stored.
    pub unit: PackedUnit,
    /// What became of it.
    pub report: Report,
}
