//! What the work needs from the world, as narrow traits.
//!
//! The work holds `Arc<dyn …>` of these; adapters implement them over real
//! parts and `sim` over memory. Calls are coarse, so boxed futures cost
//! nothing that shows. Retry and throttle are wrappers around a port, never
//! inside an adapter.

use std::{
    fmt,
    num::NonZeroUsize,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::SyncSender,
    },
    time::Duration,
};

use bytes::Bytes;
pub use futures_util::{future::BoxFuture, stream::BoxStream};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize, ImageId, Timestamp, WorkRequestId,
        host::{Feature, Space, Traffic},
        image::{Manifest, ObjectDigest, Record, SnapshotKind, Stored},
        instance::{Instance, PowerState},
        live::{LiveSource, Mode, PointInTime, Undo},
        trace::Trace,
        upload::{KeptPart, Receipt, ResumeSource, UploadToken, VolumeMark},
        work_request::WorkRequest,
    },
    recorder::Recorder,
};

/// Time and chance.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The wall clock.
    fn now(&self) -> Timestamp;
    /// 128 bits that nobody can guess.
    fn random(&self) -> u128;
}

/// What runs the instances.
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// The instances that it tells of itself, beside those that have files.
    /// Never fails: those that cannot be told of now are missing. Bounded to
    /// a few seconds.
    fn instances(&self) -> BoxFuture<'_, Vec<Instance>> {
        Box::pin(async { Vec::new() })
    }

    /// What it can do on this host, and what each missing part lacks. Bounded
    /// to a few seconds.
    fn features(&self) -> BoxFuture<'_, Vec<Feature>> {
        Box::pin(async { Vec::new() })
    }

    /// Whether `instance` runs. Never fails: what cannot be determined is
    /// [`PowerState::Unknown`]. Bounded to a few seconds.
    fn power_state<'a>(&'a self, instance: &'a Instance) -> BoxFuture<'a, PowerState>;

    /// Looks whether a snapshot of the running `instance` can be taken in
    /// this way, and changes nothing. What is said to it from here on is
    /// recorded.
    ///
    /// # Errors
    ///
    /// All that begin with `HYPERVISOR_` and `GUEST_AGENT_`;
    /// `SNAPSHOT_REFUSED` for what the instance lacks.
    fn prepare<'a>(
        &'a self,
        instance: &'a Instance,
        order: SnapshotOrder,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn Prepared>>>;

    /// Takes over a snapshot that another session took and left: `source` is
    /// a [`ResumeSource::Live`], `undo` its undo.
    ///
    /// # Errors
    ///
    /// As [`prepare`](Self::prepare); `SNAPSHOT_BROKEN` when it is not there
    /// any more.
    fn regain<'a>(
        &'a self,
        undo: &'a Undo,
        source: &'a ResumeSource,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn LiveSnapshot>>>;

    /// Takes a snapshot back that another session took: thaws the guest,
    /// gives it its disk back, removes what was added. What is gone already
    /// is success, a QEMU that has ended too.
    ///
    /// # Errors
    ///
    /// As [`prepare`](Self::prepare): it is to be tried again.
    fn undo<'a>(&'a self, undo: &'a Undo, recorder: Arc<Recorder>) -> BoxFuture<'a, Result<()>>;
}

/// How fast a volume may be read: set by who watches its guest, obeyed by who
/// reads. Clones share it.
#[derive(Debug, Clone)]
pub struct Pace(Arc<AtomicU64>);

impl Default for Pace {
    /// As fast as possible.
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(u64::MAX)))
    }
}

impl Pace {
    /// Bytes a second from now on; `None`: as many as possible.
    pub fn set(&self, bytes: Option<u64>) {
        self.0.store(bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Bytes a second; `None`: as many as possible.
    #[must_use]
    pub fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|bytes| *bytes != u64::MAX)
    }
}

/// What a guest's disk has done since its QEMU began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskWork {
    /// Reads, writes and flushes.
    pub operations: u64,
    /// Time in them, together.
    pub time: Duration,
    /// Bytes written.
    pub written: ByteSize,
}

/// How a snapshot is to be taken.
#[derive(Debug)]
pub struct SnapshotOrder {
    /// Of what consistency.
    pub mode: Mode,
    /// Most bytes that the guest may overwrite meanwhile.
    pub scratch: ByteSize,
    /// What the host can take, to be preferred: nothing of it is in the
    /// guest's way afterwards. It is of the file as it is, not of what a
    /// format makes of it.
    pub host: Option<Box<dyn HostSnapshot>>,
}

/// A snapshot that can be taken.
pub trait Prepared: Send + fmt::Debug {
    /// What will take it back. To be kept durably before it is taken.
    fn undo(&self) -> &Undo;
    /// Exact size of the volume.
    fn size(&self) -> ByteSize;
    /// Takes the point in time. When this returns, the guest is not held, or
    /// nothing could be done about it. After an error the snapshot is to be
    /// taken back by [`Hypervisor::undo`].
    ///
    /// # Errors
    ///
    /// As [`Hypervisor::prepare`].
    fn take(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn LiveSnapshot>>>;
}

/// A snapshot of a running instance. Dropped without
/// [`release`](Self::release) it stays until [`Hypervisor::undo`].
pub trait LiveSnapshot: Send + Sync + fmt::Debug {
    /// The point in time.
    fn point(&self) -> &PointInTime;
    /// Where it is read; `None`: the host took it ([`volume`](Self::volume)).
    fn source(&self) -> Option<&LiveSource>;
    /// The snapshot that the host took, once.
    fn volume(&self) -> Option<Box<dyn HeldVolume>> {
        None
    }
    /// What the guest's disk has done so far, to tell its latency. Bounded to
    /// some seconds.
    ///
    /// # Errors
    ///
    /// All that begin with `HYPERVISOR_`.
    fn disk_work(&self) -> BoxFuture<'_, Result<DiskWork>>;
    /// Bytes of scratch that it takes by now.
    ///
    /// # Errors
    ///
    /// `INTERNAL` when they cannot be counted.
    fn scratch(&self) -> BoxFuture<'_, Result<ByteSize>>;
    /// Waits until it can no longer be right: its scratch is full, or QEMU
    /// has ended.
    fn lost(&self) -> BoxFuture<'_, Error>;
    /// Takes it back. Returns how many bytes of scratch it took.
    ///
    /// # Errors
    ///
    /// As [`Hypervisor::undo`], which is to be asked then.
    fn release(self: Box<Self>) -> BoxFuture<'static, Result<ByteSize>>;
}

/// Who says which volume it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamedBy {
    /// Whoever asks: it must lie where the configuration allows.
    Request,
    /// The instance whose boot volume it is: it may lie anywhere.
    Instance,
}

/// The volumes of this host.
pub trait Volumes: Send + Sync + fmt::Debug {
    /// Opens the volume at `path` for reading and keeps everyone else from
    /// writing to it until the answer is dropped.
    ///
    /// # Errors
    ///
    /// `VOLUME_NOT_ALLOWED`, `VOLUME_NOT_FOUND`, `VOLUME_UNUSABLE`,
    /// `VOLUME_EMPTY`, `VOLUME_HELD` (naming the holder) and
    /// `VOLUME_UNAVAILABLE`.
    fn hold<'a>(
        &'a self,
        path: &'a Path,
        named: NamedBy,
    ) -> BoxFuture<'a, Result<Box<dyn HeldVolume>>>;
    /// Takes the block device or file at `path`, which nobody else may use, to
    /// write an image of `size` bytes over it; a file that does not exist is
    /// made. Changes nothing yet.
    ///
    /// # Errors
    ///
    /// As [`hold`](Self::hold), but for `VOLUME_EMPTY`; `VOLUME_TOO_SMALL`.
    fn target<'a>(
        &'a self,
        path: &'a Path,
        size: ByteSize,
    ) -> BoxFuture<'a, Result<Box<dyn Target>>>;
    /// Removes what a dead daemon left of its snapshots: how many there were.
    /// To be called before any is taken.
    ///
    /// # Errors
    ///
    /// `VOLUME_UNAVAILABLE`: they are left to the next start.
    fn sweep(&self) -> BoxFuture<'_, Result<usize>> {
        Box::pin(async { Ok(0) })
    }
    /// What this host's filesystem or volume manager offers of the volume at `path`: changes
    /// nothing yet. The snapshot will be read at the `pace` of its guest.
    ///
    /// # Errors
    ///
    /// As [`hold`](Self::hold), but for `VOLUME_HELD`.
    fn host_snapshot<'a>(
        &'a self,
        path: &'a Path,
        writer: Writer,
        pace: Pace,
    ) -> BoxFuture<'a, Result<Offer>>;
    /// Opens the snapshot of a volume that its guest goes on writing to. What
    /// is read of it is right only when all of it was read with success.
    ///
    /// # Errors
    ///
    /// As [`hold`](Self::hold), but for `VOLUME_HELD`; `SNAPSHOT_BROKEN`.
    fn live<'a>(
        &'a self,
        source: &'a LiveSource,
        pace: Pace,
    ) -> BoxFuture<'a, Result<Box<dyn HeldVolume>>>;
}

/// Who may write to a volume while its snapshot is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// Nobody: it is held.
    Nobody,
    /// Its guest, which waits meanwhile.
    Guest,
}

/// What a host offers of a volume.
#[derive(Debug)]
pub enum Offer {
    /// A snapshot that can be taken.
    Snapshot(Box<dyn HostSnapshot>),
    /// None, for this reason: a sentence about the volume, for people.
    Nothing(String),
}

/// A snapshot that the host's filesystem or volume manager can take of a
/// volume.
pub trait HostSnapshot: Send + Sync + fmt::Debug {
    /// Its kind.
    fn kind(&self) -> SnapshotKind;
    /// Has the volume's caches written back, so that taking it is short.
    ///
    /// # Errors
    ///
    /// `VOLUME_UNAVAILABLE`.
    fn settle(&self) -> BoxFuture<'_, Result<()>>;
    /// Takes it: what was written before is in it, and nothing that is
    /// written after. Whoever writes meanwhile waits. Bounded to some
    /// minutes; dropped, it leaves nothing behind.
    ///
    /// # Errors
    ///
    /// As [`Volumes::hold`], but for `VOLUME_HELD`; `SNAPSHOT_REFUSED`.
    fn take(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn HeldVolume>>>;
}

/// A volume that an image may be written over, or the place of a new file.
/// Nobody else may use it while this value lives; it was not touched yet.
pub trait Target: Send + fmt::Debug {
    /// Where it is, with symbolic links resolved.
    fn path(&self) -> &Path;
    /// Whether it is a file that is to be made, so that nothing is lost.
    fn is_new(&self) -> bool;
    /// Bytes that it has, or will have.
    fn room(&self) -> ByteSize;
    /// Begins to write: from here on it is no volume that boots, until
    /// [`Sink::finish`]. A new file has no name until then.
    ///
    /// Blocks, as everything of a [`Sink`].
    ///
    /// # Errors
    ///
    /// `WRITE_FAILED`.
    fn begin(self: Box<Self>, stop: &CancellationToken) -> Result<Box<dyn Sink>>;
}

/// Takes the extents of an image, from many threads and in any order, each
/// once.
pub trait Sink: Send + Sync {
    /// Room for an extent; waits for some.
    ///
    /// # Errors
    ///
    /// `WRITE_FAILED` of an earlier extent; `CANCELED` when the writing ended
    /// for a reason that was told already, or after the stop.
    fn room(&self) -> Result<Box<dyn Room + '_>>;
    /// `count` extents from `first` on are zeroes.
    ///
    /// # Errors
    ///
    /// `WRITE_FAILED`.
    fn zeroes(&self, first: u64, count: u64) -> Result<()>;
    /// All extents came: makes them durable, and the volume one that boots.
    /// What lies behind the image is zeroed, and counted by `meter`.
    ///
    /// # Errors
    ///
    /// `WRITE_FAILED`.
    fn finish(self: Box<Self>, meter: &Meter) -> Result<()>;
}

/// Room for an extent. Dropped, it is given back.
pub trait Room {
    /// 1 MiB, with anything in it.
    fn bytes(&mut self) -> &mut [u8];
    /// Its first `len` bytes are extent `index`: begins to write them.
    ///
    /// # Errors
    ///
    /// As [`Sink::room`].
    fn write(self: Box<Self>, index: u64, len: usize) -> Result<()>;
}

/// A volume that nothing else writes to.
pub trait HeldVolume: Send + fmt::Debug {
    /// What it is.
    fn facts(&self) -> &VolumeFacts;

    /// What holds it still.
    fn snapshot(&self) -> SnapshotKind;

    /// What tells later whether anything was written to it since; `None`
    /// where the kernel does not tell, and beside a guest.
    fn mark(&self) -> Option<VolumeMark>;

    /// Lets [`read`](Self::read) begin at this extent: those before are known.
    fn begin_at(&mut self, extent: u64);

    /// Reads the whole volume and sends it as pieces that cover it exactly
    /// once. Holes come in order; extents may overtake each other and
    /// everything, by a bounded number of places.
    ///
    /// Blocks: call it on a thread of its own. Stops soon after `stop` is
    /// cancelled or the receiver is gone, with every read that the kernel
    /// holds taken back first.
    ///
    /// # Errors
    ///
    /// `READ_FAILED`, naming device and offset; `CANCELED` after `stop`.
    fn read(&mut self, pieces: &SyncSender<Piece>, stop: &CancellationToken) -> Result<()>;
}

/// What is known of a volume before it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFacts {
    /// Its path, with symbolic links resolved.
    pub path: PathBuf,
    /// Its exact size; no multiple of anything.
    pub size: ByteSize,
    /// Bytes in a sector: offsets and lengths of direct reads are multiples.
    pub sector_size: u32,
    /// What may hold anything but zeroes: ascending, disjoint, not empty,
    /// within the size. The whole volume where the kernel tells no map.
    pub data: Vec<Range<u64>>,
}

impl VolumeFacts {
    /// Sum of the ranges that may hold data.
    #[must_use]
    pub fn data_size(&self) -> ByteSize {
        ByteSize(self.data.iter().map(|range| range.end - range.start).sum())
    }
}

/// A stretch of a volume, in whole extents (the volume's last may be short).
#[derive(Debug)]
pub enum Piece {
    /// The bytes of one extent.
    Data(Extent),
    /// `count` extents of zeroes from `first` on, known without reading.
    Zeroes {
        /// Index of the first extent.
        first: u64,
        /// How many.
        count: u64,
    },
}

/// The bytes of one extent. Dropping it gives the buffer back to the reader.
pub struct Extent {
    /// Offset in the volume over the extent's size.
    pub index: u64,
    /// Its bytes: an extent's size, less only at the volume's end.
    pub bytes: Box<dyn AsRef<[u8]> + Send>,
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Extent({}, {} bytes)", self.index, (*self.bytes).as_ref().len())
    }
}

/// A place where images are kept.
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// Its name in the configuration.
    fn name(&self) -> &str;
    /// `directory`, `s3`, …
    fn kind(&self) -> &'static str;
    /// Where it is, without any secret.
    fn location(&self) -> String;
    /// What was counted of it: nothing by itself, see
    /// [`Metered`](crate::store::Metered).
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
    /// Room, where the store can tell. An error: the store does not answer.
    fn space(&self) -> BoxFuture<'_, Result<Option<Space>>>;

    /// Begins the upload of one image. Nothing is visible before
    /// [`Upload::seal`].
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE`, `STORE_FULL`.
    fn begin<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn Upload>>>;
    /// Goes on with the upload of an image, which has these parts, after its
    /// process died: see [`Upload::token`].
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin); `STORE_REFUSED` when there is nothing to go
    /// on with.
    fn resume<'a>(
        &'a self,
        id: &'a ImageId,
        token: &'a UploadToken,
        parts: Vec<KeptPart>,
    ) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        let (_, _) = (token, parts);
        let context = format!("the store cannot go on with the upload of image {id}");
        Box::pin(async { Err(Error::new(Reason::StoreRefused, context)) })
    }
    /// Removes what dead uploads of this host left, but for those of the
    /// images in `keep`, which are gone on with. To be called before any
    /// upload begins. Returns how many there were.
    fn sweep<'a>(&'a self, keep: &'a [ImageId]) -> BoxFuture<'a, Result<usize>>;

    /// Every whole image, in no order, without its parts: there are up to
    /// 51,200 of each, and a list shows none. An image whose manifest cannot
    /// be understood is left out with a warning.
    fn list(&self) -> BoxFuture<'_, Result<Vec<(Manifest, Record)>>>;
    /// One whole image; `None` when there is none.
    fn get<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Option<(Manifest, Record)>>>;
    /// Opens an image's object.
    fn open<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn ObjectReader>>>;
    /// The digests of an image's extents, 32 bytes each, in order.
    fn extent_digests<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Vec<u8>>>;
    /// Removes an image: first from sight, then its bytes. Removing what is
    /// not there is success.
    fn delete<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Delete>>;

    /// The place of an object called `name` beside the images: no image's, and
    /// nothing that this store looks at again.
    ///
    /// # Errors
    ///
    /// `INVALID_PARAMETER`: it cannot have this name; `OBJECT_EXISTS`;
    /// `STORE_REFUSED` where there are no objects, or nobody can look whether
    /// there is one; `STORE_UNAVAILABLE`.
    fn outlet<'a>(&'a self, name: &'a str, over: Over) -> BoxFuture<'a, Result<Box<dyn Outlet>>> {
        let (_, _) = (name, over);
        let context =
            format!("the store {:?} is a {}: it has no objects", self.name(), self.kind());
        Box::pin(async {
            Err(Error::new(Reason::StoreRefused, context)
                .advice("name a store in a bucket, or use `imagectl image export to-file`"))
        })
    }
    /// Aborts a delivery of a process that has ended: see [`Delivery::token`].
    /// Repeating it is success.
    fn abandon<'a>(&'a self, token: &'a UploadToken) -> BoxFuture<'a, Result<()>> {
        let _ = token;
        Box::pin(async { Ok(()) })
    }
}

/// What a new object may replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// Anything.
    Anything,
    /// Nothing: there must be none.
    Nothing,
}

/// Finds the places that URLs name.
pub trait Outlets: Send + Sync + fmt::Debug {
    /// The place of the object that `uri` gives access to. Asks nobody.
    ///
    /// # Errors
    ///
    /// `INVALID_PARAMETER`, without a word of the URL.
    fn by_uri(&self, uri: &Secret, over: Over) -> Result<Box<dyn Outlet>>;
    /// Aborts a delivery of a process that has ended: see [`Delivery::token`].
    /// Repeating it is success. Keeps what it needs until
    /// [`sweep`](Self::sweep).
    ///
    /// # Errors
    ///
    /// Those of [`Outlet::begin`]; after `STORE_DENIED` it is of no use any
    /// more. `JOURNAL_FAILED`.
    fn abandon<'a>(&'a self, token: &'a UploadToken) -> BoxFuture<'a, Result<()>>;
    /// Wipes what is kept for deliveries other than these. Answers for how
    /// many.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`.
    fn sweep<'a>(&'a self, keep: &'a [UploadToken]) -> BoxFuture<'a, Result<usize>>;
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

/// The place of one object, outside of what is imaged's own.
pub trait Outlet: Send + Sync + fmt::Debug {
    /// Where the object will be, without any secret.
    fn location(&self) -> String;
    /// Begins to deliver it. Nothing is visible before
    /// [`Delivery::complete`].
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE`, `STORE_DENIED`, `STORE_REFUSED`; `OBJECT_EXISTS`.
    fn begin(&self) -> BoxFuture<'_, Result<Box<dyn Delivery>>>;
}

/// An object on its way to its place.
pub trait Delivery: Send + Sync + fmt::Debug {
    /// What aborts it in a later process. Where that takes a secret it is kept
    /// from here on, sealed, until the delivery ends.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`: a later process could not.
    fn token(&self) -> BoxFuture<'_, Result<UploadToken>>;
    /// Stores one part. Parts come concurrently and in any order, each once.
    ///
    /// # Errors
    ///
    /// Those of [`Outlet::begin`], `STORE_FULL`, and those of the part's body.
    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<()>>;
    /// Makes the object exist, of all parts. Answers what its service calls
    /// this version of it, where it tells.
    ///
    /// # Errors
    ///
    /// As [`put`](Self::put); `OBJECT_EXISTS` when one came meanwhile.
    fn complete(&self) -> BoxFuture<'_, Result<Option<String>>>;
    /// Removes everything. Aborting twice is success.
    fn abort(&self) -> BoxFuture<'_, Result<()>>;
}

/// What a deletion changed.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delete {
    /// The image was there and is gone.
    Deleted,
    /// It is gone from sight, and the store keeps its bytes as old versions.
    Hidden,
    /// There was none.
    AlreadyDeleted,
}

/// An upload under way. Dropping it without [`seal`](Upload::seal) or
/// [`abort`](Upload::abort) leaves the cleaning to the next
/// [`ObjectStore::sweep`].
pub trait Upload: Send + Sync + fmt::Debug {
    /// What the store needs to go on with it; `None` where it cannot.
    fn token(&self) -> Option<UploadToken>;
    /// Stores one part. Parts come concurrently and in any order, each once;
    /// one that the store has already is not sent again.
    ///
    /// # Errors
    ///
    /// `STORE_FULL`, `STORE_UNAVAILABLE`.
    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<Receipt>>;
    /// Makes the image exist: everything durable, then the manifest, last.
    /// All parts must have been put. After an error nothing is visible, and
    /// the upload is to be aborted.
    fn seal(&self, sealed: Arc<Sealed>) -> BoxFuture<'_, Result<()>>;
    /// Removes everything. Aborting twice is success.
    fn abort(&self) -> BoxFuture<'_, Result<()>>;
}

/// Everything that turns stored parts into an image: 14 MB for 400 GiB.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// Immutable.
    pub manifest: Manifest,
    /// Mutable.
    pub record: Record,
    /// 32 bytes for each extent.
    pub extent_digests: Vec<u8>,
    /// What was said to a running instance, in JSON; the manifest has its
    /// digest.
    pub trace: Option<Vec<u8>>,
}

/// A part of an object on its way to a store.
pub struct Part {
    /// From 1, without gaps.
    pub number: u32,
    /// Offset of its first byte in the object.
    pub offset: u64,
    /// Its length.
    pub size: ByteSize,
    /// Its bytes. Dropping them gives the memory back to the encoder.
    pub body: Box<dyn Body>,
    /// SHA-256 of the body.
    pub sha256: ObjectDigest,
}

/// Bytes in memory, in pieces, or on their way.
pub trait Body: Send + Sync {
    /// Piece `index`, from 0; `None` behind the last. None is empty. Aligned
    /// for direct writes, each and its length, but for the last piece's
    /// length: see [`crate::sys::aligned`].
    fn piece(&self, index: usize) -> Option<&[u8]>;

    /// All bytes from the first one on, for who sends them, where they must be
    /// waited for; they may be asked for again. `None`: the pieces are there.
    fn stream(&self) -> Option<BoxStream<'static, Result<Bytes>>> {
        None
    }

    /// Waits until so many bytes may be stored, for who takes the pieces.
    /// Blocks; [`stream`](Self::stream) has waited already.
    fn admit(&self, bytes: usize) {
        let _ = bytes;
    }
}

/// The pieces of `body`, in order.
pub fn pieces(body: &dyn Body) -> impl Iterator<Item = &[u8]> {
    (0..).map_while(|index| body.piece(index))
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({}, {} at {})", self.number, self.size, self.offset)
    }
}

impl Part {
    /// The bytes of the part, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        pieces(&*self.body)
    }
}

/// Random access to bytes, for decoders and parsers. Blocks.
pub trait ReadAt: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> u64;
    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` beyond the end, and what the device says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()>;
}

/// An object in a store.
pub trait ObjectReader: ReadAt + fmt::Debug {}

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
