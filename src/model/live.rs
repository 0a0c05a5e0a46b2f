//! Snapshots of running instances.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ByteSize, image::Consistency};

/// How the point in time of a running instance is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Mode {
    /// Inside a freeze of its filesystems, by its agent.
    Freeze,
    /// At any moment, without the guest's help: what a pulled plug leaves.
    Crash,
}

/// What takes a snapshot back, whoever took it. In the journal before
/// anything is done to the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Undo {
    /// The instance's name, for messages.
    pub instance: String,
    /// Where its QEMU listens.
    pub qmp_socket: PathBuf,
    /// Where its agent does.
    pub agent_socket: Option<PathBuf>,
    /// In the names of everything that was added to QEMU.
    pub tag: String,
    /// The disk that was given a filter, in QEMU's words.
    pub device: String,
    /// The node that it had before.
    pub node: String,
    /// Directory of the scratch file and the socket, both worthless.
    pub dir: PathBuf,
    /// The guest may be frozen.
    pub frozen: bool,
}

/// A point in time that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PointInTime {
    /// What the image will be, never better than it was taken.
    pub consistency: Consistency,
    /// From when the guest was asked to freeze until it said that it was
    /// thawed, as the host saw it; of a crash, the switch alone.
    pub window_micros: u64,
    /// Filesystems that the guest froze.
    pub frozen: u32,
    /// Those that were still frozen when it was told to thaw them.
    pub thawed: u32,
    /// Whether a fuse in the guest would have thawed it without imaged.
    pub fuse: bool,
    /// What of the host's disk the guest's writes took until the release.
    pub scratch: ByteSize,
}

/// Where a snapshot is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveSource {
    /// The volume's exact size.
    pub size: ByteSize,
    /// The volume's path.
    pub volume: PathBuf,
    /// The QEMU that has it open, where its process can be told.
    pub process: Option<u32>,
    /// Whether the guest sees the volume's bytes as they are, so that they
    /// can be read beside the guest.
    pub raw: bool,
    /// NBD server of the exports.
    pub socket: PathBuf,
    /// Export of the volume as it was.
    pub snapshot: String,
    /// Export of what the guest has overwritten since.
    pub scratch: String,
    /// Export of the volume as it is.
    pub live: String,
}
