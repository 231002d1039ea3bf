//! Running a pass that trains a sub-layer at a time: block by block, as all passes that finish units so.

use std::path::Path;

use llmpress_calibrate::{Residuals, Room, Shares};
use llmpress_model::Model;
use llmpress_sparsify::Lesson;
use llmpress_sparsify::ast::{BlockwiseSink, BlockwiseTask, Start, train_blockwise};

use super::run::Run;
use crate::blocks::{Blocks, Made, Save};
use crate::progress::{Counted, Progress, Task, Watch};
use crate::sparsify::{Line, MEMORY};
use crate::{Error, Result};

/// Trains what is left after the finished blocks.
pub(super) fn run(job: &Run<'_>, blocks: &mut Blocks, watch: &dyn Watch) -> Result<()> {
    let model = Model::open(job.dense.clone())?;
    let layers = model.config().layers.len();
    if blocks.count() >= layers {
        return Ok(());
    }
    let settings = job.settings;
    let most = (settings.steps as usize).saturating_mul(settings.batch as usize);
    // One in so many is held back.
    let most = most.saturating_add(most / (llmpress_learn::HELD_BACK - 1) + 1).max(llmpress_learn::HELD_BACK);
    let windows = job.text.calibration(most, u64::from(settings.seed))?;
    if windows.windows().len() < llmpress_learn::HELD_BACK {
        return Err(Error::Invalid(format!(
            "{settings}: the text has {} windows, of which one in {} is held back to judge by: give a longer text, or shorter \
             windows (window=)",
            windows.windows().len(),
            llmpress_learn::HELD_BACK
        )));
    }
    let memory = job.memory.map_or(MEMORY, |all| (all / 4).min(MEMORY));
    let room = Room { memory, file: blocks.scratch() };
    let start = |tensor: &str| Start::read(job.before, tensor);
    let task = BlockwiseTask { dense: &model, start: &start, windows: &windows, room: &room, settings };
    let residuals = blocks.streams(|from, path| task.residuals(from, path))?;
    let steps = u64::from(settings.steps).saturating_mul(model.sub_layers().len() as u64);
    let size = steps.saturating_mul(u64::from(settings.batch));
    let progress = watch.begin(Task { verb: "train", size, counted: Counted::Windows });
    progress.start(layers as u64 * PARTS);
    progress.resumed(blocks.count() as u64 * PARTS);
    let done = blocks.count();
    let mut sink = Kept {
        blocks,
        layers,
        lines: Vec::new(),
        progress,
        steps: u64::from(settings.steps),
        shares: Shares::new(PARTS, 2 * u64::from(settings.steps)),
        given: 0,
    };
    Ok(train_blockwise(&task, (done, residuals), &mut sink)?)
}

/// In how many parts the progress of a block is told.
const PARTS: u64 = 1 << 20;

struct Kept<'a> {
    blocks: &'a mut Blocks,
    layers: usize,
    lines: Vec<Line>,
    progress: Box<dyn Progress + 'a>,
    /// Of a sub-layer.
    steps: u64,
    shares: Shares,
    /// Of the block in work.
    given: u64,
}

impl BlockwiseSink for Kept<'_> {
    fn step(&mut self) {
        let now = self.shares.take();
        self.given += now;
        self.progress.advance(now);
    }

    fn learned(&mut self, lesson: Lesson) {
        self.lines.push(Line::Lesson(lesson));
    }

    fn block(
        &mut self,
        block: usize,
        matrices: Vec<Start>,
        residuals: &mut Residuals,
    ) -> llmpress_formats::Result<()> {
        let made = |start: Start| Ok(Made { unit: start.unit()?, name: start.tensor, instead: None });
        let made = matrices.into_iter().map(made).collect::<llmpress_formats::Result<Vec<_>>>()?;
        let lines = std::mem::take(&mut self.lines);
        let mut save = |to: &mut dyn std::io::Write, path: &Path| residuals.save(to, path);
        let save = (block + 1 < self.layers).then_some(&mut save as Save<'_>);
        self.blocks.write((&made, &[]), &lines, save)?;
        self.progress.advance(PARTS.saturating_sub(self.given));
        (self.given, self.shares) = (0, Shares::new(PARTS, 2 * self.steps));
        Ok(())
    }
}
