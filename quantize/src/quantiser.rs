//! A quantiser as it is asked for: how matrices are quantised, and what the model gets before.

use std::fmt;
use std::str::FromStr;

use llmpress_formats::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{MeanBits, Rung, Spec, Transformations, short};

/// How tensors are to be quantised: `rtn:w8`, `gptq:w4a8,g128,symmetric`, `gptq:w4a4,rotate`, `gptq:w3.5,g128`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Quantiser {
    /// How a matrix is.
    pub spec: Spec,
    /// What the model gets before.
    pub with: Transformations,
    /// The mean of true bits a weight, where widths are assigned by what each matrix matters; else all have that of `spec`.
    pub mean: Option<MeanBits>,
}

impl Quantiser {
    /// Calibration windows where nobody says how many.
    pub const WINDOWS: usize = 64;

    /// One spec for all matrices.
    pub fn of(spec: Spec) -> Self {
        Self { spec, with: Transformations::default(), mean: None }
    }

    /// Has widths assigned under a mean.
    ///
    /// # Errors
    /// Balanced grids, which have no width of their own.
    pub fn assign(&mut self, mean: MeanBits) -> Result<(), Error> {
        if self.spec.abq.balanced {
            return Err(Error::Invalid(format!("{self}: a mean of several widths has no balanced grids")));
        }
        (self.mean, self.spec.abq.bits) = (Some(mean), mean.width());
        Ok(())
    }

    /// Says how often each window is seen, and what draws them, in place of what it says itself.
    ///
    /// # Errors
    /// One that learns nothing.
    pub fn learns(&mut self, epochs: Option<u32>, seed: Option<u32>) -> Result<(), Error> {
        let before = *self;
        let Some(learn) = &mut self.spec.learn else {
            return Err(Error::Invalid(format!("{before} learns nothing: say {before},learn")));
        };
        if epochs.is_some() {
            (learn.epochs, learn.steps) = (epochs, None);
        }
        learn.seed = seed.map_or(learn.seed, u64::from);
        self.spec.check()
    }

    /// Whether it says something of the model as a whole, which no rule for some tensors can.
    pub fn is_of_model(&self) -> bool {
        !self.with.is_empty() || self.mean.is_some()
    }

    /// Whether a text asks for a quantiser, rightly or not.
    pub fn names(text: &str) -> bool {
        short::names(text)
    }

    /// Whether it cannot go without a text.
    pub fn needs_text(&self) -> bool {
        self.spec.rung == Rung::Gptq || self.with.smooth || self.mean.is_some()
    }

    /// Whether a text makes a difference to it.
    pub fn takes_text(&self) -> bool {
        self.spec.rung != Rung::Rtn || self.with.smooth || self.mean.is_some()
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
