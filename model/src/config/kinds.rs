//! What each layer sees of the tokens before: everything, a window, a chunk, or what it remembers of them.

use llmpress_formats::blueprint::LayerKinds;
use llmpress_formats::{Blueprint, Result};

use super::{Fields, turned, windows};

/// What a layer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    All,
    /// So many tokens, itself included.
    Window(usize),
    /// Those of its own chunk of so many.
    Chunk(usize),
    /// What it remembers.
    Delta,
}

/// The kind of each layer.
pub(super) fn kinds(f: &Fields<'_>, blueprint: &Blueprint, count: usize) -> Result<Vec<Kind>> {
    let said = f.config.get("layer_types").filter(|v| !v.is_null());
    if said.is_none() {
        match blueprint.mixers.kinds {
            LayerKinds::Windows => {}
            LayerKinds::Alternating(default) => {
                let window = f.size("sliding_window")?.unwrap_or(default);
                let kind =
                    |layer: usize| if layer.is_multiple_of(2) { Kind::Window(window) } else { Kind::All };
                return Ok((0..count).map(kind).collect());
            }
            LayerKinds::DeltaBut(every) => {
                let every = f.count("full_attention_interval")?.unwrap_or(every);
                let kind =
                    |layer: usize| if (layer + 1).is_multiple_of(every) { Kind::All } else { Kind::Delta };
                return Ok((0..count).map(kind).collect());
            }
            LayerKinds::ChunkedTurned(default) => {
                let chunk = chunk(f, default)?;
                let turned = turned(f, blueprint, &vec![None; count])?;
                let kind = |turned: &bool| match chunk {
                    Some(chunk) if *turned => Kind::Chunk(chunk),
                    _ => Kind::All,
                };
                return Ok(turned.iter().map(kind).collect());
            }
        }
    }
    let special = |name: &str| name == "linear_attention" || name == "chunked_attention";
    let names: Vec<&str> =
        said.and_then(|v| v.as_array()).into_iter().flatten().filter_map(|v| v.as_str()).collect();
    if !names.iter().any(|name| special(name)) {
        let kind = |window: Option<usize>| window.map_or(Kind::All, Kind::Window);
        return Ok(windows(f, blueprint, count)?.into_iter().map(kind).collect());
    }
    if names.len() != count {
        return Err(f.corrupt(format!("layer_types must be a list of {count} names, one for each layer")));
    }
    names
        .into_iter()
        .map(|name| match (name, blueprint.mixers.kinds) {
            ("full_attention", _) => Ok(Kind::All),
            ("sliding_attention", _) => {
                f.size("sliding_window")?.map(Kind::Window).ok_or_else(|| f.missing("sliding_window"))
            }
            ("linear_attention", _) if blueprint.mixers.delta.is_some() => Ok(Kind::Delta),
            ("chunked_attention", LayerKinds::ChunkedTurned(default)) => {
                chunk(f, default)?.map(Kind::Chunk).ok_or_else(|| f.missing("attention_chunk_size"))
            }
            _ => {
                Err(f.unsupported(format!("layer_types: {name:?} does not run in {} models", blueprint.name)))
            }
        })
        .collect()
}

/// The size of a chunk; none where it is said that there are none.
fn chunk(f: &Fields<'_>, default: usize) -> Result<Option<usize>> {
    match f.config.get("attention_chunk_size") {
        None => Ok(Some(default)),
        Some(_) => f.size("attention_chunk_size"),
    }
}
