//! Sizes of what stands in the place of attention, or beside it.

use llmpress_formats::{Blueprint, Result};
use serde_json::Value;

use super::Fields;
use crate::delta::DeltaConfig;
use crate::latent::LatentConfig;

/// Most tokens that a short convolution sees.
const MAX_KERNEL: usize = 64;

/// How queries are scaled by their position `p`: by `1 + strength ln(1 + floor((p + 1) / tokens))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// Tokens after which the scale grows.
    pub tokens: f32,
    /// How much.
    pub strength: f32,
}

impl Temperature {
    /// The scale of a query at a position.
    pub(crate) fn at(&self, position: usize) -> f32 {
        let steps = ((position as f32 + 1.0) / self.tokens).floor();
        (f64::from(steps).ln_1p() * f64::from(self.strength) + 1.0) as f32
    }
}

/// That of layers that turn nothing, where there is one.
pub(super) fn temperature(f: &Fields<'_>, blueprint: &Blueprint) -> Result<Option<Temperature>> {
    // Published as a number, too.
    let key = "attn_temperature_tuning";
    let tuned = match f.config.get(key).and_then(Value::as_u64) {
        Some(number) => number != 0,
        None => f.flag(key)?.unwrap_or(true),
    };
    if !blueprint.mixers.temperature || !tuned {
        return Ok(None);
    }
    let tokens = f.size("floor_scale")?.unwrap_or(8192) as f32;
    Ok(Some(Temperature { tokens, strength: f.number("attn_scale")?.unwrap_or(0.1) as f32 }))
}

/// Sizes of latent attention, where there is some.
pub(super) fn latent(f: &Fields<'_>, blueprint: &Blueprint) -> Result<Option<LatentConfig>> {
    if !blueprint.mixers.latent {
        return Ok(None);
    }
    let size = |key: &str, default| Ok::<_, llmpress_formats::Error>(f.size(key)?.unwrap_or(default));
    let query_rank = match f.config.get("q_lora_rank") {
        None => Some(1536),
        Some(_) => f.size("q_lora_rank")?,
    };
    Ok(Some(LatentConfig {
        query_rank,
        rank: size("kv_lora_rank", 512)?,
        plain: size("qk_nope_head_dim", 128)?,
        turned: size("qk_rope_head_dim", 64)?,
        value: size("v_head_dim", 128)?,
    }))
}

/// Sizes of gated delta layers, where there are some.
pub(super) fn delta(f: &Fields<'_>, blueprint: &Blueprint) -> Result<Option<DeltaConfig>> {
    if blueprint.mixers.delta.is_none() {
        return Ok(None);
    }
    let config = DeltaConfig {
        key_heads: f.count("linear_num_key_heads")?.unwrap_or(16),
        value_heads: f.count("linear_num_value_heads")?.unwrap_or(32),
        key_dim: f.count("linear_key_head_dim")?.unwrap_or(128),
        value_dim: f.count("linear_value_head_dim")?.unwrap_or(128),
        kernel: f.integer("linear_conv_kernel_dim", 2..=MAX_KERNEL)?.unwrap_or(4),
    };
    if !config.value_heads.is_multiple_of(config.key_heads) {
        return Err(f.corrupt(format!(
            "linear_num_value_heads {} is no multiple of linear_num_key_heads {}",
            config.value_heads, config.key_heads
        )));
    }
    let limit = super::MAX_SIZE as u128;
    let (keys, values) = (config.key_heads * config.key_dim, config.value_heads * config.value_dim);
    if keys as u128 > limit || values as u128 > limit || values as u128 * config.key_dim as u128 > limit {
        return Err(f.corrupt(format!(
            "linear_num_value_heads {}, linear_key_head_dim {} and linear_value_head_dim {} make layers too large",
            config.value_heads, config.key_dim, config.value_dim
        )));
    }
    Ok(Some(config))
}
