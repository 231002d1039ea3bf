//! Telling whoever waits how far a download is.

/// Hears of bytes that are there.
pub trait Progress: Sync {
    /// There are so many to be had in all.
    fn total(&self, bytes: u64);
    /// So many more are there.
    fn advance(&self, bytes: u64);
    /// So many were wrong: they come again.
    fn retreat(&self, bytes: u64);
}

/// Hears nothing.
pub(crate) struct Nobody;

impl Progress for Nobody {
    fn total(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn retreat(&self, _: u64) {}
}
