//! What can be wrong with the arguments or the bytes given to a coder.

/// Why a coder refused its input. The caller knows the file and the tensor and adds them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The encoded bytes break the format.
    #[error("corrupt {component}: {what}")]
    Corrupt {
        /// The component (or part of the encoding) at fault.
        component: &'static str,
        /// What was found and what would be right.
        what: String,
    },
    /// The caller's slices do not fit together.
    #[error("invalid argument: {0}")]
    Invalid(String),
}

impl Error {
    /// A [`Error::Corrupt`] for `component`.
    pub(crate) fn corrupt(component: &'static str, what: impl Into<String>) -> Self {
        Self::Corrupt { component, what: what.into() }
    }
}
