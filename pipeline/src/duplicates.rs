//! Tensors with the same bytes: each is stored once.
//!
//! ```text
//! dtype, shape --> some bytes of each --> digest of all bytes --> the first by name is stored, the others are it      (then compared, as
//!    alike           alike                    alike                                                                  all that is written)
//! ```

use std::collections::BTreeMap;

use llmpress_formats::{Checkpoint, Digest, Dtype, QUANTISATION_FILE, Tensor};
use rayon::prelude::*;

use crate::complete::digest;
use crate::progress::Silent;
use crate::{Method, Pass, Plan, Result};

/// Tensors smaller than this are not worth the look.
const MIN_BYTES: u64 = 256;
/// Bytes that are looked at first, at the start, in the middle and at the end.
const LOOK: u64 = 4 << 10;

/// What each tensor that is not stored itself is stored as, and the digest of both.
#[derive(Debug, Default)]
pub(crate) struct Duplicates(BTreeMap<String, (String, Digest)>);

impl Duplicates {
    /// Looks for them in a source that is to be archived. What is read of most tensors is 12 KiB. Matrices that another tool quantised are made
    /// of several tensors, each of which their readers want by itself: there it finds none.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub(crate) fn find(checkpoint: &Checkpoint, plan: &Plan) -> Result<Self> {
        let quantised = checkpoint.config().is_some_and(|config| config.quantised_by().is_some())
            || checkpoint.root().join(QUANTISATION_FILE).is_file();
        // What a pass finishes is another tensor before, and elsewhere.
        let finishes = plan.recipe.passes.iter().any(|pass| !matches!(pass, Pass::Remove(_)));
        if plan.recipe.to != Method::Archive || plan.plain || quantised || finishes {
            return Ok(Self::default());
        }
        let takes_part = [Method::Archive, Method::Planes, Method::Delta];
        let mut alike: BTreeMap<(Dtype, &[u64]), Named<'_>> = BTreeMap::new();
        for unit in plan.units().filter(|unit| takes_part.contains(&unit.method)) {
            for name in &unit.tensors {
                let tensor = checkpoint.tensor(name)?;
                if tensor.bytes >= MIN_BYTES {
                    alike.entry((tensor.dtype, &tensor.shape)).or_default().push((name, tensor));
                }
            }
        }
        let mut found = BTreeMap::new();
        for mut names in alike.into_values() {
            names.sort_unstable_by_key(|(name, _)| *name);
            let looked = groups(vec![names], |name, tensor| look(checkpoint, name, tensor))?;
            let same =
                groups(looked.into_values().collect(), |name, tensor| whole(checkpoint, name, tensor))?;
            for (digest, names) in same {
                if let [(first, _), others @ ..] = &names[..] {
                    let as_first =
                        |(name, _): &(&str, _)| ((*name).to_owned(), ((*first).to_owned(), digest));
                    found.extend(others.iter().map(as_first));
                }
            }
        }
        Ok(Self(found))
    }

    /// What a tensor is stored as, if that is another one, and the digest of its bytes.
    pub(crate) fn get(&self, tensor: &str) -> Option<(&str, Digest)> {
        self.0.get(tensor).map(|(target, digest)| (target.as_str(), *digest))
    }
}

/// Tensors by name.
type Named<'a> = Vec<(&'a str, &'a Tensor)>;

/// Those of each set that have the same digest; who is alone is left out.
fn groups<'a>(
    sets: Vec<Named<'a>>,
    digest: impl Fn(&str, &Tensor) -> Result<Digest> + Sync,
) -> Result<BTreeMap<Digest, Named<'a>>> {
    let mut found: BTreeMap<Digest, Named<'a>> = BTreeMap::new();
    for set in sets.into_iter().filter(|set| set.len() > 1) {
        let digests: Vec<Digest> =
            set.par_iter().map(|(name, tensor)| digest(name, tensor)).collect::<Result<_>>()?;
        set.into_iter()
            .zip(digests)
            .for_each(|(tensor, digest)| found.entry(digest).or_default().push(tensor));
    }
    found.retain(|_, set| set.len() > 1);
    Ok(found)
}

/// What a manifest of the source says of a tensor's bytes.
fn known(checkpoint: &Checkpoint, name: &str, tensor: &Tensor) -> Option<Digest> {
    let manifest = checkpoint.manifest().filter(|_| tensor.is_stored())?;
    manifest.tensors.get(name).map(|entry| entry.blake3)
}

/// The digest of some bytes.
fn look(checkpoint: &Checkpoint, name: &str, tensor: &Tensor) -> Result<Digest> {
    if let Some(known) = known(checkpoint, name, tensor) {
        return Ok(known);
    }
    let take = LOOK.min(tensor.bytes);
    let mut hasher = blake3::Hasher::new();
    // Words of 64 bits: aligned for every decoder. Places are those of elements of any size.
    let mut buffer = vec![0u64; LOOK as usize / 8];
    let piece = bytemuck::cast_slice_mut::<u64, u8>(&mut buffer).get_mut(..take as usize).unwrap_or_default();
    for at in [0, (tensor.bytes - take) / 2 / 16 * 16, tensor.bytes - take] {
        checkpoint.read(name, at, piece)?;
        hasher.update(piece);
    }
    Ok(hasher.finalize().into())
}

/// The digest of all bytes.
fn whole(checkpoint: &Checkpoint, name: &str, tensor: &Tensor) -> Result<Digest> {
    match known(checkpoint, name, tensor) {
        Some(known) => Ok(known),
        None => Ok(digest(tensor.bytes, |at, piece| checkpoint.read(name, at, piece), &Silent)?),
    }
}
