//! Quantising passes: which tensors, how, and the finished units that they leave.
//!
//! ```text
//! "gptq:w4a8,g128" + rules --headers--> a spec a tensor --data, block by block--> finished units in a stage --> view
//! ```

mod blocks;
mod data_free;
mod forecast;
mod run;
mod short;
mod targets;

use std::fmt;
use std::str::FromStr;

use llmpress_quantize::{Rung, Spec};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, Result};

pub(crate) use blocks::Blocks;
pub use forecast::QuantiseForecast;
pub(crate) use forecast::{expected_bytes, forecast};
pub(crate) use run::{Pass as Run, run};
pub(crate) use targets::targets;

/// How tensors are to be quantised: `rtn:w8`, `gptq:w4a8,g128,symmetric`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Quantiser(pub Spec);

impl Quantiser {
    /// Calibration windows where nobody says how many.
    pub const WINDOWS: usize = 64;

    /// Whether a text asks for a quantiser, rightly or not.
    pub fn names(text: &str) -> bool {
        short::names(text)
    }

    /// Whether it cannot go without a text.
    pub fn needs_text(&self) -> bool {
        self.0.rung == Rung::Gptq
    }

    /// Whether a text makes a difference to it.
    pub fn takes_text(&self) -> bool {
        self.0.rung != Rung::Rtn
    }
}

impl fmt::Display for Quantiser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&short::print(&self.0))
    }
}

impl FromStr for Quantiser {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        short::parse(text).map(Self)
    }
}

impl Serialize for Quantiser {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Quantiser {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A quantising pass that has run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantised {
    /// What was asked for.
    pub to: Quantiser,
    /// What it went by, if by a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationRecord>,
}

/// The windows of tokens that a pass went by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationRecord {
    /// How many.
    pub windows: usize,
    /// Tokens of each.
    pub window: usize,
    /// Digest of their ids.
    pub digest: String,
}
