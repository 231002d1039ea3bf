//! Windows that a text is packed into, in an order by chance.
//!
//! ```text
//! ids  0 1 2 3 | 4 5 6 7 | 8 ...      a window of 4 and what came after each of its tokens: 0..4 and 1..5, then 4..8 and 5..9
//! ```

use llmpress_calibrate::{Calibration, Cut};
use llmpress_formats::{Error, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// One window of so many is held back to judge by, as far as [`MOST_HELD`].
const HELD: usize = 64;
/// The most that are held back.
const MOST_HELD: usize = 16;

/// A text to train on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    ids: Vec<u32>,
    window: usize,
    /// Windows that steps see, and those that none does.
    seen: Vec<usize>,
    held: Vec<usize>,
}

impl Text {
    /// Of a text's tokens.
    ///
    /// # Errors
    /// Fewer windows than `least` beside one to judge by.
    pub fn new(ids: Vec<u32>, window: usize, least: usize) -> Result<Self> {
        let count = ids.len().saturating_sub(1) / window.max(1);
        let apart = (count / MOST_HELD).max(HELD).min(count.max(1));
        let is_held = |w: &usize| w % apart == apart / 2;
        let held: Vec<usize> = (0..count).filter(is_held).take(MOST_HELD).collect();
        let seen: Vec<usize> = (0..count).filter(|w| !held.contains(w)).collect();
        if seen.len() < least.max(1) || held.is_empty() {
            return Err(Error::Invalid(format!(
                "the text to train on has {} tokens, and {} windows of {window} with what comes after need {}: give a longer \
                 text, or shorter windows (window=) or fewer a step (batch=)",
                ids.len(),
                least.max(1) + 1,
                (least.max(1) + 1) * window + 1
            )));
        }
        Ok(Self { ids, window, seen, held })
    }

    /// Windows that steps see.
    pub fn windows(&self) -> usize {
        self.seen.len()
    }

    /// Tokens of a window.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Tokens that are scored in all windows that steps see.
    pub fn tokens(&self) -> usize {
        self.seen.len() * self.window
    }

    /// Windows that no step sees.
    pub fn held(&self) -> Vec<Window<'_>> {
        self.held.iter().map(|&at| self.at(at)).collect()
    }

    /// A digest of all of it, and of how it is cut.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(self.window as u64).to_le_bytes());
        self.ids.iter().for_each(|id| {
            hasher.update(&id.to_le_bytes());
        });
        hasher.finalize().to_hex().to_string()
    }

    /// As windows of calibration, in an order by chance: as many as so many steps see at most.
    ///
    /// # Errors
    /// Windows of a single token.
    pub fn calibration(&self, most: usize, seed: u64) -> Result<Calibration> {
        let count = self.seen.len().min(most);
        let mut order = Order::new(self.seen(), seed);
        let ids: Vec<u32> = (0..count as u64).flat_map(|number| order.get(number).ids.to_vec()).collect();
        Calibration::new(&ids, Cut { windows: count, length: self.window, seed: None }, None)
    }

    /// Windows that steps see, in the text's order.
    pub fn seen(&self) -> Vec<Window<'_>> {
        self.seen.iter().map(|&at| self.at(at)).collect()
    }

    fn at(&self, window: usize) -> Window<'_> {
        let start = window * self.window;
        Window {
            ids: self.ids.get(start..start + self.window).unwrap_or_default(),
            labels: self.ids.get(start + 1..start + 1 + self.window).unwrap_or_default(),
        }
    }
}

/// A window: tokens, and what came after each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window<'a> {
    /// Tokens.
    pub ids: &'a [u32],
    /// What came after each.
    pub labels: &'a [u32],
}

/// Gives windows out: each once before any comes again, every time in another order. Where it is depends on how many were given
/// out alone.
#[derive(Debug)]
pub struct Order<'a> {
    windows: Vec<Window<'a>>,
    seed: u64,
    /// Which pass over the windows `order` is of.
    pass: Option<u64>,
    order: Vec<usize>,
}

impl<'a> Order<'a> {
    /// Of these windows.
    pub fn new(windows: Vec<Window<'a>>, seed: u64) -> Self {
        Self { windows, seed, pass: None, order: Vec::new() }
    }

    /// Window `number`, from 0, of all that are given out; an empty one where there is none.
    pub fn get(&mut self, number: u64) -> Window<'a> {
        let count = self.windows.len().max(1) as u64;
        let pass = number / count;
        if self.pass != Some(pass) {
            let seed = self.seed.wrapping_add(pass.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            self.order = (0..self.windows.len()).collect();
            for i in (1..self.order.len()).rev() {
                // The bias of a remainder over 64 bits is far below what anyone could see.
                self.order.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
            }
            self.pass = Some(pass);
        }
        let at = self.order.get((number % count) as usize);
        at.and_then(|at| self.windows.get(*at)).copied().unwrap_or(Window { ids: &[], labels: &[] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pass_gives_every_window_once_in_an_order_of_its_own_and_never_what_is_held_back() {
        let text = Text::new((0..4001).collect(), 4, 1).unwrap();
        let held: Vec<u32> = text.held().iter().map(|w| w.ids[0]).collect();
        assert!((10..=16).contains(&held.len()) && text.windows() + held.len() == 1000);
        let mut order = Order::new(text.seen(), 7);
        let passes: Vec<Vec<u32>> = (0..3)
            .map(|pass| {
                let numbers = pass * text.windows() as u64..(pass + 1) * text.windows() as u64;
                numbers
                    .map(|n| {
                        let w = order.get(n);
                        assert!(
                            w.ids.len() == 4 && w.labels == w.ids.iter().map(|i| i + 1).collect::<Vec<_>>()
                        );
                        w.ids[0]
                    })
                    .collect()
            })
            .collect();
        for pass in &passes {
            let mut sorted = pass.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), text.windows());
            assert!(!held.iter().any(|h| pass.contains(h)) && !pass.is_sorted());
        }
        assert!(passes[0] != passes[1] && passes[1] != passes[2]);
        // Wherever one begins.
        assert_eq!(Order::new(text.seen(), 7).get(1500), order.get(1500));
        assert!((0..50).any(|n| Order::new(text.seen(), 8).get(n) != order.get(n)));
    }

    #[test]
    fn a_text_that_is_too_short_is_refused_with_what_it_takes() {
        for (tokens, window, least) in [(0, 4, 1), (5, 4, 1), (8, 4, 1), (100, 4, 24)] {
            let error = Text::new((0..tokens).collect(), window, least).unwrap_err().to_string();
            assert!(error.contains("longer text"), "{error}");
        }
        assert!(Text::new((0..9).collect(), 4, 1).is_ok());
        assert!(Text::new((0..101).collect(), 4, 24).is_ok());
    }
}
