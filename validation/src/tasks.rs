//! Questions with answers: which of several endings a model finds likeliest, and whether it would have said a given one.
//!
//! ```text
//! question --> requests: context + ending, as tokens    all requests, those alike together --> log-likelihood of each ending
//! choices:  accuracy, by the sum and by the sum a character      cloze: accuracy of greedy words, perplexity of the ending
//! ```
//!
//! Accuracies and their standard errors are those that lm-evaluation-harness calls acc, acc_norm and their stderr.

mod compare;
mod question;
mod report;

use llmpress_formats::{Error, Result};
use llmpress_model::{Engine, Skips, Tokenizer};

use crate::likelihood::{Reader, Tally};
use crate::windows::Window;

pub use compare::{Flips, TaskFlips, flips};
pub use question::Question;
pub use report::{ChoiceReport, ClozeReport, Share, TaskReport, task_report};

/// What a model makes of a question.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The log-probability of each ending after its context, in nats: of each choice, or of the target.
    pub log_likelihoods: Vec<f64>,
    /// Whether every token of the ending was the likeliest, for each ending.
    pub greedy: Vec<bool>,
    /// Whether a context was cut at its beginning to fit the model.
    pub cut: bool,
}

/// An ending after its context, as tokens.
struct Request {
    question: usize,
    ending: usize,
    window: Window,
}

/// Asks a model without `skips`: one after the other, those of the same lengths `batch` at a time, or as many as suit the
/// model and its memory; what comes out does not depend on it. `bos` stands before every context, and `progress` is told how
/// many endings are done.
///
/// A context and its ending are encoded together, and the tokens beyond those of the context alone are scored, as
/// lm-evaluation-harness does it. Of what is longer than the model was made for, the beginning is left out.
///
/// # Errors
/// A context of no token where there is no BOS; ids beyond the vocabulary; weights that cannot be read; no memory for so many.
pub fn score(
    engine: &dyn Engine,
    skips: &Skips,
    tokenizer: &Tokenizer,
    bos: Option<u32>,
    questions: &[Question],
    batch: Option<usize>,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Scored>> {
    let most = engine.config().max_positions;
    let mut scored: Vec<Scored> = Vec::with_capacity(questions.len());
    let mut requests = Vec::new();
    for (question, asked) in questions.iter().enumerate() {
        let endings = asked.endings();
        let mut cut = false;
        for (ending, (context, rest)) in endings.iter().enumerate() {
            let (window, shorter) = window(tokenizer, bos, most, context, rest)
                .map_err(|e| Error::Invalid(format!("question {}: {e}", question + 1)))?;
            cut |= shorter;
            requests.push(Request { question, ending, window });
        }
        let none = endings.len();
        scored.push(Scored { log_likelihoods: vec![0.0; none], greedy: vec![false; none], cut });
    }
    if let Some(id) =
        requests.iter().flat_map(|r| &r.window.ids).find(|id| **id as usize >= engine.vocab_size())
    {
        return Err(Error::Invalid(format!(
            "the tokenizer gives token id {id}, but {} has a vocabulary of {}: do tokenizer.json and the weights belong together?",
            engine.checkpoint().root().display(),
            engine.vocab_size()
        )));
    }
    // Those alike stand together; the longest come first, so that too little memory shows at once.
    requests.sort_by_key(|r| (std::cmp::Reverse(r.window.ids.len()), r.window.scored.start));
    let longest = requests.first().map_or(0, |request| request.window.ids.len());
    if requests.is_empty() {
        return Ok(scored);
    }
    let mut reader = Reader::new(engine, skips, longest, requests.len(), batch)?;
    let mut done = 0;
    for alike in requests
        .chunk_by(|a, b| (a.window.ids.len(), &a.window.scored) == (b.window.ids.len(), &b.window.scored))
    {
        for some in alike.chunks(reader.batch()) {
            let windows: Vec<Window> = some.iter().map(|request| request.window.clone()).collect();
            reader.read(&windows)?;
            for (number, request) in some.iter().enumerate() {
                let targets = &request.window.ids[request.window.scored.clone()];
                let mut tally = Tally::new(targets.len());
                for run in engine.logit_runs(targets.len()) {
                    tally.take(run.clone(), reader.logits(number, run)?, targets);
                }
                let of = &mut scored[request.question];
                of.log_likelihoods[request.ending] = -(0..targets.len()).map(|t| tally.nll(t)).sum::<f64>();
                of.greedy[request.ending] = tally.top == targets;
                done += 1;
                progress(done);
            }
        }
    }
    Ok(scored)
}

/// The tokens of a context and its ending, of which the ending's are scored, and whether the beginning was left out.
fn window(
    tokenizer: &Tokenizer,
    bos: Option<u32>,
    most: Option<usize>,
    context: &str,
    ending: &str,
) -> Result<(Window, bool)> {
    let before = if context.is_empty() { Vec::new() } else { tokenizer.encode(context)? };
    let whole = tokenizer.encode(&format!("{context}{ending}"))?;
    // Where context and ending share a token, it is the ending's.
    let first = before.len().min(whole.len().saturating_sub(1));
    let scored = &whole[first..];
    let mut ids: Vec<u32> = before[..first].iter().chain(scored).copied().collect();
    let room = most.map_or(usize::MAX, |most| most.saturating_sub(usize::from(bos.is_some())));
    let cut = ids.len() > room;
    if cut {
        // A token before those that are scored stays.
        let kept = room.max(scored.len() + 1).min(ids.len());
        ids.drain(..ids.len() - kept);
    }
    ids.splice(0..0, bos);
    let start = ids.len() - scored.len();
    if scored.is_empty() || start == 0 {
        return Err(Error::Invalid(
            "nothing stands before the ending: give a context, or a model whose tokenizer adds a BOS"
                .to_owned(),
        ));
    }
    let scored = start..ids.len();
    Ok((Window { ids, scored }, cut))
}
