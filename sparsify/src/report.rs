//! What became of each tensor.

use llmpress_formats::Dtype;
use llmpress_learn::Outcome;
use llmpress_model::SubLayer;
use serde::{Deserialize, Serialize};

use crate::quads::Sparse;
use crate::slorb::groups;
use crate::{QUAD, Rule};

/// What became of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The tensor.
    pub tensor: String,
    /// How its masks were found.
    pub rule: Rule,
    /// Why not as it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead: Option<String>,
    /// Calibration tokens that went through it.
    pub tokens: usize,
    /// What was added to the Hessian's diagonal, of its mean, where there is one: more than 0.01 where it was not positive
    /// definite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damping: Option<f64>,
    /// What reconstruction came to, where it was to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconstructed: Option<Reconstructed>,
    /// Why it is as its rule left it though it was to be reconstructed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unlearned: Option<String>,
    /// Before it was reconstructed: the mean square of the change of its outputs over that of its outputs, on the calibration
    /// tokens; where its rule gathers no more of them than squares, as if features were uncorrelated; where there are none, of
    /// its weights.
    pub relative_error: f64,
    /// Bits a weight, with positions and what lies beside.
    pub bits_per_weight: f64,
    /// How long it took.
    pub seconds: f64,
}

/// What reconstruction came to, on windows that no step saw.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reconstructed {
    /// Where its rule had left it: squares of differences from what the sub-layer is to give out, over squares of that. None
    /// where that is NaN or infinite.
    pub before: Option<f64>,
    /// After the last step; none where a loss was NaN or infinite.
    pub after: Option<f64>,
    /// Whether that is better, and was taken; else the start stays.
    pub taken: bool,
}

impl Reconstructed {
    pub(crate) fn of(outcome: Outcome) -> Self {
        let finite = |loss: f64| Some(loss).filter(|loss| loss.is_finite());
        Self { before: finite(outcome.before), after: finite(outcome.after), taken: outcome.is_better() }
    }
}

/// A finished tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Its name.
    pub tensor: String,
    /// The dtype of its values, which all values here have.
    pub dtype: Dtype,
    /// What is kept of it.
    pub sparse: Sparse,
    /// S of [SLoRB](crate::sum_preserving), `[rows, ceil(cols / 16)]`, where it was asked for.
    pub sums: Option<Vec<f32>>,
    /// What became of it.
    pub report: Report,
}

impl Finished {
    /// What the product multiplies: kept values, and S added to all columns of its group, `[rows, cols]`.
    pub fn product(&self) -> Vec<f32> {
        let mut weights = self.sparse.dense();
        if let Some(s) = &self.sums {
            crate::slorb::add(s, self.sparse.cols(), &mut weights);
        }
        weights
    }
}

/// Bits a weight of a matrix of so many columns: half its values, four bits a quad in whole bytes a row, and S.
pub fn bits_per_weight(dtype: Dtype, cols: usize, slorb: bool) -> f64 {
    let positions = cols.div_ceil(2 * QUAD) * 8;
    let values = cols / 2 + if slorb { groups(cols) } else { 0 };
    (values as f64 * f64::from(dtype.bits()) + positions as f64) / cols.max(1) as f64
}

/// A tensor that stays dense, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dense {
    /// Its name.
    pub tensor: String,
    /// Why.
    pub why: String,
}

/// What reconstructing a sub-layer came to. Holds no times: it is the same whenever it is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lesson {
    /// Its layer, from 0.
    pub layer: usize,
    /// Which of its sub-layers.
    pub what: Part,
    /// The tensors that were reconstructed.
    pub tensors: Vec<String>,
    /// Steps.
    pub steps: u32,
    /// The loss before and after.
    #[serde(flatten)]
    pub reconstructed: Reconstructed,
}

/// Which sub-layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Attention.
    Attention,
    /// MLP.
    Mlp,
}

impl Part {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Mlp => "MLP",
        }
    }

    /// Of a sub-layer, and its layer.
    pub(crate) fn of(site: SubLayer) -> (Self, usize) {
        match site {
            SubLayer::Attention(layer) => (Self::Attention, layer),
            SubLayer::Mlp(layer) => (Self::Mlp, layer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_nine_a_weight_in_bf16_and_one_more_with_sums() {
        assert_eq!(bits_per_weight(Dtype::BF16, 4096, false), 9.0);
        assert_eq!(bits_per_weight(Dtype::BF16, 4096, true), 10.0);
        assert_eq!(bits_per_weight(Dtype::F32, 64, false), 17.0);
        // An odd quad takes a whole byte.
        assert_eq!(bits_per_weight(Dtype::F16, 4, false), 10.0);
    }
}
