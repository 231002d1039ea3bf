//! AST: adaptive sparse training (Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
//! 2024).
//!
//! ```text
//! text --packed, shuffled--> windows of a step --student: products with W * M (+ S)--> loss against the dense teacher
//!      derivatives by the products, straight through to all of W --clipped--> W, S, norms       every n steps: M by |W|
//!                                                                             dropped ones decay, lambda(t) W of their own
//! ```
//!
//! W is kept whole: what is dropped goes on learning and comes back where it outgrows what is kept. `settings.rs` has what a run is
//! asked for, `optimiser.rs` the update, `matrix.rs` and `vector.rs` what is learned, `student.rs` all of it, `trainer.rs` a step and an
//! evaluation, `train.rs` a run, `blockwise.rs` another for models that do not fit, `state.rs` what resumes it, `record.rs` what is told
//! of it. Windows, the loss and the loop are `learn`'s.

mod blockwise;
mod matrix;
mod optimiser;
mod picture;
mod record;
mod settings;
mod state;
mod student;
mod train;
mod trainer;
mod vector;

pub use blockwise::{BlockwiseSink, BlockwiseTask, train_blockwise};
pub use llmpress_learn::{Evaluated, Text, Then, Watch, Window};
pub use matrix::Start;
pub use picture::{divergence_svg, flips_svg, loss_svg, perplexity_svg};
pub use record::{Record, Stepped};
pub use settings::Ast;
pub use student::{Outcome, TrainedNorm};
pub use train::{Task, check, measure, train};
