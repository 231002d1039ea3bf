//! What can go wrong between here and a hub.

use std::path::{Path, PathBuf};

/// A result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name or a setting that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Nobody answers, or what answers breaks off again and again.
    #[error("{url}: {why}; what has arrived is kept: run it again, or set HF_ENDPOINT to a mirror")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What happened last.
        why: String,
    },
    /// The hub answers, and not with what was asked for.
    #[error("{url}: the hub answers {status}: {what}")]
    Refused {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What that means and what to do.
        what: String,
    },
    /// What arrived is not what the hub says it is.
    #[error("{url}: {what}")]
    Corrupt {
        /// Where it came from.
        url: String,
        /// What is wrong.
        what: String,
    },
    /// The cache.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The checkpoint itself, as far as its headers tell.
    #[error(transparent)]
    Format(#[from] llmpress_formats::Error),
}

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }

    /// `invalid`, `io`, `refused`, `corrupt`, or what the checkpoint's own error is.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Unreachable { .. } | Self::Io { .. } => "io",
            Self::Refused { .. } => "refused",
            Self::Corrupt { .. } => "corrupt",
            Self::Format(e) => e.kind(),
        }
    }
}
