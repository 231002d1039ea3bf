//! A quantiser as it is asked for: how matrices are quantised, and what the model gets before.

use std::fmt;
use std::str::FromStr;

use llmpress_formats::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Rung, Spec, Transformations, short};

/// How tensors are to be quantised: `rtn:w8`, `gptq:w4a8,g128,symmetric`, `gptq:w4a4,rotate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Quantiser {
    /// How a matrix is.
    pub spec: Spec,
    /// What the model gets before.
    pub with: Transformations,
}

impl Quantiser {
    /// Calibration windows where nobody says how many.
    pub const WINDOWS: usize = 64;

    /// Without transformations.
    pub fn of(spec: Spec) -> Self {
        Self { spec, with: Transformations::default() }
    }

    /// Whether a text asks for a quantiser, rightly or not.
    pub fn names(text: &str) -> bool {
        short::names(text)
    }

    /// Whether it cannot go without a text.
    pub fn needs_text(&self) -> bool {
        self.spec.rung == Rung::Gptq || self.with.smooth
    }

    /// Whether a text makes a difference to it.
    pub fn takes_text(&self) -> bool {
        self.spec.rung != Rung::Rtn || self.with.smooth
    }
}

impl fmt::Display for Quantiser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&short::print(self))
    }
}

impl FromStr for Quantiser {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        short::parse(text)
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
