//! A step, an evaluation, and a state.
//!
//! ```text
//! "ABQ1" ...   loss at the start f64, mean of losses f64, pace f32 | best: loss f64, its step u32, codes, grids | places, grids, means
//! ```
//!
//! A model with massive activations may break all at once, at rates that were right for many steps before: error feedback left next to no error
//! along what such a token multiplies, and steps of signs wear that away. Then it goes back to the best state, and on at half the pace.

use std::io::{Read, Write};
use std::path::Path;

use llmpress_formats::{Error, Result};
use llmpress_learn::{
    Decoder, Distiller, Evaluated, Loss, Rate, StateHead, Training, Window, read_state, write_state,
};

use super::record::{Record, Stepped};
use super::student::Matrices;
use super::{WholeTask, task::Settings};
use crate::latent::Snapshot;

const MAGIC: &[u8; 4] = b"ABQ1";
/// To what norm derivatives are clipped.
const CLIP: f64 = 1.0;
/// A loss of so many times the mean of those before is of a model that broke.
const BROKEN: f64 = 2.0;
/// How much of that mean a step's loss is.
const SHARE: f64 = 0.2;

/// The best state so far, which may be the start.
pub(super) struct Best {
    pub(super) step: u32,
    pub(super) loss: f64,
    pub(super) snapshots: Vec<Snapshot>,
}

/// A model that is learned.
pub(super) struct Trainer<'a> {
    settings: Settings,
    distiller: Distiller<'a>,
    pub(super) matrices: Matrices,
    held: Vec<Window<'a>>,
    key: [u8; 32],
    step: u32,
    /// The loss at the start, on windows that no step sees.
    pub(super) before: f64,
    pub(super) best: Option<Best>,
    /// The mean of the losses of steps; NaN before the first.
    level: f64,
    /// By what rates are multiplied.
    pace: f32,
    /// The step whose loss was no number: 0, that of the start.
    pub(super) failed: Option<u32>,
}

impl<'a> Trainer<'a> {
    pub(super) fn new(
        task: &WholeTask<'a>,
        settings: Settings,
        (held, key): (Vec<Window<'a>>, [u8; 32]),
    ) -> Result<Self> {
        let decoder = Decoder::new(task.start)?;
        let matrices = Matrices::new(task, &decoder)?;
        Ok(Self {
            settings,
            distiller: Distiller::new((task.dense, task.start), decoder)?.without_norms(),
            matrices,
            held,
            key,
            step: 0,
            before: f64::NAN,
            best: None,
            level: f64::NAN,
            pace: 1.0,
            failed: None,
        })
    }
}

/// What a loss came to; none where what is to be quantised on the way was NaN or infinite, which says nothing, too.
fn sound(loss: Result<Loss>) -> Result<Option<Loss>> {
    match loss {
        Ok(loss) => Ok(Some(loss)),
        Err(Error::Invalid(_)) => Ok(None),
        Err(e) => Err(e),
    }
}

impl Training for Trainer<'_> {
    type Record = Record;

    fn steps(&self) -> u32 {
        self.step
    }

    fn step(&mut self, windows: &[Window<'_>]) -> Result<Option<Record>> {
        let (number, kd) = (self.step + 1, self.settings.kd);
        let loss = sound(self.distiller.add(&self.matrices, windows, kd))?;
        let norm = self.matrices.norm(self.distiller.gradients());
        let Some(loss) = loss.filter(|loss| loss.mean(kd).is_finite() && norm.is_finite()) else {
            self.failed = Some(number);
            return Ok(None);
        };
        let mean = loss.mean(kd);
        let broken = mean > BROKEN * self.level;
        let rate = Rate::at(self.step, self.settings.steps).times(self.pace);
        match &self.best {
            Some(best) if broken => {
                self.matrices.go_back(&best.snapshots);
                self.pace *= 0.5;
            }
            _ => {
                let share = (CLIP / norm.max(CLIP)) as f32;
                self.matrices.step(self.distiller.gradients(), share, &rate);
                self.level =
                    if self.level.is_nan() { mean } else { self.level + SHARE * (mean - self.level) };
            }
        }
        self.distiller.gradients().clear();
        self.matrices.turn(self.distiller.decoder());
        self.step = number;
        let each = |sum: f64| sum / loss.tokens.max(1) as f64;
        Ok(Some(Record::Stepped(Stepped {
            step: number,
            tokens: u64::from(number) * loss.tokens as u64,
            loss: mean,
            divergence: each(loss.divergence) / 4.0,
            likelihood: each(loss.likelihood),
            gradient: norm,
            rate: rate.share,
            broken,
        })))
    }

    fn evaluate(&mut self) -> Result<Option<Record>> {
        let loss = sound(self.distiller.measure(&self.matrices, &self.held))?;
        let found = loss.map(|loss| (loss.mean(self.settings.kd), Evaluated::of(self.step, &loss)));
        let Some((loss, found)) =
            found.filter(|(loss, found)| loss.is_finite() && found.perplexity.is_finite())
        else {
            self.failed = Some(self.step);
            return Ok(None);
        };
        if self.step == 0 {
            self.before = loss;
        }
        if self.best.as_ref().is_none_or(|best| loss < best.loss) {
            self.best = Some(Best { step: self.step, loss, snapshots: self.matrices.snapshots() });
        }
        Ok(Some(Record::Evaluated(found)))
    }

    fn save(&self, to: &mut dyn Write, path: &Path) -> Result<()> {
        write_state(StateHead { magic: MAGIC, key: &self.key }, self.step, (to, path), &mut |to| {
            to.write_all(&self.before.to_le_bytes())?;
            to.write_all(&self.level.to_le_bytes())?;
            to.write_all(&self.pace.to_le_bytes())?;
            // There is one from the first evaluation on, which is before the first step.
            if let Some(best) = &self.best {
                to.write_all(&best.loss.to_le_bytes())?;
                to.write_all(&best.step.to_le_bytes())?;
                best.snapshots.iter().try_for_each(|snapshot| snapshot.write(to))?;
            }
            self.matrices.write(to)
        })
    }

    fn load(&mut self, from: &mut dyn Read, path: &Path) -> Result<()> {
        let key = self.key;
        let Self { matrices, before, best, level, pace, .. } = self;
        let step = read_state(StateHead { magic: MAGIC, key: &key }, (from, path), &mut |from| {
            let (mut eight, mut four) = ([0u8; 8], [0u8; 4]);
            from.read_exact(&mut eight)?;
            *before = f64::from_le_bytes(eight);
            from.read_exact(&mut eight)?;
            *level = f64::from_le_bytes(eight);
            from.read_exact(&mut four)?;
            *pace = f32::from_le_bytes(four);
            from.read_exact(&mut eight)?;
            from.read_exact(&mut four)?;
            let mut snapshots = matrices.rooms();
            snapshots.iter_mut().try_for_each(|snapshot| snapshot.read(from))?;
            let (loss, step) = (f64::from_le_bytes(eight), u32::from_le_bytes(four));
            *best = Some(Best { step, loss, snapshots });
            matrices.read(from)
        })?;
        if let Some(step) = step {
            self.step = step;
            self.matrices.turn(self.distiller.decoder());
        }
        Ok(())
    }
}
