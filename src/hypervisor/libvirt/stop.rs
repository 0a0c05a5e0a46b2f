//! Shuts a domain down for its point in time, and has it run again.
//!
//! ```text
//! agent ─► power button ─► plug? ─► shut off ─► start, paused ─► backup ─► go on
//!   each with a deadline
//! ```
//! libvirt ends a domain's QEMU when its guest has shut down (it knows no
//! `preserve` for that), so the guest comes back in another QEMU. A domain
//! that libvirt forgets then, a transient one, is refused.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{
    COMMAND,
    domain::Described,
    virsh::{Line, State},
    within,
};
use crate::{
    error::{Error, Reason, Result},
    hypervisor::hold,
    model::{image::Consistency, instance::Instance, live::Force},
    recorder::Recorder,
};

/// Between two looks at a guest that shuts down: each is a process.
const LOOK: Duration = Duration::from_millis(250);

/// For a QEMU to start.
const START: Duration = Duration::from_secs(60);

/// A guest that can be shut down and started again.
#[derive(Debug)]
pub(super) struct Stopper {
    force: Force,
    /// For each way to ask.
    limit: Duration,
    /// Whether the agent can be asked.
    agent: bool,
    name: String,
}

impl Stopper {
    /// Looks whether the domain can be brought back from a shutdown.
    ///
    /// # Errors
    ///
    /// `SNAPSHOT_REFUSED`: it cannot; all that begin with `HYPERVISOR_`.
    pub async fn new(
        line: &Line,
        instance: &Instance,
        now: &Described,
        force: Force,
    ) -> Result<Self> {
        let name = &instance.name;
        let refused = |why: String| {
            let context = format!("instance {name:?} is not shut down for an image: {why}");
            Error::new(Reason::SnapshotRefused, context).field("instance_id")
        };
        let words = ["list", "--all", "--persistent", "--uuid"];
        let kept = line.virsh.ask("list its domains", &words, within(COMMAND)).await?;
        if !kept.lines().any(|domain| domain.trim() == line.domain) {
            return Err(refused("libvirt forgets it when it is shut off (it is transient)".into())
                .advice(
                    "define it (`virsh dumpxml`, `virsh define`), or ask for an image with \
                     --consistency freeze or crash, which does not shut it down",
                ));
        }
        if now.on_poweroff != "destroy" {
            let why = format!("its on_poweroff is {:?}", now.on_poweroff);
            return Err(refused(why).advice(
                "`virsh set-lifecycle-action DOMAIN poweroff destroy --live --config` lets a \
                 shutdown be one",
            ));
        }
        let next = ["--inactive"];
        let next = line.ask("describe a domain", "dumpxml", &next, within(COMMAND)).await?;
        let next = Described::read(&next).map_err(|odd| refused(odd.why))?;
        if (&next.boot.source, &next.boot.target) != (&now.boot.source, &now.boot.target) {
            let why = format!("it would start again from {}", next.boot.source.display());
            return Err(
                refused(why).advice("its next start has another boot disk: see `virsh edit`")
            );
        }
        let limit = Duration::from_secs(instance.shutdown_seconds.into());
        Ok(Self { force, limit, agent: now.agent, name: name.clone() })
    }

    async fn bring_down(&self, line: &Line) -> Result<Consistency> {
        let ways = if self.agent { &["agent", "acpi"][..] } else { &["acpi"] };
        for way in ways {
            let asked = ["--mode", way];
            let asked = line.tell("shut a domain down", "shutdown", &asked, within(COMMAND)).await;
            if let Err(error) = asked {
                // It may be down by now, and the other way may do it.
                line.recorder.note(format!("{error}"));
            }
            if self.is_off(line, within(self.limit)).await? {
                return Ok(Consistency::Clean);
            }
        }
        if self.force == Force::PullThePlug {
            line.recorder.note("the guest did not shut down: its plug is pulled");
            let _ = line.tell("pull a domain's plug", "destroy", &[], within(START)).await?;
            return Ok(Consistency::Crash);
        }
        Err(hold::still_there(&self.name, self.limit, "metadata"))
    }

    /// Waits until the domain is shut off; `false`: its time is over.
    async fn is_off(&self, line: &Line, deadline: Instant) -> Result<bool> {
        loop {
            match line.state(within(COMMAND)).await? {
                State::Off => return Ok(true),
                State::Running if Instant::now() >= deadline => return Ok(false),
                State::Running => sleep(LOOK).await,
                State::Paused | State::Gone => {
                    let context = format!("somebody else has stopped instance {:?}", self.name);
                    return Err(Error::new(Reason::ShutdownRefused, context)
                        .advice("find out who, let it run, and ask again"));
                }
            }
        }
    }
}

impl hold::Stopper for Stopper {
    type Line = Line;

    /// It is started again then, with its processors stopped: a backup needs
    /// a QEMU, and nothing is written.
    async fn shut_down(&self, line: &Line, _: &Recorder) -> Result<Consistency> {
        let consistency = self.bring_down(line).await?;
        let _ = line.tell("start a domain", "start", &["--paused"], within(START)).await?;
        Ok(consistency)
    }

    async fn start(&self, line: &Line) -> Result<()> {
        line.tell("let a domain go on", "resume", &[], within(COMMAND)).await.map(drop)
    }
}
