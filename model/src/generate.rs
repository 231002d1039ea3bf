//! Generation: token after token, the likeliest or drawn by chance.
//!
//! ```text
//! prompt --> prefill --> [ logits --> pick a token --> one more step ] ...
//! ```

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::{self, Limits};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::{Engine, Session, Skips};

/// How the next token is picked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token always.
    pub temperature: f32,
    /// Only the so many likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that reach this share of the probability together.
    pub top_p: f32,
    /// Of the generator: the same seed gives the same text.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

    /// Refuses what is out of range.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { temperature, top_p, .. } = *self;
        if !((0.0..=100.0).contains(&temperature) && top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::Invalid(format!(
                "temperature {temperature} must be 0 to 100, and top-p {top_p} above 0 and at most 1"
            )));
        }
        Ok(())
    }

    /// Which tokens may be drawn, where the temperature is not 0.
    pub(crate) fn limits(&self) -> Limits {
        Limits { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p }
    }
}

/// A sequence that grows token by token.
#[derive(Debug)]
pub struct Generation<'a> {
    engine: &'a dyn Engine,
    session: Box<dyn Session + 'a>,
    sampling: Sampling,
    random: ChaCha8Rng,
    ids: Vec<u32>,
    pending: bool,
}

impl<'a> Generation<'a> {
    /// Reads the prompt, with room for `most` tokens after it.
    ///
    /// # Errors
    /// An empty prompt, ids beyond the vocabulary, a sampling out of range, weights that cannot be read.
    pub fn start(engine: &'a dyn Engine, prompt: &[u32], most: usize, sampling: Sampling) -> Result<Self> {
        sampling.check()?;
        let mut session = engine.session(prompt.len().saturating_add(most))?;
        session.prefill(prompt)?;
        let random = ChaCha8Rng::seed_from_u64(sampling.seed);
        Ok(Self { engine, session, sampling, random, ids: prompt.to_vec(), pending: false })
    }

    /// The next token. The step that reads it is left for the next call, so the last one costs nothing.
    ///
    /// # Errors
    /// More tokens than there is room for; weights that cannot be read.
    pub fn next_token(&mut self) -> Result<u32> {
        if let (true, Some(id)) = (self.pending, self.ids.last()) {
            let length = self.session.len();
            if self.engine.config().ropes.iter().any(|rope| rope.switches_after() == Some(length)) {
                // From here on all frequencies are others: keys of before do not fit them.
                self.session.clear();
                self.session.prefill(&self.ids)?;
            } else {
                self.session.read(&[*id], &Skips::new(), 0..1)?;
            }
        }
        let id = self.session.pick(self.sampling, &mut self.random)?;
        self.ids.push(id);
        self.pending = true;
        Ok(id)
    }
}

/// `count` greedy tokens after a prompt.
///
/// # Errors
/// Those of [`Generation`].
pub fn greedy(engine: &dyn Engine, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
    let mut generation = Generation::start(engine, prompt, count, Sampling::GREEDY)?;
    (0..count).map(|_| generation.next_token()).collect()
}

/// The next token by its logits.
pub(crate) fn pick(logits: &[f32], sampling: Sampling, random: &mut ChaCha8Rng) -> u32 {
    if sampling.temperature == 0.0 {
        let best = (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a });
        return best.unwrap_or(0) as u32;
    }
    cpu::draw(logits, sampling.limits(), random.next_u64())
}
