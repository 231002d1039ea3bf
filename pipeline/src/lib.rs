//! Plans and runs conversions.
//!
//! ```text
//! recipe -> plan (headers only) -> shard after shard: survey, encode, decode and compare, publish
//!                               -> merge (index, configuration, manifest last)
//! ```
//!
//! Work inside a shard is cut into pieces that all threads share, so memory is bounded by the pieces
//! in flight and not by shards, units or tensors. The output depends on the source and the recipe
//! alone.

pub mod bench;
mod budget;
mod carried;
mod complete;
mod convert;
mod encode;
mod error;
mod fingerprint;
mod journal;
mod merge;
mod output;
mod plan;
mod receipt;
mod recipe;
mod resumed;
mod shard;
mod source;
mod survey;

pub use budget::Budget;
pub use convert::{Options, Progress, Summary, convert, restore};
pub use error::{Error, Result};
pub use plan::{Plan, PlannedShard, PlannedUnit};
pub use recipe::{Method, Recipe, Rule};
