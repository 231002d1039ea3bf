//! Quantisers: what turns a matrix into codes of a few bits and grids.
//!
//! ```text
//! model (+ calibration) --> fold: transformations that make it easier to quantise
//! ```

mod fold;

pub use fold::{Rotate, Smooth, rotations, smoothing};
