//! Telling whoever waits how far a conversion is.

/// Is told how far a conversion is, from any thread.
pub trait Progress: Sync {
    /// The whole work in bytes: every pass over the tensors counts.
    fn start(&self, total: u64);
    /// So many bytes of it are done.
    fn advance(&self, bytes: u64);
    /// A shard is complete.
    fn shard(&self, file: &str);
}
