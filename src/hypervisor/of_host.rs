//! A snapshot that the host's filesystem or volume manager takes, while the
//! guest is frozen or shut down, whoever runs it.
//!
//! QEMU has no part in it: what its guest wrote is in the file by then, or in
//! the page cache above it, which is part of the file. Without a freeze it is
//! what a pulled plug leaves: the host takes it between two writes, for those
//! that are on their way.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::{Instant, timeout_at};

use super::{
    guard::Guards,
    hold::{Hold, Moment, Stopper},
};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize,
        live::{LiveSource, Mode, PointInTime, Undo},
    },
    port::{BoxFuture, DiskWork, HeldVolume, HostSnapshot, LiveSnapshot, Prepared},
    recorder::Recorder,
};

/// What is asked of who runs the guest while its snapshot is read.
pub(super) trait Line: Send + Sync + fmt::Debug + 'static {
    /// What the guest's `disk` has done so far.
    fn disk_work(&self, disk: &str) -> impl Future<Output = Result<DiskWork>> + Send;
    /// Nothing more will be asked.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// A snapshot that the host can take.
#[derive(Debug)]
pub(super) struct Ready<S: Stopper> {
    pub line: S::Line,
    pub hold: Hold<S>,
    /// The boot disk, in the words of who runs the guest.
    pub disk: String,
    pub size: ByteSize,
    pub snapshot: Box<dyn HostSnapshot>,
    pub undo: Undo,
    pub mode: Mode,
    pub guards: Arc<Guards>,
    pub recorder: Arc<Recorder>,
}

impl<S> Prepared for Ready<S>
where
    S: Stopper<Line: Line> + Send + fmt::Debug + 'static,
{
    fn undo(&self) -> &Undo {
        &self.undo
    }

    fn size(&self) -> ByteSize {
        self.size
    }

    fn take(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn LiveSnapshot>>> {
        Box::pin(async move {
            let taken = self.taken().await?;
            Ok(Box::new(taken) as Box<dyn LiveSnapshot>)
        })
    }
}

impl<S: Stopper> Ready<S> {
    async fn taken(self) -> Result<Taken<S::Line>> {
        let Self { line, hold, disk, size, snapshot, undo, mode, guards, recorder } = self;
        // What is dirty now would be written back with the guest frozen.
        snapshot.settle().await?;
        if undo.held.is_held() {
            guards.set(&undo).await?;
        }
        let taking = Taking { snapshot: Mutex::new(Some(snapshot)), volume: Mutex::new(None) };
        let point = hold.point(&line, mode, &recorder, &taking).await?;
        guards.lift(&undo).await;
        let volume = taking.volume;
        let found = lock(&volume).as_ref().map_or(ByteSize(0), |taken| taken.facts().size);
        if found != size {
            let context = format!(
                "the snapshot of instance {:?} has {found:#}, and its disk has {size:#}",
                undo.instance
            );
            return Err(Error::new(Reason::SnapshotRefused, context)
                .advice("do not resize a volume while it is imaged; ask again"));
        }
        Ok(Taken { line, disk, point, volume })
    }
}

type Once<T> = Mutex<Option<T>>;

fn lock<T>(once: &Once<T>) -> MutexGuard<'_, Option<T>> {
    once.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A snapshot on its way from what can be taken to what was.
struct Taking {
    snapshot: Once<Box<dyn HostSnapshot>>,
    volume: Once<Box<dyn HeldVolume>>,
}

impl Moment for Taking {
    /// One that comes after the deadline is dropped, and nothing is left of
    /// it.
    fn switch(&self, deadline: Instant) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let snapshot = lock(&self.snapshot).take();
            let Some(snapshot) = snapshot else {
                let context = "the host's snapshot was taken before";
                return Err(Error::new(Reason::Internal, context));
            };
            let Ok(taken) = timeout_at(deadline, snapshot.take()).await else {
                let context = "the host did not take its snapshot in time";
                return Err(Error::new(Reason::SnapshotRefused, context)
                    .advice("look into the kernel's log (dmesg): its disk may be slow"));
            };
            *lock(&self.volume) = Some(taken?);
            Ok(())
        })
    }
}

/// A snapshot that was taken.
#[derive(Debug)]
struct Taken<L> {
    line: L,
    disk: String,
    point: PointInTime,
    volume: Once<Box<dyn HeldVolume>>,
}

impl<L: Line> LiveSnapshot for Taken<L> {
    fn point(&self) -> &PointInTime {
        &self.point
    }

    fn source(&self) -> Option<&LiveSource> {
        None
    }

    fn volume(&self) -> Option<Box<dyn HeldVolume>> {
        lock(&self.volume).take()
    }

    fn disk_work(&self) -> BoxFuture<'_, Result<DiskWork>> {
        Box::pin(self.line.disk_work(&self.disk))
    }

    fn scratch(&self) -> BoxFuture<'_, Result<ByteSize>> {
        Box::pin(async { Ok(ByteSize(0)) })
    }

    /// Never: it needs nobody.
    fn lost(&self) -> BoxFuture<'_, Error> {
        Box::pin(std::future::pending())
    }

    fn release(self: Box<Self>) -> BoxFuture<'static, Result<ByteSize>> {
        Box::pin(async move {
            self.line.close().await;
            Ok(ByteSize(0))
        })
    }
}
