//! How fast models run: tokens a second of prefill and of decode.
//!
//! ```text
//! round 1: model, model, ..., peers | round 2: ... | medians
//! ```
//!
//! All take turns in every round, so that a drift of the machine's speed touches all alike.

use std::process::Command;
use std::time::Instant;

use llmpress_formats::{Error, Result};
use llmpress_model::{Engine, Sampling, Session, Skips};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

/// What is measured.
#[derive(Clone, Debug)]
pub struct SpeedOptions {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated after it, one at a time.
    pub new_tokens: usize,
    /// Rounds.
    pub runs: usize,
    /// Commands to run beside the models; they print a line of JSON with `prefill_tokens_per_s` and
    /// `decode_tokens_per_s`, and `peer` for a name.
    pub peers: Vec<String>,
}

/// Median and range of the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The median.
    pub median: f64,
    /// The slowest round.
    pub min: f64,
    /// The fastest round.
    pub max: f64,
}

impl Rate {
    pub(crate) fn of(mut rounds: Vec<f64>) -> Self {
        rounds.sort_by(f64::total_cmp);
        let at = |i: usize| rounds.get(i).copied().unwrap_or(0.0);
        let last = rounds.len().saturating_sub(1);
        Self { median: (at(last / 2) + at(last.div_ceil(2))) / 2.0, min: at(0), max: at(last) }
    }
}

/// The speed of a model or a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpeedRow {
    /// What ran.
    pub name: String,
    /// Tokens of the prompt a second: its length by the time to the first token.
    pub prefill_tokens_per_s: Rate,
    /// Tokens a second after the first one.
    pub decode_tokens_per_s: Rate,
    /// Seconds to the first token, the median.
    pub time_to_first_token_s: f64,
}

/// Measures models by name, and peers. Each model has one sequence, made beforehand; a first run of the whole prompt and some
/// tokens warms it up.
///
/// # Errors
/// Weights that cannot be read; a peer that fails.
pub fn speed(
    models: &[(String, &dyn Engine)],
    options: &SpeedOptions,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<SpeedRow>> {
    let mut rows: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    let mut record = |name: &str, round: (f64, f64)| match rows.iter_mut().find(|(n, _)| n == name) {
        Some((_, rounds)) => rounds.push(round),
        None => rows.push((name.to_owned(), vec![round])),
    };
    let capacity = options.prompt_tokens.saturating_add(options.new_tokens).saturating_add(1);
    let mut sessions = models
        .iter()
        .map(|(name, model)| Ok((name, *model, model.session(capacity)?)))
        .collect::<Result<Vec<_>>>()?;
    for (_, model, session) in &mut sessions {
        run(*model, &mut **session, options.prompt_tokens, options.new_tokens.min(WARMING_TOKENS))?;
    }
    for round in 1..=options.runs.max(1) {
        say(&format!("round {round} of {}", options.runs.max(1)));
        for (name, model, session) in &mut sessions {
            record(name, run(*model, &mut **session, options.prompt_tokens, options.new_tokens)?);
        }
        for command in &options.peers {
            let peer = run_peer(command, options)?;
            record(
                peer.peer.as_deref().unwrap_or(command),
                (peer.prefill_tokens_per_s, peer.decode_tokens_per_s),
            );
        }
    }
    Ok(rows
        .into_iter()
        .map(|(name, rounds)| {
            let (prefill, decode): (Vec<f64>, Vec<f64>) = rounds.into_iter().unzip();
            let prefill = Rate::of(prefill);
            SpeedRow {
                name,
                prefill_tokens_per_s: prefill,
                decode_tokens_per_s: Rate::of(decode),
                time_to_first_token_s: options.prompt_tokens as f64 / prefill.median,
            }
        })
        .collect())
}

/// Tokens after the prompt that warm up: a GPU tries kernels at the first, and records its launches at the second.
const WARMING_TOKENS: usize = 4;

/// One round: tokens a second of prefill and of decode.
fn run(
    model: &dyn Engine,
    session: &mut dyn Session,
    prompt_tokens: usize,
    new_tokens: usize,
) -> Result<(f64, f64)> {
    let vocab = model.vocab_size();
    let prompt: Vec<u32> = (0..prompt_tokens).map(|i| ((i * 7919 + 13) % vocab) as u32).collect();
    let mut random = ChaCha8Rng::seed_from_u64(0);
    session.clear();
    let start = Instant::now();
    session.prefill(&prompt)?;
    let mut id = session.pick(Sampling::GREEDY, &mut random)?;
    let first = start.elapsed().as_secs_f64();
    for _ in 0..new_tokens {
        session.read(&[id], &Skips::new(), 0..1)?;
        id = session.pick(Sampling::GREEDY, &mut random)?;
    }
    let later = start.elapsed().as_secs_f64() - first;
    Ok((prompt_tokens as f64 / first, new_tokens as f64 / later))
}

/// What a peer prints.
#[derive(Deserialize)]
struct Peer {
    peer: Option<String>,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
}

fn run_peer(command: &str, options: &SpeedOptions) -> Result<Peer> {
    let fail = |what: String| Error::Invalid(format!("--peer {command}: {what}"));
    let mut words = command.split_whitespace();
    let program = words.next().ok_or_else(|| fail("the command is empty".to_owned()))?;
    let output = Command::new(program)
        .args(words)
        .args(["--prompt-tokens", &options.prompt_tokens.to_string()])
        .args(["--new-tokens", &options.new_tokens.to_string()])
        .args(["--threads", &rayon::current_num_threads().to_string()])
        .output()
        .map_err(|e| fail(format!("cannot be run: {e}")))?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(fail(format!(
            "ended with {}: {}",
            output.status,
            error.lines().last().unwrap_or_default()
        )));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let line =
        text.lines().rfind(|l| l.starts_with('{')).ok_or_else(|| fail("printed no JSON".to_owned()))?;
    serde_json::from_str(line).map_err(|e| fail(e.to_string()))
}
