//! The experts of a layer, as a configuration and the table say.

use llmpress_formats::Result;
use llmpress_formats::blueprint::{ExpertLayers, Experts, SharedSize};
use serde_json::Value;

use super::{Fields, MlpConfig};
use crate::picks::{Groups, Picks};

/// The function of a gate with limits: `(clamp(up) + 1) clamp(gate) sigmoid(alpha clamp(gate))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clamped {
    /// What the gate is multiplied by in the sigmoid.
    pub alpha: f32,
    /// The most that a gate is, and up in size.
    pub limit: f32,
}

/// The experts of a layer, if it has them.
pub(super) fn expert_mlp(f: &Fields<'_>, experts: &Experts, layer: usize) -> Result<Option<MlpConfig>> {
    if !has_experts(f, experts, layer)? {
        return Ok(None);
    }
    let key = experts.count.iter().copied().find(|key| f.config.get(key).is_some());
    let key = key.or(experts.count.last().copied()).unwrap_or_default();
    let count = f.count(key)?.ok_or_else(|| f.missing(key))?;
    let top_k = f.count("num_experts_per_tok")?.ok_or_else(|| f.missing("num_experts_per_tok"))?;
    if top_k > count {
        return Err(f.corrupt(format!("num_experts_per_tok {top_k} exceeds {key} {count}")));
    }
    let groups = groups(f, experts, key, count, top_k)?;
    let intermediate = f.size(experts.intermediate)?.ok_or_else(|| f.missing(experts.intermediate))?;
    let shared = match &experts.shared {
        None => None,
        Some(shared) => Some(match shared.size {
            SharedSize::Same => intermediate,
            SharedSize::Key(key) => f.size(key)?.ok_or_else(|| f.missing(key))?,
            SharedSize::Times(key, default) => {
                let times = f.count(key)?.unwrap_or(default);
                let size = intermediate.checked_mul(times).filter(|size| *size <= super::MAX_SIZE);
                size.ok_or_else(|| f.corrupt(format!("{key} {times} times {intermediate} is too large")))?
            }
        }),
    };
    let scale = match experts.scale {
        None => 1.0,
        Some((key, default)) => f.number(key)?.unwrap_or(default),
    };
    let clamp = match &experts.clamp {
        None => None,
        Some(clamp) => {
            let said = |(key, default): (&str, f64)| {
                Ok::<_, llmpress_formats::Error>(f.number(key)?.unwrap_or(default))
            };
            Some(Clamped { alpha: said(clamp.alpha)? as f32, limit: said(clamp.limit)? as f32 })
        }
    };
    let picks = Picks {
        top_k,
        scores: experts.scores,
        groups,
        normalise: f.bias(experts.normalise)?,
        scale: scale as f32,
        weighs_inputs: experts.weighs_inputs,
    };
    Ok(Some(MlpConfig::Experts { intermediate, count, picks, clamp, shared }))
}

fn groups(
    f: &Fields<'_>,
    experts: &Experts,
    key: &str,
    count: usize,
    top_k: usize,
) -> Result<Option<Groups>> {
    let Some(rule) = &experts.groups else { return Ok(None) };
    if let Some((key, wanted)) = rule.only {
        match f.config.get(key).and_then(Value::as_str) {
            Some(found) if found == wanted => {}
            Some("greedy") | None => return Ok(None),
            Some(other) => {
                return Err(f.unsupported(format!("{key} {other:?}; greedy and {wanted} run here")));
            }
        }
    }
    let of = f.count("n_group")?.unwrap_or(1);
    let picked = f.count("topk_group")?.unwrap_or(of);
    let size = count / of;
    if !count.is_multiple_of(of) || picked > of || size < rule.best && of > 1 || picked * size < top_k {
        return Err(f.corrupt(format!(
            "num_experts_per_tok {top_k} of {key} {count} cannot be picked from topk_group {picked} of n_group {of}"
        )));
    }
    Ok((of > 1).then_some(Groups { count: of, picked, best: rule.best }))
}

fn has_experts(f: &Fields<'_>, experts: &Experts, layer: usize) -> Result<bool> {
    let listed = |key: &str| {
        let list = f.config.get(key).and_then(Value::as_array);
        list.map(|list| list.iter().any(|v| v.as_u64() == Some(layer as u64)))
    };
    Ok(match experts.layers {
        ExpertLayers::All => true,
        ExpertLayers::SparseStep => {
            let step = f.count("decoder_sparse_step")?.unwrap_or(1);
            (layer + 1).is_multiple_of(step) && listed("mlp_only_layers") != Some(true)
        }
        ExpertLayers::From(first) => layer >= f.index("first_k_dense_replace")?.unwrap_or(first),
        ExpertLayers::Listed => match listed("moe_layers") {
            Some(listed) => listed,
            None => (layer + 1).is_multiple_of(f.count("interleave_moe_layer_step")?.unwrap_or(1)),
        },
    })
}
