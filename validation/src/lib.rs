//! Proofs that a converted checkpoint is what it should be.
//!
//! ```text
//! digests:    every byte of a converted directory is the one that was written, and decodes to the original
//! basis:      transformations of two checkpoints are undone before they are compared
//! bit_exact:  every tensor of two checkpoints, word for word
//! difference: how far the tensors of two checkpoints are from each other
//! logits:     what two checkpoints compute, bit for bit
//! perplexity, divergence: how well a model predicts a text, and how far it is from its base
//! tasks:      which answers it gives to questions, and which of them are others than its base's
//! kernel_bench, speed: what kernels and models take; gpu_bench: all of this on a GPU, in bounded time
//! ```

mod basis;
mod bit_exact;
mod claims;
mod difference;
mod digests;
mod divergence;
mod element;
pub mod gpu_bench;
mod kernel_bench;
mod likelihood;
mod logits;
mod perplexity;
mod pruned;
mod random_model;
mod speed;
mod tasks;
mod windows;

pub use basis::in_one_basis;
pub use bit_exact::{Comparison, Difference, Quantised, bit_exact};
pub use difference::{CheckpointDifference, Incomparable, Norms, TensorDifference, difference};
pub use digests::{DigestReport, Fault, verify_digests};
pub use divergence::{Distribution, Divergence, kl_divergence};
pub use kernel_bench::{
    Ceilings, CpuKernelReport, CpuKernelRow, KernelOptions, KernelReport, KernelRow, KernelShape,
    bench_cpu_kernels, bench_kernels,
};
pub use logits::{LogitComparison, logits_exact};
pub use perplexity::{Perplexity, perplexity};
pub use random_model::{RandomModel, random_text};
pub use speed::{Rate, SpeedOptions, SpeedRow, speed};
pub use tasks::{
    ChoiceReport, ClozeReport, Flips, Question, Scored, Share, TaskFlips, TaskReport, flips, score,
    task_report,
};
pub use windows::Protocol;

/// Bytes read at a time by each thread.
const PIECE: usize = 2 << 20;
