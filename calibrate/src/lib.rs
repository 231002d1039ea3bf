//! What calibrated passes go by: windows of tokens, made in one way from texts.
//!
//! ```text
//! files (plain text, or JSON lines with a `text`) --> documents --> ids, joined --> windows
//!                                                        the first ones, or some drawn by a seed
//! ```

mod texts;
mod windows;

pub use texts::Texts;
pub use windows::{Calibration, Cut};
