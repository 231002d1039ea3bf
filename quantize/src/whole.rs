//! The rung above blocks: the whole decoder learned end to end, by distillation from the dense model.
//!
//! ```text
//! units as the rungs below left them --> places, grids (latent.rs) of every matrix     fp: the dense model, its head
//! windows of a step:   student: Decoder with all of them --> kd T^2 KL(dense | student) + (1 - kd) (-ln p of what came)
//!                      <-- derivatives, clipped --> AdamW on places and grids                 windows held back: is it better?
//! ```
//!
//! What drifted in the blocks before a matrix is most of what a few bits lose, and no block can mend it by itself. `task.rs` has what is asked
//! for, `student.rs` the matrices, `trainer.rs` a step, an evaluation and a state, `record.rs` what is told of a run. Windows, the loss and the
//! loop are `learn`'s.

mod picture;
mod record;
mod student;
mod task;
mod trainer;

pub use picture::{whole_divergence_svg, whole_loss_svg};
pub use record::{Record, Stepped};
pub(crate) use task::BATCH;
pub use task::{LearnedWhole, WholeTask, check, learn_whole};
