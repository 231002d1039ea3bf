//! What no kernel does yet.

use llmpress_formats::blueprint::NormKind;
use llmpress_formats::{Error, Result};

use crate::{Model, ModelConfig};

/// The first part of an architecture that does not run on a GPU.
fn missing(config: &ModelConfig) -> Option<&'static str> {
    let blueprint = config.blueprint;
    let names = &blueprint.names;
    let parts = [
        (
            matches!(blueprint.norm, NormKind::Layer { .. })
                && (names.attention_post_norm.is_some() || names.mlp_post_norm.is_some()),
            "layer norms of what sub-layers give out",
        ),
        (
            (names.attention_norm.is_none() || names.mlp_norm.is_none()) && config.residual_scale != 1.0,
            "sub-layers whose inputs are not normed, and whose outputs are scaled",
        ),
    ];
    parts.into_iter().find_map(|(has, what)| has.then_some(what)).or(blueprint.special())
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
