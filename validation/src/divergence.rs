//! Kullback-Leibler divergence of a model from its base on a text.
//!
//! ```text
//! base  --> logits of a run of the vocabulary --+
//!                                               +--> KL(base || model), same top token, change of p
//! model --> logits of the same run -------------+        no logits are kept
//! ```

use llmpress_formats::{Error, Result};
use llmpress_model::{Engine, Skips};
use serde::Serialize;

use crate::likelihood::{Mean, Reader, Tally};
use crate::windows::{Protocol, Window};

/// How a sample is distributed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Distribution {
    /// The mean.
    pub mean: f64,
    /// Its standard error, as if tokens were independent.
    pub standard_error: f64,
    /// The smallest value.
    pub min: f64,
    /// The median.
    pub median: f64,
    /// Nine tenths are at most this.
    pub p90: f64,
    /// 99 % are at most this.
    pub p99: f64,
    /// 99.9 % are at most this.
    pub p999: f64,
    /// The largest value.
    pub max: f64,
}

impl Distribution {
    fn of(mut sample: Vec<f64>) -> Self {
        let mut mean = Mean::default();
        sample.iter().for_each(|x| mean.add(*x));
        sample.sort_by(f64::total_cmp);
        // Between the neighbours of the exact rank, linearly.
        let quantile = |q: f64| {
            let rank = q * sample.len().saturating_sub(1) as f64;
            let (below, above) = (rank.floor() as usize, rank.ceil() as usize);
            match (sample.get(below), sample.get(above)) {
                (Some(a), Some(b)) => a + (b - a) * rank.fract(),
                _ => 0.0,
            }
        };
        Self {
            mean: mean.mean(),
            standard_error: mean.standard_error(),
            min: quantile(0.0),
            median: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: quantile(1.0),
        }
    }
}

/// How far a model is from its base on a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// How the text was cut.
    #[serde(flatten)]
    pub protocol: Protocol,
    /// Windows read.
    pub windows: usize,
    /// Tokens scored.
    pub scored_tokens: usize,
    /// KL(base || model) of each token's distribution, nats.
    pub kl: Distribution,
    /// Share of tokens whose most likely successor is the same, 0 to 1.
    pub same_top: f64,
    /// Its standard error.
    pub same_top_standard_error: f64,
    /// Change of the probability of the token that came, model minus base, -1 to 1.
    pub delta_p: Distribution,
    /// Root mean square of that change.
    pub delta_p_rms: f64,
    /// Perplexity of the model.
    pub perplexity: f64,
    /// Perplexity of the base.
    pub base_perplexity: f64,
    /// Mean of `ln p(base) - ln p(model)` of the tokens that came: the logarithm of the perplexities' ratio.
    pub ln_perplexity_ratio: f64,
    /// Its standard error.
    pub ln_perplexity_ratio_standard_error: f64,
}

/// Measures KL(base || model). The models must share a vocabulary. `batch` windows are read at once, or as many as suit the models
/// and their memory; the result is the same to the bit. `progress` is told the windows done.
///
/// # Errors
/// Vocabularies of different sizes; a protocol that does not fit the text; weights that cannot be read; no memory for so many
/// windows.
pub fn kl_divergence(
    base: &dyn Engine,
    model: &dyn Engine,
    skips: &Skips,
    ids: &[u32],
    protocol: Protocol,
    batch: Option<usize>,
    progress: &mut dyn FnMut(usize),
) -> Result<Divergence> {
    same_vocabulary(base, model)?;
    let windows = protocol.windows(ids.len())?;
    let none = Skips::new();
    let mut p_reader = Reader::new(base, &none, protocol.length(), windows, batch)?;
    let mut q_reader = Reader::new(model, skips, protocol.length(), windows, batch)?;
    let batch = p_reader.batch().min(q_reader.batch());
    let (mut kl, mut delta_p) = (Vec::new(), Vec::new());
    let (mut same, mut p_nll, mut q_nll) = (Mean::default(), Mean::default(), Mean::default());
    let (mut ratio, mut squares) = (Mean::default(), Mean::default());
    // Windows that are read, and the number of the first.
    let (mut alike, mut first): (Vec<Window>, usize) = (Vec::new(), 0);
    for index in 0..windows {
        if alike.is_empty() {
            alike = protocol.alike(ids, index, windows, batch);
            p_reader.read(&alike)?;
            q_reader.read(&alike)?;
            first = index;
        }
        let number = index - first;
        let targets = &alike[number].ids[alike[number].scored.clone()];
        let (mut p, mut q) = (Tally::new(targets.len()), Tally::new(targets.len()));
        let mut weighted = vec![0.0; targets.len()];
        for run in base.logit_runs(targets.len()) {
            let (p_logits, q_logits) =
                (p_reader.logits(number, run.clone())?, q_reader.logits(number, run.clone())?);
            p.take_against(run.clone(), p_logits, q_logits, targets, &mut weighted);
            q.take(run, q_logits, targets);
        }
        for (token, weighted) in weighted.iter().enumerate() {
            let change = (-q.nll(token)).exp() - (-p.nll(token)).exp();
            // Rounding can leave a tiny negative value where the distributions all but agree.
            kl.push((weighted / p.sum[token] - (p.log_sum_exp(token) - q.log_sum_exp(token))).max(0.0));
            delta_p.push(change);
            squares.add(change * change);
            same.add(f64::from(u8::from(p.top[token] == q.top[token])));
            p_nll.add(p.nll(token));
            q_nll.add(q.nll(token));
            ratio.add(q.nll(token) - p.nll(token));
        }
        progress(index + 1);
        if number + 1 == alike.len() {
            alike.clear();
        }
    }
    Ok(Divergence {
        protocol,
        windows,
        scored_tokens: kl.len(),
        kl: Distribution::of(kl),
        same_top: same.mean(),
        same_top_standard_error: same.standard_error(),
        delta_p: Distribution::of(delta_p),
        delta_p_rms: squares.mean().sqrt(),
        perplexity: q_nll.mean().exp(),
        base_perplexity: p_nll.mean().exp(),
        ln_perplexity_ratio: ratio.mean(),
        ln_perplexity_ratio_standard_error: ratio.standard_error(),
    })
}

/// Refuses models whose logits cannot be compared.
pub(crate) fn same_vocabulary(a: &dyn Engine, b: &dyn Engine) -> Result<()> {
    if a.vocab_size() == b.vocab_size() {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{} has a vocabulary of {} and {} one of {}: their predictions cannot be compared",
        a.checkpoint().root().display(),
        a.vocab_size(),
        b.checkpoint().root().display(),
        b.vocab_size()
    )))
}
