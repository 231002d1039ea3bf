//! What can be wrong with a checkpoint.

use std::io;
use std::path::{Path, PathBuf};

/// A result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint could not be read or written. The kinds a caller can act on stay apart.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {path}: {source}{mend}", path = path.display(), mend = mend(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried: `open`, `read`, `write`, `sync`, `rename`, ...
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// The input breaks its format.
    #[error("{path}: {tensor}{what}", path = path.display(), tensor = label(tensor.as_deref()))]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The tensor, if one is at fault.
        tensor: Option<String>,
        /// What is wrong and what would be right.
        what: String,
    },
    /// The input is valid but not handled.
    #[error("{path}: {tensor}{what}", path = path.display(), tensor = label(tensor.as_deref()))]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The tensor, if one is at fault.
        tensor: Option<String>,
        /// What is not handled.
        what: String,
    },
    /// The caller's argument.
    #[error("{0}")]
    Invalid(String),
    /// More memory or disk would be needed than is allowed.
    #[error("{0}")]
    Limit(String),
}

fn label(tensor: Option<&str>) -> String {
    tensor.map(|t| format!("{t}: ")).unwrap_or_default()
}

/// `EMFILE` of Linux and the BSDs: this process has too many files open.
const TOO_MANY_OPEN_FILES: i32 = 24;

fn mend(source: &io::Error) -> &'static str {
    if source.raw_os_error() == Some(TOO_MANY_OPEN_FILES) {
        return "; every shard stays open: allow more open files (ulimit -n)";
    }
    match source.kind() {
        io::ErrorKind::StorageFull => "; free some space and run again with --resume",
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            "; choose a directory that you may use"
        }
        _ => "",
    }
}

impl Error {
    /// An [`Error::Io`].
    pub fn io(path: impl AsRef<Path>, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), action, source }
    }

    /// An [`Error::Corrupt`].
    pub fn corrupt(path: impl AsRef<Path>, tensor: Option<&str>, what: impl Into<String>) -> Self {
        Self::Corrupt { path: path.as_ref().to_owned(), tensor: tensor.map(str::to_owned), what: what.into() }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(path: impl AsRef<Path>, tensor: Option<&str>, what: impl Into<String>) -> Self {
        Self::Unsupported {
            path: path.as_ref().to_owned(),
            tensor: tensor.map(str::to_owned),
            what: what.into(),
        }
    }

    /// `io`, `corrupt`, `unsupported`, `invalid` or `limit`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::Corrupt { .. } => "corrupt",
            Self::Unsupported { .. } => "unsupported",
            Self::Invalid(_) => "invalid",
            Self::Limit(_) => "limit",
        }
    }
}
