//! The loss that a decoder is trained by: the divergence from a teacher, and the likelihood of what came.
//!
//! ```text
//! loss = kd T^2 KL(teacher_T | student_T) + (1 - kd) (lse s - s[label])        T = 2 (Hinton et al., 2015)
//!
//! some tokens at a time:   head --> logits of both --> sums --> derivative by the student's --> through the head
//! ```
//!
//! The head stays, and is the same for both. Logits of as many tokens are in memory at a time as fit [`MOST_BYTES`], a panel at
//! least: those of a window of a large vocabulary never exist whole.

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::{
    DistilShares, PANEL, TEMPERATURE, distil_back, distil_sums, divergence, log_sum_exp, multiply,
};
use llmpress_model::{Model, Panels, soft_cap};
use rayon::prelude::*;

use crate::linear::{product, transposed};

/// Bytes that logits of both models may take.
pub const MOST_BYTES: usize = 64 << 20;
/// Rows of a task.
const ROWS: usize = 32;
/// Entries of the vocabulary whose derivatives stay in the cache while they are multiplied.
const RUN: usize = 2048;

/// A head that stays.
#[derive(Debug)]
pub struct Head {
    /// `[vocabulary, hidden]`.
    rows: Vec<f32>,
    /// `[hidden, vocabulary]`.
    turned: Vec<f32>,
    hidden: usize,
    vocab: usize,
    cap: Option<f32>,
    most_bytes: usize,
}

/// Room for the logits of some tokens.
#[derive(Debug, Default)]
pub struct HeadRoom {
    teacher: Panels,
    student: Panels,
    /// Some tokens of what the head multiplies.
    x: Panels,
    capped: Vec<f32>,
}

/// What a loss comes to over some tokens: sums, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Of KL(teacher | student); in training of both at temperature 2, times 4.
    pub divergence: f64,
    /// Of `-ln p` of what came.
    pub likelihood: f64,
    /// The same of the teacher, where it is measured.
    pub of_teacher: f64,
    /// Tokens.
    pub tokens: usize,
}

impl Loss {
    /// Of more tokens.
    pub fn add(&mut self, more: Self) {
        self.divergence += more.divergence;
        self.likelihood += more.likelihood;
        self.of_teacher += more.of_teacher;
        self.tokens += more.tokens;
    }

    /// The loss of a token at so large a share of the teacher's.
    pub fn mean(&self, kd: f32) -> f64 {
        let kd = f64::from(kd);
        let sum = if kd > 0.0 { kd * self.divergence } else { 0.0 } + (1.0 - kd) * self.likelihood;
        sum / self.tokens.max(1) as f64
    }
}

/// What a loss weighs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distillation {
    /// The share of the teacher, 0 to 1.
    pub kd: f32,
    /// Tokens that the loss is a mean of, in all windows of a step.
    pub tokens: usize,
}

impl Head {
    /// A model's.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn new(model: &Model) -> Result<Self> {
        let outlet = model.outlet();
        let (vocab, hidden) = (outlet.head.rows(), outlet.head.cols());
        let mut rows = model.weights(outlet.head.tensor())?;
        // Logits that are scaled are those of scaled weights.
        if outlet.scale != 1.0 {
            rows.iter_mut().for_each(|w| *w *= outlet.scale);
        }
        let mut turned = Vec::new();
        transposed(&rows, hidden, &mut turned);
        Ok(Self { rows, turned, hidden, vocab, cap: outlet.cap, most_bytes: MOST_BYTES })
    }

    /// With another bound of what logits take.
    #[must_use]
    pub fn within(self, most_bytes: usize) -> Self {
        Self { most_bytes, ..self }
    }

    /// Bytes that a head of so many rows and columns takes in memory beside logits.
    pub fn bytes(vocab: u64, hidden: u64) -> u64 {
        vocab.saturating_mul(hidden).saturating_mul(8)
    }

    /// The loss of a window, and into `d` its derivative by what the head multiplies for the student. `teacher` is what the head
    /// multiplies for the teacher, where it has a share; `labels` what came after each token.
    ///
    /// # Errors
    /// Sizes that do not go together; a label beyond the vocabulary.
    pub fn distil(
        &self,
        teacher: Option<&Panels>,
        student: &Panels,
        labels: &[u32],
        how: Distillation,
        room: &mut HeadRoom,
        d: &mut Panels,
    ) -> Result<Loss> {
        self.check(teacher, student, labels)?;
        let (kd, all) = (how.kd, how.tokens.max(1) as f32);
        let shares = DistilShares { divergence: kd / all, likelihood: (1.0 - kd) / all };
        let squared = f64::from(TEMPERATURE) * f64::from(TEMPERATURE);
        let mut loss = Loss::default();
        d.resize(self.hidden, student.tokens());
        for first in (0..student.count()).step_by(self.panels()) {
            self.logits(student, first, &mut room.x, &mut room.student);
            match teacher {
                Some(teacher) => self.logits(teacher, first, &mut room.x, &mut room.teacher),
                None => {
                    room.teacher.resize(self.vocab, room.student.tokens());
                    room.teacher.data_mut().fill(0.0);
                }
            }
            if self.cap.is_some() {
                room.capped.clear();
                room.capped.extend_from_slice(room.student.data());
            }
            let (of_teacher, logits) = (&room.teacher, &mut room.student);
            let tokens = logits.tokens();
            let labels = &labels[first * PANEL..][..tokens];
            let panels: Vec<_> = logits.panels_mut().zip(labels.chunks(PANEL)).enumerate().collect();
            let one = |(panel, (student, labels)): (usize, (&mut [f32], &[u32]))| {
                let (teacher, width) = (of_teacher.panel(panel), labels.len());
                let sums = distil_sums(teacher, student, width);
                let mut found = Loss { tokens: width, ..Loss::default() };
                for (token, label) in labels.iter().enumerate() {
                    let logit = student[*label as usize * width + token];
                    found.divergence += squared * sums.divergence(token);
                    found.likelihood += sums.log_sum_exp(token) - f64::from(logit);
                }
                distil_back(teacher, student, width, &sums, shares);
                for (token, label) in labels.iter().enumerate() {
                    student[*label as usize * width + token] -= shares.likelihood;
                }
                found
            };
            let found: Vec<Loss> = panels.into_par_iter().with_max_len(1).map(one).collect();
            found.into_iter().for_each(|found| loss.add(found));
            if let Some(cap) = self.cap {
                let capped = room.student.data_mut().iter_mut().zip(&room.capped);
                capped.for_each(|(d, l)| *d *= 1.0 - (l / cap) * (l / cap));
            }
            self.back(&room.student, first, d);
        }
        if teacher.is_none() {
            loss.divergence = 0.0;
        }
        Ok(loss)
    }

    /// The divergence and both likelihoods at temperature 1.
    ///
    /// # Errors
    /// Those of [`Self::distil`].
    pub fn measure(
        &self,
        teacher: &Panels,
        student: &Panels,
        labels: &[u32],
        room: &mut HeadRoom,
    ) -> Result<Loss> {
        self.check(Some(teacher), student, labels)?;
        let mut loss = Loss::default();
        for first in (0..student.count()).step_by(self.panels()) {
            self.logits(teacher, first, &mut room.x, &mut room.teacher);
            self.logits(student, first, &mut room.x, &mut room.student);
            let labels = &labels[first * PANEL..][..room.student.tokens()];
            let panels: Vec<(usize, &[u32])> = labels.chunks(PANEL).enumerate().collect();
            let one = |(panel, labels): (usize, &[u32])| {
                let (p, q, width) = (room.teacher.panel(panel), room.student.panel(panel), labels.len());
                let (mut max, mut sum) = (vec![f32::NEG_INFINITY; width], vec![0.0; width]);
                let (mut of_q, mut sum_q, mut weighted) = (max.clone(), sum.clone(), sum.clone());
                divergence(p, q, width, &mut max, &mut sum, &mut weighted);
                log_sum_exp(q, width, &mut of_q, &mut sum_q);
                let mut found = Loss { tokens: width, ..Loss::default() };
                for (token, label) in labels.iter().enumerate() {
                    let (lse_p, lse_q) =
                        (f64::from(max[token]) + sum[token].ln(), f64::from(of_q[token]) + sum_q[token].ln());
                    let at = *label as usize * width + token;
                    found.divergence += weighted[token] / sum[token] - (lse_p - lse_q);
                    found.likelihood += lse_q - f64::from(q[at]);
                    found.of_teacher += lse_p - f64::from(p[at]);
                }
                found
            };
            let found: Vec<Loss> = panels.into_par_iter().with_max_len(1).map(one).collect();
            found.into_iter().for_each(|found| loss.add(found));
        }
        Ok(loss)
    }

    /// Panels whose logits are there at a time.
    fn panels(&self) -> usize {
        (self.most_bytes / (8 * self.vocab.max(1)) / PANEL).max(1)
    }

    fn check(&self, teacher: Option<&Panels>, student: &Panels, labels: &[u32]) -> Result<()> {
        let fits = |x: &Panels| x.features() == self.hidden && x.tokens() == labels.len();
        if !fits(student) || !teacher.is_none_or(fits) {
            return Err(Error::Invalid("what two heads multiply is not of the same tokens".to_owned()));
        }
        match labels.iter().find(|label| **label as usize >= self.vocab) {
            Some(label) => {
                Err(Error::Invalid(format!("token id {label} is beyond the vocabulary of {}", self.vocab)))
            }
            None => Ok(()),
        }
    }

    /// Logits of some panels from `first`; `x` is room.
    fn logits(&self, of: &Panels, first: usize, x: &mut Panels, out: &mut Panels) {
        let (start, end) = (first * PANEL, of.tokens().min((first + self.panels()) * PANEL));
        x.resize(self.hidden, end - start);
        x.data_mut().copy_from_slice(&of.data()[start * self.hidden..end * self.hidden]);
        product(&self.rows, None, x, out);
        if let Some(cap) = self.cap {
            out.data_mut().par_iter_mut().with_min_len(1 << 12).for_each(|l| *l = soft_cap(*l, cap));
        }
    }

    /// `d[.., panels from first] = head^T by_logits`.
    fn back(&self, by_logits: &Panels, first: usize, d: &mut Panels) {
        let tasks: Vec<_> = d
            .row_blocks_mut(ROWS)
            .into_iter()
            .map(|parts| {
                parts.into_iter().skip(first).take(by_logits.count()).enumerate().collect::<Vec<_>>()
            })
            .enumerate()
            .collect();
        tasks.into_par_iter().with_max_len(1).for_each(|(block, parts)| {
            let mut tile = [0.0f32; ROWS * PANEL];
            for (panel, part) in parts {
                let (logits, width) = (by_logits.panel(panel), by_logits.width(panel));
                let tile = &mut tile[..part.len()];
                part.fill(0.0);
                for start in (0..self.vocab).step_by(RUN) {
                    let end = self.vocab.min(start + RUN);
                    let weights = &self.turned[block * ROWS * self.vocab + start..];
                    multiply(weights, self.vocab, &logits[start * width..end * width], width, tile);
                    part.iter_mut().zip(&*tile).for_each(|(part, tile)| *part += tile);
                }
            }
        });
    }
}
