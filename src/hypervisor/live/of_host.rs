//! A snapshot that the host's filesystem or volume manager takes, while the
//! guest is frozen or shut down.
//!
//! QEMU has no part in it: what its guest wrote is in the file by then, or in
//! the page cache above it, which is part of the file. Without a freeze it is what a pulled plug leaves: the host takes
//! it between two writes, for those that are on their way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::{Instant, timeout_at};

use super::{find::BootDisk, snapshot::disk_work, stop::Stopper};
use crate::{
    error::{Error, Reason, Result},
    hypervisor::{
        guard::Guards,
        hold::{Hold, Moment},
        qmp::Qmp,
    },
    model::{
        ByteSize,
        live::{LiveSource, Mode, PointInTime, Undo},
    },
    port::{BoxFuture, DiskWork, HeldVolume, HostSnapshot, LiveSnapshot, Prepared},
    recorder::Recorder,
};

/// A snapshot that the host can take.
#[derive(Debug)]
pub(super) struct Ready {
    pub qmp: Qmp,
    pub hold: Hold<Stopper>,
    pub disk: BootDisk,
    pub snapshot: Box<dyn HostSnapshot>,
    pub undo: Undo,
    pub mode: Mode,
    pub guards: Arc<Guards>,
    pub recorder: Arc<Recorder>,
}

impl Prepared for Ready {
    fn undo(&self) -> &Undo {
        &self.undo
    }

    fn size(&self) -> ByteSize {
        self.disk.size
    }

    fn take(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn LiveSnapshot>>> {
        Box::pin(async move {
            let taken = self.taken().await?;
            Ok(Box::new(taken) as Box<dyn LiveSnapshot>)
        })
    }
}

impl Ready {
    async fn taken(self) -> Result<Taken> {
        let Self { qmp, hold, disk, snapshot, undo, mode, guards, recorder } = self;
        // What is dirty now would be written back with the guest frozen.
        snapshot.settle().await?;
        if undo.held.is_held() {
            guards.set(&undo).await?;
        }
        let taking = Taking { snapshot: Mutex::new(Some(snapshot)), volume: Mutex::new(None) };
        let point = hold.point(&qmp, mode, &recorder, &taking).await?;
        guards.lift(&undo).await;
        let volume = taking.volume;
        let size = lock(&volume).as_ref().map_or(ByteSize(0), |taken| taken.facts().size);
        if size != disk.size {
            let context = format!(
                "the snapshot of instance {:?} has {size:#}, and its disk has {:#}",
                undo.instance, disk.size
            );
            return Err(Error::new(Reason::SnapshotRefused, context)
                .advice("do not resize a volume while it is imaged; ask again"));
        }
        Ok(Taken { qmp, device: disk.device.to_string(), point, volume })
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
struct Taken {
    qmp: Qmp,
    device: String,
    point: PointInTime,
    volume: Once<Box<dyn HeldVolume>>,
}

impl LiveSnapshot for Taken {
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
        Box::pin(disk_work(&self.qmp, &self.device))
    }

    fn scratch(&self) -> BoxFuture<'_, Result<ByteSize>> {
        Box::pin(async { Ok(ByteSize(0)) })
    }

    /// Never: it needs no QEMU.
    fn lost(&self) -> BoxFuture<'_, Error> {
        Box::pin(std::future::pending())
    }

    fn release(self: Box<Self>) -> BoxFuture<'static, Result<ByteSize>> {
        Box::pin(async move {
            self.qmp.close().await;
            Ok(ByteSize(0))
        })
    }
}
