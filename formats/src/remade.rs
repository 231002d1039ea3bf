//! A checkpoint seen with tensors whose bytes are made of what is stored, when they are read.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

use crate::{Checkpoint, Error, Result, Transform};

/// Makes the bytes of tensors from a checkpoint that stores something else for them.
pub trait Remake: Debug + Send + Sync {
    /// Fills `out` with bytes `offset ..` of a tensor, on whole elements. `stored` is the checkpoint itself:
    /// [`Checkpoint::read_stored`] reads what there is.
    ///
    /// # Errors
    /// What is stored cannot be read.
    fn remake(&self, stored: &Checkpoint, tensor: &str, offset: u64, out: &mut [u8]) -> Result<()>;
}

impl Checkpoint {
    /// The checkpoint with some tensors (of the same dtypes and shapes) that `by` makes when they are read, and without transformations.
    ///
    /// # Errors
    /// A tensor that is not there; a view that makes tensors already.
    pub fn remade(mut self, tensors: BTreeSet<String>, by: Arc<dyn Remake>) -> Result<Self> {
        if let Some(name) = tensors.iter().find(|name| !self.tensors.contains_key(*name)) {
            let root = self.root().display();
            return Err(Error::Invalid(format!("{root}: there is no tensor {name} to make anew")));
        }
        if self.remake.is_some() {
            let root = self.root().display();
            return Err(Error::Invalid(format!("{root}: is seen through transformations already")));
        }
        for (name, tensor) in self.tensors.iter_mut().filter(|(name, _)| tensors.contains(*name)) {
            // What is zero stays so.
            tensor.made = !tensor.zero;
            if let Some(manifest) = &mut self.manifest {
                // What it was no longer holds.
                manifest.tensors.remove(name);
            }
        }
        self.transforms.clear();
        self.remake = Some(by);
        Ok(self)
    }

    /// What was done to its weights is another list from now on: of a view with tensors of a pass that transformed them.
    #[must_use]
    pub fn with_transforms(mut self, transforms: Vec<Transform>) -> Self {
        self.transforms = transforms;
        self
    }
}
