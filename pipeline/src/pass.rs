//! The passes of a recipe: what changes which tensors there are, before they are stored.
//!
//! ```text
//! asked for ("drop:attn=8") --calibration, ranking--> settled (which layers) --> an edit of the view before it
//! ```

use std::fmt;
use std::str::FromStr;

use llmpress_formats::{Checkpoint, Removal};
use llmpress_prune as prune;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, Result};

/// A pass.
#[derive(Debug, Clone, PartialEq)]
pub enum Pass {
    /// A pruning whose sub-layers are still to be chosen.
    Prune(prune::Pass),
    /// Sub-layers that go, by layer.
    Remove(Removal),
}

impl Pass {
    /// Whether a text asks for a pass, rightly or not.
    pub fn names(text: &str) -> bool {
        prune::Pass::names(text)
    }

    /// Whether it says what exactly it does.
    pub fn is_settled(&self) -> bool {
        matches!(self, Self::Remove(_))
    }

    /// Makes it keep every tensor.
    pub fn make_portable(&mut self) {
        match self {
            Self::Prune(pass) => pass.portable = true,
            Self::Remove(removal) => removal.portable = true,
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prune(pass) => pass.fmt(f),
            Self::Remove(removal) => {
                write!(f, "prune {} attentions and {} MLPs", removal.attention.len(), removal.mlp.len())
            }
        }
    }
}

impl FromStr for Pass {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(Self::Prune(text.parse()?))
    }
}

/// A pass as it is written down: what is asked for, or what it came to.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Asked(String),
    Settled(Settled),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum Settled {
    Prune(Removal),
}

impl Serialize for Pass {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Prune(pass) => Written::Asked(pass.to_string()),
            Self::Remove(removal) => Written::Settled(Settled::Prune(removal.clone())),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Pass {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Written::deserialize(deserializer)? {
            Written::Asked(text) => text.parse().map_err(serde::de::Error::custom),
            Written::Settled(Settled::Prune(removal)) => Ok(Self::Remove(removal)),
        }
    }
}

/// A checkpoint as passes leave it: nothing is copied or written.
///
/// # Errors
/// A pass that is not settled, or that this checkpoint does not admit.
pub fn view(checkpoint: Checkpoint, passes: &[Pass]) -> Result<Checkpoint> {
    passes.iter().try_fold(checkpoint, apply)
}

/// The passes that have run, of a manifest's recipe. Whatever else the recipe holds is of no concern.
///
/// # Errors
/// Passes of a kind that this version does not know.
pub fn recorded_passes(recipe: &serde_json::Value) -> Result<Vec<Pass>> {
    let wrong = |e| Error::Invalid(format!("the manifest's recipe: its passes: {e}"));
    if let Some(removal) = recipe.get("prune") {
        return Ok(vec![Pass::Remove(serde_json::from_value(removal.clone()).map_err(wrong)?)]);
    }
    let passes = recipe.get("passes").map(|passes| serde_json::from_value(passes.clone()).map_err(wrong));
    Ok(passes.transpose()?.unwrap_or_default())
}

/// A view after one more pass.
pub(crate) fn apply(checkpoint: Checkpoint, pass: &Pass) -> Result<Checkpoint> {
    match pass {
        Pass::Remove(removal) => {
            let edit = removal.edit(&checkpoint)?;
            Ok(checkpoint.edited(&edit)?)
        }
        Pass::Prune(pass) => Err(Error::Invalid(format!(
            "{pass} is still to be worked out: give --to with --calib FILE, or plan with --ranking FILE"
        ))),
    }
}
