//! What this host can do.

use super::ByteSize;

/// Something imaged does where the host has what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// Short name, e.g. `io_uring` or `instance web-3`.
    pub name: String,
    /// Whether it is there.
    pub available: bool,
    /// Which variant is used, or what is missing and how to get it.
    pub details: String,
}

/// What went to a store and came from it since the daemon began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of parts that it has taken.
    pub stored: ByteSize,
    /// Bytes of objects that were read; a piece that is read twice counts
    /// twice, wherever it came from.
    pub read: ByteSize,
    /// Calls that failed in the end.
    pub failed: u64,
    /// Requests that were made again because the store did not answer, or was
    /// busy.
    pub retried: u64,
}

/// Room in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What an image can still take.
    pub free: ByteSize,
    /// All there is.
    pub total: ByteSize,
}
