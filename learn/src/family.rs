//! What of architectures has derivatives here.

use llmpress_formats::blueprint::{MlpNames, NormKind, QueryKeyNorm};
use llmpress_formats::{Error, Result};
use llmpress_model::{Model, ModelConfig};

/// The first part of a model that has none.
pub(crate) fn missing(config: &ModelConfig) -> Option<&'static str> {
    let blueprint = config.blueprint;
    let parts = [
        (blueprint.parallel, "attention and MLP side by side"),
        (matches!(blueprint.norm, NormKind::Layer { .. }), "layer norms"),
        (
            blueprint.query_key_norm == QueryKeyNorm::Whole,
            "a norm of queries and keys over all heads together",
        ),
        (matches!(blueprint.names.mlp, MlpNames::Plain(_)), "MLPs without a gate"),
        (blueprint.transposed, "matrices that are stored transposed"),
        (config.attention_softcap.is_some(), "capped attention scores"),
    ];
    parts.into_iter().find_map(|(has, what)| has.then_some(what))
}

/// Why nothing is learned of a model's sub-layers as a whole, where a part of its family has no derivative.
pub fn unlearnable(model: &Model) -> Option<String> {
    let name = model.config().blueprint.name;
    missing(model.config()).map(|what| format!("{name} models have {what}, which has no derivative here"))
}

/// Refuses to learn a model one of whose parts has no derivative, by name.
///
/// # Errors
/// [`Error::Unsupported`], with the family, the part and what can be done instead.
pub fn check(model: &Model) -> Result<()> {
    match missing(model.config()) {
        None => Ok(()),
        Some(what) => Err(Error::unsupported(
            model.checkpoint().root(),
            None,
            format!(
                "is a {} model, which has {what}: that has no derivative here, and nothing is learned or trained of it. Take a method \
                 that does not learn",
                model.config().blueprint.name
            ),
        )),
    }
}
