//! Activations: features x tokens, in panels of up to 48 tokens.
//!
//! ```text
//! panel 0: feature 0 of tokens 0..48 | feature 1 of tokens 0..48 | ...
//! panel 1: feature 0 of tokens 48..  | ...                              the last one is narrower
//! ```
//!
//! A run of features of a panel is contiguous, so heads, row blocks and norms are plain slices, and the tokens
//! of a panel fill the lanes of a vector. A single token is an ordinary vector.

use std::ops::Range;

use llmpress_kernels::cpu::PANEL;

/// A matrix of activations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Panels {
    features: usize,
    tokens: usize,
    data: Vec<f32>,
}

impl Panels {
    /// All zero.
    #[must_use]
    pub fn zeros(features: usize, tokens: usize) -> Self {
        Self { features, tokens, data: vec![0.0; features * tokens] }
    }

    /// Features of a token.
    #[must_use]
    pub fn features(&self) -> usize {
        self.features
    }

    /// Tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of panels.
    #[must_use]
    pub fn count(&self) -> usize {
        self.tokens.div_ceil(PANEL)
    }

    /// The tokens of a panel.
    #[must_use]
    pub fn range(&self, panel: usize) -> Range<usize> {
        panel * PANEL..((panel + 1) * PANEL).min(self.tokens)
    }

    /// How many tokens a panel has.
    #[must_use]
    pub fn width(&self, panel: usize) -> usize {
        self.range(panel).len()
    }

    /// A panel, `panel[feature * width + token]`.
    #[must_use]
    pub fn panel(&self, panel: usize) -> &[f32] {
        let range = self.range(panel);
        &self.data[range.start * self.features..range.end * self.features]
    }

    /// A panel to write to.
    pub fn panel_mut(&mut self, panel: usize) -> &mut [f32] {
        let range = self.range(panel);
        &mut self.data[range.start * self.features..range.end * self.features]
    }

    /// The panels to write to, in order.
    pub fn panels_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.data.chunks_mut((self.features * PANEL).max(1))
    }

    /// All of it, panel after panel.
    #[must_use]
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All of it to write to.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    fn index(&self, feature: usize, token: usize) -> usize {
        let panel = token / PANEL;
        panel * PANEL * self.features + feature * self.width(panel) + token % PANEL
    }

    /// One value.
    #[must_use]
    pub fn get(&self, feature: usize, token: usize) -> f32 {
        self.data[self.index(feature, token)]
    }

    /// Sets one value.
    pub fn set(&mut self, feature: usize, token: usize, value: f32) {
        let index = self.index(feature, token);
        self.data[index] = value;
    }

    /// The features of a token, in order.
    pub fn token(&self, token: usize) -> impl Iterator<Item = f32> {
        let panel = self.panel(token / PANEL);
        panel.iter().skip(token % PANEL).step_by(self.width(token / PANEL)).copied()
    }

    /// Sets the features of a token.
    pub fn set_token(&mut self, token: usize, values: impl IntoIterator<Item = f32>) {
        let (panel, width) = (token / PANEL, self.width(token / PANEL));
        let to = self.panel_mut(panel).iter_mut().skip(token % PANEL).step_by(width);
        to.zip(values).for_each(|(to, value)| *to = value);
    }

    /// Makes it `features` x `tokens`; what it holds then is unspecified.
    pub fn resize(&mut self, features: usize, tokens: usize) {
        (self.features, self.tokens) = (features, tokens);
        self.data.resize(features * tokens, 0.0);
    }

    /// Splits the features into runs of `rows` (the last one shorter) and gives each run its part of every
    /// panel, so that threads can write them side by side.
    pub fn row_blocks_mut(&mut self, rows: usize) -> Vec<Vec<&mut [f32]>> {
        let blocks = self.features.div_ceil(rows);
        let mut result: Vec<Vec<&mut [f32]>> =
            (0..blocks).map(|_| Vec::with_capacity(self.count())).collect();
        let (features, tokens) = (self.features, self.tokens);
        for (panel, data) in self.data.chunks_mut((features * PANEL).max(1)).enumerate() {
            let width = PANEL.min(tokens - panel * PANEL);
            for (block, part) in result.iter_mut().zip(data.chunks_mut(rows * width)) {
                block.push(part);
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_row_blocks_cover_every_value_once() {
        for tokens in [1, 2, 47, 48, 49, 96, 100] {
            let mut panels = Panels::zeros(5, tokens);
            for token in 0..tokens {
                panels.set_token(token, (0..5).map(|f| (token * 5 + f) as f32));
            }
            for token in 0..tokens {
                assert!(panels.token(token).eq((0..5).map(|f| (token * 5 + f) as f32)));
                assert_eq!(panels.get(3, token), (token * 5 + 3) as f32);
            }
            let copy = panels.clone();
            let blocks = panels.row_blocks_mut(2);
            assert_eq!(blocks.len(), 3);
            for (block, parts) in blocks.iter().enumerate() {
                for (panel, part) in parts.iter().enumerate() {
                    let width = copy.width(panel);
                    let from = block * 2 * width;
                    assert_eq!(*part, &copy.panel(panel)[from..from + part.len()]);
                }
            }
        }
    }
}
