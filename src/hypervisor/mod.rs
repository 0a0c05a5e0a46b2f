//! What runs the instances of this host.
//!
//! ```text
//! hosts     who runs an instance
//! qemu      whether a QEMU runs
//! qmp       commands to QEMU          ┐ allow-lists, published
//! agent     commands to the guest     ┘ in docs/qemu-commands.md
//! libvirt   the domains of libvirt, by virsh
//! freeze    a guest's filesystems   ┐ what holds a guest
//! hold      or the whole guest      ┘ for its point in time
//! of_host   snapshots that the host takes
//! live      snapshots of running instances, with all of these
//! iscsi     what of iSCSI a guest has
//! guard     lets guests go when imaged cannot
//! keep      what of it may be recorded
//! ```

pub mod agent;
mod allowed;
mod freeze;
pub mod guard;
mod hold;
mod hosts;
pub mod iscsi;
mod keep;
mod libvirt;
pub mod lines;
mod live;
mod of_host;
mod qemu;
pub mod qmp;
mod refusal;

use std::time::Duration;

pub use allowed::Allowed;
pub use hosts::Hosts;
pub use libvirt::LibvirtHost;
pub use qemu::QemuHost;
pub use refusal::Refusal;
use tokio::time::Instant;

/// For a command to a hypervisor or an agent that works; one that does not is
/// told of.
const COMMAND: Duration = Duration::from_secs(10);

/// From now on.
fn within(time: Duration) -> Instant {
    Instant::now() + time
}
