//! The volumes of this host: found, held, mapped and read.
//!
//! ```text
//! path ──open──► checked and open ──hold: holder, qemu_lock──► held ──map──► facts
//!                                                               └──reader, queue──► pieces
//! path ──open──► reflink, lvm: snapshot ──reader──► pieces
//! path ──open, hold──► target ──writer, queue, flusher──► an image over what was there
//! ```
//!
//! A volume is held in three ways at once, for each stops others: `O_EXCL`
//! the kernel (mounts, swap, device-mapper), QEMU's lock bytes every QEMU,
//! and a search of `/proc` and `/sys` finds who was there before and who
//! respects neither.

#[cfg(test)]
mod device_tests;
mod flusher;
mod hold;
mod holder;
mod live;
mod lvm;
mod map;
pub mod nbd;
mod open;
mod pace;
mod procfs;
mod program;
mod qemu_lock;
mod queue;
mod reader;
pub mod reconcile;
mod reflink;
#[cfg(test)]
mod reflink_tests;
mod target;
#[cfg(test)]
mod tests;
mod writer;
mod writes;

use std::{
    fmt,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::writes::Writes;
use self::{
    hold::hold,
    holder::Host,
    live::Live,
    open::{Named, Purpose},
    reader::Source,
};
pub use self::{lvm::Lvm, queue::Engine, reader::ReaderSettings};
use crate::{
    error::{Error, Reason, Result},
    model::{ByteSize, image::SnapshotKind, live::LiveSource, upload::VolumeMark},
    port::{
        BoxFuture, HeldVolume, NamedBy, Offer, Pace, Piece, Target, VolumeFacts, Volumes, Writer,
    },
    sys::{
        ring::{Mode, Ring},
        stat::Identity,
    },
};

/// How long opening, flushing and mapping a volume may take. A device with
/// gigabytes of dirty cache needs a minute; one that answers nothing would
/// take for ever.
const HOLD_DEADLINE: Duration = Duration::from_secs(120);

/// Volumes that are opened at once. One that does not answer keeps its thread,
/// and only so many are ever lost to such.
const OPENINGS: usize = 16;

/// The block devices and raw files in the directories that the configuration
/// allows.
#[derive(Debug)]
pub struct HostVolumes {
    allowed: Arc<[PathBuf]>,
    /// Where images may be restored to.
    targets: Arc<[PathBuf]>,
    settings: ReaderSettings,
    host: Host,
    openings: Openings,
    lvm: Option<Arc<Lvm>>,
}

/// What is wanted of a snapshot of the host.
struct Wanted {
    writer: Writer,
    pace: Pace,
    settings: ReaderSettings,
}

/// Threads that open a volume, or snapshot it.
#[derive(Debug, Clone)]
struct Openings(Arc<Semaphore>);

impl HostVolumes {
    /// Volumes within `allowed_dirs` (the configuration's
    /// `boot_volume_dirs`), at any depth: both the path that is asked for and
    /// where it leads.
    #[must_use]
    pub fn new(allowed_dirs: Vec<PathBuf>, settings: ReaderSettings) -> Self {
        let openings = Openings(Arc::new(Semaphore::new(OPENINGS)));
        let (allowed, targets) = (allowed_dirs.into(), Arc::default());
        Self { allowed, targets, settings, host: Host::default(), openings, lvm: None }
    }

    /// Thin logical volumes are snapshotted by `lvm`.
    #[must_use]
    pub fn snapshotting(mut self, lvm: Option<Lvm>) -> Self {
        self.lvm = lvm.map(Arc::new);
        self
    }

    /// Images may be restored to volumes within `dirs` (`restore_dirs`): by
    /// default to none.
    #[must_use]
    pub fn restoring_to(mut self, dirs: Vec<PathBuf>) -> Self {
        self.targets = dirs.into();
        self
    }
}

/// Whether this kernel lets this process use io_uring, and in which mode.
///
/// # Errors
///
/// `ENOSYS` where it is missing, `EPERM` where it is forbidden
/// (`kernel.io_uring_disabled`, seccomp).
pub fn uring_available() -> io::Result<Mode> {
    Ring::probe()
}

impl HostVolumes {
    /// Where a volume must lie that is named so.
    fn allowed(&self, path: &Path, named: NamedBy) -> Arc<[PathBuf]> {
        match named {
            NamedBy::Request => Arc::clone(&self.allowed),
            NamedBy::Instance => [path.to_owned()].into(),
        }
    }

    /// Opens `volume` on a thread of its own, by what is allowed.
    async fn open<V: Send + 'static>(
        &self,
        volume: &Path,
        allowed: &Arc<[PathBuf]>,
        open: impl FnOnce(&Host, &[PathBuf], ReaderSettings) -> Result<V> + Send + 'static,
    ) -> Result<V> {
        let (allowed, settings, host) = (Arc::clone(allowed), self.settings, self.host.clone());
        self.openings.run(volume, move || open(&host, &allowed, settings)).await
    }
}

impl Openings {
    /// Does `work` with `volume` on a thread of its own.
    async fn run<V: Send + 'static>(
        &self,
        volume: &Path,
        work: impl FnOnce() -> Result<V> + Send + 'static,
    ) -> Result<V> {
        let openings = Arc::clone(&self.0);
        let work = async {
            // Held by the thread, not by who waits for it.
            let place = openings.acquire_owned().await;
            let work = move || {
                let _place = place;
                work()
            };
            tokio::task::spawn_blocking(work).await
        };
        // A device that does not answer keeps its thread; what it opens in
        // the end is dropped at once.
        match tokio::time::timeout(HOLD_DEADLINE, work).await {
            Ok(Ok(held)) => held,
            Ok(Err(panic)) => Err(Error::new(
                Reason::Internal,
                format!("the opening of {} ended early", volume.display()),
            )
            .because(panic)),
            Err(_) => Err(Error::new(
                Reason::VolumeUnavailable,
                format!(
                    "the volume {} did not answer within {} seconds",
                    volume.display(),
                    HOLD_DEADLINE.as_secs()
                ),
            )
            .advice("look into the kernel's log")),
        }
    }
}

impl Volumes for HostVolumes {
    fn hold<'a>(
        &'a self,
        path: &'a Path,
        named: NamedBy,
    ) -> BoxFuture<'a, Result<Box<dyn HeldVolume>>> {
        let (asked, allowed) = (path.to_owned(), self.allowed(path, named));
        Box::pin(async move {
            let held = self.open(path, &allowed, move |host, allowed, settings| {
                let held = hold(host, allowed, settings, &asked)?;
                Ok(Box::new(held) as Box<dyn HeldVolume>)
            });
            held.await
        })
    }

    fn target<'a>(
        &'a self,
        path: &'a Path,
        size: ByteSize,
    ) -> BoxFuture<'a, Result<Box<dyn Target>>> {
        let asked = path.to_owned();
        Box::pin(async move {
            let target = self.open(path, &self.targets, move |host, allowed, settings| {
                let target = target::target(host, allowed, settings, &asked, size)?;
                Ok(Box::new(target) as Box<dyn Target>)
            });
            target.await.map_err(|error| error.field("to"))
        })
    }

    fn host_snapshot<'a>(
        &'a self,
        path: &'a Path,
        named: NamedBy,
        writer: Writer,
        pace: Pace,
    ) -> BoxFuture<'a, Result<Offer>> {
        let (asked, allowed) = (path.to_owned(), self.allowed(path, named));
        let (openings, lvm) = (self.openings.clone(), self.lvm.clone());
        let offer = move |host: &Host, allowed: &[PathBuf], settings| {
            let wanted = Wanted { writer, pace, settings };
            let named = Named::look_up(&asked, allowed, Purpose::ReadBesideGuest)?;
            let is_file = matches!(named.identity, Identity::File { .. });
            Ok(match (is_file, &lvm) {
                (true, _) => match reflink::offer(host, named, wanted)? {
                    Ok(reflink) => Offer::Snapshot(Box::new(reflink::Ready { reflink, openings })),
                    Err(why) => Offer::Nothing(why),
                },
                (false, Some(lvm)) => match lvm::offer(lvm, host, &named, wanted)? {
                    Ok(thin) => Offer::Snapshot(Box::new(lvm::Ready { thin, openings })),
                    Err(why) => Offer::Nothing(why),
                },
                (false, None) => Offer::Nothing("it is a device, and LVM cannot be used".into()),
            })
        };
        Box::pin(async move { self.open(path, &allowed, offer).await })
    }

    fn sweep(&self) -> BoxFuture<'_, Result<usize>> {
        Box::pin(async move {
            let Some(lvm) = self.lvm.clone() else { return Ok(0) };
            self.openings.run(Path::new("of LVM"), move || lvm.sweep()).await
        })
    }

    fn live<'a>(
        &'a self,
        source: &'a LiveSource,
        pace: Pace,
    ) -> BoxFuture<'a, Result<Box<dyn HeldVolume>>> {
        let from = source.clone();
        Box::pin(self.open(source.volume(), &self.allowed, move |host, allowed, settings| {
            let live = Live::open(host, allowed, settings, &from, pace)?;
            Ok(Box::new(live) as Box<dyn HeldVolume>)
        }))
    }
}

/// A volume that nothing else writes to while this value lives.
struct Held {
    /// Open exclusively, with QEMU's locks.
    source: Source,
    settings: ReaderSettings,
    /// The file under a loop device, with QEMU's locks.
    _backing: Option<File>,
    /// What was written before.
    writes: Writes,
    /// The first extent that is read.
    from: u64,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Held({}, {})", self.source.facts.path.display(), self.source.facts.size)
    }
}

impl HeldVolume for Held {
    fn facts(&self) -> &VolumeFacts {
        &self.source.facts
    }

    fn snapshot(&self) -> SnapshotKind {
        SnapshotKind::AtRest
    }

    fn mark(&self) -> Option<VolumeMark> {
        self.writes.mark()
    }

    fn begin_at(&mut self, extent: u64) {
        self.from = extent;
    }

    fn read(&mut self, pieces: &SyncSender<Piece>, stop: &CancellationToken) -> Result<()> {
        reader::read(&self.source, self.settings, self.from, None, pieces, stop)?;
        self.writes.none_since(&self.source.file, &self.source.facts.path)
    }
}
