//! Transformations that make weights and activations easier to quantise: which ones a model gets.
//!
//! ```text
//! rotations    norms folded into their readers, then R1, R2, R4 of the model's sizes: outliers are spread
//! smoothing    s = sqrt(act / weight) of each channel between a producer and its readers: outliers are shared
//! ```
//!
//! What they do to each tensor is [`llmpress_model::Folds`]; this says which are wanted.

mod rotate;
mod smooth;

pub use rotate::{Rotate, rotations};
pub use smooth::{Smooth, smoothing};
