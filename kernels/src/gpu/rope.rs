//! Heads made ready for attention: normed, turned, and put into the cache.

use super::attention::{Cache, Heads, Sequences};
use super::cache_codes::keep;
use super::{Argument, Gpu, Launch, Result, View, size32};

/// Warps of a block, each with a head.
const WARPS: u32 = 4;

/// A rotary embedding in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// `F32 [positions, half]`.
    pub cos: View<'a>,
    /// `F32 [positions, half]`.
    pub sin: View<'a>,
    /// Pairs of features that turn.
    pub half: usize,
    /// Whether pairs are neighbours; else feature i turns with feature `half + i`.
    pub neighbours: bool,
}

/// Norms of each head's query and key: weights `F32 [head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorms<'a> {
    /// Of queries.
    pub query: View<'a>,
    /// Of keys.
    pub key: View<'a>,
    /// Added to the mean square.
    pub eps: f32,
}

/// Norms and turns the queries of `qkv` (`F32 [tokens, (heads + 2 kv_heads) head_dim]`) in place, and puts keys and values into
/// the cache in BF16; or as codes, and then keys are normed and turned in place as well. Positions beyond the cache are left out.
///
/// # Errors
/// A buffer is too small; the launch fails.
pub fn rope(
    gpu: &Gpu,
    heads: Heads,
    qkv: View<'_>,
    sequences: Sequences<'_>,
    rotation: Rotation<'_>,
    norms: Option<HeadNorms<'_>>,
    cache: Cache<'_>,
) -> Result<()> {
    let Heads { heads: query, kv_heads, head_dim } = heads;
    let stride = (query + 2 * kv_heads) * head_dim;
    sequences.check()?;
    let tokens = sequences.tokens();
    qkv.require("qkv", 4 * tokens * stride)?;
    cache.check(heads)?;
    rotation.cos.require("cos", 4 * cache.capacity * rotation.half)?;
    rotation.sin.require("sin", 4 * cache.capacity * rotation.half)?;
    if 2 * rotation.half > head_dim {
        return Err(super::Error::Invalid(format!(
            "heads of {head_dim} cannot turn {} pairs",
            rotation.half
        )));
    }
    if tokens == 0 {
        return Ok(());
    }
    let none = Argument::Pointer(0);
    let (q_norm, k_norm, eps) = match norms {
        Some(norms) => {
            norms.query.require("the queries' norm", 4 * head_dim)?;
            norms.key.require("the keys' norm", 4 * head_dim)?;
            (norms.query.pointer(), norms.key.pointer(), norms.eps)
        }
        None => (none, none, 0.0),
    };
    let (keys, values) = match cache.codes {
        None => (cache.keys.pointer(), cache.values.pointer()),
        Some(_) => (none, none),
    };
    gpu.launch(&Launch {
        file: "rope",
        kernel: "rope",
        grid: [size32("heads", query + 2 * kv_heads)?.div_ceil(WARPS), size32("tokens", tokens)?, 1],
        block: 32 * WARPS,
        shared: 0,
        arguments: &[
            qkv.pointer(),
            Argument::U32(size32("stride", stride)?),
            Argument::U32(query as u32),
            Argument::U32(kv_heads as u32),
            Argument::U32(head_dim as u32),
            Argument::U32(rotation.half as u32),
            Argument::U32(u32::from(rotation.neighbours)),
            rotation.cos.pointer(),
            rotation.sin.pointer(),
            sequences.positions.pointer(),
            sequences.places.pointer(),
            Argument::U32(size32("tokens", sequences.each)?),
            q_norm,
            k_norm,
            Argument::F32(eps),
            keys,
            values,
            Argument::U64(cache.capacity as u64),
        ],
        overlaps: true,
    })?;
    match cache.codes {
        None => Ok(()),
        Some(codes) => keep(gpu, heads, qkv, sequences, cache, codes),
    }
}
