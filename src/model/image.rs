//! Custom images: what is known when one is ordered, what is known when it is
//! whole, and what may change afterwards.

use std::{collections::BTreeMap, fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    ByteSize, CompartmentId, ImageId, InstanceId, Timestamp,
    instance::OperatingSystem,
    live::{Expected, PointInTime},
};

/// Bytes of a volume that share one BLAKE3: the unit of reading, of the
/// content digest and of reordering.
pub const EXTENT_SIZE: u64 = ByteSize::MIB;

/// Largest volume that can be imaged. Its object fits in the 10,000 parts that
/// object stores take, the largest of which have 201 MiB.
pub const MAX_VOLUME_SIZE: ByteSize = ByteSize::gib(1024);

/// An image at some moment of its life.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Its OCID.
    pub id: ImageId,
    /// What its owner may change.
    pub record: Record,
    /// Where it comes from.
    pub origin: Origin,
    /// How far it is.
    pub state: ImageState,
}

/// OCI's `lifecycleState`, with what each state knows.
#[derive(Debug, Clone, PartialEq)]
pub enum ImageState {
    /// Being made; nothing of it can be read.
    Provisioning,
    /// Whole and sealed.
    Available(Box<Stored>),
    /// The same, and its object is being sent elsewhere.
    Exporting(Box<Stored>),
    /// Gone: deleted, or never finished.
    Deleted,
}

/// The mutable part of an image, a file of its own in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Who may see it.
    pub compartment_id: CompartmentId,
    /// A name for people, not unique.
    pub display_name: String,
    /// Free-form tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub freeform_tags: BTreeMap<String, String>,
}

/// What is settled when an image is ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Origin {
    /// When it was ordered.
    pub time_created: Timestamp,
    /// The instance whose boot volume it is, if it was an instance's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_instance_id: Option<InstanceId>,
    /// The volume that was read.
    pub source_volume: PathBuf,
    /// The image that the instance was launched from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_image_id: Option<ImageId>,
    /// What the guest runs, as far as anyone said.
    #[serde(flatten)]
    pub os: OperatingSystem,
    /// `x86_64`, `aarch64` or `UNKNOWN`.
    pub architecture: String,
    /// How instances are to be launched from it.
    pub launch_mode: LaunchMode,
    /// Whether instances launched from it may be imaged again.
    pub create_image_allowed: bool,
    /// How its clusters are compressed.
    pub compression: Compression,
    /// What kind of point in time it is.
    pub consistency: Consistency,
    /// Name of the store it goes to, on the host that made it.
    pub store: String,
}

/// What is known of an image that is whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stored {
    /// Format of the object.
    pub format: Format,
    /// The volume's size as the guest sees it.
    pub virtual_size: ByteSize,
    /// The object's size.
    pub object_size: ByteSize,
    /// BLAKE3 over the BLAKE3s of the volume's 1 MiB extents.
    pub content_digest: ContentDigest,
    /// SHA-256 over the SHA-256s of the parts, in order.
    pub object_digest: ObjectDigest,
    /// The object cut at part boundaries, in order.
    pub parts: Vec<StoredPart>,
    /// What held the volume still while it was read; none: it was made before
    /// that was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotKind>,
    /// The point in time, of an instance that ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point_in_time: Option<PointInTime>,
    /// What the last rehearsal of that instance had expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<Expected>,
    /// SHA-256 of the trace, of an instance that ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_digest: Option<ObjectDigest>,
    /// When each phase of the capture began.
    pub time_line: Vec<PhaseTime>,
    /// Version of the imaged that made it.
    pub imaged_version: String,
}

/// One part of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredPart {
    /// Its length.
    pub size: ByteSize,
    /// Its SHA-256.
    pub sha256: ObjectDigest,
}

/// When a phase began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PhaseTime {
    /// The phase's name.
    pub phase: String,
    /// When it began.
    pub time_started: Timestamp,
}

/// The immutable description of a whole image; its appearance in a store
/// makes the image exist.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Form of this document.
    pub schema: ManifestSchema,
    /// The image's OCID.
    pub id: ImageId,
    /// Where it comes from.
    #[serde(flatten)]
    pub origin: Origin,
    /// What it is.
    #[serde(flatten)]
    pub stored: Stored,
}

/// Forms of the manifest that this version reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ManifestSchema {
    /// The first.
    #[serde(rename = "imaged.manifest/1")]
    V1,
}

impl AsRef<Self> for Manifest {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Manifest {
    /// Bytes of each part, in order.
    pub fn part_sizes(&self) -> impl Iterator<Item = u64> {
        self.stored.parts.iter().map(|part| part.size.get())
    }

    /// The image that this manifest and `record` describe.
    #[must_use]
    pub fn into_image(self, record: Record) -> Image {
        Image {
            id: self.id,
            record,
            origin: self.origin,
            state: ImageState::Available(Box::new(self.stored)),
        }
    }
}

/// A value that is written as one fixed word.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$variant_doc])* #[serde(rename = $word)] $variant,)+ }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$variant => $word,)+ })
            }
        }
    };
}

words!(
    /// Format of an object.
    Format {
        /// QEMU's, version 3.
        Qcow2 = "QCOW2",
    }
);

words!(
    /// OCI's launch modes.
    LaunchMode {
        /// iSCSI boot and VFIO devices.
        Native = "NATIVE",
        /// Emulated devices.
        Emulated = "EMULATED",
        /// virtio.
        Paravirtualized = "PARAVIRTUALIZED",
        /// As the launch options say.
        Custom = "CUSTOM",
        /// Accelerated virtio.
        AcceleratedPv = "ACCELERATEDPV",
    }
);

words!(
    /// What kind of point in time an image is. Never upgraded.
    Consistency {
        /// The guest's applications agreed to the point in time.
        Application = "APPLICATION",
        /// The guest's filesystems were frozen.
        Filesystem = "FILESYSTEM",
        /// The instance was shut down, or nothing used the volume.
        Clean = "CLEAN",
        /// As after a power failure.
        Crash = "CRASH",
    }
);

words!(
    /// What held a volume still while it was read.
    SnapshotKind {
        /// Nothing: it was at rest, and nobody else had it.
        AtRest = "AT_REST",
        /// A clone of its file, which shares its blocks (XFS, btrfs).
        Reflink = "REFLINK",
        /// A thin snapshot of its logical volume.
        Lvm = "LVM",
        /// QEMU, which copies before its guest overwrites.
        CopyBeforeWrite = "COPY_BEFORE_WRITE",
    }
);

words!(
    /// How clusters are compressed.
    Compression {
        /// zstd, level 3; QEMU 5.1 or newer reads it.
        Zstd = "ZSTD",
        /// Deflate; every QEMU reads it.
        Deflate = "DEFLATE",
        /// Not at all.
        None = "NONE",
    }
);

macro_rules! digest {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; 32]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl From<$name> for String {
            fn from(digest: $name) -> Self {
                digest.to_string()
            }
        }

        impl FromStr for $name {
            type Err = DigestError;
            fn from_str(text: &str) -> Result<Self, DigestError> {
                parse_hex(text).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = DigestError;
            fn try_from(text: String) -> Result<Self, DigestError> {
                text.parse()
            }
        }
    };
}

digest!(
    /// A BLAKE3 of guest-visible bytes.
    ContentDigest
);
digest!(
    /// A SHA-256 of an object's bytes.
    ObjectDigest
);

/// The text is not 64 lower-case hex digits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a digest is 64 lower-case hexadecimal digits")]
pub struct DigestError;

fn parse_hex(text: &str) -> Result<[u8; 32], DigestError> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Ok(c - b'0'),
        b'a'..=b'f' => Ok(c - b'a' + 10),
        _ => Err(DigestError),
    };
    let text: &[u8; 64] = text.as_bytes().try_into().map_err(|_| DigestError)?;
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(bytes)
}
