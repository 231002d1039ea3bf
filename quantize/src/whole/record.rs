//! What is told of learning a whole model as it goes.

use llmpress_learn::Evaluated;
use serde::{Deserialize, Serialize};

/// A step. Holds no times: it is the same whenever it is made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stepped {
    /// Which, from 1.
    pub step: u32,
    /// Tokens learned from so far.
    pub tokens: u64,
    /// The mean loss of a token.
    pub loss: f64,
    /// KL to the dense model at temperature 2, nats a token.
    pub divergence: f64,
    /// `-ln p` of what came, nats a token.
    pub likelihood: f64,
    /// The norm of all derivatives, before they are clipped.
    pub gradient: f64,
    /// What every rate is multiplied by.
    pub rate: f32,
    /// Whether the loss says that the model broke: it went back to the best state then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub broken: bool,
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
