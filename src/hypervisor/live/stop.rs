//! Shuts a guest down for its point in time, and has it run again.
//!
//! ```text
//!                     (the guard stands by)
//! mark ─► set-action pause ─► agent ─► power button ─► plug? ─► the guest is down
//!                               │  each with a deadline            │ the snapshot
//!                               └ never mind which did it          ▼
//!            set-action as before ◄─ cont ◄─ mark off ◄─ reset ◄───┘
//! ```
//! Whatever ends this halfway, [`start_again`] brings the guest back from
//! wherever it stands: from a later process, from the guard's, or after an
//! error. Nothing needs to remember how far it came: QEMU tells. The mark is
//! an empty block node.
//!
//! | QEMU says | the mark | so the guest |
//! |---|---|---|
//! | `prelaunch` | | was reset: go on |
//! | `shutdown`, `paused` | is there | is down: reset, go on |
//! | `running` | is there | may be shutting down: wait until it is down, or its time is over |
//! | anything | is not | was not told to shut down, or was started again |
//!
//! Facts: QEMU, `system/runstate.c`: a VM that has shut down must be reset
//! before it goes on, and is in `prelaunch` from the reset until then.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};

use super::{COMMAND, within};
use crate::{
    error::{Error, Reason, Result},
    hypervisor::{
        agent::Agent,
        hold,
        qmp::{Command, Done, EventKind, Events, NodeName, NodeRef, Observed, OnShutdown, Qmp},
    },
    model::{
        image::Consistency,
        instance::{Instance, Sockets},
        live::Force,
    },
    recorder::Recorder,
};

/// Between two looks at a guest that shuts down.
const LOOK: Duration = Duration::from_millis(250);
/// Between two looks whether the VM is reset: a millisecond's work.
const RESET_LOOK: Duration = Duration::from_millis(2);

/// A guest that can be shut down and started again.
#[derive(Debug)]
pub(super) struct Stopper {
    agent: Option<Agent>,
    force: Force,
    /// For each way to ask.
    limit: Duration,
    usual: OnShutdown,
    mark: NodeName,
    name: String,
}

impl Stopper {
    /// Looks whether this QEMU can be brought back from a shutdown.
    ///
    /// # Errors
    ///
    /// `SNAPSHOT_REFUSED`: it cannot.
    pub async fn new(
        qmp: &Qmp,
        instance: &Instance,
        mark: NodeName,
        agent: Option<Agent>,
        force: Force,
    ) -> Result<Self> {
        let usual = usual(qmp, &instance.name).await?;
        let limit = Duration::from_secs(instance.shutdown_seconds.into());
        Ok(Self { agent, force, limit, usual, mark, name: instance.name.clone() })
    }

    async fn bring_down(&self, qmp: &Qmp, recorder: &Recorder) -> Result<Consistency> {
        execute(qmp, Command::add_mark(self.mark.clone())).await?;
        let mut events = qmp.events();
        execute(qmp, Command::set_on_shutdown(OnShutdown::Pause)).await?;
        if let Some(agent) = &self.agent {
            let deadline = within(self.limit);
            tokio::select! {
                biased;
                down = self.is_down(qmp, &mut events, deadline) => if down? {
                    return Ok(Consistency::Clean);
                },
                // The button may do what the agent does not.
                error = self.refused(agent, deadline) => recorder.note(format!("{error}")),
            }
        }
        execute(qmp, Command::power_button()).await?;
        if self.is_down(qmp, &mut events, within(self.limit)).await? {
            return Ok(Consistency::Clean);
        }
        if self.force == Force::PullThePlug {
            recorder.note("the guest did not shut down: its plug is pulled");
            execute(qmp, Command::stop()).await?;
            return Ok(Consistency::Crash);
        }
        Err(hold::still_there(&self.name, self.limit, "file"))
    }

    /// An agent that says that it does not.
    async fn refused(&self, agent: &Agent, deadline: Instant) -> Error {
        let error = agent.shut_down(deadline).await;
        if error.reason() == Reason::GuestAgentTimeout {
            // It is gone, or busy with the shutdown.
            tokio::time::sleep_until(deadline).await;
        }
        error
    }

    /// Waits until the guest is down; `false`: its time is over.
    async fn is_down(&self, qmp: &Qmp, events: &mut Events, deadline: Instant) -> Result<bool> {
        loop {
            match qmp.execute(Command::query_status(), within(COMMAND)).await?.status.as_str() {
                "shutdown" => return Ok(true),
                // Somebody else has it by now, or it broke.
                "running" => {}
                other => {
                    let context =
                        format!("QEMU of instance {:?} says {other:?}, not shut down", self.name);
                    return Err(Error::new(Reason::ShutdownRefused, context)
                        .advice("find out who stopped it, let it run, and ask again"));
                }
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            let shut_down = async {
                loop {
                    match events.next().await {
                        Observed::Event(event) if event.kind == EventKind::Shutdown => break Ok(()),
                        Observed::Event(_) => {}
                        Observed::Missed(_) => break Ok(()),
                        Observed::Ended(error) => break Err(error),
                    }
                }
            };
            let soon = deadline.min(within(LOOK));
            if let Ok(seen) = timeout_at(soon, shut_down).await {
                seen?;
            }
        }
    }
}

impl hold::Stopper for Stopper {
    type Line = Qmp;

    async fn shut_down(&self, qmp: &Qmp, recorder: &Recorder) -> Result<Consistency> {
        self.bring_down(qmp, recorder).await
    }

    async fn start(&self, qmp: &Qmp) -> Result<()> {
        start(qmp, self.usual, &self.mark).await
    }
}

/// Resets a VM that is down, lets it run, and has QEMU do as usual. The mark
/// goes when nothing but `cont` is left.
async fn start(qmp: &Qmp, usual: OnShutdown, mark: &NodeName) -> Result<()> {
    let end = within(COMMAND);
    let status = async || qmp.execute(Command::query_status(), end).await;
    if status().await?.status != "prelaunch" {
        execute(qmp, Command::reset()).await?;
        while status().await?.status != "prelaunch" {
            sleep(RESET_LOOK).await;
        }
    }
    unmark(qmp, mark).await?;
    execute(qmp, Command::cont()).await?;
    execute(qmp, Command::set_on_shutdown(usual)).await
}

/// Has a guest run again, however far its shutdown came; `seconds` is how
/// long that may take it. Repeating it changes nothing. The monitor is free
/// between two looks.
///
/// # Errors
///
/// Those of [`Qmp`]; a QEMU that has ended is none.
pub async fn start_again(
    name: &str,
    sockets: &Sockets,
    mark: &NodeName,
    seconds: u32,
    recorder: &Arc<Recorder>,
) -> Result<()> {
    let end = within(Duration::from_secs(seconds.into()));
    loop {
        let socket = &sockets.qmp_socket;
        let qmp = match Qmp::connect(socket, Arc::clone(recorder), within(COMMAND)).await {
            Err(error) if error.reason() == Reason::HypervisorGone => return Ok(()),
            connected => connected?,
        };
        let stands = look(&qmp, name, mark, Instant::now() >= end).await;
        qmp.close().await;
        match stands? {
            Stands::Runs => return Ok(()),
            Stands::Wait => sleep(LOOK).await,
        }
    }
}

/// How a guest stands that was told to shut down.
enum Stands {
    Runs,
    Wait,
}

async fn look(qmp: &Qmp, name: &str, mark: &NodeName, late: bool) -> Result<Stands> {
    let usual = usual(qmp, name).await?;
    let status = qmp.execute(Command::query_status(), within(COMMAND)).await?.status;
    match (status.as_str(), is_marked(qmp, mark).await?) {
        ("prelaunch", _) | ("shutdown" | "paused", true) => {
            start(qmp, usual, mark).await?;
            tracing::warn!(instance = name, "started a guest that was left shut down");
        }
        ("running", true) if !late => return Ok(Stands::Wait),
        // It runs, or was stopped by something else, which will know why.
        _ => {
            unmark(qmp, mark).await?;
            execute(qmp, Command::set_on_shutdown(usual)).await?;
        }
    }
    Ok(Stands::Runs)
}

async fn is_marked(qmp: &Qmp, mark: &NodeName) -> Result<bool> {
    let nodes = qmp.execute(Command::query_nodes(), within(COMMAND)).await?;
    let ours = NodeRef::from(mark);
    Ok(nodes.iter().any(|node| node.node_name.as_ref() == Some(&ours)))
}

async fn unmark(qmp: &Qmp, mark: &NodeName) -> Result<()> {
    match is_marked(qmp, mark).await? {
        true => execute(qmp, Command::delete_node(mark.clone())).await,
        false => Ok(()),
    }
}

async fn execute(qmp: &Qmp, command: Command<Done>) -> Result<()> {
    let Done {} = qmp.execute(command, within(COMMAND)).await?;
    Ok(())
}

/// What this QEMU does of itself when its guest has shut down. It cannot be
/// asked: its command line says so.
async fn usual(qmp: &Qmp, name: &str) -> Result<OnShutdown> {
    let refused = |why: &str| {
        let context = format!("instance {name:?} is not shut down for an image: {why}");
        Error::new(Reason::SnapshotRefused, context).field("instance_id")
    };
    let line = match qmp.process() {
        Some(process) => tokio::fs::read(format!("/proc/{process}/cmdline")).await.ok(),
        None => None,
    };
    let Some(line) = line else {
        return Err(refused("its QEMU's command line cannot be seen")
            .advice("shut it down yourself: a stopped instance is imaged at rest"));
    };
    let Actions { shutdown, resets } = Actions::of(&line);
    match resets {
        true => Ok(shutdown),
        false => Err(refused("its QEMU ends instead of resetting (-no-reboot)")
            .advice("shut it down yourself: a stopped instance is imaged at rest")),
    }
}

/// What a QEMU's command line says of its guest's end.
#[derive(Debug, PartialEq, Eq)]
struct Actions {
    shutdown: OnShutdown,
    /// Whether a reset is one.
    resets: bool,
}

impl Actions {
    /// From `/proc/PID/cmdline`; the last word counts (QEMU, "-action").
    fn of(line: &[u8]) -> Self {
        let mut found = Self { shutdown: OnShutdown::Poweroff, resets: true };
        let mut words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        while let Some(word) = words.next() {
            match word.strip_prefix("--").or_else(|| word.strip_prefix('-')) {
                Some("no-shutdown") => found.shutdown = OnShutdown::Pause,
                Some("no-reboot") => found.resets = false,
                Some("action") => {
                    for action in words.next().unwrap_or_default().split(',') {
                        match action {
                            "shutdown=pause" => found.shutdown = OnShutdown::Pause,
                            "shutdown=poweroff" => found.shutdown = OnShutdown::Poweroff,
                            "reboot=shutdown" => found.resets = false,
                            "reboot=reset" => found.resets = true,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_tells_what_a_shutdown_does() {
        let of = |line: &str| {
            let Actions { shutdown, resets } = Actions::of(line.replace(' ', "\0").as_bytes());
            (shutdown, resets)
        };
        let (ends, waits) = (OnShutdown::Poweroff, OnShutdown::Pause);
        assert_eq!(of("qemu -m 1G"), (ends, true));
        assert_eq!(of("qemu -no-shutdown -m 1G"), (waits, true));
        assert_eq!(of("qemu --no-shutdown --no-reboot"), (waits, false));
        assert_eq!(of("qemu -action reboot=shutdown,shutdown=pause"), (waits, false));
        assert_eq!(of("qemu -no-shutdown -action shutdown=poweroff"), (ends, true));
        assert_eq!(of("qemu -name no-shutdown -action"), (ends, true));
        assert_eq!(of(""), (ends, true));
    }
}
