//! A run.

use std::io::Read;
use std::path::Path;

use llmpress_formats::{Error, Result};
use llmpress_learn::{Evaluated, Order, Schedule, Text, Watch, Window, train as run};
use llmpress_model::Model;

use super::Record;
use super::student::Outcome;
use super::trainer::Trainer;
use super::{Ast, Start};

/// What is to be trained.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// The dense model: the teacher, and where dropped weights come from.
    pub dense: &'a Model,
    /// Where each sparse matrix begins.
    pub starts: &'a [Start],
    /// The text.
    pub text: &'a Text,
    /// How.
    pub settings: Ast,
    /// The windows to judge by, which may be of another length: [`Text::held`], or those of another text.
    pub judge: &'a [Window<'a>],
    /// Steps between evaluations; 0: at the start and the end alone.
    pub evaluate: u32,
}

/// Refuses a model that is not trained as its checkpoint stores it.
///
/// # Errors
/// A turned residual stream, whose norms cannot be trained: they stand outside of the rotation.
pub fn check(model: &Model) -> Result<()> {
    if model.outlet().turn.is_none() {
        return Ok(());
    }
    Err(Error::Invalid(
        "the residual stream of this model is turned (R1), and a decoder is trained as its checkpoint stores it: undo the \
         rotation first"
            .to_owned(),
    ))
}

/// Trains. `from` is a state that [`Watch::keep`] kept, with its path for errors; one of another run is not taken up. None where
/// the run was stopped.
///
/// # Errors
/// Experts; a text that is too short; a loss that is NaN or infinite, with its step; states that cannot be read; what `watch` says.
pub fn train(
    task: Task<'_>,
    from: Option<(&mut dyn Read, &Path)>,
    watch: &mut dyn Watch<Record>,
) -> Result<Option<Outcome>> {
    let Task { dense, starts, text, settings, judge, evaluate } = task;
    if text.window() != settings.window as usize {
        return Err(Error::Invalid("the text is cut into other windows than is asked for".to_owned()));
    }
    let mut trainer = Trainer::new(dense, starts, settings, (judge, key(&task)))?;
    let mut order = Order::new(text.seen(), u64::from(settings.seed));
    let schedule = Schedule { steps: settings.steps, batch: settings.batch, evaluate };
    match run(&mut trainer, &mut order, schedule, from, watch)? {
        true => trainer.student.finish().map(Some),
        false => Ok(None),
    }
}

/// What training left, on some windows: as stored, beside the dense model.
///
/// # Errors
/// What is not of that model; weights that cannot be read.
pub fn measure(dense: &Model, outcome: &Outcome, windows: &[Window<'_>]) -> Result<Evaluated> {
    let mut trainer = Trainer::new(dense, &outcome.matrices, Ast::default(), (windows, [0; 32]))?;
    trainer.student.take_norms(&outcome.norms)?;
    trainer.measure()
}

/// Of what run a state is.
fn key(task: &Task<'_>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{:?} {}", task.settings, task.text.digest()).as_bytes());
    for start in task.starts {
        hasher.update(format!("\n{} {:?} {}\n", start.tensor, start.dtype, start.sparse.cols()).as_bytes());
        hasher.update(start.sparse.masks());
        let sums = start.sums.iter().flatten();
        start.sparse.values().iter().chain(sums).for_each(|x| {
            hasher.update(&x.to_le_bytes());
        });
    }
    *hasher.finalize().as_bytes()
}
