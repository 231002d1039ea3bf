//! Ranking the sub-layers of a checkpoint, for whoever looks before pruning.

use std::path::Path;
use std::sync::Arc;

use llmpress_formats::Checkpoint;
use llmpress_model::Model;
use llmpress_prune::{Pass, Ranking};

use crate::Result;
use crate::chain::{CalibrationText, calibration};
use crate::convert::pool;
use crate::progress::Watch;

/// Where a search is saved after each of its choices, and whether it goes on from there.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// The file.
    pub path: &'a Path,
    /// Go on from what it holds, if it is there.
    pub resume: bool,
}

/// Ranks the sub-layers of a checkpoint on so many threads, one per processor if nobody says.
pub fn rank(
    dir: &Path,
    pass: &Pass,
    text: &CalibrationText,
    jobs: Option<usize>,
    saved: Option<Saved<'_>>,
    watch: &dyn Watch,
) -> Result<Ranking> {
    pool(jobs.unwrap_or(0))?.install(|| {
        let model = Model::open(Arc::new(Checkpoint::open_dequantised(dir)?))?;
        let calibration = calibration(&model, pass, text)?;
        let found = match &saved {
            Some(saved) if saved.resume && saved.path.exists() => Some(Ranking::read(saved.path)?),
            _ => None,
        };
        crate::chain::rank(&model, pass, calibration.as_ref(), found, watch, &mut |ranking| {
            saved.as_ref().map_or(Ok(()), |saved| ranking.write(saved.path))
        })
    })
}
