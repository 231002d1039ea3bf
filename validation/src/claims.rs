//! What a manifest claims beyond digests: that it lists what there is, what is tied, what was pruned.

use std::collections::BTreeSet;

use llmpress_formats::{
    Checkpoint, Digest, INDEX_FILE, LayerNames, MANIFEST_FILE, Manifest, Part, Removal, is_model_file,
};

use crate::PIECE;
use crate::pruned::{Gone, Pruned};

/// Told of a fault: file, tensor, what is wrong.
pub(crate) type Tell<'a> = &'a (dyn Fn(&str, Option<&str>, String) + Sync);

/// Tells of files that are there, that a model is made from, and that the manifest does not list.
pub(crate) fn check_unknown_files(unknown: &mut Vec<String>, fault: Tell<'_>) {
    unknown.retain(|name| {
        let counts = is_model_file(name) || name.ends_with(".safetensors") && !name.starts_with('.');
        if counts {
            fault(name, None, format!("is not listed by {MANIFEST_FILE}, so nothing says that it is right"));
        }
        !counts
    });
}

/// Tells of claims that are not so. `decode`: also of those that take reading tensors.
pub(crate) fn check_claims(checkpoint: &Checkpoint, manifest: &Manifest, decode: bool, fault: Tell<'_>) {
    for name in manifest.source.files.keys() {
        if name != INDEX_FILE && name != MANIFEST_FILE && !manifest.files.contains_key(name) {
            fault(MANIFEST_FILE, None, format!("does not list {name}, which the source had"));
        }
    }
    for unit in checkpoint.units().values().filter(|u| u.encoding().name() == "raw") {
        // Of other encodings the stored shapes do not tell the tensor's.
        let stored = unit.components().values().next().map(|c| c.shape());
        if let Some(part) = unit.parts().first().filter(|part| stored != Some(&part.shape[..])) {
            let what =
                format!("is said to be {:?}, but is stored as {:?}", part.shape, stored.unwrap_or_default());
            fault(MANIFEST_FILE, Some(&part.name), what);
        }
    }
    let derived = checkpoint.derived_ties();
    let names: BTreeSet<&String> = manifest.tied.keys().chain(derived.keys()).collect();
    for name in names {
        match (manifest.tied.get(name), derived.get(name)) {
            (claimed, right) if claimed == right => {}
            (Some(claimed), _) => {
                let what =
                    format!("is said to be tied to {claimed}, which configuration and tensors do not say");
                fault(MANIFEST_FILE, Some(name), what);
            }
            (None, _) => {
                fault(MANIFEST_FILE, Some(name), "is tied, but the manifest does not say so".to_owned());
            }
        }
    }
    let pruned = match Pruned::of(manifest) {
        Ok(pruned) => pruned,
        Err(e) => return fault(MANIFEST_FILE, None, format!("recipe: prune: {e}")),
    };
    for name in manifest.dropped.keys().filter(|name| manifest.tensors.contains_key(*name)) {
        // After whole layers went, a tensor may have the name of one that is gone.
        if !pruned.renumbers() && !was_converted_before(manifest) {
            fault(MANIFEST_FILE, Some(name), "is said to have been left out, but is there".to_owned());
        }
    }
    check_pruned(checkpoint, manifest, &pruned, decode, fault);
}

/// Whether the source was itself converted, and perhaps pruned: what it lacked is in `dropped` too.
fn was_converted_before(manifest: &Manifest) -> bool {
    manifest.source.kind == "llmpress"
}

/// A tensor of a sub-layer.
struct Placed<'a> {
    name: &'a String,
    layer: usize,
    part: Part,
    /// Whether the sub-layer adds nothing if it is zero.
    last: bool,
}

/// The tensors of sub-layers but for their norms, which some share.
fn placed<'a>(layers: LayerNames, names: impl Iterator<Item = &'a String>) -> Vec<Placed<'a>> {
    let prefixes = layers.prefixes();
    let place = |name: &'a String| {
        let (number, rest) = prefixes
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix.as_str()).and_then(|rest| rest.split_once('.')))?;
        rest.split_once('.').filter(|(_, rest)| rest.contains('.'))?;
        let (part, last) = (layers.part(rest, false)?, layers.is_last_product(rest));
        Some(Placed { name, layer: number.parse().ok()?, part, last })
    };
    names.filter_map(place).collect()
}

fn check_pruned(
    checkpoint: &Checkpoint,
    manifest: &Manifest,
    pruned: &Pruned,
    decode: bool,
    fault: Tell<'_>,
) {
    let layers = LayerNames::of(checkpoint.config());
    if !was_converted_before(manifest) {
        for (name, _) in manifest.dropped.iter().filter(|(_, reason)| *reason == "pruned") {
            let gone = layers.split(name).is_some_and(|(layer, _)| {
                pruned.attention.dropped.contains(&layer) || pruned.mlp.dropped.contains(&layer)
            });
            if !gone {
                fault(
                    MANIFEST_FILE,
                    Some(name),
                    "is said to be pruned, but the recipe does not say so".to_owned(),
                );
            }
        }
    }
    let (here, dropped) = (placed(layers, manifest.tensors.keys()), placed(layers, manifest.dropped.keys()));
    for (what, gone, part) in
        [("attention", &pruned.attention, Part::Attention), ("MLP", &pruned.mlp, Part::Mlp)]
    {
        let claim = |number: usize, what_is: &str| {
            fault(
                MANIFEST_FILE,
                None,
                format!("says that the {what} of layer {number} was pruned, but {what_is}"),
            );
        };
        let here = |number| here.iter().filter(move |of| of.layer == number && of.part == part);
        for &number in &gone.dropped {
            if !dropped.iter().any(|of| of.layer == number && of.part == part) {
                claim(number, "none of its tensors is among those that were left out");
            } else if pruned.left(number).is_some_and(|left| here(left).next().is_some()) {
                claim(number, "its tensors are there");
            }
        }
        for &number in gone.zero.difference(&gone.dropped) {
            let Some(left) = pruned.left(number) else { continue };
            let mut products =
                here(left).filter(|of| of.last && of.name.ends_with(".weight")).map(|of| of.name).peekable();
            if products.peek().is_none() {
                claim(number, "it has no last product that could be zero");
            }
            for name in products.filter(|_| decode) {
                let bytes = checkpoint.tensors().get(name).map_or(0, |t| t.bytes);
                if manifest.tensors.get(name).is_some_and(|t| t.blake3 != zeros(bytes)) {
                    claim(number, &format!("{name} is not zero"));
                }
            }
        }
    }
    check_lists(checkpoint, pruned, fault);
}

/// A configuration must name the sub-layers that are gone from layers that are left, or nothing runs the checkpoint as it is.
fn check_lists(checkpoint: &Checkpoint, pruned: &Pruned, fault: Tell<'_>) {
    let left = |gone: &Gone| -> BTreeSet<usize> {
        gone.dropped.iter().filter_map(|number| pruned.left(*number)).collect()
    };
    let (attention, mlp) = (left(&pruned.attention), left(&pruned.mlp));
    let Some(config) = checkpoint.config().filter(|_| !attention.is_empty() || !mlp.is_empty()) else {
        return;
    };
    let layers =
        config.get(LayerNames::of(Some(config)).count_key()).and_then(serde_json::Value::as_u64).unwrap_or(0);
    match Removal::of_config(config, layers as usize) {
        Ok(listed) => {
            if !attention.is_subset(&listed.attention) || !mlp.is_subset(&listed.mlp) {
                let what = "says that sub-layers were pruned which config.json does not list";
                fault(MANIFEST_FILE, None, what.to_owned());
            }
        }
        Err(e) => fault(MANIFEST_FILE, None, e.to_string()),
    }
}

/// The digest of so many zero bytes.
fn zeros(bytes: u64) -> Digest {
    let piece = vec![0; PIECE.min(bytes as usize)];
    let mut hasher = blake3::Hasher::new();
    let mut left = bytes;
    while left > 0 {
        let take = left.min(piece.len() as u64) as usize;
        hasher.update(&piece[..take]);
        left -= take as u64;
    }
    hasher.finalize().into()
}
