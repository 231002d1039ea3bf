//! What calibrated passes go by: windows of tokens, made in one way from texts, and what a model makes of them, layer by
//! layer.
//!
//! ```text
//! files (plain text, or JSON lines with a `text`) --> documents --> ids, joined --> windows
//!                                                        the first ones, or some drawn by a seed
//! windows --> residual streams, a layer at a time --> second moments of what its linears multiply
//! logits of two models --> their distance
//! ```

mod distance;
mod drift;
mod moments;
mod sensitivity;
mod stream;
mod texts;
mod windows;

pub use distance::{Distance, DistanceKind, distances};
pub use drift::Drift;
pub use moments::{Extent, Moments};
pub use sensitivity::output_energy;
pub use stream::{Room, Streams, Tap};
pub use texts::Texts;
pub use windows::{Calibration, Cut};
