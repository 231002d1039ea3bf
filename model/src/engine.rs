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

    /// Empty sequences with room for `capacity` tokens each, that are read side by side. Each has the results that it has by itself.
    ///
    /// # Errors
    /// [`Error::Limit`] where there is not so much memory on the device.
    fn batch(&self, sequences: usize, capacity: usize) -> Result<Box<dyn Batch + '_>>;

    /// Sequences of so many tokens that are worth reading at once.
    fn suited_batch(&self, length: usize) -> usize;

    /// Whether sequences of different lengths may be read side by side: rotary embeddings of some models depend on the length.
    fn mixes_lengths(&self) -> bool {
        !self.config().ropes.iter().any(|rope| rope.depends_on_length())
    }

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

/// Sequences of an [`Engine`] side by side, each at its place.
pub trait Batch: Debug {
    /// Forgets the tokens of a sequence and keeps the memory.
    fn clear(&mut self, place: usize);

    /// Reads tokens after those read before, as many of each sequence at `places`: those of the first one first. The states of
    /// tokens `keep` of each stay, for [`Self::logits`] and [`Self::pick`].
    ///
    /// # Errors
    /// Those of [`Session::read`]; places that are not there, or twice.
    fn read(&mut self, places: &[usize], ids: &[u32], skips: &Skips, keep: Range<usize>) -> Result<()>;

    /// Reads a prompt into a sequence, and keeps the state of its last token.
    ///
    /// # Errors
    /// Those of [`Self::read`]; an empty prompt.
    fn prefill(&mut self, place: usize, ids: &[u32]) -> Result<()>;

    /// The logits of the kept tokens of sequence `number` of those that were read last, for a run of the vocabulary: run x tokens.
    ///
    /// # Errors
    /// No such sequence; weights that cannot be read.
    fn logits(&mut self, number: usize, run: Range<usize>, out: &mut Panels) -> Result<()>;

    /// The token after the last kept one of each sequence that was read last, each drawn with its own generator.
    ///
    /// # Errors
    /// Weights that cannot be read.
    fn pick(&mut self, sampling: Sampling, random: &mut [&mut ChaCha8Rng]) -> Result<Vec<u32>>;
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

    fn batch(&self, sequences: usize, capacity: usize) -> Result<Box<dyn Batch + '_>> {
        let caches = (0..sequences).map(|_| self.cache(capacity)).collect();
        Ok(Box::new(ModelBatch { model: self, caches, kept: Vec::new() }))
    }

    /// Products with the tokens of one sequence keep the processor busy.
    fn suited_batch(&self, _length: usize) -> usize {
        1
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

/// Some caches, in the order of `places`, which differ.
fn some_of<'c>(caches: &'c mut [Cache], places: &[usize]) -> Result<Vec<&'c mut Cache>> {
    let count = caches.len();
    let mut all: Vec<Option<&mut Cache>> = caches.iter_mut().map(Some).collect();
    let take =
        |place: &usize| all.get_mut(*place).and_then(Option::take).ok_or_else(|| no_sequence(*place, count));
    places.iter().map(take).collect()
}

/// What is asked of a sequence that is not there.
pub(crate) fn no_sequence(number: usize, count: usize) -> Error {
    Error::Invalid(format!("sequence {number} of {count}"))
}

/// Sequences on the processor.
#[derive(Debug)]
struct ModelBatch<'a> {
    model: &'a Model,
    caches: Vec<Cache>,
    /// Kept states of each sequence that was read last.
    kept: Vec<Panels>,
}

impl ModelBatch<'_> {
    fn cache(&mut self, place: usize) -> Result<&mut Cache> {
        let count = self.caches.len();
        self.caches.get_mut(place).ok_or_else(|| no_sequence(place, count))
    }
}

impl Batch for ModelBatch<'_> {
    fn clear(&mut self, place: usize) {
        if let Some(cache) = self.caches.get_mut(place) {
            cache.clear();
        }
    }

    fn read(&mut self, places: &[usize], ids: &[u32], skips: &Skips, keep: Range<usize>) -> Result<()> {
        let twice = |(i, place): (usize, &usize)| places[..i].contains(place);
        if places.is_empty()
            || !ids.len().is_multiple_of(places.len())
            || places.iter().enumerate().any(twice)
        {
            return Err(Error::Invalid(format!("{} tokens for the sequences {places:?}", ids.len())));
        }
        self.kept.clear();
        let model = self.model;
        if places.len() > 1 && ids.len() == places.len() && keep == (0..1) {
            let caches = some_of(&mut self.caches, places)?;
            self.kept = model.hidden_side_by_side(ids, caches, skips)?;
            return Ok(());
        }
        for (place, ids) in places.iter().zip(ids.chunks((ids.len() / places.len()).max(1))) {
            let all = model.hidden(ids, self.cache(*place)?, skips, &mut Unobserved)?;
            let mut kept = Panels::zeros(all.features(), keep.len());
            keep.clone().enumerate().for_each(|(to, from)| kept.set_token(to, all.token(from)));
            self.kept.push(kept);
        }
        Ok(())
    }

    fn prefill(&mut self, place: usize, ids: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::Invalid("the prompt has no tokens".to_owned()));
        }
        let cache = self.cache(place)?;
        cache.announce(cache.len() + ids.len());
        for piece in ids.chunks(PREFILL_TOKENS) {
            self.read(&[place], piece, &Skips::new(), piece.len() - 1..piece.len())?;
        }
        Ok(())
    }

    fn logits(&mut self, number: usize, run: Range<usize>, out: &mut Panels) -> Result<()> {
        let kept = self.kept.get(number).ok_or_else(|| no_sequence(number, self.kept.len()))?;
        self.model.logit_run(kept, run, out)
    }

    fn pick(&mut self, sampling: Sampling, random: &mut [&mut ChaCha8Rng]) -> Result<Vec<u32>> {
        let last = |kept: &Panels| -> Result<Panels> {
            let last = kept
                .tokens()
                .checked_sub(1)
                .ok_or_else(|| Error::Invalid("no token was kept to go on from".to_owned()))?;
            let mut state = Panels::zeros(kept.features(), 1);
            state.set_token(0, kept.token(last));
            Ok(state)
        };
        let states = self.kept.iter().map(last).collect::<Result<Vec<_>>>()?;
        let logits = self.model.logits_side_by_side(&states)?;
        Ok(logits.iter().zip(random).map(|(logits, random)| pick(logits.data(), sampling, random)).collect())
    }
}
