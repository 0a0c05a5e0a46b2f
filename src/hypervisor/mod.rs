//! What runs the instances of this host.
//!
//! ```text
//! qemu      whether an instance runs
//! qmp       commands to QEMU          ┐ allow-lists, published
//! agent     commands to the guest     ┘ in docs/qemu-commands.md
//! live      snapshots of running instances, with both
//! keep      what of it may be recorded
//! ```

pub mod agent;
mod allowed;
mod keep;
pub mod lines;
mod live;
mod qemu;
pub mod qmp;
mod refusal;

pub use allowed::Allowed;
pub use qemu::QemuHost;
pub use refusal::Refusal;
