//! What no kernel does yet.

use llmpress_formats::blueprint::{MlpNames, NormKind, QueryKeyNorm};
use llmpress_formats::{Error, Result};

use crate::norm::Norm;
use crate::{Model, ModelConfig};

/// The first part of an architecture that does not run on a GPU.
fn missing(config: &ModelConfig) -> Option<&'static str> {
    let blueprint = config.blueprint;
    let names = &blueprint.names;
    let parts = [
        (blueprint.parallel, "attention and MLP side by side"),
        (matches!(blueprint.norm, NormKind::Layer { .. }), "layer norms"),
        (
            names.attention_norm.is_none() || names.mlp_norm.is_none(),
            "sub-layers whose inputs are not normed",
        ),
        (
            blueprint.query_key_norm == QueryKeyNorm::Whole,
            "a norm of queries and keys over all heads together",
        ),
        (matches!(names.mlp, MlpNames::Plain(_)), "MLPs without a gate"),
        (blueprint.transposed, "matrices that are stored transposed"),
        (names.positions.is_some(), "learned positions"),
        (config.attention_softcap.is_some(), "capped attention scores"),
        (
            config.ropes.iter().any(crate::RopeConfig::turns_neighbours),
            "rotary embeddings of neighbouring features",
        ),
    ];
    parts.into_iter().find_map(|(has, what)| has.then_some(what))
}

/// Refuses a model that has a part that no kernel does, by name.
pub(super) fn check(model: &Model) -> Result<()> {
    let config = model.config();
    match missing(config) {
        None => Ok(()),
        Some(what) => Err(Error::unsupported(
            model.checkpoint.root(),
            None,
            format!(
                "is a {} model, which has {what}: that does not run on a GPU yet. Leave out --device cuda, or say --device cpu",
                config.blueprint.name
            ),
        )),
    }
}

/// The weights of a norm that must be there.
pub(super) fn weights<'a>(norm: &'a Option<Norm>, model: &Model) -> Result<&'a [f32]> {
    let missing = || {
        let root = model.checkpoint.root();
        Error::unsupported(
            root,
            None,
            "has sub-layers whose inputs are not normed, which do not run on a GPU yet",
        )
    };
    norm.as_ref().map(|norm| norm.weight.as_slice()).ok_or_else(missing)
}

/// How the residual stream is held, so that what sub-layers give out is added without a scale: all of it divided by that scale. Norms of it
/// are what they were where their epsilon is divided by its square.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream {
    /// What the embedding is multiplied by.
    pub(super) embedding_scale: f32,
    /// Added to the mean square in norms of the stream.
    pub(super) eps: f32,
}

impl Stream {
    pub(super) fn of(config: &ModelConfig) -> Self {
        let scale = config.residual_scale;
        Self { embedding_scale: config.embedding_scale / scale, eps: config.norm_eps / (scale * scale) }
    }
}
