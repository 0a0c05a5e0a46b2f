//! What the work needs from the world, as narrow traits.
//!
//! The work holds `Arc<dyn …>` of these; adapters implement them over real
//! parts and `sim` over memory. Calls are coarse, so boxed futures cost
//! nothing that shows. Retry and throttle are wrappers around a port, never
//! inside an adapter.

use std::{
    fmt,
    num::NonZeroUsize,
    sync::atomic::{AtomicU64, Ordering},
};

pub use futures_util::{future::BoxFuture, stream::BoxStream};
use tokio_util::sync::CancellationToken;

use crate::{
    error::Result,
    model::{
        ByteSize, Timestamp, WorkRequestId, image::Stored, trace::Trace, upload::KeptPart,
        work_request::WorkRequest,
    },
};

mod guest;
mod store;
mod volume;

pub use guest::{DiskWork, Guests, Hypervisor, LiveSnapshot, Pace, Prepared, SnapshotOrder};
pub use store::{
    Body, Delete, Delivery, ObjectReader, ObjectStore, Outlet, Outlets, Over, Part, ReadAt, Sealed,
    Upload, pieces,
};
pub use volume::{
    Extent, HeldVolume, HostSnapshot, NamedBy, Offer, Piece, Room, Sink, Target, VolumeFacts,
    Volumes, Writer,
};

/// Time and chance.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The wall clock.
    fn now(&self) -> Timestamp;
    /// 128 bits that nobody can guess.
    fn random(&self) -> u128;
}

/// Keeps secrets that an undo needs after a crash, sealed. Calls are bounded.
pub trait Vault: Send + Sync + fmt::Debug {
    /// Keeps `secret` durably. Answers its name, which is none.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`, here and below.
    fn keep<'a>(&'a self, secret: &'a Secret) -> BoxFuture<'a, Result<String>>;
    /// The secret called `name`; `None`: it was wiped.
    fn open<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Secret>>>;
    /// Keeps it no longer. Repeating it is success.
    fn wipe<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>>;
    /// Keeps those that are named here alone. Answers how many others there
    /// were.
    fn sweep<'a>(&'a self, keep: &'a [&'a str]) -> BoxFuture<'a, Result<usize>>;
}

/// A text that is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Looks into objects whose bytes may be hostile, where a break-in gains
/// nothing: what parses them can do nothing but answer.
pub trait Inspector: Send + Sync + fmt::Debug {
    /// Recomputes the digests of `object` and compares them with what was
    /// `stored` and with `extent_digests`, 32 bytes for each extent. `None`:
    /// all is well.
    ///
    /// Blocks: call it on a thread of its own, whose priority it lowers to
    /// `SCHED_IDLE`. Reads the object twice, once as bytes and once as an
    /// image, on `threads` threads. `meter` counts both: at the end it stands
    /// at the object's size and the volume's together. Ends within a second
    /// of `stop`, once the store has answered.
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE` when the object cannot be read,
    /// `IMAGE_UNREADABLE` when decoding it exceeds a limit or breaks the one
    /// that decodes, `CONFINEMENT_UNAVAILABLE` when this host cannot confine
    /// it, `CANCELED` after `stop`.
    fn verify(
        &self,
        object: &dyn ReadAt,
        stored: &Stored,
        extent_digests: &[u8],
        threads: NonZeroUsize,
        meter: &Meter,
        stop: &CancellationToken,
    ) -> Result<Option<Fault>>;

    /// Decodes `object` into `sink`, each extent when it has its digest in
    /// `extent_digests`. `None`: all are there, and the sink is to be
    /// finished.
    ///
    /// Blocks, as [`verify`](Self::verify). `meter` stands at the volume's
    /// size at the end.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify), and those of the sink.
    #[allow(clippy::too_many_arguments, reason = "what is decoded, where to, and how")]
    fn decode(
        &self,
        object: &dyn ReadAt,
        stored: &Stored,
        extent_digests: &[u8],
        threads: NonZeroUsize,
        sink: &dyn Sink,
        meter: &Meter,
        stop: &CancellationToken,
    ) -> Result<Option<Fault>>;
}

/// Where an image differs from what was stored: the first place found.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The object's length.
    #[error("the object has {found:#} and was stored with {stored:#}")]
    Size {
        /// What is there.
        found: ByteSize,
        /// What should be.
        stored: ByteSize,
    },
    /// Bytes of the object.
    #[error("part {number}, at offset {offset} of the object, has another SHA-256")]
    Part {
        /// From 1.
        number: usize,
        /// Of its first byte.
        offset: u64,
    },
    /// What the guest would see.
    #[error("what a guest reads at offset {offset} has another BLAKE3")]
    Extent {
        /// Offset in the volume.
        offset: u64,
    },
    /// The manifest's own sums.
    #[error("the {0} in the manifest is not that of its parts")]
    Sum(&'static str),
    /// The object is no image any more.
    #[error("the object cannot be decoded")]
    Undecodable(#[source] Undecodable),
}

/// What is wrong with an image, in words that are fit to be shown.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Undecodable(pub String);

/// What has passed so far, for progress.
#[derive(Debug, Default)]
pub struct Meter {
    read: AtomicU64,
    skipped: AtomicU64,
}

impl Meter {
    /// Bytes that were read and worked on.
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Bytes that were known to be zeroes.
    pub fn skipped(&self) -> u64 {
        self.skipped.load(Ordering::Relaxed)
    }

    /// `bytes` more were read.
    pub fn add_read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    /// `bytes` more are zeroes.
    pub fn add_skipped(&self, bytes: u64) {
        self.skipped.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What survives a restart.
pub trait Journal: Send + Sync + fmt::Debug {
    /// Keeps `request` durably; the older version of it is replaced.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`.
    fn put<'a>(&'a self, request: &'a WorkRequest) -> BoxFuture<'a, Result<()>>;
    /// Keeps what the request `id` said to its instance; an older record of
    /// it is replaced. Bounded: less than 1 MiB.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`.
    fn put_trace<'a>(
        &'a self,
        id: &'a WorkRequestId,
        trace: &'a Trace,
    ) -> BoxFuture<'a, Result<()>>;
    /// What the request `id` said to its instance; `None`: nothing.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`.
    fn trace<'a>(&'a self, id: &'a WorkRequestId) -> BoxFuture<'a, Result<Option<Trace>>>;
    /// Keeps what the store has of the upload of `id`, and how to go on after
    /// it.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`.
    fn put_part<'a>(&'a self, id: &'a WorkRequestId, part: KeptPart) -> BoxFuture<'a, Result<()>>;
    /// The parts of the upload of `id`, by number.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`.
    fn parts<'a>(&'a self, id: &'a WorkRequestId) -> BoxFuture<'a, Result<Vec<KeptPart>>>;
    /// Forgets the parts of the upload of `id`.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`.
    fn forget_parts<'a>(&'a self, id: &'a WorkRequestId) -> BoxFuture<'a, Result<()>>;
    /// Everything that is kept, oldest first.
    fn load(&self) -> BoxFuture<'_, Result<Vec<WorkRequest>>>;
    /// Forgets these, with all that is theirs; unknown ids are no error.
    fn forget<'a>(&'a self, ids: &'a [WorkRequestId]) -> BoxFuture<'a, Result<()>>;
}
