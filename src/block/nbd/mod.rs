//! Reads volumes from NBD exports on Unix sockets, QEMU's above all.
//!
//! ```text
//! socket ── negotiate ──► client ──► map      what to read
//!           protocol      answer └─► reader   extents, several at once
//! ```
//!
//! The server runs on this host with a guest inside it: every byte of it is
//! checked and every wait has an end.

mod answer;
mod client;
#[cfg(test)]
mod device_tests;
mod endpoint;
mod fault;
mod live;
mod map;
mod negotiate;
mod protocol;
mod reader;
mod request;
mod socket;
#[cfg(test)]
mod tests;

pub use self::{
    client::{Client, Finished, MAX_IN_FLIGHT},
    endpoint::{Context, Endpoint, Role, fault},
    fault::{Code, Fault, Violation},
    live::{ScratchExport, SnapshotExport},
    map::{Allocated, Content, Extents},
    reader::{Guide, Wanted, check_size, read_all},
    socket::{Socket, Stream},
};
