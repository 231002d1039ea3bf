//! Running a pass that trains: the crate `sparsify` computes, a stage keeps, also where it goes on (`steps.rs`).

use std::io::Read;
use std::sync::Arc;

use llmpress_formats::Checkpoint;
use llmpress_formats::encoding::PackedUnit;
use llmpress_formats::encoding::abq::Floats;
use llmpress_model::Model;
use llmpress_sparsify::ast::{self, Ast, Outcome, Record, Start, Text};

use super::blockwise;
use crate::blocks::{Blocks, Made};
use crate::progress::Watch;
use crate::steps::{Followed, State};
use crate::{Error, Result};

/// Evaluations of a run, beside that of its start.
const EVALUATIONS: u32 = 20;

/// What is to be trained.
pub(crate) struct Run<'a> {
    /// Before it was made 2:4.
    pub(crate) dense: Arc<Checkpoint>,
    /// As it begins.
    pub(crate) before: &'a Checkpoint,
    pub(crate) text: &'a Text,
    pub(crate) settings: Ast,
    /// Bytes of memory that the job may take.
    pub(crate) memory: Option<u64>,
}

/// Trains, from the state that is there, and keeps what comes of it.
pub(crate) fn run(job: &Run<'_>, blocks: &mut Blocks, watch: &dyn Watch) -> Result<()> {
    if job.settings.blockwise {
        return blockwise::run(job, blocks, watch);
    }
    if blocks.count() > 0 {
        return Ok(());
    }
    let model = Model::open(job.dense.clone())?;
    let starts = job.before.tensors().keys().map(|name| Start::read(job.before, name));
    let starts: Vec<Start> =
        starts.filter_map(|start| start.transpose()).collect::<llmpress_formats::Result<_>>()?;
    if starts.is_empty() {
        return Err(Error::Invalid(format!(
            "{}: nothing is 2:4 by then, so there is nothing to train",
            job.settings
        )));
    }
    let path = blocks.state();
    let mut state = State::open(&path)?;
    let records = state.as_mut().map(|state| std::mem::take(&mut state.records)).unwrap_or_default();
    let judge = job.text.held();
    let settings = job.settings;
    let mut kept = Followed::new(&path, ("train", settings.steps, settings.tokens() as u64), records, watch);
    let task = ast::Task {
        dense: &model,
        starts: &starts,
        text: job.text,
        settings: job.settings,
        judge: &judge,
        evaluate: job.settings.steps.div_ceil(EVALUATIONS),
    };
    let from = state.as_mut().map(|state| (&mut state.rest as &mut dyn Read, path.as_path()));
    let Some(outcome) = ast::train(task, from, &mut kept)? else { return Err(Followed::<Record>::stopped()) };
    let records = kept.records;
    blocks.write((&made(&model, outcome)?, &[]), &records, None)?;
    // Of no more use; what is left of it does no harm.
    let _ = std::fs::remove_file(&path);
    Ok(())
}

/// Finished tensors: matrices, and norms as they are.
fn made(model: &Model, outcome: Outcome) -> Result<Vec<Made>> {
    let mut made = Vec::new();
    for matrix in &outcome.matrices {
        made.push(Made { name: matrix.tensor.clone(), unit: matrix.unit()?, instead: None });
    }
    for norm in outcome.norms {
        let dtype = model.checkpoint().tensor(&norm.tensor)?.dtype;
        let unit = PackedUnit::Raw(Floats::round(dtype, &norm.values)?);
        made.push(Made { name: norm.tensor, unit, instead: None });
    }
    Ok(made)
}
