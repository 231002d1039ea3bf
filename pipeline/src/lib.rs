//! Plans and runs conversions.
//!
//! ```text
//! recipe -> passes (views; rankings and finished units, kept as they are found)
//!        -> plan (headers only) -> shard after shard: survey, encode, decode and compare, publish
//!                               -> merge (index, configuration, manifest last)
//! ```
//!
//! Work inside a shard is cut into pieces that all threads share, so memory is bounded by the pieces
//! in flight and not by shards, units or tensors. The output depends on the source and the recipe
//! alone.

pub mod bench;
mod blocks;
mod budget;
mod card;
mod carried;
mod chain;
mod complete;
mod convert;
mod coverage;
mod duplicates;
mod error;
mod export;
mod fingerprint;
mod foreseen;
mod gguf;
mod job;
mod joint;
mod journal;
mod measuring;
mod merge;
mod method;
mod output;
mod partial;
mod pass;
mod plan;
mod progress;
mod quantise;
mod rank;
mod receipt;
mod recipe;
mod resumed;
mod shard;
mod sink;
mod source;
mod space;
mod sparsify;
mod spread;
mod stage;
mod steps;
mod survey;
mod train;
mod work;
mod worker;
mod workload;

pub use budget::Budget;
pub use card::Measured;
pub use chain::{CalibrationText, Request};
pub use convert::{Options, Summary, convert, convert_request, restore};
pub use coverage::Uncovered;
pub use error::{Error, Result, listed};
pub use export::{ExportFormat, export};
pub use llmpress_quantize::{Learned, Lesson, MeanBits, Quantiser, Taught};
pub use method::Method;
pub use pass::{Pass, recorded_passes, view};
pub use plan::{PassForecast, Plan, PlannedPass, PlannedShard, PlannedUnit};
pub use progress::{Counted, Progress, Task, Watch};
pub use quantise::{CalibrationRecord, QuantiseForecast, Quantised};
pub use rank::{Saved, rank};
pub use recipe::{Recipe, Rule, Target};
pub use sparsify::{Share, Sparsified, Sparsifier};
pub use spread::Spread;
pub use train::{Ast, Evaluated, Trained};
pub use worker::{Scratch, Worked};
pub use workload::{Rate, Traffic, Workload};
