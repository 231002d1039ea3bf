//! What runs a decoder, on the processor or on a GPU, behind one face.
//!
//! ```text
//! Engine (weights) --> Session (keys and values of one sequence): read tokens --> logits, or a picked token
//! ```

use std::fmt::Debug;
use std::ops::Range;

use llmpress_formats::{Checkpoint, Error, Result};
use rand_chacha::ChaCha8Rng;

use crate::generate::pick;
use crate::{Cache, Model, ModelConfig, Panels, Sampling, Skips, Unobserved};

/// Tokens that [`Session::prefill`] reads at a time.
const PREFILL_TOKENS: usize = 480;
/// Logits of a run of [`Engine::logit_runs`].
const RUN_LOGITS: usize = 4 << 20;

/// A decoder that can run.
pub trait Engine: Debug + Sync {
    /// The checkpoint behind it.
    fn checkpoint(&self) -> &Checkpoint;

    /// The configuration.
    fn config(&self) -> &ModelConfig;

    /// Entries of the vocabulary.
    fn vocab_size(&self) -> usize;

    /// Bytes of weights that are decoded for every token: what [`Model::load`] would save.
    fn decoded_bytes(&self) -> u64 {
        0
    }

    /// An empty sequence with room for `capacity` tokens.
    ///
    /// # Errors
    /// Not so much memory on the device.
    fn session(&self, capacity: usize) -> Result<Box<dyn Session + '_>>;

    /// Runs of the vocabulary that keep the logits of `tokens` tokens small.
    fn logit_runs(&self, tokens: usize) -> Vec<Range<usize>> {
        let vocab = self.vocab_size();
        // Whole strips of 16 rows, so that fixed12 heads are read in place.
        let step = (RUN_LOGITS / tokens.max(1)).next_multiple_of(16).max(16);
        (0..vocab).step_by(step).map(move |first| first..(first + step).min(vocab)).collect()
    }
}

/// One sequence of an [`Engine`].
pub trait Session: Debug {
    /// Tokens read so far.
    fn len(&self) -> usize;

    /// Whether none was read.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all tokens and keeps the memory.
    fn clear(&mut self);

    /// Says that a sequence of at least `length` tokens is to come: rotary embeddings that depend on the length
    /// are those of the whole then, in however many pieces it is read.
    fn announce(&mut self, length: usize);

    /// Reads tokens after those read before, without `skips`. The states of tokens `keep` of them stay, for
    /// [`Self::logits`] and [`Self::pick`].
    ///
    /// # Errors
    /// An id beyond the vocabulary; more tokens than there is room for; weights that cannot be read.
    fn read(&mut self, ids: &[u32], skips: &Skips, keep: Range<usize>) -> Result<()>;

    /// The logits of the kept tokens for a run of the vocabulary: run x tokens.
    ///
    /// # Errors
    /// Weights that cannot be read.
    fn logits(&mut self, run: Range<usize>, out: &mut Panels) -> Result<()>;

    /// The token after the last kept one.
    ///
    /// # Errors
    /// Weights that cannot be read.
    fn pick(&mut self, sampling: Sampling, random: &mut ChaCha8Rng) -> Result<u32>;

    /// Reads a prompt, some tokens at a time, and keeps the state of the last.
    ///
    /// # Errors
    /// Those of [`Self::read`]; an empty prompt.
    fn prefill(&mut self, ids: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::Invalid("the prompt has no tokens".to_owned()));
        }
        self.announce(self.len() + ids.len());
        for piece in ids.chunks(PREFILL_TOKENS) {
            self.read(piece, &Skips::new(), piece.len() - 1..piece.len())?;
        }
        Ok(())
    }
}

impl Engine for Model {
    fn checkpoint(&self) -> &Checkpoint {
        self.checkpoint()
    }

    fn config(&self) -> &ModelConfig {
        self.config()
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size()
    }

    fn decoded_bytes(&self) -> u64 {
        self.decoded_bytes()
    }

    fn session(&self, capacity: usize) -> Result<Box<dyn Session + '_>> {
        Ok(Box::new(ModelSession { model: self, cache: self.cache(capacity), kept: Panels::default() }))
    }
}

/// A sequence on the processor.
#[derive(Debug)]
struct ModelSession<'a> {
    model: &'a Model,
    cache: Cache,
    kept: Panels,
}

impl Session for ModelSession<'_> {
    fn len(&self) -> usize {
        self.cache.len()
    }

    fn clear(&mut self) {
        self.cache.clear();
    }

    fn announce(&mut self, length: usize) {
        self.cache.announce(length);
    }

    fn read(&mut self, ids: &[u32], skips: &Skips, keep: Range<usize>) -> Result<()> {
        let all = self.model.hidden(ids, &mut self.cache, skips, &mut Unobserved)?;
        if keep == (0..ids.len()) {
            self.kept = all;
            return Ok(());
        }
        self.kept.resize(all.features(), keep.len());
        for (to, from) in keep.enumerate() {
            self.kept.set_token(to, all.token(from));
        }
        Ok(())
    }

    fn logits(&mut self, run: Range<usize>, out: &mut Panels) -> Result<()> {
        self.model.logit_run(&self.kept, run, out)
    }

    fn pick(&mut self, sampling: Sampling, random: &mut ChaCha8Rng) -> Result<u32> {
        let mut logits = Panels::default();
        let last = self.kept.tokens().saturating_sub(1);
        if last > 0 {
            let mut state = Panels::zeros(self.kept.features(), 1);
            state.set_token(0, self.kept.token(last));
            self.kept = state;
        }
        self.logits(0..self.model.vocab_size(), &mut logits)?;
        Ok(pick(logits.data(), sampling, random))
    }
}
