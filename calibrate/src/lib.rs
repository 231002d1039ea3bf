//! What calibrated passes go by: windows of tokens, made in one way from texts, and what a model makes of them, layer by
//! layer.
//!
//! ```text
//! files (plain text, or JSON lines with a `text`) --> documents --> ids, joined --> windows
//!                                                        the first ones, or some drawn by a seed
//! windows --> residual streams, a layer at a time --> second moments of what its linears multiply
//! logits of two models --> their distance
//! one matrix in another form --> distance of the logits --> the forms of least loss under a budget
//! second moments --> factor of the Hessian --> error feedback along the columns, weights that make up for drift
//! ```

mod allocate;
mod distance;
mod drift;
mod evidence;
mod factor;
mod family;
mod feedback;
mod measure;
mod moments;
mod residuals;
mod retarget;
mod sensitivity;
mod shape;
mod shares;
mod stream;
mod texts;
mod windows;

pub use allocate::{Choice, allocate};
pub use distance::{Distance, DistanceKind, distances};
pub use drift::Drift;
pub use evidence::{MOST_COLUMNS, energy, least_tokens, named, share_of_drift, too_few};
pub use factor::{DAMPING, Factor, Order};
pub use family::{check, check_layout};
pub use feedback::{Piece, feed_back};
pub use measure::{MEASURED_WINDOWS, Measured, Probe, Sensitivity, measure};
pub use moments::{Extent, Moments};
pub use residuals::Residuals;
pub use retarget::retarget;
pub use sensitivity::output_energy;
pub use shape::InputShape;
pub use shares::Shares;
pub use stream::{Room, Streams, Tap};
pub use texts::Texts;
pub use windows::{Calibration, Cut};
