//! What can go wrong in a conversion.

use std::path::PathBuf;

/// A result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a plan or a conversion failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or a checkpoint is at fault.
    #[error(transparent)]
    Format(#[from] llmpress_formats::Error),
    /// The caller's argument.
    #[error("{0}")]
    Invalid(String),
    /// The output directory is in the way.
    #[error("{path}: {what}", path = path.display())]
    Output {
        /// The output directory.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// More memory, disk or threads would be needed than are allowed.
    #[error("{0}")]
    Limit(String),
    /// What was written does not decode to what was read. Nothing was published.
    #[error(
        "unit {unit}: decoding does not give back the source at byte {offset} of its tensors; nothing was published. This is a fault of llmpress or of the memory of this computer: please report it"
    )]
    Mismatch {
        /// The unit.
        unit: String,
        /// The first byte that differs.
        offset: u64,
    },
}

impl Error {
    /// `io`, `corrupt`, `unsupported`, `invalid`, `limit` or `mismatch`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Format(e) => e.kind(),
            Self::Invalid(_) | Self::Output { .. } => "invalid",
            Self::Limit(_) => "limit",
            Self::Mismatch { .. } => "mismatch",
        }
    }
}
