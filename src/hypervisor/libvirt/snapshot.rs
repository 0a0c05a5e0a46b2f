//! Takes a snapshot of a domain by a backup, and holds it.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::unistd::{Gid, Uid};
use tokio::time::{Instant, sleep};

use super::{
    BACKUP_FILE, COMMAND, SCRATCH_FILE, SOCKET_FILE, domain,
    stop::Stopper,
    undo::{Room, is_under_way, undo},
    virsh::Line,
    within,
};
use crate::{
    error::{Context, Error, Reason, Result},
    hypervisor::{
        guard::Guards,
        hold::{Hold, Moment},
        of_host,
    },
    model::{
        ByteSize,
        live::{Backup, BackupSource, Held, LiveSource, Mode, PointInTime, Undo},
        upload::ResumeSource,
    },
    port::{BoxFuture, DiskWork, LiveSnapshot, Prepared},
    steps,
};

/// How often the scratch is measured.
const LOOK: Duration = Duration::from_millis(200);

/// A snapshot that can be taken: everything was looked at.
#[derive(Debug)]
pub(super) struct Ready {
    pub line: Line,
    pub hold: Hold<Stopper>,
    pub undo: Undo,
    pub backup: Backup,
    pub owner: Option<(u32, u32)>,
    pub volume: PathBuf,
    pub size: ByteSize,
    pub mode: Mode,
    pub guards: Arc<Guards>,
}

impl Prepared for Ready {
    fn undo(&self) -> &Undo {
        &self.undo
    }

    fn size(&self) -> ByteSize {
        self.size
    }

    fn take(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn LiveSnapshot>>> {
        Box::pin(async move {
            self.make_order().await?;
            // It stays until the backup has ended: it keeps the scratch from
            // filling, too.
            self.guards.set(&self.undo).await?;
            let point = self.hold.point(&self.line, self.mode, &self.line.recorder, &*self).await?;
            let Self { line, undo, backup, volume, size, guards, .. } = *self;
            let source = LiveSource::Backup(BackupSource {
                size,
                volume,
                socket: backup.dir.join(SOCKET_FILE),
                export: backup.export(),
            });
            Ok(Box::new(Taken { line, undo, backup, point, source, guards })
                as Box<dyn LiveSnapshot>)
        })
    }
}

impl Ready {
    /// The point in time: libvirt has QEMU begin a backup (`blockdev-backup`
    /// with `sync=none`), which copies from then on what is overwritten.
    async fn begin(&self, deadline: Instant) -> Result<()> {
        let order = self.backup.dir.join(BACKUP_FILE);
        let order = order.to_string_lossy();
        self.line.tell("begin a backup", "backup-begin", &[&order], deadline).await.map(drop)
    }

    /// A directory that only QEMU's user and root may enter, with the order.
    async fn make_order(&self) -> Result<()> {
        let (backup, owner) = (self.backup.clone(), self.owner);
        let made = tokio::task::spawn_blocking(move || make_order(&backup, owner));
        let made = steps::effect("scratch made", made).await.map_err(io::Error::other).flatten();
        made.context(Reason::Internal, || {
            format!("no scratch can be made in {}", self.backup.dir.display())
        })
    }
}

impl Moment for Ready {
    fn switch(&self, deadline: Instant) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.begin(deadline))
    }
}

fn make_order(backup: &Backup, owner: Option<(u32, u32)>) -> io::Result<()> {
    let dir: &Path = &backup.dir;
    fs::DirBuilder::new().mode(0o700).create(dir)?;
    let (socket, scratch) = (dir.join(SOCKET_FILE), dir.join(SCRATCH_FILE));
    let order = domain::backup(&backup.target, &backup.export(), &socket, &scratch);
    fs::write(dir.join(BACKUP_FILE), order)?;
    // QEMU makes the socket.
    if let Some((user, group)) = owner {
        nix::unistd::chown(dir, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?;
    }
    Ok(())
}

/// Takes over a snapshot that another imaged took.
///
/// # Errors
///
/// `SNAPSHOT_BROKEN` when it is not there any more; all that begin with
/// `HYPERVISOR_`.
pub(super) async fn regain(
    line: Line,
    undo: &Undo,
    backup: &Backup,
    source: &ResumeSource,
    guards: Arc<Guards>,
) -> Result<Box<dyn LiveSnapshot>> {
    let gone = || gone(&undo.instance);
    let ResumeSource::Live { point, source, .. } = source else { return Err(gone()) };
    if !is_under_way(&line, backup).await? {
        return Err(gone());
    }
    guards.set(undo).await?;
    let (undo, backup, point, source) = (undo.clone(), backup.clone(), *point, source.clone());
    Ok(Box::new(Taken { line, undo, backup, point, source, guards }))
}

pub(super) fn gone(instance: &str) -> Error {
    let context = format!("the snapshot of instance {instance:?} is gone");
    Error::new(Reason::SnapshotBroken, context)
        .advice("ask for the image again, with a new retry token")
}

/// A snapshot that is held.
#[derive(Debug)]
struct Taken {
    line: Line,
    undo: Undo,
    backup: Backup,
    point: PointInTime,
    source: LiveSource,
    guards: Arc<Guards>,
}

impl LiveSnapshot for Taken {
    fn point(&self) -> &PointInTime {
        &self.point
    }

    fn source(&self) -> Option<&LiveSource> {
        Some(&self.source)
    }

    fn disk_work(&self) -> BoxFuture<'_, Result<DiskWork>> {
        Box::pin(of_host::Line::disk_work(&self.line, &self.backup.target))
    }

    fn scratch(&self) -> BoxFuture<'_, Result<ByteSize>> {
        Box::pin(async move {
            let room = self.room().await;
            let room = room.context(Reason::Internal, || {
                format!("the scratch file in {} cannot be measured", self.backup.dir.display())
            })?;
            Ok(ByteSize(room.used))
        })
    }

    fn lost(&self) -> BoxFuture<'_, Error> {
        Box::pin(async move {
            loop {
                sleep(LOOK).await;
                match self.room().await {
                    Ok(room) if room.is_spent(self.backup.scratch) => return self.spent(room),
                    Ok(_) => {}
                    // libvirt removes it with its backup.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return self.ended(),
                    Err(error) => tracing::warn!("the scratch cannot be measured: {error}"),
                }
            }
        })
    }

    fn release(self: Box<Self>) -> BoxFuture<'static, Result<ByteSize>> {
        Box::pin(async move {
            let scratch = self.room().await.map(|room| ByteSize(room.used));
            let Self { line, undo: owed, backup, guards, .. } = *self;
            undo(&line, &Undo { held: Held::NOT, ..owed.clone() }, &backup).await?;
            guards.lift(&owed).await;
            // Ended before it was released, it may have ended before it was
            // read.
            scratch.context(Reason::SnapshotBroken, || {
                format!("the backup of instance {:?} had ended before", owed.instance)
            })
        })
    }
}

impl Taken {
    async fn room(&self) -> io::Result<Room> {
        let backup = self.backup.clone();
        tokio::task::spawn_blocking(move || Room::of(&backup)).await.map_err(io::Error::other)?
    }

    fn spent(&self, room: Room) -> Error {
        let limit = self.backup.scratch;
        let context = format!(
            "what the guest overwrote takes {}, and the image is given up at four fifths of the \
             {limit} that it may take",
            ByteSize(room.used)
        );
        let context = match room.used >= limit.get() - limit.get() / 5 {
            true => context,
            false => format!(
                "the filesystem of the scratch area has {} left, less than a fifth of the {limit} \
                 that the image may take",
                ByteSize(room.free)
            ),
        };
        Error::new(Reason::SnapshotBroken, context).advice(
            "libvirt's backups stop a guest for which there is no room: ask again when the guest \
             writes less, or raise `scratch_size`",
        )
    }

    fn ended(&self) -> Error {
        let context =
            format!("the backup of instance {:?} has ended before its image", self.undo.instance);
        Error::new(Reason::SnapshotBroken, context).advice(
            "somebody ended it (`virsh domjobabort`), or the domain, or its QEMU has died: look \
             into libvirt's log, and ask again",
        )
    }
}

impl of_host::Line for Line {
    async fn disk_work(&self, disk: &str) -> Result<DiskWork> {
        let told = self.ask("count a disk's work", "domblkstat", &[disk], within(COMMAND)).await?;
        Ok(disk_work(&told))
    }

    async fn close(self) {}
}

/// What `domblkstat` says.
fn disk_work(told: &str) -> DiskWork {
    let of = |key: &str| {
        let words = told.lines().map(|line| line.split_whitespace().rev());
        let mut found = words.filter_map(|mut words| {
            let (value, name) = (words.next()?, words.next()?);
            (name == key).then(|| value.parse::<u64>().ok())?
        });
        found.next().unwrap_or_default()
    };
    let nanos = of("rd_total_times") + of("wr_total_times") + of("flush_total_times");
    DiskWork {
        operations: of("rd_req") + of("wr_req") + of("flush_operations"),
        time: Duration::from_nanos(nanos),
        written: ByteSize(of("wr_bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disks_work_is_read_from_its_lines() {
        let told = "vda rd_req 3\nvda rd_bytes 9\nvda wr_req 4\nvda wr_bytes 4096\n\
                    vda flush_operations 1\nvda rd_total_times 10\nvda wr_total_times 20\n\
                    vda flush_total_times 30\n";
        let work = disk_work(told);
        assert_eq!((work.operations, work.time), (8, Duration::from_nanos(60)));
        assert_eq!(work.written, ByteSize(4096));
    }
}
