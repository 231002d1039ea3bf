//! Stored tensors that a model does not use: layers beyond those it has, biases and norms that its configuration
//! denies.

use std::cell::RefCell;
use std::collections::BTreeSet;

use llmpress_formats::Checkpoint;

/// Collects the names of the tensors that a model is made of.
#[derive(Debug, Default)]
pub(crate) struct Used(RefCell<BTreeSet<String>>, RefCell<Vec<String>>);

impl Used {
    /// Passes over all names that begin so: layers that predict further tokens, which the decoder does without.
    pub(crate) fn pass_over(&self, prefix: String) {
        self.1.borrow_mut().push(prefix);
    }

    fn predicts(&self, name: &str) -> bool {
        self.1.borrow().iter().any(|prefix| name.starts_with(prefix))
    }

    pub(crate) fn note(&self, name: &str) {
        self.0.borrow_mut().insert(name.to_owned());
    }

    /// The stored tensors that were not noted. `prefix` is that of the decoder's names: other models in the same
    /// checkpoint, such as one for images, are passed over, and so are buffers that old versions of transformers
    /// stored.
    pub(crate) fn others(&self, checkpoint: &Checkpoint, prefix: &str) -> Vec<String> {
        let used = self.0.borrow();
        let own = match prefix {
            "language_model.model." => "language_model.",
            "model.language_model." => prefix,
            _ => "",
        };
        let tied = checkpoint.tied();
        let other = |name: &&String| {
            let is_used = used.contains(*name) || tied.iter().any(|(n, t)| t == *name && used.contains(n));
            !is_used && name.starts_with(own) && !name.ends_with(".rotary_emb.inv_freq")
        };
        checkpoint.tensors().keys().filter(other).filter(|name| !self.predicts(name)).cloned().collect()
    }
}
