//! Generation for several prompts at once: each token of all of them is one step.
//!
//! ```text
//! waiting prompts --> a free place: prefill --> [ step of all that run --> a token each ] --> finished, its place is free
//! ```

use llmpress_formats::{Error, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::{Engine, Generation, Sampling, Skips};

/// What came after a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// The tokens, the one that ended it included.
    pub tokens: Vec<u32>,
    /// Whether one of `ends` ended it; else it has as many tokens as were asked for.
    pub ended: bool,
}

/// A prompt that runs.
struct Running {
    prompt: usize,
    place: usize,
    last: u32,
    random: ChaCha8Rng,
}

/// Prompts that run at a time where nobody says how many.
const SUITED: usize = 16;

/// Up to `most` tokens after each prompt, up to one of `ends`: the tokens that each has by itself, in the order of the prompts.
/// `batch` prompts run at a time, or as many as there is memory for, at most 16; one where rotary embeddings depend on the length.
/// `told` is told the number of each prompt that is finished.
///
/// # Errors
/// Those of [`Generation`]; a batch of no prompts; not so much memory.
pub fn generate_all(
    engine: &dyn Engine,
    prompts: &[Vec<u32>],
    most: usize,
    sampling: Sampling,
    ends: &[u32],
    batch: Option<usize>,
    told: &mut dyn FnMut(usize),
) -> Result<Vec<Finished>> {
    if batch == Some(0) {
        return Err(Error::Invalid("a batch of no prompts".to_owned()));
    }
    sampling.check()?;
    let mut finished = vec![Finished { tokens: Vec::new(), ended: false }; prompts.len()];
    let mut size = batch.unwrap_or(SUITED).min(prompts.len());
    if most == 0 || prompts.is_empty() {
        return Ok(finished);
    }
    if size == 1 || !engine.mixes_lengths() {
        for (prompt, (ids, finished)) in prompts.iter().zip(&mut finished).enumerate() {
            let mut generation = Generation::start(engine, ids, most, sampling)?;
            while finished.tokens.len() < most && !finished.ended {
                let id = generation.next_token()?;
                finished.tokens.push(id);
                finished.ended = ends.contains(&id);
            }
            told(prompt);
        }
        return Ok(finished);
    }
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut sequences = loop {
        match engine.batch(size, longest.saturating_add(most)) {
            Err(Error::Limit(_)) if batch.is_none() && size > 1 => size /= 2,
            made => break made?,
        }
    };
    let mut waiting = prompts.iter().enumerate();
    let mut free: Vec<usize> = (0..size).rev().collect();
    let mut running: Vec<Running> = Vec::new();
    // Whether a prompt is finished with one more token.
    let mut take = |prompt: usize, id: u32| {
        let of = &mut finished[prompt];
        of.tokens.push(id);
        of.ended = ends.contains(&id);
        let done = of.ended || of.tokens.len() == most;
        if done {
            told(prompt);
        }
        done
    };
    loop {
        while let Some(&place) = free.last() {
            let Some((prompt, ids)) = waiting.next() else { break };
            sequences.clear(place);
            sequences.prefill(place, ids)?;
            let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
            let picked = sequences.pick(sampling, &mut [&mut random])?;
            for last in picked {
                if !take(prompt, last) {
                    free.pop();
                    running.push(Running { prompt, place, last, random: random.clone() });
                }
            }
        }
        if running.is_empty() {
            return Ok(finished);
        }
        let places: Vec<usize> = running.iter().map(|one| one.place).collect();
        let ids: Vec<u32> = running.iter().map(|one| one.last).collect();
        sequences.read(&places, &ids, &Skips::new(), 0..1)?;
        let mut random: Vec<&mut ChaCha8Rng> = running.iter_mut().map(|one| &mut one.random).collect();
        let picked = sequences.pick(sampling, &mut random)?;
        running.iter_mut().zip(picked).for_each(|(one, id)| one.last = id);
        running.retain(|one| {
            let done = take(one.prompt, one.last);
            if done {
                free.push(one.place);
            }
            !done
        });
    }
}
