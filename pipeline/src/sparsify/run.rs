//! Running a pass that makes matrices 2:4: the crate `sparsify` computes, a stage keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Room};
use llmpress_formats::{Checkpoint, Error as FormatError};
use llmpress_model::{Model, folded};
use llmpress_sparsify::{
    Finished, FinishedBlock, Job, Lesson, Permuted, Report, Residuals, Sink, Sparsifier, State, permutations,
};

use super::partly::{Becomes, Choices, Line as Settled};
use super::record::Line;
use crate::Result;
use crate::blocks::{Blocks, FORMS_FILE, Made, Save};
use crate::measuring::Measuring;
use crate::progress::{Counted, Progress, Task, Watch};

/// Memory for streams, and for Hessians, where nobody says how much there is.
pub(crate) const MEMORY: u64 = 1 << 30;

/// What is to be made 2:4, how, and by what.
pub(crate) struct Pass<'a> {
    pub(crate) tensors: &'a BTreeSet<String>,
    pub(crate) how: Sparsifier,
    /// What is to be settled first, tensor by tensor.
    pub(crate) choices: Option<&'a Choices>,
    pub(crate) calibration: Option<&'a Calibration>,
    /// Bytes of memory that the job may take.
    pub(crate) memory: Option<u64>,
}

/// Does what is left of a pass after the finished blocks. Returns what was settled, tensor by tensor.
pub(crate) fn run(
    before: Arc<Checkpoint>,
    pass: &Pass<'_>,
    blocks: &mut Blocks,
    watch: &dyn Watch,
) -> Result<Vec<Settled>> {
    let before = if pass.how.permute { permuted(before, pass, blocks, watch)? } else { before };
    let model = &mut Model::open(before)?;
    let memory = pass.memory.map_or(MEMORY, |all| (all / 4).min(MEMORY));
    let room = Room { memory, file: blocks.scratch() };
    let settled = match (pass.choices, pass.calibration) {
        (Some(choices), Some(calibration)) => {
            blocks.settled(FORMS_FILE, || choices.settle(model, calibration, &room, Measuring::new(watch)))?
        }
        _ => Vec::new(),
    };
    let mut hows: BTreeMap<String, Sparsifier> =
        pass.tensors.iter().map(|name| (name.clone(), pass.how)).collect();
    for line in settled.iter().filter(|line| matches!(line.becomes, Becomes::Dense | Becomes::Quantised)) {
        hows.remove(&line.tensor);
    }
    // What only the choice goes by is of no concern to what is made of a matrix.
    let calibration = pass.calibration.filter(|_| pass.how.finds_by_text());
    let job = Job { hows: &hows, calibration, room: &room, hessians: memory };
    let residuals = blocks.streams(|from, path| job.residuals(model, from, path))?;
    let state = State { blocks: blocks.count(), residuals: residuals.flatten() };
    let mut kept = Kept { blocks, watch, progress: None, lessons: Vec::new() };
    llmpress_sparsify::run(model, job, state, &mut kept)?;
    Ok(settled)
}

/// What is to be made 2:4, channels in the order that was found for them.
fn permuted(
    before: Arc<Checkpoint>,
    pass: &Pass<'_>,
    blocks: &mut Blocks,
    watch: &dyn Watch,
) -> Result<Arc<Checkpoint>> {
    let hows = pass.tensors.iter().map(|name| (name.clone(), pass.how)).collect();
    blocks.transform(|| {
        let model = Model::open(before.clone())?;
        permutations(&model, &hows, pass.calibration, &mut Ordering { watch, progress: None })
    })?;
    let root = before.root().to_owned();
    let before = Arc::try_unwrap(before).map_err(|_| {
        FormatError::Invalid(format!("{}: is in use, and cannot be seen otherwise", root.display()))
    })?;
    Ok(Arc::new(folded(before, blocks.transforms().to_vec())?))
}

/// Tells how far the search for an order is.
struct Ordering<'a> {
    watch: &'a dyn Watch,
    progress: Option<Box<dyn Progress + 'a>>,
}

impl Permuted for Ordering<'_> {
    fn start(&mut self, weights: u64) {
        let progress = self.watch.begin(Task { verb: "permute", size: weights, counted: Counted::Weights });
        progress.start(weights);
        self.progress = Some(progress);
    }

    fn step(&mut self, weights: u64) {
        if let Some(progress) = &self.progress {
            progress.advance(weights);
        }
    }
}

/// Keeps what is finished, and tells how far the pass is.
struct Kept<'a> {
    blocks: &'a mut Blocks,
    watch: &'a dyn Watch,
    progress: Option<Box<dyn Progress + 'a>>,
    /// Of the block in work.
    lessons: Vec<Lesson>,
}

impl Sink for Kept<'_> {
    fn start(&mut self, weights: u64, work: u64, finished: u64) {
        let progress = self.watch.begin(Task { verb: "sparsify", size: weights, counted: Counted::Weights });
        progress.start(work);
        progress.advance(finished);
        self.progress = Some(progress);
    }

    fn step(&mut self, work: u64) {
        if let Some(progress) = &self.progress {
            progress.advance(work);
        }
    }

    fn learned(&mut self, lesson: &Lesson) {
        self.lessons.push(lesson.clone());
    }

    fn block(
        &mut self,
        block: usize,
        finished: FinishedBlock,
        residuals: Option<&mut Residuals>,
    ) -> llmpress_formats::Result<()> {
        if block != self.blocks.count() {
            return Err(FormatError::Invalid(format!(
                "block {block} was finished after {} blocks",
                self.blocks.count()
            )));
        }
        let made = finished.tensors.into_iter().map(made).collect::<llmpress_formats::Result<Vec<_>>>()?;
        let lessons = std::mem::take(&mut self.lessons).into_iter().map(Line::Lesson);
        let lines: Vec<Line> = lessons.chain(finished.dense.into_iter().map(Line::Dense)).collect();
        let mut save = residuals.map(|r| move |to: &mut dyn std::io::Write, path: &Path| r.save(to, path));
        let save = save.as_mut().map(|save| save as Save<'_>);
        self.blocks.write((&made, &[]), &lines, save)
    }
}

/// A finished tensor as it is stored.
fn made(done: Finished) -> llmpress_formats::Result<Made> {
    let unit = done.unit()?;
    Ok(Made { name: done.tensor, unit, instead: instead(&done.report) })
}

/// Why a tensor was not made 2:4 as it was asked for.
fn instead(report: &Report) -> Option<String> {
    let instead = report.instead.as_ref().map(|why| format!("by {} instead: {why}", report.rule));
    instead.or_else(|| report.unlearned.as_ref().map(|why| format!("as {} left it: {why}", report.rule)))
}
