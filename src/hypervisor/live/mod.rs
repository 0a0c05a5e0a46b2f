//! Snapshots of running instances, by QEMU's copy-before-write filter.
//!
//! ```text
//! prepare   nothing is changed: QEMU, its disk, the agent, room for scratch
//!   │         (the undo is kept durably)
//! take      scratch ─► fuse ─► freeze ─► filter, switch ─► thaw ─► exports
//!   │         or, with the guest shut down for it, as `stop` has it
//!   │         (the image is read)
//! release   exports ─► snapshot ─► switch back ─► filter ─► scratch
//! undo      the same for whatever is left, from another session
//! ```
//!
//! # The point in time
//!
//! It is the moment of the switch (`qom-set drive`), not that of the filter's
//! creation: QEMU drains the disk (`bdrv_replace_child_bs`) before it gives
//! the device another node, so that each write lies wholly before or wholly
//! after. A write before it went past the filter and is part of what the
//! filter finds; one after it is copied first. The switch therefore needs no
//! stopped processors, also when nothing is frozen: a daemon that dies at any
//! line of this leaves a guest that runs, or a guard that sees to it.
//!
//! # What holds without imaged
//!
//! `on-cbw-error=break-snapshot` and `cbw-timeout` end the snapshot, not the
//! guest's write, when the scratch is full or slow. The fuse thaws the guest, and so does the
//! guard, a process beside imaged, which starts one again that was shut down.

mod find;
mod iothread;
mod names;
mod prepare;
mod snapshot;
mod stop;
mod undo;

pub use prepare::prepare;
pub(super) use prepare::room;
pub use snapshot::regain;
pub(super) use undo::clean;
pub use undo::{let_go, undo};

use super::{COMMAND, within};

/// Of a file or directory that imaged makes for a QEMU.
const SCRATCH_FILE: &str = "scratch.qcow2";
/// The NBD server's socket.
const SOCKET_FILE: &str = "nbd.sock";
