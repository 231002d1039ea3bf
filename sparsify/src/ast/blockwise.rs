//! Training one sub-layer at a time, for models that do not fit: the same update, decay and masks, against what the dense model's
//! sub-layer gives out.
//!
//! ```text
//! now: streams of the model as it is trained so far      original: the dense model's
//! a sub-layer: sum (now + y - original after it)^2 --> derivatives --> W, S; every n steps: M        norms stay
//! ```
//!
//! The memory is that of one sub-layer and of the streams, which may lie in a file.

use std::path::Path;

use llmpress_calibrate::{Calibration, Residuals, Room};
use llmpress_formats::{Error, Result};
use llmpress_learn::{Net, Rate, Settings, Variable, reconstruct};
use llmpress_model::{Model, SubLayer};

use super::matrix::Matrix;
use super::optimiser::Update;
use super::vector::squares;
use super::{Ast, Start};
use crate::masked::Still;
use crate::report::{Lesson, Part, Reconstructed};

/// What is to be trained a sub-layer at a time.
pub struct BlockwiseTask<'a> {
    /// The dense model.
    pub dense: &'a Model,
    /// Where a matrix begins; none where it stays dense.
    pub start: &'a dyn Fn(&str) -> Result<Option<Start>>,
    /// The windows of the text, of which one in sixteen is held back to judge by.
    pub windows: &'a Calibration,
    /// Where streams may lie.
    pub room: &'a Room,
    /// How. Steps are of each sub-layer.
    pub settings: Ast,
}

impl BlockwiseTask<'_> {
    /// Streams of both models, as [`Residuals::save`] wrote them.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn residuals(&self, from: &mut dyn std::io::Read, path: &Path) -> Result<Residuals> {
        Residuals::load(self.dense, self.windows, (self.room, STREAMS), from, path)
    }
}

/// The root mean square of weights whose rate is the one that is asked for; of others it is as much more or less.
const USUAL: f32 = 0.05;
/// Streams that are there at a time.
const STREAMS: u64 = 2;

/// Takes what is finished.
pub trait BlockwiseSink {
    /// A step of a sub-layer is done.
    fn step(&mut self);

    /// A sub-layer was trained.
    fn learned(&mut self, lesson: Lesson);

    /// The matrices of a block are finished. With `residuals` the run goes on from here.
    ///
    /// # Errors
    /// They cannot be kept: the run ends.
    fn block(&mut self, block: usize, matrices: Vec<Start>, residuals: &mut Residuals) -> Result<()>;
}

/// Trains block after block, after those that are finished.
///
/// # Errors
/// A family with parts that have no derivatives; a text that is too short; weights or streams that cannot be read; what `sink` says.
pub fn train_blockwise(
    task: &BlockwiseTask<'_>,
    (done, residuals): (usize, Option<Residuals>),
    sink: &mut dyn BlockwiseSink,
) -> Result<()> {
    task.settings.check()?;
    llmpress_learn::check(task.dense)?;
    let layers = task.dense.config().layers.len();
    let mut residuals = match residuals {
        Some(residuals) if done > 0 => residuals,
        None if done > 0 => {
            return Err(Error::Invalid(format!("no streams to go on with after {done} finished blocks")));
        }
        _ => Residuals::embed(task.dense, task.windows, task.room, STREAMS)?,
    };
    let mut student = task.dense.twin()?;
    for layer in done..layers {
        let mut matrices = Vec::new();
        for input in student.inputs_of(layer) {
            for tensor in input.tensors {
                if let Some(start) = (task.start)(&tensor)? {
                    student.replace(&tensor, start.product())?;
                    matrices.push(start);
                }
            }
        }
        for site in [SubLayer::Attention(layer), SubLayer::Mlp(layer)] {
            if student.parts(site).is_none() {
                continue;
            }
            let Residuals { now, original: Some(original) } = &mut residuals else {
                return Err(Error::Invalid("the dense model's streams are missing".to_owned()));
            };
            original.advance(task.dense, site, &mut || ())?;
            // Experts, whose tokens depend on what is learned, have no net: they stay as they began.
            if let Some(net) = Net::new(&student, site) {
                let mut variables = net
                    .tensors()
                    .iter()
                    .map(|tensor| match matrices.iter().find(|start| start.tensor == *tensor) {
                        Some(start) => {
                            let dense = task.dense.weights(tensor)?;
                            let matrix = Matrix::new(start, dense, task.settings.slorb)?;
                            let squares = squares(&matrix.dense);
                            let decay = task.settings.lambda(squares);
                            let mean = (squares / matrix.dense.len().max(1) as f64).sqrt() as f32;
                            let settings = Ast { rate: task.settings.rate * mean / USUAL, ..task.settings };
                            let trained = Adaptive { matrix, settings, decay, step: 0 };
                            Ok(Either::Trained(Box::new(trained)))
                        }
                        None => Ok(Either::Still(Still(student.weights(tensor)?))),
                    })
                    .collect::<Result<Vec<_>>>()?;
                if variables.iter().any(|variable| matches!(variable, Either::Trained(_))) {
                    let mut all: Vec<&mut dyn Variable> =
                        variables.iter_mut().map(Either::variable).collect();
                    let (part, _) = Part::of(site);
                    let at = 2 * layer as u64 + u64::from(part == Part::Mlp);
                    let settings = Settings {
                        steps: task.settings.steps,
                        batch: task.settings.batch as usize,
                        seed: u64::from(task.settings.seed)
                            .wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                        rate: 1.0,
                    };
                    let outcome =
                        reconstruct(&net, &mut all, (now, original), settings, &mut || sink.step())?;
                    let mut tensors = Vec::new();
                    for variable in variables {
                        let Either::Trained(trained) = variable else { continue };
                        tensors.push(trained.matrix.tensor.clone());
                        let Some(start) = matrices.iter_mut().find(|s| s.tensor == trained.matrix.tensor)
                        else {
                            continue;
                        };
                        if outcome.is_better() {
                            *start = trained.matrix.finish()?;
                            student.replace(&start.tensor, start.product())?;
                        }
                    }
                    let reconstructed = Reconstructed::of(outcome);
                    sink.learned(Lesson { layer, what: part, tensors, steps: settings.steps, reconstructed });
                }
            }
            now.advance(&student, site, &mut || ())?;
        }
        for start in &matrices {
            student.restore(&start.tensor)?;
        }
        sink.block(layer, matrices, &mut residuals)?;
    }
    Ok(())
}

/// A matrix that is trained by itself.
struct Adaptive {
    matrix: Matrix,
    settings: Ast,
    /// The greatest decay.
    decay: f32,
    step: u32,
}

impl Variable for Adaptive {
    fn weights(&self) -> &[f32] {
        &self.matrix.seen
    }

    fn step(&mut self, gradient: &[f32], _rate: &Rate) {
        // The loss is a share of what is to be reached: derivatives of any size, of which the decay is one.
        let norm = self.matrix.squares(gradient).sqrt();
        let share = if norm > 0.0 { (1.0 / norm) as f32 } else { 1.0 };
        self.matrix.step(gradient, Update::at(self.step, &self.settings, self.decay, share));
        self.step += 1;
        if self.settings.every > 0 && self.step.is_multiple_of(self.settings.every) {
            self.matrix.choose();
        }
        self.matrix.see();
    }
}

/// A matrix of a sub-layer.
enum Either {
    Trained(Box<Adaptive>),
    Still(Still),
}

impl Either {
    fn variable(&mut self) -> &mut dyn Variable {
        match self {
            Self::Trained(matrix) => matrix.as_mut(),
            Self::Still(still) => still,
        }
    }
}
