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
mod convert;
mod coverage;
mod error;
mod fingerprint;
mod merge;
mod method;
mod output;
mod plan;
mod progress;
mod receipt;
mod recipe;
mod shard;
mod sink;
mod source;
mod survey;
mod work;

pub use budget::Budget;
pub use convert::{Options, Summary, convert, restore};
pub use coverage::Uncovered;
pub use error::{Error, Result};
pub use method::Method;
pub use plan::{Plan, PlannedShard, PlannedUnit};
pub use progress::Progress;
pub use recipe::{Recipe, Rule};
