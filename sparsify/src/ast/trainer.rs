//! A step, and an evaluation.

use std::io::{Read, Write};
use std::path::Path;

use llmpress_formats::{Error, Result};
use llmpress_learn::{Decoder, Distiller, Evaluated, Training, Window};
use llmpress_model::Model;

use super::optimiser::Update;
use super::record::{Record, Stepped};
use super::student::Student;
use super::vector::squares;
use super::{Ast, Start};

/// To what norm derivatives are clipped.
const CLIP: f64 = 1.0;

/// A model in training.
pub(super) struct Trainer<'a> {
    settings: Ast,
    distiller: Distiller<'a>,
    pub(super) student: Student,
    /// The greatest decay.
    decay: f32,
    /// The windows to judge by.
    judge: &'a [Window<'a>],
    /// Of what run it is.
    pub(super) key: [u8; 32],
    /// Steps done.
    pub(super) step: u32,
}

impl<'a> Trainer<'a> {
    pub(super) fn new(
        dense: &'a Model,
        starts: &[Start],
        settings: Ast,
        (judge, key): (&'a [Window<'a>], [u8; 32]),
    ) -> Result<Self> {
        settings.check()?;
        super::check(dense)?;
        let decoder = Decoder::new(dense)?;
        let student = Student::new(&decoder, dense, starts, settings.slorb)?;
        Ok(Self {
            settings,
            distiller: Distiller::new((dense, dense), decoder)?,
            decay: settings.lambda(student.matrices().map(|matrix| squares(&matrix.dense)).sum()),
            student,
            judge,
            key,
            step: 0,
        })
    }

    /// What the student does on windows that it is not trained on.
    pub(super) fn measure(&mut self) -> Result<Evaluated> {
        Ok(Evaluated::of(self.step, &self.distiller.measure(&self.student, self.judge)?))
    }

    /// After a state was taken up.
    pub(super) fn see(&mut self) {
        self.student.matrices_mut().for_each(super::matrix::Matrix::see);
        self.student.vectors_mut().for_each(super::vector::Vector::see);
        self.student.turn(self.distiller.decoder());
    }
}

impl Training for Trainer<'_> {
    type Record = Record;

    fn steps(&self) -> u32 {
        self.step
    }

    fn step(&mut self, windows: &[Window<'_>]) -> Result<Option<Record>> {
        let number = self.step + 1;
        let kd = self.settings.kd;
        // What the forward refuses is NaN or infinite where it is to be quantised: a loss that says nothing, too.
        let loss = self.distiller.add(&self.student, windows, kd)?;
        let norm = self.student.norm(self.distiller.gradients());
        let mean = loss.mean(kd);
        if !mean.is_finite() || !norm.is_finite() {
            return Err(Error::Invalid(format!(
                "the loss of step {number} is {mean} and its derivatives' norm {norm}: give a lower rate (lr={} or less), or look for \
                 NaN in the model with `verify`",
                self.settings.rate / 2.0
            )));
        }
        let update = Update::at(self.step, &self.settings, self.decay, (CLIP / norm.max(CLIP)) as f32);
        let choose = self.settings.every > 0 && number.is_multiple_of(self.settings.every);
        let flips = self.student.step(self.distiller.gradients(), update, choose);
        self.distiller.gradients().clear();
        self.student.turn(self.distiller.decoder());
        self.step = number;
        let each = |sum: f64| sum / loss.tokens.max(1) as f64;
        Ok(Some(Record::Stepped(Stepped {
            step: number,
            tokens: u64::from(number) * loss.tokens as u64,
            loss: mean,
            divergence: (kd > 0.0).then_some(each(loss.divergence) / 4.0),
            likelihood: each(loss.likelihood),
            gradient: norm,
            rate: update.rate,
            lambda: update.lambda,
            flips: choose.then_some(flips),
        })))
    }

    fn evaluate(&mut self) -> Result<Option<Record>> {
        Ok(Some(Record::Evaluated(self.measure()?)))
    }

    fn save(&self, to: &mut dyn Write, path: &Path) -> Result<()> {
        self.write(to, path)
    }

    fn load(&mut self, from: &mut dyn Read, path: &Path) -> Result<()> {
        self.read(from, path)
    }
}
