//! Snapshots of running instances.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ByteSize, image::Consistency, instance::Machine};

/// How the point in time of a running instance is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Mode {
    /// While it is shut down for it, as OCI does; it is started again at once.
    Stop(Force),
    /// Inside a freeze of its filesystems, by its agent.
    Freeze,
    /// As [`Freeze`](Self::Freeze); where no agent answers, or the freeze is
    /// refused or does not hold, as [`Crash`](Self::Crash).
    FreezeOrCrash,
    /// At any moment, without the guest's help: what a pulled plug leaves.
    Crash,
}

/// What is done to a guest that does not shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Force {
    /// Nothing: there is no image.
    No,
    /// Its plug is pulled: the image is what that leaves.
    PullThePlug,
}

/// What takes a snapshot back, whoever took it. In the journal before
/// anything is done to the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Undo {
    /// The instance's name, for messages.
    pub instance: String,
    /// What runs it.
    #[serde(flatten)]
    pub machine: Machine,
    /// What was added to it.
    #[serde(flatten)]
    pub snapshot: SnapshotUndo,
    /// What may hold the guest.
    #[serde(flatten)]
    pub held: Held,
}

/// What may hold a guest: to be ended first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Held {
    /// Its filesystems may be frozen.
    pub frozen: bool,
    /// It may be shut down, waiting to be started again, or be shutting down:
    /// that may take it so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<u32>,
}

impl Held {
    /// Nothing holds it.
    pub const NOT: Self = Self { frozen: false, stopped: None };

    /// Whether anything may.
    #[must_use]
    pub fn is_held(self) -> bool {
        self != Self::NOT
    }
}

/// What a snapshot has added to what runs the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SnapshotUndo {
    /// A copy-before-write filter in QEMU.
    Filter(Filter),
    /// A backup of libvirt's.
    Backup(Backup),
    /// Nothing: the host took it.
    OfHost(OfHost),
}

impl SnapshotUndo {
    /// What tells this snapshot from all others.
    #[must_use]
    pub fn tag(&self) -> &str {
        match self {
            Self::Filter(filter) => &filter.tag,
            Self::Backup(backup) => &backup.tag,
            Self::OfHost(of_host) => &of_host.host_snapshot,
        }
    }

    /// The filter, if it is one.
    #[must_use]
    pub const fn filter(&self) -> Option<&Filter> {
        match self {
            Self::Filter(filter) => Some(filter),
            Self::Backup(_) | Self::OfHost(_) => None,
        }
    }
}

/// A snapshot that the host took, and that ends with the process that reads
/// it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OfHost {
    /// Its tag.
    pub host_snapshot: String,
    /// Of which run, if it is a domain's.
    #[serde(flatten)]
    pub run: Option<Run>,
}

/// One run of a domain, from its start until it is shut off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Run {
    /// The libvirtd that has it.
    pub uri: String,
    /// libvirt counts the starts of its domains.
    pub started: u32,
}

/// A copy-before-write filter in QEMU, with all that belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Filter {
    /// In the names of everything that was added to QEMU.
    pub tag: String,
    /// The disk that was given the filter, in QEMU's words.
    pub device: String,
    /// The node that it had before.
    pub node: String,
    /// Directory of the scratch file and the socket, both worthless.
    pub dir: PathBuf,
}

/// A backup of libvirt's, with all that belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backup {
    /// In the name of its export, by which it is known.
    pub tag: String,
    /// The domain's disk, in libvirt's words.
    pub target: String,
    /// Directory of the order, the scratch file and the socket, all worthless.
    pub dir: PathBuf,
    /// Of which run it is.
    #[serde(flatten)]
    pub run: Run,
    /// Most bytes that the guest may overwrite.
    pub scratch: ByteSize,
}

impl Backup {
    /// The name of its export.
    #[must_use]
    pub fn export(&self) -> String {
        format!("imaged-{}", self.tag)
    }
}

/// A point in time that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PointInTime {
    /// What the image will be, never better than it was taken.
    pub consistency: Consistency,
    /// From when the guest was asked to freeze until it said that it was
    /// thawed, as the host saw it; of one that was shut down, from the order
    /// until it ran again; of a crash, the switch alone.
    pub window_micros: u64,
    /// Filesystems that the guest froze.
    pub frozen: u32,
    /// Those that were still frozen when it was told to thaw them.
    pub thawed: u32,
    /// Whether a fuse in the guest would have thawed it without imaged.
    pub fuse: bool,
    /// Whether the guest was shut down for it, and started again.
    #[serde(default)]
    pub stopped: bool,
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
#[serde(untagged)]
pub enum LiveSource {
    /// The exports of a copy-before-write filter.
    Filter(FilterSource),
    /// The one export of a backup.
    Backup(BackupSource),
}

impl LiveSource {
    /// The volume's path.
    #[must_use]
    pub fn volume(&self) -> &Path {
        match self {
            Self::Filter(source) => &source.volume,
            Self::Backup(source) => &source.volume,
        }
    }
}

/// Where the snapshot of a libvirt backup is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackupSource {
    /// The volume's exact size.
    pub size: ByteSize,
    /// The volume's path.
    pub volume: PathBuf,
    /// NBD server of the export.
    pub socket: PathBuf,
    /// Export of the volume as it was, with a map of its own.
    pub export: String,
}

/// Where the snapshot of a copy-before-write filter is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FilterSource {
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
