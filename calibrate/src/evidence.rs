//! How much a text says of a matrix: what second moments are good for, by how many tokens they are of.

use llmpress_formats::{Error, Result};

use crate::{Moments, output_energy};

/// A full Hessian of `n` columns from fewer than `n / TOO_FEW` tokens says too little.
const TOO_FEW: usize = 8;
/// The most columns for which the Hessian stays in memory beside its factor, for what goes beyond error feedback: making up
/// for drift, and going over the columns again.
pub const MOST_COLUMNS: usize = 8192;
/// Tokens a column from which on drift is made up for. Measured at full share: on tinylm 64 a column gain much and 16 next to
/// nothing, on SmolLM2 28 (10 before `down_proj`), of a text unlike the one it is judged by, do harm.
const SURE: f32 = 16.0;

/// The fewest tokens that a Hessian of so many features is of.
pub fn least_tokens(features: usize) -> usize {
    features.div_ceil(TOO_FEW)
}

/// Whether so few tokens were seen that a Hessian says little, in words.
pub fn too_few(moments: &Moments) -> Option<String> {
    let (tokens, needed) = (moments.tokens(), least_tokens(moments.features()));
    (tokens < needed)
        .then(|| format!("{tokens} calibration tokens went through it where {needed} are needed"))
}

/// How much of the drift is made up for: all of it where there are very many tokens, none where they are no more than
/// 16 times the columns. From few tokens the weights would learn the text.
pub fn share_of_drift(tokens: usize, features: usize) -> f32 {
    (1.0 - SURE * features as f32 / tokens.max(1) as f32).max(0.0)
}

/// The mean square of outputs; without moments, or of no tokens, that of the weights times their number.
///
/// # Errors
/// Not whole rows.
pub fn energy(weights: &[f32], moments: Option<&Moments>) -> Result<f64> {
    match moments {
        Some(moments) if moments.tokens() > 0 => output_energy(weights, moments),
        _ => Ok(weights.iter().map(|&w| f64::from(w) * f64::from(w)).sum()),
    }
}

/// An error that says of which tensor.
pub fn named(tensor: &str, error: Error) -> Error {
    match error {
        Error::Invalid(what) => Error::Invalid(format!("{tensor}: {what}")),
        Error::Limit(what) => Error::Limit(format!("{tensor}: {what}")),
        other => other,
    }
}
