//! The loop.

use std::io::{Read, Write};
use std::path::Path;

use llmpress_formats::{Error, Result};
use llmpress_model::Model;

use super::record::{Evaluated, Record, Stepped};
use super::student::Outcome;
use super::text::{Order, Text, Window};
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

/// Follows a run.
pub trait Watch {
    /// The run goes on after so many steps: 0 where it begins.
    fn begin(&mut self, step: u32) {
        let _ = step;
    }

    /// A step or an evaluation is done.
    ///
    /// # Errors
    /// It cannot be told: the run ends.
    fn tell(&mut self, record: Record) -> Result<()>;

    /// A step is done. What is returned says whether a state is to be written, by [`Self::keep`], and whether the run is to end
    /// there.
    fn then(&mut self, step: u32) -> Then {
        let _ = step;
        Then::Go
    }

    /// Keeps a state: `write` writes it.
    ///
    /// # Errors
    /// It cannot be kept: the run ends.
    fn keep(&mut self, step: u32, write: &mut dyn FnMut(&mut dyn Write, &Path) -> Result<()>) -> Result<()> {
        let _ = (step, write);
        Ok(())
    }
}

/// What follows a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The next one.
    Go,
    /// A state, then the next one.
    Keep,
    /// A state, and nothing more.
    Stop,
}

/// Trains. `from` is a state that [`Watch::keep`] kept, with its path for errors; one of another run is not taken up. None where
/// the run was stopped.
///
/// # Errors
/// Experts; a text that is too short; a loss that is NaN or infinite, with its step; states that cannot be read; what `watch` says.
pub fn train(
    task: Task<'_>,
    from: Option<(&mut dyn Read, &Path)>,
    watch: &mut dyn Watch,
) -> Result<Option<Outcome>> {
    let Task { dense, starts, text, settings, judge, evaluate } = task;
    if text.window() != settings.window as usize {
        return Err(Error::Invalid("the text is cut into other windows than is asked for".to_owned()));
    }
    let mut trainer = Trainer::new(dense, starts, settings)?;
    let key = key(&task);
    if let Some((from, path)) = from {
        trainer.load(&key, from, path)?;
    }
    watch.begin(trainer.step);
    let mut order = Order::new(text, u64::from(settings.seed));
    if trainer.step == 0 {
        watch.tell(Record::Evaluated(trainer.evaluate(judge)?))?;
    }
    while trainer.step < settings.steps {
        let first = u64::from(trainer.step) * u64::from(settings.batch);
        let windows: Vec<_> = (first..first + u64::from(settings.batch)).map(|n| order.get(n)).collect();
        let stepped: Stepped = trainer.step(&windows)?;
        watch.tell(Record::Stepped(stepped))?;
        let last = trainer.step == settings.steps;
        if last || (evaluate > 0 && trainer.step.is_multiple_of(evaluate)) {
            let found: Evaluated = trainer.evaluate(judge)?;
            watch.tell(Record::Evaluated(found))?;
        }
        let then = watch.then(trainer.step);
        if then != Then::Go {
            let step = trainer.step;
            watch.keep(step, &mut |to, path| trainer.save(&key, to, path))?;
        }
        if then == Then::Stop && !last {
            return Ok(None);
        }
    }
    trainer.student.finish().map(Some)
}

/// What training left, on some windows: as stored, beside the dense model.
///
/// # Errors
/// What is not of that model; weights that cannot be read.
pub fn measure(dense: &Model, outcome: &Outcome, windows: &[Window<'_>]) -> Result<Evaluated> {
    let mut trainer = Trainer::new(dense, &outcome.matrices, Ast::default())?;
    trainer.student.take_norms(&outcome.norms)?;
    trainer.evaluate(windows)
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
