//! What is told of a run as it goes.

use llmpress_learn::Evaluated;
use serde::{Deserialize, Serialize};

/// A step. Holds no times: it is the same whenever it is made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stepped {
    /// Which, from 1.
    pub step: u32,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// The mean loss of a token.
    pub loss: f64,
    /// KL to the dense model at temperature 2, nats a token; none where it has no share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<f64>,
    /// `-ln p` of what came, nats a token.
    pub likelihood: f64,
    /// The norm of all derivatives, before they are clipped.
    pub gradient: f64,
    /// The rate.
    pub rate: f32,
    /// The decay of dropped weights.
    pub lambda: f32,
    /// Quads whose masks changed, where masks were found again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flips: Option<u64>,
}

/// Either, as a line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// An evaluation.
    Evaluated(Evaluated),
    /// A step.
    Stepped(Stepped),
}
