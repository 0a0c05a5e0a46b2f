//! The guest agent: the commands that imaged may send into a guest, and a
//! client that keeps in step with it.
//!
//! ```text
//! out of step ──sync, answered by our number──► in step ──command──► out of step
//!      ▲                                           ▲                     │
//!      └───── timeout, oddity, dropped future ─────┼─────────────────────┤
//!                                                  └──────answer─────────┘
//! ```
//! A command is only sent in step: to an agent that has just answered. A lost
//! answer therefore costs one wait, never the socket.
//!
//! Facts: QEMU, `qga/qapi-schema.json` and `docs/interop/qemu-ga.rst`.

mod answer;
mod client;
pub mod codec;
mod command;
mod program;
#[cfg(test)]
mod tests;

pub use answer::{Disk, ExecStatus, Filesystem, FreezeStatus, Info, OsInfo};
pub use client::Agent;
pub use command::ALLOWED;
pub use program::{GuestProcess, GuestProgram, Input, IscsiStep};
