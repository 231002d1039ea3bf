//! A step, and an evaluation.

use llmpress_formats::{Error, Result};
use llmpress_learn::{Decoder, DecoderGradients, DecoderKept, Distillation, Head, HeadRoom, Loss};
use llmpress_model::{Model, Panels, Skips, Unobserved};

use super::optimiser::Update;
use super::record::{Evaluated, Stepped};
use super::student::Student;
use super::text::Window;
use super::vector::squares;
use super::{Ast, Start};

/// To what norm derivatives are clipped.
const CLIP: f64 = 1.0;

/// A model in training.
pub(super) struct Trainer<'a> {
    dense: &'a Model,
    settings: Ast,
    decoder: Decoder,
    head: Head,
    pub(super) student: Student,
    /// The greatest decay.
    decay: f32,
    gradients: DecoderGradients,
    kept: DecoderKept,
    room: HeadRoom,
    d: Panels,
    /// Steps done.
    pub(super) step: u32,
}

impl<'a> Trainer<'a> {
    pub(super) fn new(dense: &'a Model, starts: &[Start], settings: Ast) -> Result<Self> {
        settings.check()?;
        let decoder = Decoder::new(dense)?;
        let student = Student::new(&decoder, dense, starts, settings.slorb)?;
        Ok(Self {
            dense,
            settings,
            head: Head::new(dense)?,
            decay: settings.lambda(student.matrices().map(|matrix| squares(&matrix.dense)).sum()),
            student,
            gradients: decoder.gradients(),
            kept: DecoderKept::default(),
            room: HeadRoom::default(),
            d: Panels::default(),
            step: 0,
            decoder,
        })
    }

    /// One step on some windows.
    pub(super) fn step(&mut self, windows: &[Window<'_>]) -> Result<Stepped> {
        let number = self.step + 1;
        let tokens = windows.iter().map(|window| window.ids.len()).sum();
        let how = Distillation { kd: self.settings.kd, tokens };
        let mut loss = Loss::default();
        for window in windows {
            let teacher = match how.kd > 0.0 {
                true => Some(hidden(self.dense, window.ids)?),
                false => None,
            };
            let Self { dense, decoder, head, student, gradients, kept, room, d, .. } = self;
            let of_window: Result<Loss> = student.with(|given| {
                decoder.forward(dense, given, window.ids, kept)?;
                let loss = head.distil(teacher.as_ref(), kept.hidden(), window.labels, how, room, d)?;
                decoder.backward(given, d, kept, gradients);
                Ok(loss)
            });
            // What the forward refuses is NaN or infinite where it is to be quantised: a loss that says nothing, too.
            loss.add(of_window?);
        }
        let norm = self.student.norm(&self.gradients);
        let mean = loss.mean(how.kd);
        if !mean.is_finite() || !norm.is_finite() {
            return Err(Error::Invalid(format!(
                "the loss of step {number} is {mean} and its derivatives' norm {norm}: give a lower rate (lr={} or less), or look for \
                 NaN in the model with `verify`",
                self.settings.rate / 2.0
            )));
        }
        let update = Update::at(self.step, &self.settings, self.decay, (CLIP / norm.max(CLIP)) as f32);
        let choose = self.settings.every > 0 && number.is_multiple_of(self.settings.every);
        let flips = self.student.step(&self.gradients, update, choose);
        self.gradients.clear();
        self.student.turn(&self.decoder);
        self.step = number;
        let each = |sum: f64| sum / tokens.max(1) as f64;
        Ok(Stepped {
            step: number,
            tokens: u64::from(number) * tokens as u64,
            loss: mean,
            divergence: (how.kd > 0.0).then_some(each(loss.divergence) / 4.0),
            likelihood: each(loss.likelihood),
            gradient: norm,
            rate: update.rate,
            lambda: update.lambda,
            flips: choose.then_some(flips),
        })
    }

    /// What the student does on windows that it is not trained on.
    pub(super) fn evaluate(&mut self, windows: &[Window<'_>]) -> Result<Evaluated> {
        let mut loss = Loss::default();
        for window in windows {
            let teacher = hidden(self.dense, window.ids)?;
            let Self { dense, decoder, head, student, kept, room, .. } = self;
            student.with(|given| decoder.forward(dense, given, window.ids, kept))?;
            loss.add(head.measure(&teacher, kept.hidden(), window.labels, room)?);
        }
        let each = |sum: f64| sum / loss.tokens.max(1) as f64;
        Ok(Evaluated {
            step: self.step,
            perplexity: each(loss.likelihood).exp(),
            dense: each(loss.of_teacher).exp(),
            divergence: each(loss.divergence),
        })
    }

    /// After a state was taken up.
    pub(super) fn see(&mut self) {
        self.student.matrices_mut().for_each(super::matrix::Matrix::see);
        self.student.vectors_mut().for_each(super::vector::Vector::see);
        self.student.turn(&self.decoder);
    }
}

/// What the head multiplies after a window.
fn hidden(model: &Model, ids: &[u32]) -> Result<Panels> {
    let mut cache = model.cache(ids.len());
    cache.announce(ids.len());
    model.hidden(ids, &mut cache, &Skips::new(), &mut Unobserved)
}
