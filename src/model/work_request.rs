//! Long-running operations as their users see them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    ByteSize, CompartmentId, Timestamp, WorkRequestId,
    iscsi::IscsiUndo,
    live::{Rehearsal, Undo},
    upload::{Outgoing, Resume},
};

/// A work request, as the journal keeps it and the API shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkRequest {
    /// Its OCID.
    pub id: WorkRequestId,
    /// What it does.
    pub operation: Operation,
    /// How far it is.
    pub status: Status,
    /// Where it belongs.
    pub compartment_id: CompartmentId,
    /// What it works on.
    pub resources: Vec<Resource>,
    /// What it does now.
    pub phase: Phase,
    /// How much of it is done.
    pub progress: Progress,
    /// When it was accepted.
    pub time_accepted: Timestamp,
    /// When work on it began.
    pub time_started: Option<Timestamp>,
    /// When it ended.
    pub time_finished: Option<Timestamp>,
    /// Why it failed.
    pub errors: Vec<ErrorEntry>,
    /// What is worth telling, oldest first.
    pub logs: Vec<LogEntry>,
    /// Who asked.
    pub requested_by: String,
    /// What the asker calls this request, so that asking twice is asking
    /// once.
    pub retry: Option<Retry>,
    /// What is still to be done to its instance, also after its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<Undo>,
    /// What gives its instance the iSCSI back that was taken, also after its
    /// end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iscsi: Option<IscsiUndo>,
    /// What a rehearsal found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rehearsal: Option<Rehearsal>,
    /// How a later daemon goes on with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Box<Resume>>,
    /// What it has begun to send and not yet taken back, also after its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outgoing: Option<Outgoing>,
    /// How fast it may go.
    #[serde(default)]
    pub rates: Rates,
}

/// Most bytes a second; `None`: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// That are read of a volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<ByteSize>,
    /// That are sent to a store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<ByteSize>,
}

/// A change of [`Rates`]: what it does not name stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NewRates {
    /// That are read of a volume.
    pub read: Option<Option<ByteSize>>,
    /// That are sent to a store.
    pub upload: Option<Option<ByteSize>>,
}

impl Rates {
    /// As they are after `new`.
    #[must_use]
    pub fn changed(self, new: NewRates) -> Self {
        Self { read: new.read.unwrap_or(self.read), upload: new.upload.unwrap_or(self.upload) }
    }
}

impl WorkRequest {
    /// A request that was just accepted.
    #[must_use]
    pub fn accepted(
        id: WorkRequestId,
        operation: Operation,
        compartment_id: CompartmentId,
        resources: Vec<Resource>,
        now: Timestamp,
        requested_by: String,
        retry: Option<Retry>,
    ) -> Self {
        Self {
            id,
            operation,
            status: Status::Accepted,
            compartment_id,
            resources,
            phase: Phase::Queued,
            progress: Progress::default(),
            time_accepted: now,
            time_started: None,
            time_finished: None,
            errors: Vec::new(),
            logs: Vec::new(),
            requested_by,
            retry,
            undo: None,
            iscsi: None,
            rehearsal: None,
            resume: None,
            outgoing: None,
            rates: Rates::default(),
        }
    }

    /// Whether anything is still to be undone of it, also after its end.
    #[must_use]
    pub const fn owes(&self) -> bool {
        self.undo.is_some() || self.iscsi.is_some() || self.outgoing.is_some()
    }

    /// Ends it: with an error, or well.
    pub fn finish(&mut self, status: Status, error: Option<ErrorEntry>, now: Timestamp) {
        self.status = status;
        self.phase = Phase::Done;
        self.time_finished = Some(now);
        self.errors.extend(error);
        self.resume = None;
        self.progress.per_second = 0;
        for resource in &mut self.resources {
            if resource.action == Action::InProgress {
                resource.action = match status {
                    Status::Succeeded => Action::Created,
                    _ => Action::Related,
                };
            }
        }
    }
}

/// A retry token and what it was first used for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// Whose token it is: tokens of different users differ.
    pub user: String,
    /// The token.
    pub token: String,
    /// BLAKE3 of the request, in hex: the same token with another request is
    /// an error.
    pub fingerprint: String,
}

/// What a work request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Operation {
    /// Makes an image.
    CreateImage,
    /// Recomputes an image's digests.
    VerifyImage,
    /// Tries what making an image of a running instance does to it.
    RehearseImage,
    /// Sends an image's object elsewhere.
    ExportImage,
    /// Writes an image over a volume.
    RestoreVolume,
    /// Takes all iSCSI from an instance's guest.
    DisconnectIscsi,
    /// Gives it back.
    ReconnectIscsi,
}

/// OCI's status of a work request.
///
/// ```text
/// Accepted ──► InProgress ──► Succeeded
///    │             │  └─────► Failed
///    └──► Canceling ──► Canceled
/// ```
/// Canceling may still end in Succeeded or Failed, when the end came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Status {
    /// Queued.
    Accepted,
    /// Being worked on.
    InProgress,
    /// Done.
    Succeeded,
    /// Ended by an error; everything was undone.
    Failed,
    /// Asked to end.
    Canceling,
    /// Ended because it was asked to; everything was undone.
    Canceled,
}

impl Status {
    /// Whether nothing will change any more.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Canceled)
    }
}

/// What a work request does now, in the order in which it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Waits for a place.
    Queued,
    /// May this be done?
    Preflight,
    /// Takes the point in time of a running instance.
    Snapshot,
    /// Reads, encodes and stores.
    Read,
    /// Watches what a running instance writes.
    Sample,
    /// Gives a running instance its disk back.
    Release,
    /// Makes the image, or the exported object, exist.
    Seal,
    /// Recomputes digests.
    Verify,
    /// Sends an object elsewhere.
    Export,
    /// Writes an image over a volume.
    Restore,
    /// Takes iSCSI from a guest.
    Disconnect,
    /// Gives it back.
    Reconnect,
    /// Over.
    Done,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Queued => "queued",
            Self::Preflight => "preflight",
            Self::Snapshot => "snapshot",
            Self::Read => "read",
            Self::Sample => "sample",
            Self::Release => "release",
            Self::Seal => "seal",
            Self::Verify => "verify",
            Self::Export => "export",
            Self::Restore => "restore",
            Self::Disconnect => "disconnect",
            Self::Reconnect => "reconnect",
            Self::Done => "done",
        })
    }
}

/// Counts of bytes of the volume, but `stored`: bytes of the object.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The volume's size; 0 until it is known.
    pub total: u64,
    /// Read so far.
    pub read: u64,
    /// Known to be zeroes without reading.
    pub skipped: u64,
    /// Stored so far.
    pub stored: u64,
    /// Read or skipped a second, over the last seconds.
    pub per_second: u64,
}

impl Progress {
    /// 0 to 100.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a percentage")]
    pub fn percent(&self) -> f32 {
        match self.total {
            0 => 0.0,
            total => ((self.read + self.skipped) as f32 / total as f32 * 100.0).min(100.0),
        }
    }

    /// Seconds to the end at this rate, where there is a rate.
    #[must_use]
    pub fn eta_seconds(&self) -> Option<u64> {
        let left = self.total.saturating_sub(self.read + self.skipped);
        left.checked_div(self.per_second)
    }
}

/// Something that a work request is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resource {
    /// What the work does to it.
    pub action: Action,
    /// `image`, `instance` or `volume`.
    pub entity_type: EntityType,
    /// OCID, or path of a volume.
    pub identifier: String,
}

/// Kinds of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntityType {
    /// An image.
    Image,
    /// An instance.
    Instance,
    /// A volume.
    Volume,
}

impl fmt::Display for EntityType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Image => "image",
            Self::Instance => "instance",
            Self::Volume => "volume",
        })
    }
}

/// OCI's action types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Action {
    /// It exists because of the work.
    Created,
    /// The work is making it.
    InProgress,
    /// The work only looks at it.
    Related,
}

/// Why a work request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorEntry {
    /// The reason's code, e.g. `VOLUME_HELD`.
    pub code: String,
    /// One sentence, then its causes, one a line, then what to do.
    pub message: String,
    /// When.
    pub time: Timestamp,
}

/// Something worth telling.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// One sentence.
    pub message: String,
    /// When.
    pub time: Timestamp,
}
