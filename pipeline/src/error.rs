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
    /// Another process has the output directory.
    #[error("{path}: another llmpress is writing there: wait for it to end", path = path.display())]
    Busy {
        /// The output directory.
        path: PathBuf,
    },
    /// Shards that nobody has made yet.
    #[error("{path}: {count} of {of} units are not done: {units}", path = path.display(), count = missing.len(), units = listed(missing))]
    Missing {
        /// The output directory.
        path: PathBuf,
        /// Their numbers, in order.
        missing: Vec<usize>,
        /// How many there are to be.
        of: usize,
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
    /// `io`, `corrupt`, `unsupported`, `invalid`, `busy`, `missing`, `limit` or `mismatch`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Format(e) => e.kind(),
            Self::Invalid(_) | Self::Output { .. } => "invalid",
            Self::Busy { .. } => "busy",
            Self::Missing { .. } => "missing",
            Self::Limit(_) => "limit",
            Self::Mismatch { .. } => "mismatch",
        }
    }

    /// Whether the same may succeed later or on another machine: files that could not be read or written, no room, an output that others
    /// have, a fault of the memory. Everything else is a fault of what was asked for, or of the source.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Format(e) => matches!(e.kind(), "io" | "limit"),
            Self::Invalid(_) | Self::Output { .. } => false,
            Self::Busy { .. } | Self::Missing { .. } | Self::Limit(_) | Self::Mismatch { .. } => true,
        }
    }
}

/// Numbers in order as ranges: `0-3,7`.
pub fn listed(numbers: &[usize]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let text = |&(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    ranges.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_listed_as_ranges() {
        let cases: [(&[usize], &str); 4] =
            [(&[], ""), (&[3], "3"), (&[0, 1, 2, 7], "0-2,7"), (&[1, 3, 4], "1,3-4")];
        for (numbers, text) in cases {
            assert_eq!(listed(numbers), text);
        }
    }
}
