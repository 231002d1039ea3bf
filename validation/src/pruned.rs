//! What the passes of a recipe removed.
//!
//! ```text
//! layers of the source:  0 1 2 3 4 5     pass 1 removes layer 1, pass 2 the attention of what is then layer 2
//! layers that are left:  0   1 2 3 4     so attention of layer 3 of the source is gone, which is layer 2 now
//! ```

use std::collections::BTreeSet;

use llmpress_formats::{Manifest, Removal};
use serde::Deserialize;

/// Sub-layers of a kind, by the layers of the source.
#[derive(Debug, Default)]
pub(crate) struct Gone {
    /// Left out.
    pub(crate) dropped: BTreeSet<usize>,
    /// Kept, with a last product of zero.
    pub(crate) zero: BTreeSet<usize>,
}

/// All of it.
#[derive(Debug, Default)]
pub(crate) struct Pruned {
    pub(crate) attention: Gone,
    pub(crate) mlp: Gone,
    /// Layers of the source that went as a whole: the others were renumbered.
    whole: BTreeSet<usize>,
}

/// A pass as recipes record it. What others do than pruning is of no concern here.
#[derive(Deserialize)]
struct Pass {
    prune: Option<Removal>,
}

impl Pruned {
    /// What a manifest's recipe says.
    pub(crate) fn of(manifest: &Manifest) -> serde_json::Result<Self> {
        let mut pruned = Self::default();
        if let Some(removal) = manifest.recipe.get("prune") {
            pruned.remove(&Removal::deserialize(removal)?);
        }
        if let Some(passes) = manifest.recipe.get("passes") {
            for pass in Vec::<Pass>::deserialize(passes)? {
                pass.prune.iter().for_each(|removal| pruned.remove(removal));
            }
        }
        Ok(pruned)
    }

    fn remove(&mut self, removal: &Removal) {
        let of_source = |layers: &BTreeSet<usize>| -> BTreeSet<usize> {
            layers.iter().map(|layer| self.source_layer(*layer)).collect()
        };
        let (attention, mlp) = (of_source(&removal.attention), of_source(&removal.mlp));
        if removal.portable && !removal.renumbers() {
            self.attention.zero.extend(attention);
            self.mlp.zero.extend(mlp);
            return;
        }
        if removal.renumbers() {
            self.whole.extend(&attention);
        }
        self.attention.dropped.extend(attention);
        self.mlp.dropped.extend(mlp);
    }

    /// Whether layers have other numbers than in the source.
    pub(crate) fn renumbers(&self) -> bool {
        !self.whole.is_empty()
    }

    /// The number that a layer that is left has in the source.
    fn source_layer(&self, left: usize) -> usize {
        self.whole
            .iter()
            .fold(left, |layer, gone| if *gone <= layer { layer.saturating_add(1) } else { layer })
    }

    /// The number that a layer of the source has now; `None` for one that went as a whole.
    pub(crate) fn left(&self, source: usize) -> Option<usize> {
        (!self.whole.contains(&source)).then(|| source - self.whole.range(..source).count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_told_by_the_source_through_every_pass() {
        let set = |layers: &[usize]| layers.iter().copied().collect::<BTreeSet<usize>>();
        let mut pruned = Pruned::default();
        pruned.remove(&Removal { attention: set(&[1, 4]), mlp: set(&[1, 4]), portable: false });
        // Left are 0 2 3 5 6 7.
        pruned.remove(&Removal { attention: set(&[1, 3]), ..Removal::default() });
        pruned.remove(&Removal { attention: set(&[0]), mlp: set(&[0]), portable: false });
        // Left are 2 3 5 6 7.
        pruned.remove(&Removal { mlp: set(&[4]), portable: true, ..Removal::default() });
        assert_eq!(pruned.attention.dropped, set(&[0, 1, 2, 4, 5]));
        assert_eq!((pruned.mlp.dropped.clone(), pruned.mlp.zero.clone()), (set(&[0, 1, 4]), set(&[7])));
        assert_eq!(
            [1, 2, 3, 5, 7].map(|layer| pruned.left(layer)),
            [None, Some(0), Some(1), Some(2), Some(4)]
        );
    }
}
