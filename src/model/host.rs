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

/// Room in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What an image can still take.
    pub free: ByteSize,
    /// All there is.
    pub total: ByteSize,
}
