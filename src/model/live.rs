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
    /// As [`Freeze`](Self::Freeze); where no agent answers, or the freeze is
    /// refused or does not hold, as [`Crash`](Self::Crash).
    FreezeOrCrash,
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

/// What a capture is expected to cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Expected {
    /// As [`PointInTime::window_micros`].
    pub window_micros: u64,
    /// As [`PointInTime::scratch`].
    pub scratch: ByteSize,
    /// From the point in time to the seal.
    pub seconds: u64,
    /// Size of the object.
    pub bytes: ByteSize,
    /// Whether a capture on this host tells how fast and how dense; without
    /// one, seconds and bytes are assumptions.
    pub from_experience: bool,
}

/// What a rehearsal found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rehearsal {
    /// The point in time that it took and gave up again.
    pub point: PointInTime,
    /// How long the guest was watched after it.
    pub sampled_seconds: u64,
    /// What the guest wrote in that time.
    pub written: ByteSize,
    /// What a capture would cost.
    pub expected: Expected,
}

/// Where a snapshot is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
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
