//! Learning a sub-layer's weights from what it is to give out.
//!
//! ```text
//! target = the original's residual stream after the sub-layer - the stream that it reads now
//! a window:  forward --> sum (y - target)^2 / sum target^2 --> backward
//! ```
//!
//! So a sub-layer makes up for what those before it have lost, as far as what it reads tells. On tinylm at 2 bits that gains
//! twice what its own outputs on the original's streams do as targets.

use llmpress_calibrate::Streams;
use llmpress_formats::{Error, Result};
use llmpress_model::Panels;
use rayon::prelude::*;

use crate::descend::{Task, descend};
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
}

impl Work<'_, '_> {
    /// What comes out of a window, less its target, is left in `y`. Returns the squares of both, if they are finite.
    fn forward(&mut self, window: usize) -> Result<Option<(f64, f64)>> {
        self.streams.0.get(window, &mut self.input)?;
        self.streams.1.get(window, &mut self.target)?;
        let weights: Vec<&[f32]> = self.variables.iter().map(|v| v.weights()).collect();
        let given = Given::of(&weights);
        // What it refuses is NaN or infinite where it is to be quantised: a loss that says nothing, too.
        if self.net.forward(given, &self.input, &mut self.kept, &mut self.y).is_err() {
            return Ok(None);
        }
        let pieces = self.y.data_mut().par_chunks_mut(PIECE).zip(self.target.data().par_chunks(PIECE));
        let pieces = pieces.zip(self.input.data().par_chunks(PIECE));
        let sums: Vec<(f64, f64)> = pieces
            .map(|((y, target), input)| {
                let (mut away, mut all) = (0.0, 0.0);
                for ((y, target), input) in y.iter_mut().zip(target).zip(input) {
                    let target = target - input;
                    *y -= target;
                    away += f64::from(*y) * f64::from(*y);
                    all += f64::from(target) * f64::from(target);
                }
                (away, all)
            })
            .collect();
        let sums = sums.iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        if !sums.0.is_finite() || !sums.1.is_finite() {
            return Ok(None);
        }
        Ok(Some(sums))
    }
}

impl Task for Work<'_, '_> {
    fn loss(&mut self, windows: &[usize]) -> Result<f64> {
        let (mut away, mut all) = (0.0, 0.0);
        for &window in windows {
            let Some(sums) = self.forward(window)? else { return Ok(f64::NAN) };
            (away, all) = (away + sums.0, all + sums.1);
        }
        Ok(if all > 0.0 { away / all } else { away })
    }

    fn add_gradients(&mut self, window: usize) -> Result<bool> {
        let Some((_, all)) = self.forward(window)? else { return Ok(false) };
        let scale = if all > 0.0 { (2.0 / all) as f32 } else { 2.0 };
        self.y.data_mut().iter_mut().for_each(|d| *d *= scale);
        let weights: Vec<&[f32]> = self.variables.iter().map(|v| v.weights()).collect();
        let back = (&mut self.y, &[][..]);
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
