//! Looks whether a snapshot of a domain can be taken, and changes nothing.

use std::{fs, path::Path, sync::Arc};

use super::{
    COMMAND,
    domain::Described,
    snapshot::Ready,
    stop::Stopper,
    virsh::{Line, State},
    within,
};
use crate::{
    error::{Context, Error, Reason, Result},
    hypervisor::{agent::Agent, freeze::Freezer, guard::Guards, hold::Hold, live, of_host},
    model::{
        ByteSize,
        instance::Instance,
        live::{Backup, Mode, OfHost, Run, SnapshotUndo, Undo},
    },
    port::{Prepared, SnapshotOrder},
};

/// Checks everything that can be checked. `scratch_dir` is where scratch
/// files go, `tag` what tells this snapshot from others.
///
/// # Errors
///
/// All that begin with `HYPERVISOR_` and `GUEST_AGENT_`; `SNAPSHOT_REFUSED`
/// for what stands against it.
pub(super) async fn prepare(
    line: Line,
    instance: &Instance,
    mut order: SnapshotOrder,
    scratch_dir: &Path,
    tag: String,
    guards: Arc<Guards>,
) -> Result<Box<dyn Prepared>> {
    let refused = |why: String| {
        let context = format!("no snapshot of instance {:?} can be taken: {why}", instance.name);
        Error::new(Reason::SnapshotRefused, context).field("instance_id")
    };
    match line.state(within(COMMAND)).await? {
        State::Running => {}
        State::Paused => {
            return Err(refused("it is paused".into()).advice(
                "let it run (`virsh resume`), or shut it down: a stopped instance is imaged at rest",
            ));
        }
        State::Off | State::Gone => {
            let context = format!("the domain of instance {:?} has ended", instance.name);
            return Err(Error::new(Reason::HypervisorGone, context).advice("ask again"));
        }
    }
    let xml = line.ask("describe a domain", "dumpxml", &[], within(COMMAND)).await?;
    let now = Described::read(&xml).map_err(|odd| refused(odd.why))?;
    let Some(started) = now.id else {
        return Err(refused("libvirt does not say since when it runs".into()));
    };
    if now.boot.source != instance.boot_volume {
        return Err(refused("its boot disk was changed just now".into()).advice("ask again"));
    }
    if now.boot.read_only {
        return Err(refused("its boot disk is read-only".into()));
    }
    let job = line.ask("tell of a domain's job", "domjobinfo", &[], within(COMMAND)).await?;
    if !job.contains("None") {
        return Err(refused("libvirt is at another job of it".into()).advice(
            "wait until it has ended, or end it (`virsh domjobinfo`, `virsh domjobabort`)",
        ));
    }
    let size = size(&line, &now).await?;
    let hold = match order.mode {
        Mode::Crash => Hold::Not,
        Mode::Freeze => Hold::Frozen(freezer(&line, instance).await?),
        Mode::FreezeOrCrash => match freezer(&line, instance).await {
            Ok(freezer) => Hold::Frozen(freezer),
            Err(error) => {
                line.recorder.note(format!("not frozen: {error}"));
                Hold::Not
            }
        },
        Mode::Stop(force) => Hold::Stopped(Stopper::new(&line, instance, &now, force).await?),
    };
    let run = Run { uri: line.virsh.uri().to_owned(), started };
    if let Some(snapshot) = order.host.take().filter(|_| now.boot.format == "raw") {
        let of_host = OfHost { host_snapshot: tag, run: Some(run) };
        let undo = Undo {
            instance: instance.name.clone(),
            machine: instance.machine.clone(),
            snapshot: SnapshotUndo::OfHost(of_host),
            held: hold.undo(instance),
        };
        let (disk, mode) = (now.boot.target, order.mode);
        let recorder = Arc::clone(&line.recorder);
        return Ok(Box::new(of_host::Ready {
            line,
            hold,
            disk,
            size,
            snapshot,
            undo,
            mode,
            guards,
            recorder,
        }));
    }
    live::room(scratch_dir.to_owned(), order.scratch).await?;
    let backup = Backup {
        dir: scratch_dir.join(&tag),
        tag,
        target: now.boot.target,
        run,
        scratch: order.scratch,
    };
    let undo = Undo {
        instance: instance.name.clone(),
        machine: instance.machine.clone(),
        snapshot: SnapshotUndo::Backup(backup.clone()),
        held: hold.undo(instance),
    };
    let (owner, volume, mode) = (now.owner, instance.boot_volume.clone(), order.mode);
    Ok(Box::new(Ready { line, hold, undo, backup, owner, volume, size, mode, guards }))
}

async fn freezer(line: &Line, instance: &Instance) -> Result<Freezer> {
    let agent = Agent::of_domain(line.clone());
    agent.ping(within(COMMAND)).await?;
    Freezer::new(agent, instance.freeze).await
}

/// A raw file's is exact; QEMU counts whole sectors.
async fn size(line: &Line, now: &Described) -> Result<ByteSize> {
    let (path, raw) = (now.boot.source.clone(), now.boot.format == "raw");
    let file = tokio::task::spawn_blocking(move || fs::metadata(&path)).await;
    if let (true, Ok(Ok(file))) = (raw, file)
        && file.is_file()
    {
        return Ok(ByteSize(file.len()));
    }
    let target = [now.boot.target.as_str()];
    let told = line.ask("measure a disk", "domblkinfo", &target, within(COMMAND)).await?;
    let capacity = told.lines().find_map(|line| line.strip_prefix("Capacity:"));
    let capacity = capacity.unwrap_or_default().trim().parse();
    capacity.map(ByteSize).context(Reason::HypervisorRefused, || {
        format!("libvirt does not tell the size of {}", now.boot.source.display())
    })
}
