//! What must be remembered of an upload to go on with it after a restart.

use serde::{Deserialize, Serialize};

use super::{
    ByteSize, ImageId,
    image::{Origin, PhaseTime, Record, StoredPart},
    live::{LiveSource, PointInTime},
};

/// What a store calls an upload. Its own business, and no secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UploadToken(pub String);

/// What a store says of a part that it has. Its own business, and no secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Receipt(pub String);

/// A part that is stored, or the first one, which is only remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptPart {
    /// From 1.
    pub number: u32,
    /// Size and digest.
    pub stored: StoredPart,
    /// The store's; `None`: the first part, without its header.
    pub receipt: Option<Receipt>,
    /// How the encoder stood after it; empty where that is not known any more.
    pub standing: Vec<u8>,
    /// Digests of the extents that ended in it.
    pub digests: Vec<u8>,
    /// The first part's bytes; empty for the others.
    pub body: Vec<u8>,
}

/// A capture that can be gone on with, as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resume {
    /// The image to be.
    pub image_id: ImageId,
    /// What its owner may change.
    pub record: Record,
    /// Where it comes from.
    pub origin: Origin,
    /// Name of the instance.
    pub instance: Option<String>,
    /// Its upload.
    pub token: UploadToken,
    /// What is read.
    pub source: ResumeSource,
    /// When each phase began, so far.
    pub time_line: Vec<PhaseTime>,
}

/// An object on its way to somebody, as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outgoing {
    /// Where it goes, without any secret.
    pub location: String,
    /// How a later daemon aborts it; `None`: it cannot.
    pub upload: Option<OutgoingUpload>,
}

/// An upload that can be aborted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutgoingUpload {
    /// Name of the store; none: at a URL, which the token does not tell.
    pub store: Option<String>,
    /// What the upload is called there.
    pub token: UploadToken,
}

/// What an interrupted capture was reading.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ResumeSource {
    /// A volume that nothing may have written to since.
    AtRest(VolumeMark),
    /// A snapshot that QEMU holds.
    Live {
        /// Its point in time.
        point: PointInTime,
        /// Where it is read.
        source: LiveSource,
        /// Bytes that the guest may overwrite.
        scratch: ByteSize,
    },
}

/// What was ever written to a volume, as the kernel counts it. Two that are
/// equal: nothing was written in between.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeMark {
    /// Which volume of which boot of the host.
    pub volume: String,
    /// The kernel's counters.
    pub writes: Vec<u64>,
}
