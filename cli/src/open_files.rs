//! How many files may be open: every shard of a checkpoint stays so.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit, often 1024, to the hard one, which any program may do.
pub(crate) fn raise_limit() {
    let now = getrlimit(Resource::Nofile);
    // Where it is refused, opening a file too many says what to do.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum });
}
