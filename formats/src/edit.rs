//! A checkpoint seen with tensors left out, renamed or zero: nothing is copied or written.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Checkpoint, Config, Error, Result};

/// What is to be different in a [`Checkpoint::edited`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edit {
    /// Tensors that are left out, and why.
    pub drop: BTreeMap<String, String>,
    /// New names by old ones.
    pub rename: BTreeMap<String, String>,
    /// Tensors (by their old names) whose bytes are all zero.
    pub zero: BTreeSet<String>,
    /// The text of another configuration.
    pub config: Option<String>,
}

impl Checkpoint {
    /// The checkpoint with an edit. Its tensors have their new names everywhere.
    ///
    /// # Errors
    /// A tensor that is not there; two with one name; a configuration that does not parse.
    pub fn edited(mut self, edit: &Edit) -> Result<Self> {
        let named = edit.drop.keys().chain(edit.rename.keys()).chain(&edit.zero);
        for name in named {
            if !self.tensors.contains_key(name) {
                return Err(Error::Invalid(format!(
                    "{}: there is no tensor {name} to edit",
                    self.root().display()
                )));
            }
        }
        let by_layer = self.transforms.iter().find(|t| matches!(t, crate::Transform::Scale { .. }));
        if let Some(transform) = by_layer.filter(|_| !edit.rename.is_empty()) {
            let what = format!(
                "has a {} of its weights by layers that would be renumbered: prune the checkpoint that it was made from",
                transform.name()
            );
            return Err(Error::unsupported(self.root(), None, what));
        }
        let new_name = |old: &String| edit.rename.get(old).unwrap_or(old).clone();
        let (mut tensors, mut origins) = (BTreeMap::new(), BTreeMap::new());
        for (name, mut tensor) in std::mem::take(&mut self.tensors) {
            // An edit of an edit knows a tensor by the name that it was given; those that are gone are
            // told by the names of the source.
            let of_source = self.origins.get(&name).unwrap_or(&name).clone();
            if let Some(reason) = edit.drop.get(&name) {
                self.dropped.insert(of_source, reason.clone());
                continue;
            }
            tensor.zero |= edit.zero.contains(&name);
            let new = new_name(&name);
            if new != of_source {
                origins.insert(new.clone(), of_source);
            }
            if tensors.insert(new, tensor).is_some() {
                return Err(Error::Invalid(format!("two tensors would be called {}", new_name(&name))));
            }
        }
        self.tensors = tensors;
        self.origins = origins;
        if let Some(manifest) = &mut self.manifest {
            // Digests follow their tensors; those of zeroed ones no longer hold.
            let entries = std::mem::take(&mut manifest.tensors).into_iter();
            manifest.tensors = entries
                .filter(|(name, _)| !edit.drop.contains_key(name) && !edit.zero.contains(name))
                .map(|(name, entry)| (new_name(&name), entry))
                .collect();
        }
        self.tied = std::mem::take(&mut self.tied)
            .into_iter()
            .map(|(name, stored)| (new_name(&name), new_name(&stored)))
            .collect();
        if let Some(text) = &edit.config {
            let path = self.root().join(crate::CONFIG_FILE);
            self.config = Some(Config::parse(&path, text.clone())?);
        }
        self.edited = true;
        Ok(self)
    }

    /// Whether it is a view made by [`Self::edited`].
    pub fn is_edited(&self) -> bool {
        self.edited
    }

    /// Tensors of its source that it does not have, and why.
    pub fn dropped(&self) -> &BTreeMap<String, String> {
        &self.dropped
    }
}
