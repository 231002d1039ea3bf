//! What each step of training a whole decoder computes: a loss against the dense model, and its derivatives.
//!
//! ```text
//! windows of a step --teacher: the dense model--> what its head multiplies \
//!         --student: Decoder, given weights--> what the head multiplies -----> Head: loss --> derivatives, added up
//! ```

use llmpress_formats::Result;
use llmpress_model::{Model, Panels, Skips, Unobserved};
use serde::{Deserialize, Serialize};

use crate::{Decoder, DecoderGradients, DecoderKept, Distillation, Given, Head, HeadRoom, Loss, Window};

/// What a decoder computes with: what each sub-layer is given, and the weights of the last norm, its own where there are none.
pub type GivenAll<'a> = (&'a [Given<'a>], Option<&'a [f32]>);

/// What is trained of a decoder.
pub trait Student {
    /// Calls `then` with what the decoder computes with.
    ///
    /// # Errors
    /// What `then` says.
    fn lend(&self, then: &mut dyn FnMut(GivenAll<'_>) -> Result<()>) -> Result<()>;
}

/// A teacher, and all that goes from windows to derivatives.
#[derive(Debug)]
pub struct Distiller<'a> {
    dense: &'a Model,
    /// What embeds for the student: the dense model, or one whose residual stream is turned.
    embeds: &'a Model,
    decoder: Decoder,
    head: Head,
    gradients: DecoderGradients,
    kept: DecoderKept,
    room: HeadRoom,
    d: Panels,
}

/// The windows that no step sees, after some steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// After so many steps.
    pub step: u32,
    /// Perplexity.
    pub perplexity: f64,
    /// That of the dense model.
    pub dense: f64,
    /// KL to the dense model at temperature 1, nats a token.
    pub divergence: f64,
}

impl Evaluated {
    /// Of what a loss came to at temperature 1.
    pub fn of(step: u32, loss: &Loss) -> Self {
        let each = |sum: f64| sum / loss.tokens.max(1) as f64;
        Self {
            step,
            perplexity: each(loss.likelihood).exp(),
            dense: each(loss.of_teacher).exp(),
            divergence: each(loss.divergence),
        }
    }
}

impl<'a> Distiller<'a> {
    /// Of the dense model, whose head stays, the model that embeds tokens for the student, and the student's decoder.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn new((dense, embeds): (&'a Model, &'a Model), decoder: Decoder) -> Result<Self> {
        Ok(Self {
            dense,
            embeds,
            head: Head::new(dense)?,
            gradients: decoder.gradients(),
            decoder,
            kept: DecoderKept::default(),
            room: HeadRoom::default(),
            d: Panels::default(),
        })
    }

    /// Without derivatives by norms, where nobody learns them.
    #[must_use]
    pub fn without_norms(mut self) -> Self {
        self.gradients.norm = Vec::new();
        self.gradients.sub_layers.iter_mut().for_each(|gradients| gradients.norm = Vec::new());
        self
    }

    /// The student's decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// What was added up.
    pub fn gradients(&mut self) -> &mut DecoderGradients {
        &mut self.gradients
    }

    /// The loss of some windows, with the teacher's share `kd`; its derivatives are added up.
    ///
    /// # Errors
    /// Ids beyond the vocabulary; what is NaN or infinite where it is to be quantised.
    pub fn add(&mut self, student: &dyn Student, windows: &[Window<'_>], kd: f32) -> Result<Loss> {
        let how = Distillation { kd, tokens: windows.iter().map(|window| window.ids.len()).sum() };
        let mut loss = Loss::default();
        for window in windows {
            let teacher = match kd > 0.0 {
                true => Some(hidden(self.dense, window.ids)?),
                false => None,
            };
            let Self { embeds, decoder, head, gradients, kept, room, d, .. } = self;
            student.lend(&mut |given| {
                decoder.forward(embeds, given, window.ids, kept)?;
                loss.add(head.distil(teacher.as_ref(), kept.hidden(), window.labels, how, room, d)?);
                decoder.backward(given, d, kept, gradients);
                Ok(())
            })?;
        }
        Ok(loss)
    }

    /// What the student does on windows, at temperature 1.
    ///
    /// # Errors
    /// Those of [`Self::add`].
    pub fn measure(&mut self, student: &dyn Student, windows: &[Window<'_>]) -> Result<Loss> {
        let mut loss = Loss::default();
        for window in windows {
            let teacher = hidden(self.dense, window.ids)?;
            let Self { embeds, decoder, head, kept, room, .. } = self;
            student.lend(&mut |given| decoder.forward(embeds, given, window.ids, kept))?;
            loss.add(head.measure(&teacher, kept.hidden(), window.labels, room)?);
        }
        Ok(loss)
    }
}

/// What the head multiplies after a window.
fn hidden(model: &Model, ids: &[u32]) -> Result<Panels> {
    let mut cache = model.cache(ids.len());
    cache.announce(ids.len());
    model.hidden(ids, &mut cache, &Skips::new(), &mut Unobserved)
}
