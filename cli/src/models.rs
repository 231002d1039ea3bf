//! What the verbs that run a model share: opening it with its tokenizer, and the threads.

use std::path::Path;
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Error};
use llmpress_model::{Model, Tokenizer};

use crate::Outcome;
use crate::report::Failure;

/// Longest text that is read.
const MAX_TEXT_BYTES: u64 = 1 << 30;

/// A model and its tokenizer.
pub(crate) struct Loaded {
    pub(crate) model: Model,
    pub(crate) tokenizer: Tokenizer,
}

impl Loaded {
    pub(crate) fn open(dir: &Path) -> Result<Self, Failure> {
        Ok(Self { model: open_model(dir)?, tokenizer: Tokenizer::open(dir)? })
    }

    /// Refuses ids that the model has no embedding for.
    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), Failure> {
        match ids.iter().max() {
            Some(&id) if id as usize >= self.model.vocab_size() => {
                Err(Failure::from(Error::Invalid(format!(
                    "the tokenizer gives token id {id}, but {} has a vocabulary of {}: do tokenizer.json and the weights \
                 belong together?",
                    self.model.checkpoint().root().display(),
                    self.model.vocab_size()
                ))))
            }
            _ => Ok(()),
        }
    }
}

/// A model without a tokenizer.
pub(crate) fn open_model(dir: &Path) -> Result<Model, Failure> {
    Ok(Model::open(Arc::new(Checkpoint::open(dir)?))?)
}

/// Runs a verb on `jobs` threads, all processors if none is given.
pub(crate) fn in_pool(jobs: Option<u16>, verb: impl FnOnce() -> Outcome + Send) -> Outcome {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(jobs.map_or(0, usize::from))
        .build()
        .map_err(|e| Failure::Usage(format!("--jobs: {e}")))?;
    pool.install(verb)
}

/// A text file.
pub(crate) fn read_text(path: &Path) -> Result<String, Failure> {
    let bytes = llmpress_formats::read_small_file(path, MAX_TEXT_BYTES)?;
    String::from_utf8(bytes).map_err(|e| {
        Error::corrupt(path, None, format!("is not UTF-8 at byte {}", e.utf8_error().valid_up_to())).into()
    })
}
