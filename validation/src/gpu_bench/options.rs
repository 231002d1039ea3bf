//! What is asked for.

use std::path::PathBuf;
use std::time::Duration;

/// What is run, where, and for how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// The `llmpress` program that the calls start.
    pub program: PathBuf,
    /// What it says of itself, for the report.
    pub version: String,
    /// Where the report goes.
    pub out: PathBuf,
    /// Where the models that are made lie while it runs: gigabytes. Removed at the end.
    pub scratch: PathBuf,
    /// Bytes that may be taken there; what is free if none.
    pub scratch_bytes: Option<u64>,
    /// The GPU's number.
    pub ordinal: usize,
    /// A small checkpoint with a tokenizer to compare processor and GPU on; one with random weights if there is none.
    pub model: Option<PathBuf>,
    /// The text for it; its `eval.txt` or made-up words if there is none.
    pub text: Option<PathBuf>,
    /// Seconds for everything.
    pub budget: Duration,
    /// Most layers of the model of 8B shapes.
    pub layers: usize,
    /// Run these steps only, and what they need; all if empty.
    pub only: Vec<String>,
    /// Run nothing after this step.
    pub stop_after: Option<String>,
    /// Replace a report that is there.
    pub force: bool,
}

/// The budget unless another is given.
pub const BUDGET: Duration = Duration::from_secs(420);
