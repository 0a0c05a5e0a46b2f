//! Looks whether a snapshot can be taken, and changes nothing.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::unistd::{Gid, Uid};

use super::{
    COMMAND,
    find::{BootDisk, boot_disk},
    iothread,
    names::Names,
    snapshot::Ready,
    stop::Stopper,
    undo::sockets,
    within,
};
use crate::{
    error::{Context, Error, Reason, Result},
    hypervisor::{
        agent::Agent,
        freeze::Freezer,
        guard::Guards,
        hold::Hold,
        of_host,
        qmp::{Command, Qmp},
    },
    model::{
        ByteSize,
        instance::Instance,
        live::{Filter, Mode, OfHost, SnapshotUndo, Undo},
    },
    port::{Prepared, SnapshotOrder},
    recorder::Recorder,
};

/// What to do where no agent can freeze the guest.
const CRASH: &str = "start qemu-guest-agent in the guest and name its socket as `agent_socket` in \
                     the instance's file, or ask for a crash-consistent image";

/// Checks everything that can be checked. `scratch_dir` is where scratch
/// files go, `tag` what tells this snapshot from others.
///
/// # Errors
///
/// Those of [`Qmp`] and [`Agent`]; `SNAPSHOT_REFUSED` for what stands against
/// it.
pub async fn prepare(
    instance: &Instance,
    mut order: SnapshotOrder,
    scratch_dir: &Path,
    tag: String,
    guards: Arc<Guards>,
    recorder: Arc<Recorder>,
) -> Result<Box<dyn Prepared>> {
    let names = Names::of(&tag)?;
    let sockets = sockets(&instance.machine, &instance.name)?;
    let qmp = Qmp::connect(&sockets.qmp_socket, Arc::clone(&recorder), within(COMMAND)).await?;
    let disk = look(&qmp, instance).await?;
    let hold = match (order.mode, &sockets.agent_socket) {
        (Mode::Crash, _) | (Mode::FreezeOrCrash, None) => Hold::Not,
        (Mode::Freeze, Some(socket)) => Hold::Frozen(freezer(instance, socket, &recorder).await?),
        (Mode::FreezeOrCrash, Some(socket)) => match freezer(instance, socket, &recorder).await {
            Ok(freezer) => Hold::Frozen(freezer),
            Err(error) => {
                recorder.note(format!("not frozen: {error}"));
                Hold::Not
            }
        },
        (Mode::Stop(force), socket) => {
            let agent = match socket {
                Some(socket) => agent(socket, &recorder).await,
                None => None,
            };
            Hold::Stopped(Stopper::new(&qmp, instance, names.mark.clone(), agent, force).await?)
        }
        (Mode::Freeze, None) => {
            let context = format!("nothing can freeze instance {:?}", instance.name);
            let error = Error::new(Reason::GuestAgentUnavailable, context)
                .because("its file in `instances.d` names no `agent_socket`");
            return Err(error.advice(CRASH).field("instance_id"));
        }
    };
    let of_host = order.host.take().filter(|_| disk.raw);
    if let Some(snapshot) = of_host {
        let undo = Undo {
            instance: instance.name.clone(),
            machine: instance.machine.clone(),
            snapshot: SnapshotUndo::OfHost(OfHost { host_snapshot: tag, run: None }),
            held: hold.undo(instance),
        };
        let mode = order.mode;
        return Ok(Box::new(of_host::Ready {
            line: qmp,
            hold,
            disk: disk.device.to_string(),
            size: disk.size,
            snapshot,
            undo,
            mode,
            guards,
            recorder,
        }));
    }
    let owner = owner(qmp.process());
    let dir = scratch_dir.join(&tag);
    room(scratch_dir.to_owned(), order.scratch).await?;
    let filter = Filter { tag, device: disk.device.to_string(), node: disk.node.to_string(), dir };
    let undo = Undo {
        instance: instance.name.clone(),
        machine: instance.machine.clone(),
        snapshot: SnapshotUndo::Filter(filter.clone()),
        held: hold.undo(instance),
    };
    let volume = instance.boot_volume.clone();
    Ok(Box::new(Ready {
        qmp,
        hold,
        disk,
        names,
        undo,
        filter,
        owner,
        volume,
        order,
        guards,
        recorder,
    }))
}

async fn freezer(instance: &Instance, socket: &Path, recorder: &Arc<Recorder>) -> Result<Freezer> {
    let agent = Agent::connect(socket, Arc::clone(recorder), within(COMMAND)).await?;
    Freezer::new(agent, instance.freeze).await
}

/// An agent that may shut the guest down; one that does not answer is no
/// reason to refuse, because there is the power button.
async fn agent(socket: &Path, recorder: &Arc<Recorder>) -> Option<Agent> {
    match Agent::connect(socket, Arc::clone(recorder), within(COMMAND)).await {
        Ok(agent) => Some(agent),
        Err(error) => {
            recorder.note(format!("{error}"));
            None
        }
    }
}

/// Whether this QEMU can, and nothing else is under way in it.
async fn look(qmp: &Qmp, instance: &Instance) -> Result<BootDisk> {
    let refused = |why: String| {
        let name = &instance.name;
        let context = format!("no snapshot of instance {name:?} can be taken: {why}");
        Error::new(Reason::SnapshotRefused, context).field("instance_id")
    };
    let status = qmp.execute(Command::query_status(), within(COMMAND)).await?;
    if !status.running {
        return Err(refused(format!("its virtual CPUs do not run, QEMU says {:?}", status.status))
            .advice("let it run (`cont`), or shut it down: a stopped instance is imaged at rest"));
    }
    let schema = qmp.execute(Command::query_schema(), within(COMMAND)).await?;
    if !schema.has_breakable_snapshots() {
        let context = format!(
            "QEMU {} of instance {:?} has no snapshots that spare the guest",
            qmp.version(),
            instance.name
        );
        return Err(Error::new(Reason::HypervisorUnsupported, context)
            .advice("QEMU 7.1 has them; an older one's instance must be shut down first")
            .field("instance_id"));
    }
    let jobs = qmp.execute(Command::query_jobs(), within(COMMAND)).await?;
    if let Some(job) = jobs.first() {
        return Err(refused(format!("its QEMU is at another job, {} {:?}", job.kind, job.id))
            .advice("wait until it has ended, or cancel it"));
    }
    if qmp.execute(Command::query_migration(), within(COMMAND)).await?.is_under_way() {
        return Err(refused("it is being moved to another host".into())
            .advice("ask again on the host where it is then"));
    }
    let exports = qmp.execute(Command::query_exports(), within(COMMAND)).await?;
    if let Some(export) = exports.first() {
        return Err(refused(format!("its QEMU exports {:?} already", export.id))
            .advice("a QEMU has one NBD server: end the backup that uses it"));
    }
    let devices = qmp.execute(Command::query_block(), within(COMMAND)).await?;
    let used = qmp.execute(Command::query_statistics(), within(COMMAND)).await?;
    let of = instance.clone();
    let found = tokio::task::spawn_blocking(move || boot_disk(&of, &devices, &used)).await;
    let disk = found.context(Reason::Internal, || "the search for the boot disk ended early")??;
    let kind = qmp.execute(Command::device_type(disk.device.clone()), within(COMMAND)).await?;
    if ["scsi-block", "scsi-generic"].contains(&kind.as_str()) {
        return Err(refused(format!(
            "its boot disk is a {kind}, which writes past QEMU's filters"
        ))
        .advice("attach it as scsi-hd or virtio-blk, or shut the instance down"));
    }
    iothread::check(qmp, instance, &disk.device).await?;
    Ok(disk)
}

/// Whom QEMU runs as: what is made for it must be its own.
fn owner(process: Option<u32>) -> Option<(Uid, Gid)> {
    let found = fs::metadata(format!("/proc/{}", process?)).ok()?;
    Some((Uid::from_raw(found.uid()), Gid::from_raw(found.gid())))
}

/// Scratch that fills the host's disk would hurt others than this image.
pub(in crate::hypervisor) async fn room(dir: PathBuf, wanted: ByteSize) -> Result<()> {
    let shown = dir.display().to_string();
    let looked = tokio::task::spawn_blocking(move || {
        if !dir.exists() {
            fs::create_dir_all(&dir)?;
            // QEMU's user passes through; what is in it, it cannot see.
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o711))?;
        }
        let space = nix::sys::statvfs::statvfs(&dir)?;
        Ok::<_, std::io::Error>(ByteSize(space.blocks_available() * space.fragment_size()))
    });
    let free =
        looked.await.map_err(std::io::Error::other).flatten().context(Reason::Internal, || {
            format!("the scratch directory {shown} cannot be used")
        })?;
    if free < wanted {
        let context =
            format!("the scratch directory {shown} has {free} and {wanted} may be needed");
        return Err(Error::new(Reason::SnapshotRefused, context)
            .advice("make room, or set `scratch_size` or `scratch_dir`"));
    }
    Ok(())
}
