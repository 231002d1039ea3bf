//! Measuring matrices one by one before a pass: how far it is, and what it takes.

use std::collections::BTreeMap;

use llmpress_calibrate::{Cut, MEASURED_WINDOWS};
use llmpress_formats::Checkpoint;

use crate::Result;
use crate::progress::{Counted, Progress, Task, Watch};

/// Tells how far the measuring is.
pub(crate) struct Measuring<'a> {
    watch: &'a dyn Watch,
    progress: Option<Box<dyn Progress + 'a>>,
}

impl<'a> Measuring<'a> {
    pub(crate) fn new(watch: &'a dyn Watch) -> Self {
        Self { watch, progress: None }
    }

    /// The weights whose matrices are to be measured.
    pub(crate) fn start(&mut self, weights: u64) {
        let progress = self.watch.begin(Task { verb: "measure", size: weights, counted: Counted::Weights });
        progress.start(weights);
        self.progress = Some(progress);
    }

    /// So many more are.
    pub(crate) fn step(&mut self, weights: u64) {
        if let Some(progress) = &self.progress {
            progress.advance(weights);
        }
    }
}

/// Multiplications that it takes to measure so many forms of matrices, each of which runs the layers from its own on. `weights`
/// are those of each of them; the head's are not counted.
pub(crate) fn products(weights: &BTreeMap<&str, u64>, forms: u64, cut: Cut) -> u128 {
    let tokens = (cut.windows.min(MEASURED_WINDOWS) as u128) * cut.length as u128;
    let all = weights.values().fold(0u128, |sum, &weights| sum + u128::from(weights));
    // Half of all layers on average.
    tokens * u128::from(forms) * weights.len() as u128 * all / 2
}

/// Bytes of the logits that distances are measured from, as far as they may take `most`.
pub(crate) fn logits_bytes(view: &Checkpoint, cut: Cut, most: u64) -> Result<u64> {
    let vocabulary =
        view.config().and_then(|c| c.get("vocab_size")).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let windows = cut.windows.min(MEASURED_WINDOWS) as u64;
    Ok(windows.saturating_mul(cut.length as u64).saturating_mul(vocabulary).saturating_mul(4).min(most))
}
