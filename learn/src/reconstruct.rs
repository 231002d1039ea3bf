//! Learning a sub-layer's weights from what it is to give out.
//!
//! ```text
//! target = the original's residual stream after the sub-layer - the stream that it reads now
//! a step:  a window by chance --> forward --> sum (y - target)^2 / sum target^2 --> backward --> variables
//! before and after: the same loss over windows that no step sees; what is not better takes its start again
//! ```
//!
//! So a sub-layer makes up for what those before it have lost, as far as what it reads tells. On tinylm at 2 bits that gains
//! twice what its own outputs on the original's streams do as targets.

use llmpress_calibrate::Streams;
use llmpress_formats::{Error, Result};
use llmpress_model::Panels;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::{Kept, Net, Rate};

/// One window of so many is held back, where there are so many.
pub const HELD_BACK: usize = 16;
/// Values that a task sums.
const PIECE: usize = 1 << 14;

/// The weights of a matrix as they are learned: `quantize` gives those that lie on grids.
pub trait Variable: Send + Sync {
    /// The weights that products see, row-major.
    fn weights(&self) -> &[f32];

    /// One step down the derivative of the loss by [`Self::weights`].
    fn step(&mut self, gradient: &[f32], rate: &Rate);
}

/// How long is learned, and from which windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Steps.
    pub steps: u32,
    /// Windows of a step.
    pub batch: usize,
    /// What draws windows.
    pub seed: u64,
    /// What every variable's own rate is multiplied by.
    pub rate: f32,
}

/// What learning came to, on windows that no step saw where there are enough of them; else on all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// The loss at the start: squares of differences over squares of targets.
    pub before: f64,
    /// At the end; NaN where a loss on the way was NaN or infinite.
    pub after: f64,
}

impl Outcome {
    /// Whether it is better than its start.
    pub fn is_better(&self) -> bool {
        self.after < self.before
    }
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
    let held: Vec<usize> = match windows {
        HELD_BACK.. => (0..windows).skip(HELD_BACK / 2).step_by(HELD_BACK).collect(),
        _ => (0..windows).collect(),
    };
    let seen: Vec<usize> = match windows {
        HELD_BACK.. => (0..windows).filter(|w| held.binary_search(w).is_err()).collect(),
        _ => (0..windows).collect(),
    };
    let mut work = Work {
        net,
        kept: Kept::default(),
        input: Panels::default(),
        target: Panels::default(),
        y: Panels::default(),
    };
    let before = work.loss(variables, (inputs, targets), &held)?;
    let mut order = Order { random: ChaCha8Rng::seed_from_u64(settings.seed), all: seen, left: Vec::new() };
    let mut gradients: Vec<Vec<f32>> = variables.iter().map(|v| vec![0.0; v.weights().len()]).collect();
    for step in 0..settings.steps {
        gradients.iter_mut().for_each(|g| g.par_chunks_mut(PIECE).for_each(|g| g.fill(0.0)));
        for _ in 0..settings.batch.max(1) {
            let window = order.next();
            if !work.add_gradients(variables, (inputs, targets), window, &mut gradients)? {
                return Ok(Outcome { before, after: f64::NAN });
            }
        }
        let rate = Rate::at(step, settings.steps).times(settings.rate);
        variables.iter_mut().zip(&gradients).for_each(|(variable, gradient)| variable.step(gradient, &rate));
        progress();
    }
    let after = work.loss(variables, (inputs, targets), &held)?;
    Ok(Outcome { before, after })
}

/// Windows in an order by chance, each once before any comes again.
struct Order {
    random: ChaCha8Rng,
    all: Vec<usize>,
    left: Vec<usize>,
}

impl Order {
    fn next(&mut self) -> usize {
        if self.left.is_empty() {
            self.left.clone_from(&self.all);
        }
        let at = (self.random.next_u64() % self.left.len().max(1) as u64) as usize;
        self.left.swap_remove(at)
    }
}

struct Work<'a> {
    net: &'a Net,
    kept: Kept,
    input: Panels,
    target: Panels,
    y: Panels,
}

impl Work<'_> {
    /// What comes out of a window, less its target, is left in `y`. Returns the squares of both, if they are finite.
    fn forward(
        &mut self,
        weights: &[&[f32]],
        (inputs, targets): (&mut Streams, &mut Streams),
        window: usize,
    ) -> Result<Option<(f64, f64)>> {
        inputs.get(window, &mut self.input)?;
        targets.get(window, &mut self.target)?;
        // What it refuses is NaN or infinite where it is to be quantised: a loss that says nothing, too.
        if self.net.forward(weights, &self.input, &mut self.kept, &mut self.y).is_err() {
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

    fn loss(
        &mut self,
        variables: &[&mut dyn Variable],
        (inputs, targets): (&mut Streams, &mut Streams),
        windows: &[usize],
    ) -> Result<f64> {
        let weights: Vec<&[f32]> = variables.iter().map(|v| v.weights()).collect();
        let (mut away, mut all) = (0.0, 0.0);
        for &window in windows {
            let Some(sums) = self.forward(&weights, (inputs, targets), window)? else { return Ok(f64::NAN) };
            (away, all) = (away + sums.0, all + sums.1);
        }
        Ok(if all > 0.0 { away / all } else { away })
    }

    fn add_gradients(
        &mut self,
        variables: &[&mut dyn Variable],
        streams: (&mut Streams, &mut Streams),
        window: usize,
        gradients: &mut [Vec<f32>],
    ) -> Result<bool> {
        let weights: Vec<&[f32]> = variables.iter().map(|v| v.weights()).collect();
        let Some((_, all)) = self.forward(&weights, streams, window)? else { return Ok(false) };
        let scale = if all > 0.0 { (2.0 / all) as f32 } else { 2.0 };
        self.y.data_mut().iter_mut().for_each(|d| *d *= scale);
        self.net.backward(&weights, &mut self.kept, &mut self.y, gradients);
        Ok(true)
    }
}
