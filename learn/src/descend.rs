//! The loop that learns: windows by chance, AdamW on a cosine schedule.
//!
//! ```text
//! a step:  some windows by chance --> derivatives, added up --> variables
//! before and after: the loss over windows that no step sees
//! ```

use llmpress_formats::Result;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::Rate;

/// One window of so many is held back, where there are so many.
pub const HELD_BACK: usize = 16;

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
    /// The loss at the start: squares of differences over squares of targets, and what else the loss adds.
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

/// What is learned.
pub(crate) trait Task {
    /// The loss over some windows; NaN where it is none.
    fn loss(&mut self, windows: &[usize]) -> Result<f64>;

    /// Adds the derivatives of one window's; false where its loss is no number.
    fn add_gradients(&mut self, window: usize) -> Result<bool>;

    /// One step down what was added up, which is zero then.
    fn step(&mut self, rate: &Rate);
}

/// Learns from `windows` windows. The variables are as the last step left them.
pub(crate) fn descend(
    task: &mut dyn Task,
    windows: usize,
    settings: Settings,
    progress: &mut dyn FnMut(),
) -> Result<Outcome> {
    let is_held = |w: &usize| windows < HELD_BACK || w % HELD_BACK == HELD_BACK / 2;
    let held: Vec<usize> = (0..windows).filter(is_held).collect();
    let seen: Vec<usize> = (0..windows).filter(|w| windows < HELD_BACK || !is_held(w)).collect();
    let before = task.loss(&held)?;
    let mut order = Order { random: ChaCha8Rng::seed_from_u64(settings.seed), all: seen, left: Vec::new() };
    for step in 0..settings.steps {
        for _ in 0..settings.batch.max(1) {
            if !task.add_gradients(order.next())? {
                return Ok(Outcome { before, after: f64::NAN });
            }
        }
        task.step(&Rate::at(step, settings.steps).times(settings.rate));
        progress();
    }
    let after = task.loss(&held)?;
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
