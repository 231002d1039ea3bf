//! Running a quantising pass: the crate `quantize` computes, a stage keeps. Without a text and transformations no model is
//! opened.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Room};
use llmpress_formats::Checkpoint;
use llmpress_model::Model;
use llmpress_quantize::{
    FinishedBlock, Job, Lesson, Measured, Report, Residuals, Sink, Spec, State, Transformations,
    assign_widths,
};

use super::targets::Assigned;
use super::{data_free, whole};
use crate::Result;
use crate::blocks::{Blocks, Made, Save, WIDTHS_FILE};
use crate::measuring::Measuring;
use crate::progress::{Counted, Progress, Task, Watch};

/// Memory for streams, and for Hessians, where nobody says how much there is.
pub(super) const MEMORY: u64 = 1 << 30;

/// What is to be quantised, how, and by what.
pub(crate) struct Pass<'a> {
    pub(crate) specs: &'a BTreeMap<String, Spec>,
    /// Those of them whose widths are assigned.
    pub(crate) assigned: Option<&'a Assigned>,
    /// What the model gets before.
    pub(crate) with: Transformations,
    pub(crate) calibration: Option<&'a Calibration>,
    /// Bytes of memory that the job may take.
    pub(crate) memory: Option<u64>,
    /// What is to be quantised, once more.
    pub(crate) again: &'a dyn Fn() -> Result<Checkpoint>,
}

/// Does what is left of a pass after the finished blocks.
pub(crate) fn run(
    before: Arc<Checkpoint>,
    pass: &Pass<'_>,
    blocks: &mut Blocks,
    watch: &dyn Watch,
) -> Result<()> {
    if pass.calibration.is_none() && pass.with.is_empty() && pass.assigned.is_none() {
        return data_free::run(&before, pass.specs, blocks, watch);
    }
    let mut opened = Model::open(before.clone())?;
    let model = &mut opened;
    let memory = pass.memory.map_or(MEMORY, |all| (all / 4).min(MEMORY));
    let room = Room { memory, file: blocks.scratch() };
    let mut specs = pass.specs.clone();
    if let (Some(assigned), Some(calibration)) = (pass.assigned, pass.calibration) {
        let free: BTreeMap<String, Spec> =
            pass.specs.clone().into_iter().filter(|(n, _)| assigned.tensors.contains(n)).collect();
        let widths: BTreeMap<String, u8> = blocks.settled(WIDTHS_FILE, || {
            let mut watched = Measuring::new(watch);
            let specs = assign_widths(model, &free, assigned.mean, calibration, &room, &mut watched)?;
            Ok(specs.into_iter().map(|(name, spec)| (name, spec.abq.bits)).collect())
        })?;
        for (name, bits) in widths {
            if let Some(spec) = specs.get_mut(&name) {
                spec.abq.bits = bits;
            }
        }
    }
    blocks.transform(|| pass.with.of(model, pass.calibration))?;
    let transforms = blocks.transforms().to_vec();
    let job = Job {
        specs: &specs,
        transforms: &transforms,
        calibration: pass.calibration,
        room: &room,
        hessians: memory,
    };
    let residuals = blocks.streams(|from, path| job.residuals(model, from, path))?;
    let state = State { blocks: blocks.count(), residuals: residuals.flatten() };
    let layers = model.config().layers.len();
    let mut kept = Kept { blocks, watch, progress: None, layers, lessons: Vec::new() };
    llmpress_quantize::run(model, job, state, &mut kept)?;
    let linears: BTreeSet<String> =
        (0..layers).flat_map(|layer| model.inputs_of(layer)).flat_map(|input| input.tensors).collect();
    // A block a layer, and one for what is in none.
    let finished = layers + usize::from(specs.keys().any(|tensor| !linears.contains(tensor)));
    drop(kept);
    drop(opened);
    match pass.calibration {
        Some(calibration) if whole::is_wanted(&specs) && blocks.count() == finished => {
            whole::run((before, (pass.again)()?), (&specs, calibration), blocks, watch)
        }
        _ => Ok(()),
    }
}

impl Measured for Measuring<'_> {
    fn start(&mut self, weights: u64) {
        self.start(weights);
    }

    fn step(&mut self, weights: u64) {
        self.step(weights);
    }
}

/// Keeps what is finished, and tells how far the pass is.
struct Kept<'a> {
    blocks: &'a mut Blocks,
    watch: &'a dyn Watch,
    progress: Option<Box<dyn Progress + 'a>>,
    layers: usize,
    /// Of the block in work.
    lessons: Vec<Lesson>,
}

impl Sink for Kept<'_> {
    fn start(&mut self, weights: u64, work: u64, finished: u64) {
        let progress = self.watch.begin(Task { verb: "quantise", size: weights, counted: Counted::Weights });
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
        if let Some(progress) = &self.progress {
            progress.learned(lesson, self.layers);
        }
    }

    fn block(
        &mut self,
        block: usize,
        finished: FinishedBlock,
        residuals: Option<&mut Residuals>,
    ) -> llmpress_formats::Result<()> {
        if block != self.blocks.count() {
            return Err(llmpress_formats::Error::Invalid(format!(
                "block {block} was finished after {} blocks",
                self.blocks.count()
            )));
        }
        let made: Vec<Made> = finished
            .tensors
            .into_iter()
            .map(|done| Made { name: done.tensor, unit: done.unit, instead: instead(&done.report) })
            .collect();
        let mut save = residuals.map(|r| move |to: &mut dyn std::io::Write, path: &Path| r.save(to, path));
        let save = save.as_mut().map(|save| save as Save<'_>);
        self.blocks.write((&made, &finished.transforms), &std::mem::take(&mut self.lessons), save)
    }
}

/// Why a tensor was not quantised as it was asked for.
fn instead(report: &Report) -> Option<String> {
    let instead = report.instead.as_ref().map(|why| format!("by {} instead: {why}", report.rung));
    instead.or_else(|| report.unlearned.as_ref().map(|why| format!("as {} left it: {why}", report.rung)))
}
