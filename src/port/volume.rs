//! Volumes, and what is written to them.

use std::{
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::mpsc::SyncSender,
};

use tokio_util::sync::CancellationToken;

use super::{BoxFuture, Meter, Pace};
use crate::{
    error::Result,
    model::{ByteSize, image::SnapshotKind, live::LiveSource, upload::VolumeMark},
};

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
    /// What this host's filesystem or volume manager offers of the volume at
    /// `path`: changes nothing yet. The snapshot will be read at the `pace` of its guest.
    ///
    /// # Errors
    ///
    /// As [`hold`](Self::hold), but for `VOLUME_HELD`.
    fn host_snapshot<'a>(
        &'a self,
        path: &'a Path,
        named: NamedBy,
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
