//! What can go wrong on a device.

/// The result of work on a device.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no device to work on; says why.
    #[error("{0}")]
    Unavailable(String),
    /// An argument makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Valid, but no kernel does it.
    #[error("{0}")]
    Unsupported(String),
    /// The device has not so much memory.
    #[error("the GPU has no {asked} bytes left: {free} of {total} are free")]
    Memory {
        /// Bytes asked for.
        asked: usize,
        /// Bytes that are free.
        free: usize,
        /// Bytes that it has.
        total: usize,
    },
    /// A call failed in the driver.
    #[error("{call} failed: {reason}")]
    Driver {
        /// What was called.
        call: String,
        /// The driver's name for what happened.
        reason: String,
    },
    /// A kernel broke a rule, says the emulator.
    #[error("{kernel}: {fault}")]
    Fault {
        /// Its name.
        kernel: String,
        /// What it did, and where.
        fault: String,
    },
}
