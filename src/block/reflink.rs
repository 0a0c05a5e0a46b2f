//! Clones of files that share their blocks: XFS and btrfs.
//!
//! ```text
//! volume ──FICLONE──► unnamed file beside it ──direct reads──► pieces
//! ```
//! The clone has no name, so it goes with the process that made it, however
//! that ends.
//!
//! It is a point in time, also beside a guest. Both filesystems clone under
//! the exclusive lock of the file, which every write takes, and first wait
//! for the direct writes that are on their way (`inode_dio_wait`; btrfs also
//! for its ordered extents). A write that was answered before is in the
//! clone, one that begins after is not, and one beside it is there as a whole
//! or not at all. That is no less than what a pulled plug leaves.

use std::{
    fs::File,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, mpsc::SyncSender},
};

use nix::sys::{
    statfs::{BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs},
    statvfs::fstatvfs,
};
use tokio_util::sync::CancellationToken;

use super::{
    Openings, Wanted,
    hold::measured,
    holder::Host,
    open::{self, Named, Opened},
    reader::{self, AsItIs, Past, ReaderSettings, Source},
    writes::Writes,
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::{ByteSize, image::SnapshotKind, upload::VolumeMark},
    port::{BoxFuture, HeldVolume, HostSnapshot, Pace, Piece, VolumeFacts, Writer},
    steps,
    sys::{
        ioctl::{clone_file, clone_start, extents},
        stat::{self, DirectReads, Identity, direct_reads},
    },
};

/// Most extents of a volume that is cloned while its guest waits: that takes
/// some milliseconds, and 200,000 of them took 3.3 s.
const EXTENTS: u32 = 500;

/// Of how much is tried whether it can be cloned: whole blocks of every
/// filesystem.
const TRIED: u64 = 64 << 10;

/// A volume that can be cloned, and the file that it will be cloned into.
#[derive(Debug)]
pub(super) struct Reflink {
    host: Host,
    path: PathBuf,
    identity: Identity,
    volume: Arc<File>,
    sector_size: u32,
    clone: File,
    writer: Writer,
    pace: Pace,
    settings: ReaderSettings,
}

/// Looks whether the file `named` can be cloned, and why not.
pub(super) fn offer(host: &Host, named: Named, wanted: Wanted) -> Result<Result<Reflink, String>> {
    let (path, identity) = (named.path.clone(), named.identity);
    let nothing = |why: String| Ok(Err(why));
    let Some(Opened { file, sector_size, .. }) = named.open()? else {
        return nothing("something has claimed it".into());
    };
    if !fstatfs(&file)
        .is_ok_and(|fs| [XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC].contains(&fs.filesystem_type()))
    {
        return nothing("its filesystem is neither XFS nor btrfs, which clone files".into());
    }
    if wanted.writer == Writer::Guest {
        match extents(file.as_fd()) {
            Ok(count) if count <= EXTENTS => {}
            Ok(count) => {
                return nothing(format!(
                    "its file is in {count} pieces, and a clone of more than {EXTENTS} takes long"
                ));
            }
            Err(error) => {
                return nothing(format!("the pieces of its file cannot be counted: {error}"));
            }
        }
    }
    // What the guest overwrites takes new blocks while the clone keeps the
    // old ones. With room for all of them, it never finds the disk full for
    // the clone's sake.
    let used = file.metadata().map(|facts| facts.blocks() * 512);
    let free = fstatvfs(&file).map(|fs| fs.blocks_available() * fs.fragment_size());
    match (used, free) {
        (Ok(used), Ok(free)) if used <= free => {}
        (Ok(used), Ok(free)) => {
            return nothing(format!(
                "its filesystem has {} left, and may need {} beside a clone",
                ByteSize(free),
                ByteSize(used)
            ));
        }
        (Err(error), _) => return nothing(format!("its size on the disk is unknown: {error}")),
        (_, Err(error)) => return nothing(format!("the room beside it is unknown: {error}")),
    }
    match empty_clone(&path, &file) {
        Err(error) => nothing(format!("its file cannot be cloned: {error}")),
        Ok(clone) => Ok(Ok(Reflink {
            host: host.clone(),
            path,
            identity,
            volume: Arc::new(file),
            sector_size,
            clone,
            writer: wanted.writer,
            pace: wanted.pace,
            settings: wanted.settings,
        })),
    }
}

/// A file without a name beside the one at `path`, into which its start could
/// be cloned.
fn empty_clone(path: &Path, volume: &File) -> std::io::Result<File> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut options = File::options();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE | libc::O_DIRECT);
    let clone = options.open(directory)?;
    let tried = if volume.metadata()?.len() < TRIED { 0 } else { TRIED };
    clone_start(clone.as_fd(), volume.as_fd(), tried)?;
    Ok(clone)
}

impl Reflink {
    /// The point in time.
    fn take(self) -> Result<Clone> {
        let Self { host, path, identity, volume, clone, writer, pace, settings, .. } = self;
        let refused = || format!("the file of the volume {} cannot be cloned", path.display());
        clone_file(clone.as_fd(), volume.as_fd()).context(Reason::SnapshotRefused, refused)?;
        // A file that was put in its place is another volume.
        if stat::identity(&path).ok() != Some(identity) {
            return Err(Error::new(Reason::SnapshotRefused, refused()).because("it was exchanged"));
        }
        let measured_clone = || format!("cannot measure the clone of {}", path.display());
        let mark = match writer {
            Writer::Guest => None,
            Writer::Nobody => Writes::until_now(&host, identity, &volume)
                .context(Reason::VolumeUnavailable, measured_clone)?
                .mark(),
        };
        let size = clone.metadata().context(Reason::VolumeUnavailable, measured_clone)?.len();
        // Shared blocks may want other direct reads than a file's own.
        let sector_size = match direct_reads(clone.as_fd()) {
            Ok(DirectReads::Aligned { offset, .. }) => offset.max(self.sector_size),
            _ => self.sector_size,
        };
        let source = measured(path, identity, Opened { file: clone, size, sector_size }, None)?;
        Ok(Clone { source, settings, pace, mark, from: 0 })
    }
}

/// A [`Reflink`] with the threads that it may take.
#[derive(Debug)]
pub(super) struct Ready {
    pub reflink: Reflink,
    pub openings: Openings,
}

impl HostSnapshot for Ready {
    fn kind(&self) -> SnapshotKind {
        SnapshotKind::Reflink
    }

    fn settle(&self) -> BoxFuture<'_, Result<()>> {
        let (volume, path) = (Arc::clone(&self.reflink.volume), self.reflink.path.clone());
        Box::pin(self.openings.run(&self.reflink.path, move || open::flush(&volume, &path)))
    }

    fn take(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn HeldVolume>>> {
        Box::pin(async move {
            let Self { reflink, openings } = *self;
            let path = reflink.path.clone();
            let taken = openings.run(&path, move || reflink.take());
            let clone = steps::effect("host snapshot", taken).await?;
            Ok(Box::new(clone) as Box<dyn HeldVolume>)
        })
    }
}

/// A clone that is read.
#[derive(Debug)]
struct Clone {
    source: Source,
    settings: ReaderSettings,
    pace: Pace,
    /// The volume's, when it was cloned.
    mark: Option<VolumeMark>,
    /// The first extent that is read.
    from: u64,
}

impl HeldVolume for Clone {
    fn facts(&self) -> &VolumeFacts {
        &self.source.facts
    }

    fn snapshot(&self) -> SnapshotKind {
        SnapshotKind::Reflink
    }

    fn mark(&self) -> Option<VolumeMark> {
        self.mark.clone()
    }

    fn begin_at(&mut self, extent: u64) {
        self.from = extent;
    }

    fn read(&mut self, pieces: &SyncSender<Piece>, stop: &CancellationToken) -> Result<()> {
        let guest: (&mut dyn Past, &Pace) = (&mut AsItIs, &self.pace);
        reader::read(&self.source, self.settings, self.from, Some(guest), pieces, stop)
    }
}
