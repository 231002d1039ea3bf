//! The passes of a recipe: what changes which tensors there are, before they are stored.
//!
//! ```text
//! asked for ("drop:attn=8") --calibration, ranking--> settled (which layers) --> an edit of the view before it
//! asked for ("sparse24:wanda + ast:steps=2000") --text--> finished units, trained against the view before both
//! asked for ("gptq:w4", "sparse24:wanda") --calibration, block by block--> finished units in place of tensors of the view
//! ```

use std::fmt;
use std::str::FromStr;

use llmpress_formats::{Checkpoint, Edit, Removal};
use llmpress_prune as prune;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Ast, Error, Method, Quantised, Quantiser, Result, Sparsified, Sparsifier, Trained};

/// A pass.
#[derive(Debug, Clone, PartialEq)]
pub enum Pass {
    /// A pruning whose sub-layers are still to be chosen.
    Prune(prune::Pass),
    /// Sub-layers that go, by layer.
    Remove(Removal),
    /// Matrices that are still to be made 2:4.
    Sparsify(Sparsifier),
    /// Matrices that were made 2:4: their units are in the view.
    Sparsified(Sparsified),
    /// Matrices that are 2:4 by then and are still to be trained.
    Train(Ast),
    /// Matrices that were trained: their units are in the view.
    Trained(Trained),
    /// A quantiser that is still to run.
    Quantise(Quantiser),
    /// A quantiser that has run: its units are in the view.
    Quantised(Quantised),
}

impl Pass {
    /// Whether a text asks for a pass, rightly or not.
    pub fn names(text: &str) -> bool {
        prune::Pass::names(text) || Quantiser::names(text) || names_sparsifier(text) || Ast::names(text)
    }

    /// Whether it says what exactly it does.
    pub fn is_settled(&self) -> bool {
        matches!(self, Self::Remove(_) | Self::Sparsified(_) | Self::Trained(_) | Self::Quantised(_))
    }

    /// Makes a pruning keep every tensor; no other pass takes any.
    pub fn make_portable(&mut self) {
        match self {
            Self::Prune(pass) => pass.portable = true,
            Self::Remove(removal) => removal.portable = true,
            Self::Sparsify(_)
            | Self::Sparsified(_)
            | Self::Train(_)
            | Self::Trained(_)
            | Self::Quantise(_)
            | Self::Quantised(_) => {}
        }
    }

    /// The quantiser that is still to run.
    pub fn quantiser_mut(&mut self) -> Option<&mut Quantiser> {
        match self {
            Self::Quantise(quantiser) => Some(quantiser),
            Self::Prune(_)
            | Self::Remove(_)
            | Self::Sparsify(_)
            | Self::Sparsified(_)
            | Self::Train(_)
            | Self::Trained(_)
            | Self::Quantised(_) => None,
        }
    }

    /// What is still to make matrices 2:4.
    pub fn sparsifier_mut(&mut self) -> Option<&mut Sparsifier> {
        match self {
            Self::Sparsify(sparsifier) => Some(sparsifier),
            Self::Prune(_)
            | Self::Remove(_)
            | Self::Sparsified(_)
            | Self::Train(_)
            | Self::Trained(_)
            | Self::Quantise(_)
            | Self::Quantised(_) => None,
        }
    }

    /// Bits in which the cache is to hold keys and values, as a quantiser that is still to run says.
    pub(crate) fn cache_bits(&self) -> Option<u8> {
        match self {
            Self::Quantise(quantiser) => quantiser.with.cache_bits,
            Self::Prune(_)
            | Self::Remove(_)
            | Self::Sparsify(_)
            | Self::Sparsified(_)
            | Self::Train(_)
            | Self::Trained(_)
            | Self::Quantised(_) => None,
        }
    }

    /// Whether it is still to run, and leaves finished units in a stage.
    pub(crate) fn finishes_units(&self) -> bool {
        matches!(self, Self::Sparsify(_) | Self::Train(_) | Self::Quantise(_))
    }

    /// Whether it removes sub-layers.
    pub fn prunes(&self) -> bool {
        matches!(self, Self::Prune(_) | Self::Remove(_))
    }

    /// Whether it goes by a text where there is one.
    pub(crate) fn takes_text(&self) -> bool {
        match self {
            Self::Prune(pass) => pass.calibrated(),
            Self::Quantise(quantiser) => quantiser.takes_text(),
            Self::Sparsify(sparsifier) => sparsifier.needs_text(),
            Self::Train(_) => true,
            Self::Remove(_) | Self::Sparsified(_) | Self::Trained(_) | Self::Quantised(_) => false,
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
            Self::Sparsify(sparsifier) => sparsifier.fmt(f),
            Self::Sparsified(sparsified) => sparsified.to.fmt(f),
            Self::Train(ast) => ast.fmt(f),
            Self::Trained(trained) => trained.to.fmt(f),
            Self::Quantise(quantiser) => quantiser.fmt(f),
            Self::Quantised(quantised) => quantised.to.fmt(f),
        }
    }
}

impl FromStr for Pass {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match Quantiser::names(text) {
            true => Ok(Self::Quantise(text.parse()?)),
            false if Ast::names(text) => Ok(Self::Train(text.parse()?)),
            false if names_sparsifier(text) => Ok(Self::Sparsify(text.parse()?)),
            false => Ok(Self::Prune(text.parse()?)),
        }
    }
}

/// `sparse24:fixed12` is a method, which stores what is sparse already.
fn names_sparsifier(text: &str) -> bool {
    Sparsifier::names(text) && text.parse::<Method>().is_err()
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
    Sparsify(Sparsified),
    Train(Trained),
    Quantise(Quantised),
}

impl Serialize for Pass {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Prune(pass) => Written::Asked(pass.to_string()),
            Self::Remove(removal) => Written::Settled(Settled::Prune(removal.clone())),
            Self::Sparsify(sparsifier) => Written::Asked(sparsifier.to_string()),
            Self::Sparsified(sparsified) => Written::Settled(Settled::Sparsify(sparsified.clone())),
            Self::Train(ast) => Written::Asked(ast.to_string()),
            Self::Trained(trained) => Written::Settled(Settled::Train(trained.clone())),
            Self::Quantise(quantiser) => Written::Asked(quantiser.to_string()),
            Self::Quantised(quantised) => Written::Settled(Settled::Quantise(quantised.clone())),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Pass {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Written::deserialize(deserializer)? {
            Written::Asked(text) => text.parse().map_err(serde::de::Error::custom),
            Written::Settled(Settled::Prune(removal)) => Ok(Self::Remove(removal)),
            Written::Settled(Settled::Sparsify(sparsified)) => Ok(Self::Sparsified(sparsified)),
            Written::Settled(Settled::Train(trained)) => Ok(Self::Trained(trained)),
            Written::Settled(Settled::Quantise(quantised)) => Ok(Self::Quantised(quantised)),
        }
    }
}

/// A checkpoint as passes leave it: nothing is copied or written. What was quantised is seen as it was before.
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
        Pass::Sparsified(_) | Pass::Trained(_) | Pass::Quantised(_) => {
            Ok(checkpoint.edited(&Edit::default())?)
        }
        Pass::Sparsify(sparsifier) => {
            Err(Error::Invalid(format!("{sparsifier} is still to run: give --to instead of a plan")))
        }
        Pass::Train(ast) => {
            Err(Error::Invalid(format!("{ast} is still to run: give --to instead of a plan")))
        }
        Pass::Quantise(quantiser) => {
            Err(Error::Invalid(format!("{quantiser} is still to run: give --to instead of a plan")))
        }
        Pass::Prune(pass) => Err(Error::Invalid(format!(
            "{pass} is still to be worked out: give --to with --calib FILE, or plan with --ranking FILE"
        ))),
    }
}
