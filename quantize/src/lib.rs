//! Quantisers: what turns a matrix into codes of a few bits and grids.
//!
//! ```text
//! Quantiser, as it is written: Spec (width, groups, zero point, rung) and Transformations of the model
//! weights (+ h, the squares of what each column multiplies) --> Grid: scales and zero points as they are stored
//! weights, Grid (+ Factor of the Hessian)                   --> codes --> a finished unit
//! model, specs, calibration                                 --> run: block by block, to a Sink
//! model as that left it, dense model                        --> whole: learned end to end
//! model (+ calibration)                                     --> fold: transformations that make it easier to quantise
//! ```

mod alone;
mod effort;
mod fold;
mod gptq;
mod grid;
mod kept;
mod latent;
mod learn;
mod lesson;
mod line;
mod matrix;
mod memory;
mod on_grid;
mod picture;
mod polish;
mod quantiser;
mod report;
mod rounding;
mod run;
mod search;
mod short;
mod spec;
mod whole;
mod widths;

pub use fold::{Rotate, Smooth, Transformations, rotations, smoothing};
pub use gptq::{Fed, gptq};
pub use grid::Grid;
pub use kept::{KEPT_SUMS, quantise_kept};
pub use lesson::{Lesson, Taught};
pub use llmpress_calibrate::{DAMPING, Factor, InputShape, Order, Residuals};
pub use matrix::makes_up;
pub use memory::block_peak_bytes;
pub use picture::{error_svg, loss_svg};
pub use quantiser::Quantiser;
pub use report::{Finished, Learned, Report};
pub use run::{FinishedBlock, Job, Sink, State, run};
pub use spec::{Beside, Grain, Learn, LearnedPart, Rung, Spec, ZeroPoint};
pub use whole::{
    LearnedWhole, Record, Stepped, WholeTask, check as check_whole, learn_whole, whole_divergence_svg,
    whole_loss_svg,
};
pub use widths::{MeanBits, Measured, assign as assign_widths, expected_bits};
