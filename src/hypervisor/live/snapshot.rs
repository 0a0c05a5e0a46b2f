//! Takes a snapshot and holds it.

use std::{
    fs::{self, File},
    io,
    num::NonZeroU32,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::unistd::{Gid, Uid};
use tokio::time::{Instant, sleep, timeout};

use super::{
    COMMAND, SCRATCH_FILE, SOCKET_FILE,
    find::BootDisk,
    names::Names,
    stop::Stopper,
    undo::{clean, sockets, take_out},
    within,
};
use crate::{
    error::{Context, Error, Reason, Result},
    format::qcow2,
    hypervisor::{
        guard::Guards,
        hold::{Hold, Moment},
        of_host,
        qmp::{
            AllocationMap, Command, DeviceStatistics, Done, Events, FilePath, NodeRef, Observed,
            Qmp, SocketPath, Switch,
        },
    },
    model::{
        ByteSize,
        live::{Filter, FilterSource, LiveSource, PointInTime, Undo},
        upload::ResumeSource,
    },
    port::{BoxFuture, DiskWork, LiveSnapshot, Prepared, SnapshotOrder},
    recorder::Recorder,
    steps,
};

/// Longest copy before a guest's write. QEMU 7.2 keeps it in 32 bits of
/// nanoseconds: 4.29 s at most are what they say.
const COPY_SECONDS: u32 = 4;

/// How often the scratch is measured. QEMU alone keeps the bound; this tells
/// of a full one before the next read does.
const LOOK: Duration = Duration::from_millis(200);

/// Longest wait for the scratch's disk at the end: the guest has its own back
/// by then.
const SYNC: Duration = Duration::from_secs(300);

/// With so little left, QEMU may have found no room: it needs a cluster and
/// its tables at once.
const LEFT: u64 = ByteSize::MIB;

/// A snapshot that can be taken: everything was looked at.
#[derive(Debug)]
pub struct Ready {
    pub(super) qmp: Qmp,
    pub(super) hold: Hold<Stopper>,
    pub(super) disk: BootDisk,
    pub(super) names: Names,
    pub(super) undo: Undo,
    pub(super) filter: Filter,
    pub(super) owner: Option<(Uid, Gid)>,
    pub(super) volume: PathBuf,
    pub(super) order: SnapshotOrder,
    pub(super) guards: Arc<Guards>,
    pub(super) recorder: Arc<Recorder>,
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
        let events = self.qmp.events();
        let scratch = self.add_scratch().await?;
        if self.undo.held.is_held() {
            self.guards.set(&self.undo).await?;
        }
        let point = self.hold.point(&self.qmp, self.order.mode, &self.recorder, &self).await?;
        self.guards.lift(&self.undo).await;
        self.show().await?;
        let Self { qmp, disk, names, undo, filter, volume, order, .. } = self;
        let source = LiveSource::Filter(FilterSource {
            size: disk.size,
            volume,
            process: qmp.process(),
            raw: disk.raw,
            socket: filter.dir.join(SOCKET_FILE),
            snapshot: names.snapshot.to_string(),
            scratch: names.saved.to_string(),
            live: names.live.to_string(),
        });
        let events = tokio::sync::Mutex::new(events);
        Ok(Taken { qmp, events, undo, filter, point, source, limit: order.scratch, scratch })
    }

    /// What takes the guest's overwritten bytes, and the server that will
    /// show them. The guest notices nothing.
    async fn add_scratch(&self) -> Result<File> {
        let (dir, size, owner) = (self.filter.dir.clone(), self.disk.size.get(), self.owner);
        // Whole sectors, as QEMU counts.
        let limit = self.order.scratch.get() / 512 * 512;
        let made = tokio::task::spawn_blocking(move || make_scratch(&dir, size, limit, owner));
        let made = steps::effect("scratch made", made).await.map_err(io::Error::other).flatten();
        let made = made.context(Reason::Internal, || {
            format!("no scratch file can be made in {}", self.filter.dir.display())
        })?;
        let odd = || format!("QEMU cannot be told of {}", self.filter.dir.display());
        let file =
            FilePath::new(&self.filter.dir.join(SCRATCH_FILE)).context(Reason::Internal, odd)?;
        let socket =
            SocketPath::new(&self.filter.dir.join(SOCKET_FILE)).context(Reason::Internal, odd)?;
        let Names { scratch, bound, overlay, .. } = self.names.clone();
        self.execute(Command::add_scratch(scratch.clone(), file)).await?;
        self.execute(Command::add_bound(bound.clone(), scratch, limit)).await?;
        self.execute(Command::add_overlay(overlay, bound)).await?;
        self.execute(Command::start_nbd_server(socket)).await?;
        Ok(made)
    }

    async fn put_filter_in(&self, deadline: Instant) -> Result<()> {
        let Names { overlay, filter, .. } = self.names.clone();
        let (node, device) = (self.disk.node.clone(), &self.disk.device);
        let timeout = NonZeroU32::new(COPY_SECONDS).unwrap_or(NonZeroU32::MIN);
        let filtered = NodeRef::from(&filter);
        let add = Command::add_copy_before_write(filter, node.clone(), overlay, timeout);
        let Done {} = self.qmp.execute(add, deadline).await?;
        match self.qmp.switch_drive(device, &node, &filtered, deadline).await? {
            Switch::Switched => Ok(()),
            Switch::AlreadyThere => {
                Err(Error::new(Reason::Internal, format!("{device} had the filter before")))
            }
        }
    }

    /// Exports what is to be read.
    async fn show(&self) -> Result<()> {
        let Names { overlay, filter, access, snapshot, saved, live, .. } = self.names.clone();
        self.execute(Command::add_snapshot_access(access.clone(), filter.clone())).await?;
        self.execute(Command::add_export(snapshot, access, AllocationMap::Hidden)).await?;
        self.execute(Command::add_export(saved, overlay, AllocationMap::Told)).await?;
        if self.disk.raw {
            return Ok(());
        }
        self.execute(Command::add_export(live, filter, AllocationMap::Hidden)).await
    }

    async fn execute(&self, command: Command<Done>) -> Result<()> {
        let Done {} = self.qmp.execute(command, within(COMMAND)).await?;
        Ok(())
    }
}

impl Moment for Ready {
    fn switch(&self, deadline: Instant) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.put_filter_in(deadline))
    }
}

/// Takes over a snapshot that another session took.
///
/// # Errors
///
/// Those of [`Qmp`]; `SNAPSHOT_BROKEN` when it is not there any more.
pub async fn regain(
    undo: &Undo,
    source: &ResumeSource,
    recorder: Arc<Recorder>,
) -> Result<Box<dyn LiveSnapshot>> {
    let gone = || {
        let context = format!("the snapshot of instance {:?} is gone", undo.instance);
        Error::new(Reason::SnapshotBroken, context)
            .advice("ask for the image again, with a new retry token")
    };
    let ResumeSource::Live { point, source: LiveSource::Filter(source), scratch } = source else {
        return Err(gone());
    };
    let sockets = sockets(&undo.machine, &undo.instance)?;
    let Some(filter) = undo.snapshot.filter() else { return Err(gone()) };
    let qmp = match Qmp::connect(&sockets.qmp_socket, recorder, within(COMMAND)).await {
        Err(error) if error.reason() == Reason::HypervisorGone => return Err(gone().because(error)),
        connected => connected?,
    };
    let names = Names::of(&filter.tag)?;
    let exports = qmp.execute(Command::query_exports(), within(COMMAND)).await?;
    if !exports.iter().any(|export| export.id == names.snapshot.as_str()) {
        return Err(gone());
    }
    // Failures to keep it that nobody was told of are told to who opens it.
    let file = filter.dir.join(SCRATCH_FILE);
    let file = tokio::task::spawn_blocking(move || fs::OpenOptions::new().write(true).open(file));
    let file = file.await.map_err(io::Error::other).flatten();
    let file = file.map_err(|cause| gone().because(cause))?;
    let events = tokio::sync::Mutex::new(qmp.events());
    let source = LiveSource::Filter(FilterSource { process: qmp.process(), ..source.clone() });
    let (undo, filter, point, limit) = (undo.clone(), filter.clone(), *point, *scratch);
    Ok(Box::new(Taken { qmp, events, undo, filter, point, source, limit, scratch: file }))
}

/// An empty image that only QEMU's user may open, in a sparse file that is as
/// long as it may ever be. The answer learns of every failure to keep it
/// ([`kept`]).
fn make_scratch(dir: &Path, size: u64, limit: u64, owner: Option<(Uid, Gid)>) -> io::Result<File> {
    fs::DirBuilder::new().mode(0o700).create(dir)?;
    let path = dir.join(SCRATCH_FILE);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    io::Write::write_all(&mut file, &qcow2::empty(size))?;
    file.set_len(limit)?;
    if let Some((user, group)) = owner {
        for path in [path.as_path(), dir] {
            nix::unistd::chown(path, Some(user), Some(group))?;
        }
    }
    Ok(file)
}

/// A snapshot that is held.
#[derive(Debug)]
struct Taken {
    qmp: Qmp,
    events: tokio::sync::Mutex<Events>,
    undo: Undo,
    filter: Filter,
    point: PointInTime,
    source: LiveSource,
    limit: ByteSize,
    scratch: File,
}

impl LiveSnapshot for Taken {
    fn point(&self) -> &PointInTime {
        &self.point
    }

    fn source(&self) -> Option<&LiveSource> {
        Some(&self.source)
    }

    fn disk_work(&self) -> BoxFuture<'_, Result<DiskWork>> {
        Box::pin(disk_work(&self.qmp, &self.filter.device))
    }

    fn scratch(&self) -> BoxFuture<'_, Result<ByteSize>> {
        Box::pin(async move {
            used(&self.filter.dir).await.context(Reason::Internal, || {
                format!("the scratch file in {} cannot be measured", self.filter.dir.display())
            })
        })
    }

    fn lost(&self) -> BoxFuture<'_, Error> {
        Box::pin(async move {
            let mut events = self.events.lock().await;
            tokio::select! {
                error = ended(&mut events) => error,
                error = self.overflow() => error,
                error = self.moved() => error,
            }
        })
    }

    fn release(self: Box<Self>) -> BoxFuture<'static, Result<ByteSize>> {
        Box::pin(async move {
            let scratch = used(&self.filter.dir).await.unwrap_or_default();
            let taken = take_out(&self.qmp, &self.undo.instance, &self.filter).await;
            self.qmp.close().await;
            taken?;
            let kept = kept(self.scratch).await;
            clean(&self.filter.dir).await?;
            kept?;
            Ok(scratch)
        })
    }
}

impl Taken {
    /// Returns when its VM begins to be moved. Asked, because QEMU tells of it
    /// by itself only where that was switched on.
    async fn moved(&self) -> Error {
        loop {
            sleep(LOOK).await;
            let asked = self.qmp.execute(Command::query_migration(), within(COMMAND)).await;
            if asked.is_ok_and(|migration| migration.is_under_way()) {
                let instance = &self.undo.instance;
                let context = format!("instance {instance:?} is being moved to another host");
                return Error::new(Reason::SnapshotBroken, context)
                    .advice("ask for the image there, once it has arrived");
            }
        }
    }

    /// Returns when all that is allowed of the disk is used.
    async fn overflow(&self) -> Error {
        loop {
            sleep(LOOK).await;
            let Ok(used) = used(&self.filter.dir).await else { continue };
            if used.get() + LEFT > self.limit.get() {
                let context = format!(
                    "what the guest overwrote fills the {} of scratch that one image may take",
                    self.limit
                );
                return Error::new(Reason::SnapshotBroken, context)
                    .advice("ask again when the guest writes less, or raise `scratch_size`");
            }
        }
    }
}

impl of_host::Line for Qmp {
    async fn disk_work(&self, disk: &str) -> Result<DiskWork> {
        disk_work(self, disk).await
    }

    async fn close(self) {
        Self::close(self).await;
    }
}

/// What QEMU's `device` has done so far.
async fn disk_work(qmp: &Qmp, device: &str) -> Result<DiskWork> {
    let disks = qmp.execute(Command::query_statistics(), within(COMMAND)).await?;
    let is_it =
        |disk: &&DeviceStatistics| disk.qdev.as_ref().is_some_and(|qdev| qdev.as_str() == device);
    let stats = disks.iter().find(is_it).map(|disk| disk.stats).unwrap_or_default();
    let nanos = stats.rd_total_time_ns + stats.wr_total_time_ns + stats.flush_total_time_ns;
    Ok(DiskWork {
        operations: stats.rd_operations + stats.wr_operations + stats.flush_operations,
        time: Duration::from_nanos(nanos),
        written: ByteSize(stats.wr_bytes),
    })
}

/// Returns when QEMU has.
async fn ended(events: &mut Events) -> Error {
    loop {
        if let Observed::Ended(error) = events.next().await {
            return error;
        }
    }
}

/// Whether the disk kept all that was written to the scratch file.
///
/// QEMU writes through the page cache, because the guest's write waits for
/// it. A disk that fails tells of it later, when the pages are written; what
/// was then read again from the disk may have been anything. The kernel tells
/// every descriptor that was open by then (`errseq_t`, fsync(2)).
async fn kept(scratch: File) -> Result<()> {
    let lost = || "the disk of the scratch area did not keep what the guest had overwritten";
    let synced = tokio::task::spawn_blocking(move || scratch.sync_data());
    let synced = timeout(SYNC, synced).await.map_err(io::Error::from);
    let synced = synced.and_then(|synced| synced.map_err(io::Error::other)).flatten();
    let told = synced.context(Reason::SnapshotBroken, lost);
    told.map_err(|error| error.advice("look into the kernel's log (dmesg), or set `scratch_dir`"))
}

/// Bytes of the host's disk that the scratch takes.
async fn used(dir: &Path) -> io::Result<ByteSize> {
    let found = tokio::fs::metadata(dir.join(SCRATCH_FILE)).await?;
    Ok(ByteSize(found.blocks() * 512))
}
