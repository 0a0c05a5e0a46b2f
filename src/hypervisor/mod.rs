//! What runs the instances of this host.
//!
//! ```text
//! hosts     who runs an instance
//! qemu      whether a QEMU runs
//! qmp       commands to QEMU          ┐ allow-lists, published
//! agent     commands to the guest     ┘ in docs/qemu-commands.md
//! libvirt   the domains of libvirt, by virsh
//! live      snapshots of running instances, with both
//! guard     lets guests go when imaged cannot
//! keep      what of it may be recorded
//! ```

pub mod agent;
mod allowed;
pub mod guard;
mod hosts;
mod keep;
mod libvirt;
pub mod lines;
mod live;
mod qemu;
pub mod qmp;
mod refusal;

pub use allowed::Allowed;
pub use hosts::Hosts;
pub use libvirt::LibvirtHost;
pub use qemu::QemuHost;
pub use refusal::Refusal;
