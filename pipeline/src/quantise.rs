//! Quantising passes: which tensors, how, and the finished units that they leave.
//!
//! ```text
//! "gptq:w4a8,g128" + rules --headers--> a spec a tensor --data, block by block--> finished units in a stage --> view
//! ```

mod data_free;
mod forecast;
mod record;
mod run;
mod sparse;
mod targets;
mod whole;

use llmpress_quantize::Quantiser;
use serde::{Deserialize, Serialize};

pub(crate) use data_free::run as run_by_matrix;
pub use forecast::QuantiseForecast;
pub(crate) use forecast::{check_whole_fits, expected_bytes, forecast};
pub(crate) use record::files as record_files;
pub(crate) use run::{Pass as Run, run};
pub(crate) use sparse::{
    check as check_sparse, expected_bytes as expected_sparse_bytes, is_sparse, of_view as sparse_of_view,
};
pub(crate) use targets::{Assigned, targets};

/// A quantising pass that has run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantised {
    /// What was asked for.
    pub to: Quantiser,
    /// What it went by, if by a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationRecord>,
}

/// The windows of tokens that a pass went by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationRecord {
    /// How many.
    pub windows: usize,
    /// Tokens of each.
    pub window: usize,
    /// Digest of their ids.
    pub digest: String,
}
