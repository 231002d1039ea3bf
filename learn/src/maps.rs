//! How far attention weighs tokens otherwise than it is to.
//!
//! ```text
//! KL(P* | P) of each token's row = sum p* (ln p* - ln p)        by the scores that P was made of: P - P*
//! ```
//!
//! (ABQ-LLM, section 3.2, whose published code takes a softmax of what is one already: this is the divergence itself.)

use llmpress_model::Panels;

/// What a sub-layer's heads take of each token, before they weigh it; of an MLP nothing. Maps themselves grow with the square
/// of the window: they are made again where they are needed.
#[derive(Debug, Default)]
pub struct Maps {
    pub(crate) query: Panels,
    /// `[heads, tokens, head_dim]`.
    pub(crate) keys: Vec<f32>,
}

/// What counts as the least probability.
const LEAST: f32 = 1e-30;

/// The sum over all columns.
pub(crate) fn divergence(wanted: &[f32], p: &[f32]) -> f64 {
    let terms = wanted.iter().zip(p).filter(|(wanted, _)| **wanted > 0.0);
    terms.map(|(wanted, p)| f64::from(*wanted) * f64::from(wanted.max(LEAST) / p.max(LEAST)).ln()).sum()
}

/// Adds `share` times its derivative by scores.
pub(crate) fn divergence_back(wanted: &[f32], p: &[f32], share: f32, d: &mut [f32]) {
    d.iter_mut().zip(wanted).zip(p).for_each(|((d, wanted), p)| *d += share * (p - wanted));
}
