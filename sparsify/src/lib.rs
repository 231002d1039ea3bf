//! 2:4 sparsity: of every four consecutive inputs of a row two are kept.
//!
//! ```text
//! Sparsifier, as it is written: rule, reconstruction, boost
//! what o and down multiply (+ second moments)      --> an order of channels of which quads keep more
//! weights (+ second moments of what they multiply) --> masks, weights that make up for what is dropped
//! a sub-layer's matrices, streams                  --> reconstructed together, masks kept
//! what is missing of a matrix                      --> S: weights for sums of inputs, beside it
//! distances of the logits, matrix by matrix        --> which of them stay dense
//! all of it trained against the dense model        --> ast: masks that adapt, dropped weights that decay
//! model, sparsifiers, calibration                  --> run: block by block, to a Sink
//! ```

pub mod ast;
mod effort;
mod masked;
mod masks;
mod matrix;
mod memory;
mod partly;
mod permute;
mod quads;
mod reconstruct;
mod refine;
mod reorder;
mod report;
mod rounding;
mod run;
mod slorb;
mod sparsegpt;
mod sparsifier;
#[cfg(test)]
mod testing;
mod unit;

pub use llmpress_calibrate::{InputShape, Residuals};
pub use masks::{magnitude, wanda};
pub use memory::block_peak_bytes;
pub use partly::{Form, Partly, Share, check_dense, check_ratio, choose, keep_dense};
pub use permute::{Permuted, permutations};
pub use quads::{QUAD, Sparse};
pub use report::{Dense, Finished, Lesson, Part, Reconstructed, Report, bits_per_weight};
pub use run::{FinishedBlock, Job, Sink, State, run};
pub use slorb::{GROUP, LeastSquares, add as add_sums, groups, sum_preserving};
pub use sparsegpt::{Pruned, sparsegpt};
pub use sparsifier::{Reconstruct, Rule, Sparsifier};
