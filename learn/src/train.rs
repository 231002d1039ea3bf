//! The loop that trains a whole decoder: steps on windows in an order by chance, evaluations, states to go on from.
//!
//! ```text
//! evaluate --> step, step, ... --> evaluate --> ... --> evaluate        Watch is told of each, and says when a state is kept
//! ```

use std::io::{Read, Write};
use std::path::Path;

use llmpress_formats::Result;

use crate::{Order, Window};

/// What is trained.
pub trait Training {
    /// What is told of a step or of an evaluation.
    type Record;

    /// Steps that are done.
    fn steps(&self) -> u32;

    /// One step on some windows; none where training ends with it: there is nothing to go on with.
    ///
    /// # Errors
    /// Those of its pass.
    fn step(&mut self, windows: &[Window<'_>]) -> Result<Option<Self::Record>>;

    /// What is trained is measured on the windows that no step sees; none as of [`Self::step`].
    ///
    /// # Errors
    /// Those of its pass.
    fn evaluate(&mut self) -> Result<Option<Self::Record>>;

    /// Writes where it is. `path` is for errors.
    ///
    /// # Errors
    /// It cannot be written.
    fn save(&self, to: &mut dyn Write, path: &Path) -> Result<()>;

    /// Takes up what [`Self::save`] wrote; nothing of another run.
    ///
    /// # Errors
    /// What cannot be read, or is not what was written.
    fn load(&mut self, from: &mut dyn Read, path: &Path) -> Result<()>;
}

/// How long is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Steps.
    pub steps: u32,
    /// Windows of a step.
    pub batch: u32,
    /// Steps between evaluations; 0: at the start and the end alone.
    pub evaluate: u32,
}

/// Follows a run.
pub trait Watch<R> {
    /// The run goes on after so many steps: 0 where it begins.
    fn begin(&mut self, step: u32) {
        let _ = step;
    }

    /// A step or an evaluation is done.
    ///
    /// # Errors
    /// It cannot be told: the run ends.
    fn tell(&mut self, record: R) -> Result<()>;

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

/// Trains. `from` is a state that [`Watch::keep`] kept, with its path for errors; one of another run is not taken up. False where
/// the run was stopped.
///
/// # Errors
/// Those of the training; states that cannot be read; what `watch` says.
pub fn train<T: Training>(
    training: &mut T,
    order: &mut Order<'_>,
    Schedule { steps, batch, evaluate }: Schedule,
    from: Option<(&mut dyn Read, &Path)>,
    watch: &mut dyn Watch<T::Record>,
) -> Result<bool> {
    if let Some((from, path)) = from {
        training.load(from, path)?;
    }
    watch.begin(training.steps());
    if training.steps() == 0 {
        let Some(found) = training.evaluate()? else { return Ok(true) };
        watch.tell(found)?;
    }
    while training.steps() < steps {
        let first = u64::from(training.steps()) * u64::from(batch);
        let windows: Vec<_> = (first..first + u64::from(batch)).map(|number| order.get(number)).collect();
        let Some(stepped) = training.step(&windows)? else { return Ok(true) };
        watch.tell(stepped)?;
        let step = training.steps();
        let last = step == steps;
        if last || (evaluate > 0 && step.is_multiple_of(evaluate)) {
            let Some(found) = training.evaluate()? else { return Ok(true) };
            watch.tell(found)?;
        }
        let then = watch.then(step);
        if then != Then::Go {
            watch.keep(step, &mut |to, path| training.save(to, path))?;
        }
        if then == Then::Stop && !last {
            return Ok(false);
        }
    }
    Ok(true)
}
