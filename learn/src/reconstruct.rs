//! Learning a sub-layer's weights from what it is to give out.
//!
//! ```text
//! target = the original's residual stream after the sub-layer - the stream that it reads now
//! a window:  forward --> mean (y - target)^2 / target^2 over tokens (weigh.rs) --> backward
//! ```
//!
//! So a sub-layer makes up for what those before it have lost, as far as what it reads tells. On tinylm at 2 bits that gains
//! twice what its own outputs on the original's streams do as targets.

use llmpress_calibrate::Streams;
use llmpress_formats::{Error, Result};
use llmpress_model::Panels;
use rayon::prelude::*;

use crate::descend::{Task, descend};
use crate::weigh::{shares, squares, weighed, weighed_back};
use crate::{Given, Gradients, Kept, Net, Outcome, Rate, Settings};

/// Values that a task sums.
const PIECE: usize = 1 << 14;

/// The weights of a matrix as they are learned: `quantize` gives those that lie on grids.
pub trait Variable: Send + Sync {
    /// The weights that products see, row-major.
    fn weights(&self) -> &[f32];

    /// One step down the derivative of the loss by [`Self::weights`].
    fn step(&mut self, gradient: &[f32], rate: &Rate);
}

/// Learns the variables of each matrix of `net`. `inputs` are residual streams before it, `targets` what they are to be
/// after it. The variables are as the last step left them; the caller takes their start again where that is no better.
///
/// # Errors
/// Streams that do not go together; a file that cannot be read.
pub fn reconstruct(
    net: &Net,
    variables: &mut [&mut dyn Variable],
    (inputs, targets): (&mut Streams, &mut Streams),
    settings: Settings,
    progress: &mut dyn FnMut(),
) -> Result<Outcome> {
    let windows = inputs.windows();
    let sizes = |s: &Streams| (s.windows(), s.tokens(), s.features());
    if sizes(inputs) != sizes(targets) || windows == 0 || variables.len() != net.tensors().len() {
        return Err(Error::Invalid("inputs, targets and matrices do not go together".to_owned()));
    }
    let gradients = Gradients::zeros(variables.iter().map(|v| v.weights().len()));
    let mut work = Work {
        net,
        variables,
        streams: (inputs, targets),
        gradients,
        kept: Kept::default(),
        input: Panels::default(),
        target: Panels::default(),
        y: Panels::default(),
        d: Panels::default(),
    };
    descend(&mut work, windows, settings, progress)
}

struct Work<'a, 'v> {
    net: &'a Net,
    variables: &'a mut [&'v mut dyn Variable],
    streams: (&'a mut Streams, &'a mut Streams),
    gradients: Gradients,
    kept: Kept,
    input: Panels,
    target: Panels,
    y: Panels,
    /// The derivative by `y`.
    d: Panels,
}

impl Work<'_, '_> {
    /// The loss of a window; its derivative by what comes out is left in `d`.
    fn forward(&mut self, window: usize) -> Result<f64> {
        self.streams.0.get(window, &mut self.input)?;
        self.streams.1.get(window, &mut self.target)?;
        let weights: Vec<&[f32]> = self.variables.iter().map(|v| v.weights()).collect();
        // What it refuses is NaN or infinite where it is to be quantised: a loss that says nothing, too.
        if self.net.forward(Given::of(&weights), &self.input, &mut self.kept, &mut self.y).is_err() {
            return Ok(f64::NAN);
        }
        let shares = shares(&squares(&self.target, &self.input));
        let pieces = self.target.data_mut().par_chunks_mut(PIECE).zip(self.input.data().par_chunks(PIECE));
        pieces.for_each(|(target, input)| target.iter_mut().zip(input).for_each(|(t, x)| *t -= x));
        self.d.resize(self.y.features(), self.y.tokens());
        self.d.data_mut().fill(0.0);
        weighed_back(&self.y, &self.target, &shares, &mut self.d);
        Ok(weighed(&squares(&self.y, &self.target), &shares))
    }
}

impl Task for Work<'_, '_> {
    fn loss(&mut self, windows: &[usize]) -> Result<f64> {
        let mut sum = 0.0;
        for &window in windows {
            sum += self.forward(window)?;
        }
        Ok(sum / windows.len().max(1) as f64)
    }

    fn add_gradients(&mut self, window: usize) -> Result<bool> {
        if !self.forward(window)?.is_finite() {
            return Ok(false);
        }
        let weights: Vec<&[f32]> = self.variables.iter().map(|v| v.weights()).collect();
        let back = (&mut self.d, &[][..]);
        let given = Given::of(&weights);
        self.net.backward(given, &self.input, &mut self.kept, back, &mut self.gradients, None);
        Ok(true)
    }

    fn step(&mut self, rate: &Rate) {
        let all = self.variables.iter_mut().zip(&self.gradients.matrices);
        all.for_each(|(variable, gradient)| variable.step(gradient, rate));
        self.gradients.clear();
    }
}
