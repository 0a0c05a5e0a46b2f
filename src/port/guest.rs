//! Those that run instances.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{BoxFuture, HeldVolume, HostSnapshot, Secret};
use crate::{
    error::{Error, Result},
    model::{
        ByteSize,
        host::Feature,
        instance::{Instance, Machine, PowerState},
        iscsi::Iscsi,
        live::{LiveSource, Mode, PointInTime, Undo},
        upload::ResumeSource,
    },
    recorder::Recorder,
};

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

/// The guests of instances, as their agents answer for them.
pub trait Guests: Send + Sync + fmt::Debug {
    /// What of iSCSI the running `instance` has, as its guest says. Changes
    /// nothing; bounded to some minutes.
    ///
    /// # Errors
    ///
    /// All that begin with `GUEST_`.
    fn iscsi<'a>(&'a self, instance: &'a Instance) -> BoxFuture<'a, Result<Iscsi>>;

    /// What would give the guest of the running `instance` all of its iSCSI
    /// back; `None`: it has nothing. Changes nothing.
    ///
    /// # Errors
    ///
    /// As [`iscsi`](Self::iscsi); `GUEST_UNSUPPORTED` for what imaged could
    /// not give back.
    fn keep_iscsi<'a>(
        &'a self,
        instance: &'a Instance,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Option<Secret>>>;

    /// Takes what was `kept` from the guest that `machine` runs: unmounts,
    /// logs out, removes the records. After an error, or when this is
    /// dropped, it is to be given back. Bounded to some minutes.
    ///
    /// # Errors
    ///
    /// As [`iscsi`](Self::iscsi); `GUEST_BUSY` for what is in use, with its
    /// users.
    fn disconnect_iscsi<'a>(
        &'a self,
        machine: &'a Machine,
        kept: &'a Secret,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<()>>;

    /// Gives back what was `kept`, however much of it was taken, also after a
    /// reboot of the guest. Repeating it changes nothing. Bounded to some
    /// minutes.
    ///
    /// # Errors
    ///
    /// As [`iscsi`](Self::iscsi): it is to be tried again.
    fn reconnect_iscsi<'a>(
        &'a self,
        machine: &'a Machine,
        kept: &'a Secret,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<()>>;
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
