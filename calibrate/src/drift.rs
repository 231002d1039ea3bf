//! How far activations of a changed model are from those of the original one, seen through what they are now.
//!
//! ```text
//! D = (X' - X) X^T / tokens      X: what a linear multiplies now, X': what it multiplied before anything was changed
//!
//! W X' is what it should give out: the least squares of (W' X - W X') have W' = W + W D (X X^T)^-1 tokens
//! ```

use llmpress_formats::{Error, Result};
use llmpress_model::Panels;
use rayon::prelude::*;

use crate::moments::{Blocks, Moments, RUN_TOKENS, add_run, token_rows};

/// Sums over all tokens of differences times activations.
#[derive(Clone, Debug, PartialEq)]
pub struct Drift {
    features: usize,
    tokens: usize,
    sums: Vec<f32>,
    now: Vec<f32>,
    away: Vec<f32>,
    panels: Vec<f32>,
}

impl Drift {
    /// None yet, of so many features.
    ///
    /// # Errors
    /// More features than memory can be asked for.
    pub fn new(features: usize) -> Result<Self> {
        let sums = Moments::square(features)?;
        Ok(Self { features, tokens: 0, sums, now: vec![], away: vec![], panels: vec![] })
    }

    /// Adds a window: activations now, and those of the original model.
    ///
    /// # Errors
    /// Other features, or not the same tokens.
    pub fn add(&mut self, now: &Panels, original: &Panels) -> Result<()> {
        let sizes = |x: &Panels| (x.features(), x.tokens());
        if sizes(now) != sizes(original) || now.features() != self.features {
            return Err(Error::Invalid(format!(
                "activations of {:?} and {:?} do not go with {} features",
                sizes(now),
                sizes(original),
                self.features
            )));
        }
        let (features, tokens) = sizes(now);
        token_rows(now, &mut self.now);
        token_rows(original, &mut self.away);
        self.away.par_iter_mut().zip(&self.now).for_each(|(away, now)| *away -= now);
        for first in (0..tokens).step_by(RUN_TOKENS) {
            let run = first..(first + RUN_TOKENS).min(tokens);
            let rows = [&self.away[..], &self.now[..]];
            add_run(&mut self.sums, rows, &mut self.panels, (features, tokens), run, Blocks::All);
        }
        self.tokens += tokens;
        Ok(())
    }

    /// D, `[features, features]`.
    #[must_use]
    pub fn close(mut self) -> Vec<f32> {
        let factor = (1.0 / self.tokens.max(1) as f64) as f32;
        self.sums.par_iter_mut().for_each(|s| *s *= factor);
        self.sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_is_the_difference_times_what_is_now() {
        let (features, lengths) = (101, [30, 490]);
        let value = |i: usize| ((i * 7919) % 1013) as f32 / 500.0 - 1.0;
        let panels = |tokens: usize, seed: usize| {
            let mut x = Panels::zeros(features, tokens);
            (0..tokens).for_each(|t| x.set_token(t, (0..features).map(|f| value(seed + t * features + f))));
            x
        };
        let windows = lengths.map(|tokens| (panels(tokens, tokens), panels(tokens, 3 * tokens + 1)));
        let mut drift = Drift::new(features).unwrap();
        windows.iter().for_each(|(now, original)| drift.add(now, original).unwrap());
        assert!(drift.add(&panels(3, 0), &panels(4, 0)).is_err());
        let found = drift.close();
        for i in 0..features {
            for j in (0..features).step_by(7) {
                let exact: f64 = windows
                    .iter()
                    .flat_map(|(now, was)| {
                        (0..now.tokens()).map(move |t| (was.get(i, t) - now.get(i, t), now.get(j, t)))
                    })
                    .map(|(a, b)| f64::from(a) * f64::from(b))
                    .sum::<f64>()
                    / lengths.iter().sum::<usize>() as f64;
                assert!((f64::from(found[i * features + j]) - exact).abs() < 1e-5, "{i} {j}");
            }
        }
    }
}
