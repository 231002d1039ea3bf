//! Perplexity of a model on a text.

use llmpress_formats::Result;
use llmpress_model::{Engine, Skips};
use serde::Serialize;

use crate::likelihood::{Mean, Reader, Tally};
use crate::windows::Protocol;

/// The perplexity of a model on a text, and how it was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// How the text was cut.
    #[serde(flatten)]
    pub protocol: Protocol,
    /// Windows read.
    pub windows: usize,
    /// Tokens scored.
    pub scored_tokens: usize,
    /// `e` to the mean negative log-probability.
    pub perplexity: f64,
    /// Its standard error: that of the mean times the perplexity, as if tokens were independent.
    pub perplexity_standard_error: f64,
    /// The mean negative log-probability.
    pub nats_per_token: f64,
    /// Its standard error.
    pub nats_per_token_standard_error: f64,
    /// Bits a byte of text, by the text's mean number of bytes a token.
    pub bits_per_byte: f64,
}

/// Measures the perplexity of `model` without `skips` on the tokens of a text of `text_bytes` bytes. `progress`
/// is told the number of windows done.
///
/// The mean is over all scored tokens, in F64. `batch` windows are read at once, or as many as suit the model and its memory; the
/// result is the same to the bit.
///
/// # Errors
/// A protocol that does not fit the text; weights that cannot be read; no memory for so many windows.
pub fn perplexity(
    model: &dyn Engine,
    skips: &Skips,
    ids: &[u32],
    text_bytes: usize,
    protocol: Protocol,
    batch: Option<usize>,
    progress: &mut dyn FnMut(usize),
) -> Result<Perplexity> {
    let windows = protocol.windows(ids.len())?;
    let mut reader = Reader::new(model, skips, protocol.length(), windows, batch)?;
    let mut nll = Mean::default();
    let mut done = 0;
    while done < windows {
        let alike = protocol.alike(ids, done, windows, reader.batch());
        reader.read(&alike)?;
        for (number, window) in alike.iter().enumerate() {
            let targets = &window.ids[window.scored.clone()];
            let mut tally = Tally::new(targets.len());
            for run in model.logit_runs(targets.len()) {
                tally.take(run.clone(), reader.logits(number, run)?, targets);
            }
            (0..targets.len()).for_each(|token| nll.add(tally.nll(token)));
            done += 1;
            progress(done);
        }
    }
    let perplexity = nll.mean().exp();
    Ok(Perplexity {
        protocol,
        windows,
        scored_tokens: nll.count(),
        perplexity,
        perplexity_standard_error: perplexity * nll.standard_error(),
        nats_per_token: nll.mean(),
        nats_per_token_standard_error: nll.standard_error(),
        bits_per_byte: nll.mean() / std::f64::consts::LN_2 * ids.len() as f64 / text_bytes.max(1) as f64,
    })
}
