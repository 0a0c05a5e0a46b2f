//! Takes a snapshot out of a QEMU, whatever is left of it.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{COMMAND, SCRATCH_FILE, SOCKET_FILE, names::Names, stop::start_again, within};
use crate::{
    error::{Context, Error, Reason, Result},
    hypervisor::{
        agent::{Agent, FreezeStatus},
        freeze,
        qmp::{Command, Done, ExportId, NodeName, NodeRef, Qmp, Switch},
    },
    model::{
        instance::{Machine, Sockets},
        live::{Filter, Undo},
    },
    recorder::Recorder,
    steps,
};

/// Between two looks whether an export has ended.
const LOOK: Duration = Duration::from_millis(5);

/// Takes back what `undo` says, by sessions of its own. Whatever is gone
/// already is success, QEMU itself included.
///
/// # Errors
///
/// Those of [`Qmp`] and [`Agent`]; it can be tried again.
pub async fn undo(undo: &Undo, recorder: Arc<Recorder>) -> Result<()> {
    let sockets = sockets(&undo.machine, &undo.instance)?;
    // What holds the guest first. A guest that does not answer is no reason
    // to leave the rest.
    let let_go = let_go(undo, &recorder).await;
    let Some(filter) = undo.snapshot.filter() else { return let_go };
    match Qmp::connect(&sockets.qmp_socket, recorder, within(COMMAND)).await {
        Ok(qmp) => {
            let taken = take_out(&qmp, &undo.instance, filter).await;
            qmp.close().await;
            taken?;
        }
        Err(error) if error.reason() == Reason::HypervisorGone => {}
        Err(error) => return Err(error),
    }
    clean(&filter.dir).await?;
    let_go
}

/// Ends what holds the guest: thaws it, starts it again. Repeating it changes
/// nothing.
///
/// # Errors
///
/// As [`undo`].
pub async fn let_go(undo: &Undo, recorder: &Arc<Recorder>) -> Result<()> {
    let sockets = sockets(&undo.machine, &undo.instance)?;
    if undo.held.frozen {
        thaw(&undo.instance, sockets, recorder).await?;
    }
    let Some(seconds) = undo.held.stopped else { return Ok(()) };
    let mark = Names::of(undo.snapshot.tag())?.mark;
    start_again(&undo.instance, sockets, &mark, seconds, recorder).await
}

/// Where what runs the instance listens.
///
/// # Errors
///
/// `INTERNAL`: it is another hypervisor's.
pub(super) fn sockets<'a>(machine: &'a Machine, instance: &str) -> Result<&'a Sockets> {
    machine.sockets().ok_or_else(|| {
        let context = format!("instance {instance:?} has no QEMU of its own to be asked");
        Error::new(Reason::Internal, context)
    })
}

async fn thaw(instance: &str, sockets: &Sockets, recorder: &Arc<Recorder>) -> Result<()> {
    let Some(socket) = &sockets.agent_socket else { return Ok(()) };
    // Without QEMU nobody listens, and nothing is frozen.
    let reached = Qmp::connect(&sockets.qmp_socket, Arc::clone(recorder), within(COMMAND)).await;
    match reached {
        Ok(qmp) => qmp.close().await,
        Err(error) if error.reason() == Reason::HypervisorGone => return Ok(()),
        Err(_) => {}
    }
    let agent = Agent::connect(socket, Arc::clone(recorder), within(COMMAND)).await?;
    if agent.freeze_status(within(COMMAND)).await? == FreezeStatus::Frozen {
        let count = freeze::thaw(&agent, recorder).await?;
        tracing::warn!(instance, count, "thawed a guest that was left frozen");
    }
    freeze::disarm(&agent, recorder).await;
    Ok(())
}

/// Takes out of QEMU what was put in, in the one order that works.
pub(super) async fn take_out(qmp: &Qmp, instance: &str, filter: &Filter) -> Result<()> {
    let names = Names::of(&filter.tag)?;
    end_exports(qmp, &names).await?;
    let nodes = qmp.execute(Command::query_nodes(), within(COMMAND)).await?;
    let is_there = |name: &NodeName| {
        nodes.iter().any(|node| node.node_name.as_ref() == Some(&NodeRef::from(name)))
    };
    // A QEMU has one server, and nobody tells whose it is. It is ours when our
    // overlay is there, which comes just before it and goes after it. The
    // socket tells nothing: anyone may have removed it.
    if is_there(&names.overlay) {
        let _ = qmp.stop_nbd_server(within(COMMAND)).await?;
    }
    let remove = async |name: &NodeName| -> Result<()> {
        if is_there(name) {
            let Done {} = qmp.execute(Command::delete_node(name.clone()), within(COMMAND)).await?;
        }
        Ok(())
    };
    remove(&names.access).await?;
    if is_there(&names.filter) {
        switch_back(qmp, instance, filter, &names).await?;
    }
    for name in [&names.filter, &names.overlay, &names.bound, &names.scratch] {
        remove(name).await?;
    }
    Ok(())
}

/// Ends the snapshot's exports.
async fn end_exports(qmp: &Qmp, names: &Names) -> Result<()> {
    let ours = [&names.snapshot, &names.saved, &names.live];
    let end = within(COMMAND);
    let mut asked = Vec::<ExportId>::new();
    loop {
        let exports = qmp.execute(Command::query_exports(), within(COMMAND)).await?;
        let mut left = ours.iter().filter(|id| exports.iter().any(|e| e.id == id.as_str()));
        let Some(first) = left.next() else { return Ok(()) };
        for id in std::iter::once(first).chain(left) {
            if !asked.contains(id) {
                asked.push((*id).clone());
                let Done {} =
                    qmp.execute(Command::delete_export((*id).clone()), within(COMMAND)).await?;
            }
        }
        if tokio::time::Instant::now() >= end {
            let context = format!("QEMU did not end the export {first}");
            return Err(Error::new(Reason::HypervisorTimeout, context));
        }
        sleep(LOOK).await;
    }
}

async fn switch_back(qmp: &Qmp, instance: &str, ours: &Filter, names: &Names) -> Result<()> {
    let odd = || format!("the journal's words for the disk of instance {instance:?} are odd");
    let device = ours.device.parse().context(Reason::Internal, odd)?;
    let node = ours.node.parse().context(Reason::Internal, odd)?;
    let filter = NodeRef::from(&names.filter);
    match qmp.switch_drive(&device, &filter, &node, within(COMMAND)).await {
        Ok(Switch::Switched | Switch::AlreadyThere) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes the scratch file and the socket.
pub(in crate::hypervisor) async fn clean(dir: &Path) -> Result<()> {
    let of = dir.to_owned();
    let removed = tokio::task::spawn_blocking(move || remove(&of));
    let removed = steps::effect("scratch removed", removed).await;
    let removed = removed.unwrap_or_else(|panic| Err(io::Error::other(panic)));
    removed.context(Reason::Internal, || format!("{} cannot be removed", dir.display()))
}

fn remove(dir: &Path) -> io::Result<()> {
    let gone = |outcome: io::Result<()>| match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    };
    for file in [SOCKET_FILE, SCRATCH_FILE] {
        gone(fs::remove_file(dir.join(file)))?;
    }
    gone(fs::remove_dir(dir))
}
