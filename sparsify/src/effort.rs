//! How long parts of a job take beside each other: what progress is counted in.
//!
//! ```text
//! a weight that is made sparse: 1      that is reconstructed: what its steps multiply it with, over what making it sparse does
//! ```

use llmpress_calibrate::Calibration;

use crate::Sparsifier;

/// Products with each weight that a token takes in a step: forward, and back to weights and inputs.
const PRODUCTS: u64 = 3;

/// Reconstructing a weight of a matrix of `cols`, in times of making it sparse: 0 where that is not asked for.
pub(crate) fn reconstructing(how: &Sparsifier, cols: u64, text: Option<&Calibration>) -> u64 {
    let (Some(reconstruct), Some(text)) = (how.reconstruct, text) else { return 0 };
    let step = PRODUCTS.saturating_mul(text.length() as u64);
    let once = (text.tokens() as u64).saturating_mul(2).saturating_add(cols);
    u64::from(reconstruct.steps()).saturating_mul(step).div_ceil(once.max(1)).max(1)
}
