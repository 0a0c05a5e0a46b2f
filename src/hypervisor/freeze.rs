//! Freezes a guest, does something, and thaws it, whatever happens.

use std::{num::NonZeroU32, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    COMMAND,
    agent::{Agent, FreezeStatus, GuestProgram},
    within,
};
use crate::{
    error::{Error, Reason, Result},
    model::instance::Freeze,
    recorder::Recorder,
};

/// Longest freeze of a Linux guest: what its programs bear without timeouts
/// of their own.
const LINUX: Duration = Duration::from_secs(30);

/// Windows ends a freeze after ten seconds by itself (VSS,
/// `CVssWriter::Subscribe`).
const WINDOWS: Duration = Duration::from_secs(8);

/// How long a thaw is tried: an agent that is late does the freeze first and
/// then the thaw.
const THAW: Duration = Duration::from_secs(60);

/// For one try of it.
const THAW_TRY: Duration = Duration::from_secs(5);

/// Between tries.
const PAUSE: Duration = Duration::from_millis(100);

/// A guest that can be frozen, and thaws by itself where that is possible.
#[derive(Debug)]
pub(super) struct Freezer {
    agent: Agent,
    deadline: Duration,
    /// Whether the agent starts programs, so that a fuse can be armed.
    fuses: bool,
    /// Whether a freeze is the applications', too.
    pub applications: bool,
}

/// What came of a freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frozen {
    pub filesystems: u32,
    /// How many were still frozen when they were thawed.
    pub thawed: u32,
    /// From the order to freeze until the answer to the thaw.
    pub window: Duration,
    /// Whether a fuse was armed.
    pub fuse: bool,
}

impl Freezer {
    /// Looks whether the guest can be frozen.
    ///
    /// # Errors
    ///
    /// All that begin with `GUEST_AGENT_`; `SNAPSHOT_REFUSED` for a guest
    /// that is frozen already.
    pub async fn new(agent: Agent, wanted: Freeze) -> Result<Self> {
        let info = agent.info(within(COMMAND)).await?;
        for needed in ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"] {
            if !info.allows(needed) {
                let context = format!("the guest's agent may not run {needed}");
                return Err(Error::new(Reason::GuestAgentDisabled, context).advice(
                    "allow it in the guest's qemu-ga configuration, or ask for a \
                     crash-consistent image",
                ));
            }
        }
        if agent.freeze_status(within(COMMAND)).await? == FreezeStatus::Frozen {
            return Err(Error::new(Reason::SnapshotRefused, "the guest is frozen already")
                .advice("end the backup that froze it, or thaw it by `guest-fsfreeze-thaw`"));
        }
        let windows = match info.allows("guest-get-osinfo") {
            true => agent.os_info(within(COMMAND)).await?.is_windows(),
            false => false,
        };
        Ok(Self {
            agent,
            deadline: wanted.limit.unwrap_or(if windows { WINDOWS } else { LINUX }),
            fuses: !windows && info.allows("guest-exec") && info.allows("guest-exec-status"),
            applications: windows || wanted.hook,
        })
    }

    /// Freezes the guest, does `work` and thaws the guest.
    ///
    /// # Errors
    ///
    /// Of the freeze, else of `work`, else of the thaw: then the guest may
    /// still be frozen, and its fuse is what is left. After
    /// [`nothing_frozen`] of the error, nothing was done.
    pub async fn during<T>(
        &self,
        recorder: &Recorder,
        work: impl AsyncFnOnce(Instant) -> Result<T>,
    ) -> Result<(T, Frozen)> {
        let fuse = self.arm(recorder).await;
        let begun = Instant::now();
        let deadline = begun + self.deadline;
        let frozen = self.agent.freeze(deadline).await;
        let worked = match &frozen {
            Ok(0) => Err(Error::new(
                Reason::GuestAgentRefused,
                "the guest has no filesystem that can be frozen",
            )),
            Ok(_) => work(deadline).await,
            Err(_) => Err(Error::new(Reason::Internal, "nothing is done without a freeze")),
        };
        // Nothing is frozen after these, and a thaw would only cost time.
        let nothing = matches!(&frozen, Err(error) if nothing_frozen(error));
        let thawed = if nothing { Ok(0) } else { thaw(&self.agent, recorder).await };
        let window = begun.elapsed();
        if fuse {
            disarm(&self.agent, recorder).await;
        }
        let filesystems = frozen?;
        let work = worked?;
        let frozen = Frozen { filesystems, thawed: thawed?, window, fuse };
        Ok((work, frozen))
    }

    /// Whether it is armed: a guest without the programs that a fuse needs is
    /// frozen without one.
    async fn arm(&self, recorder: &Recorder) -> bool {
        if !self.fuses {
            return false;
        }
        let seconds = u32::try_from(self.deadline.as_secs()).unwrap_or(u32::MAX);
        let after_seconds = NonZeroU32::new(seconds).unwrap_or(NonZeroU32::MIN);
        let fuse = GuestProgram::ThawFuse { after_seconds };
        let armed = async {
            let process = self.agent.start(fuse, within(COMMAND)).await?;
            let status = self.agent.status(process, within(COMMAND)).await?;
            match status.exited {
                false => Ok(()),
                true => Err(Error::new(Reason::GuestAgentRefused, "the fuse ended at once")),
            }
        };
        armed.await.inspect_err(|error| recorder.note(format!("no fuse: {error}"))).is_ok()
    }
}

/// Ends the guest's fuses, also those that a dead imaged has left: one that
/// blows later would thaw the next freeze. They are gone when this returns, or
/// the next freeze's fuse would be ended with them. Whether one blew is seen by
/// the counts.
pub(super) async fn disarm(agent: &Agent, recorder: &Recorder) {
    let deadline = within(COMMAND);
    let ended = async {
        let process = agent.start(GuestProgram::DisarmFuses, deadline).await?;
        agent.ended(process, "end its fuses", deadline).await
    };
    if let Err(error) = ended.await {
        recorder.note(format!("a fuse is left to burn down, if there is one: {error}"));
    }
}

/// Whether a freeze that ended so froze nothing.
pub(super) fn nothing_frozen(error: &Error) -> bool {
    matches!(
        error.reason(),
        Reason::GuestAgentRefused | Reason::GuestAgentUnavailable | Reason::GuestAgentDisabled
    )
}

/// Thaws until the agent says that it has: how many filesystems.
///
/// # Errors
///
/// The last try's. The guest may be frozen then.
pub(super) async fn thaw(agent: &Agent, recorder: &Recorder) -> Result<u32> {
    let end = within(THAW);
    loop {
        let error = match agent.thaw(within(THAW_TRY)).await {
            Ok(count) => return Ok(count),
            Err(error) => error,
        };
        if Instant::now() >= end {
            return Err(error.advice(
                "the guest may still be frozen: see that its agent runs, then restart imaged, \
                 which thaws it",
            ));
        }
        recorder.note(format!("thawed again, because {error}"));
        sleep(PAUSE).await;
    }
}
