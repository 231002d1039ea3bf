//! Log-probabilities of the scored tokens of a window, the vocabulary run by run.

use std::ops::Range;

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu;
use llmpress_model::{Batch, Engine, Panels, Skips};
use rayon::prelude::*;

use crate::windows::Window;

/// A model at work on windows: its sequences and buffers.
pub(crate) struct Reader<'a> {
    skips: &'a Skips,
    sequences: Box<dyn Batch + 'a>,
    /// Windows that are read at once.
    batch: usize,
    logits: Panels,
}

impl<'a> Reader<'a> {
    /// Room for windows of `length` tokens: `wanted` at once, or as many as suit the engine and its memory holds, of `windows`.
    pub(crate) fn new(
        engine: &'a dyn Engine,
        skips: &'a Skips,
        length: usize,
        windows: usize,
        wanted: Option<usize>,
    ) -> Result<Self> {
        let mut batch = wanted.unwrap_or_else(|| engine.suited_batch(length)).clamp(1, windows.max(1));
        let sequences = loop {
            match engine.batch(batch, length) {
                Err(Error::Limit(_)) if wanted.is_none() && batch > 1 => batch /= 2,
                made => break made?,
            }
        };
        Ok(Self { skips, sequences, batch, logits: Panels::default() })
    }

    /// Windows that are read at once.
    pub(crate) fn batch(&self) -> usize {
        self.batch
    }

    /// Runs windows whose scored tokens lie alike. Afterwards the kept states are those from which these are predicted.
    pub(crate) fn read(&mut self, windows: &[Window]) -> Result<()> {
        let Some(first) = windows.first() else { return Ok(()) };
        let places: Vec<usize> = (0..windows.len()).collect();
        places.iter().for_each(|place| self.sequences.clear(*place));
        let ids: Vec<u32> = windows.iter().flat_map(|window| window.ids.iter().copied()).collect();
        self.sequences.read(&places, &ids, self.skips, first.scored.start - 1..first.scored.end - 1)
    }

    /// The logits of a run of the vocabulary, of one of the windows that were read.
    pub(crate) fn logits(&mut self, window: usize, run: Range<usize>) -> Result<&Panels> {
        self.sequences.logits(window, run, &mut self.logits)?;
        Ok(&self.logits)
    }
}

/// What is known of a model's predictions after some runs of the vocabulary, token by token.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    pub(crate) max: Vec<f32>,
    pub(crate) sum: Vec<f64>,
    /// The logit of the token that came.
    pub(crate) target: Vec<f32>,
    /// The most likely token.
    pub(crate) top: Vec<u32>,
}

impl Tally {
    pub(crate) fn new(tokens: usize) -> Self {
        Self {
            max: vec![f32::NEG_INFINITY; tokens],
            sum: vec![0.0; tokens],
            target: vec![f32::NAN; tokens],
            top: vec![0; tokens],
        }
    }

    /// Takes up a run of logits; `targets` are the tokens that came.
    pub(crate) fn take(&mut self, run: Range<usize>, logits: &Panels, targets: &[u32]) {
        self.note(run, logits, targets);
        self.parts().enumerate().par_bridge().for_each(|(panel, (max, sum))| {
            cpu::log_sum_exp(logits.panel(panel), logits.width(panel), max, sum);
        });
    }

    /// Takes up a run of logits and of those of another model, whose weighted differences go to `weighted`.
    pub(crate) fn take_against(
        &mut self,
        run: Range<usize>,
        logits: &Panels,
        other: &Panels,
        targets: &[u32],
        weighted: &mut [f64],
    ) {
        self.note(run, logits, targets);
        let weighted = weighted.chunks_mut(cpu::PANEL);
        self.parts().zip(weighted).enumerate().par_bridge().for_each(|(panel, ((max, sum), weighted))| {
            let width = logits.width(panel);
            cpu::divergence(logits.panel(panel), other.panel(panel), width, max, sum, weighted);
        });
    }

    fn parts(&mut self) -> impl Iterator<Item = (&mut [f32], &mut [f64])> {
        self.max.chunks_mut(cpu::PANEL).zip(self.sum.chunks_mut(cpu::PANEL))
    }

    /// Notes the targets' logits and the largest ones, of equals the first. To be called before the maxima
    /// are raised.
    fn note(&mut self, run: Range<usize>, logits: &Panels, targets: &[u32]) {
        for (token, target) in targets.iter().enumerate() {
            if run.contains(&(*target as usize)) {
                self.target[token] = logits.get(*target as usize - run.start, token);
            }
        }
        let parts = self.max.chunks(cpu::PANEL).zip(self.top.chunks_mut(cpu::PANEL));
        parts.enumerate().par_bridge().for_each(|(panel, (max, top))| {
            let mut best = max.to_vec();
            for (row, logits) in logits.panel(panel).chunks_exact(best.len()).enumerate() {
                for ((logit, best), top) in logits.iter().zip(&mut best).zip(&mut *top) {
                    if logit > best {
                        (*best, *top) = (*logit, (run.start + row) as u32);
                    }
                }
            }
        });
    }

    /// The logarithm of the sum of all exponentials, in nats.
    pub(crate) fn log_sum_exp(&self, token: usize) -> f64 {
        f64::from(self.max[token]) + self.sum[token].ln()
    }

    /// The negative log-probability of the token that came, in nats.
    pub(crate) fn nll(&self, token: usize) -> f64 {
        self.log_sum_exp(token) - f64::from(self.target[token])
    }
}

/// Mean and standard error of a sample, added up in F64.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mean {
    count: usize,
    sum: f64,
    squares: f64,
}

impl Mean {
    pub(crate) fn add(&mut self, x: f64) {
        self.count += 1;
        self.sum += x;
        self.squares += x * x;
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    pub(crate) fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    /// Of the mean, as if the sample's values were independent.
    pub(crate) fn standard_error(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        let n = self.count as f64;
        let variance = (self.squares / n - self.mean().powi(2)).max(0.0);
        (variance / (n - 1.0)).sqrt()
    }
}
