//! QEMU's machine protocol (QMP): the commands that imaged may send, and a
//! client that sends no others.
//!
//! ```text
//! greeting ─► qmp_capabilities ─► commands and answers, events between ─► end
//! ```
//! Facts: QEMU, `docs/interop/qmp-spec.rst` and "QMP reference"; what was
//! seen is of QEMU 7.2.

mod answer;
mod call;
mod client;
pub mod codec;
mod command;
mod connection;
mod event;
mod names;
#[cfg(test)]
mod tests;

pub use answer::{
    BlockDevice, BlockExport, BlockNode, Cache, Counters, DeviceStatistics, Done, Image, IoThread,
    Job, Migration, Schema, Status,
};
pub use call::OnShutdown;
pub use client::{Events, Observed, Qmp, ServerStop, Switch};
pub use codec::Version;
pub use command::{ALLOWED, AllocationMap, Command};
pub(super) use connection::{NoGreeting, greet};
pub use event::{Details, Event, EventKind};
pub use names::{DevicePath, ExportId, FilePath, NameError, NodeName, NodeRef, PREFIX, SocketPath};
