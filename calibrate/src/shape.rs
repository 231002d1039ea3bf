//! What reads one input, by sizes alone: what memory is reckoned from.

use llmpress_model::SharedInput;

/// Linears that read one input: features, and the rows of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputShape {
    /// Columns of all of them.
    pub features: u64,
    /// Rows of each.
    pub rows: Vec<u64>,
}

impl InputShape {
    /// Of an input whose tensors have so many rows.
    pub fn new(input: &SharedInput, rows: impl Fn(&str) -> u64) -> Self {
        Self { features: input.features as u64, rows: input.tensors.iter().map(|t| rows(t)).collect() }
    }

    /// Weights of all of them.
    pub fn weights(&self) -> u64 {
        self.rows.iter().fold(0u64, |sum, rows| sum.saturating_add(rows.saturating_mul(self.features)))
    }
}
