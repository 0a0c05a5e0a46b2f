//! Holds a guest for its point in time, whoever runs it.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    COMMAND,
    freeze::{Freezer, Frozen, nothing_frozen},
    within,
};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize,
        image::Consistency,
        instance::Instance,
        live::{Held, Mode, PointInTime},
    },
    port::BoxFuture,
    recorder::Recorder,
};

/// A guest that can be shut down and started again, by whom it is told.
pub(super) trait Stopper: Sync {
    /// Who is told.
    type Line: Sync;

    /// Has it shut down, and its disk be there, unwritten; what the disk
    /// holds then. After an error it is to be started again.
    ///
    /// # Errors
    ///
    /// `SHUTDOWN_REFUSED`: it is still there when its time is over; those of
    /// the hypervisor.
    fn shut_down(
        &self,
        line: &Self::Line,
        recorder: &Recorder,
    ) -> impl Future<Output = Result<Consistency>> + Send;

    /// Has it run again, from the beginning.
    ///
    /// # Errors
    ///
    /// Those of the hypervisor.
    fn start(&self, line: &Self::Line) -> impl Future<Output = Result<()>> + Send;
}

/// What makes the point in time.
pub(super) trait Moment: Sync {
    /// From here on the guest's writes are not in the snapshot.
    fn switch(&self, deadline: Instant) -> BoxFuture<'_, Result<()>>;
}

/// How a guest is held.
#[derive(Debug)]
pub(super) enum Hold<S> {
    /// Not at all.
    Not,
    /// Its filesystems are frozen.
    Frozen(Freezer),
    /// It is shut down, and started again.
    Stopped(S),
}

impl<S: Stopper> Hold<S> {
    /// What may have to be ended.
    pub fn undo(&self, instance: &Instance) -> Held {
        Held {
            frozen: matches!(self, Self::Frozen(_)),
            stopped: matches!(self, Self::Stopped(_)).then_some(instance.shutdown_seconds),
        }
    }

    /// Takes the point in time with the guest held. After an error it may
    /// still be.
    ///
    /// # Errors
    ///
    /// Those of the moment, of the freeze and of the shutdown;
    /// `SNAPSHOT_REFUSED` for a freeze that did not last.
    pub async fn point(
        &self,
        line: &S::Line,
        mode: Mode,
        recorder: &Recorder,
        moment: &dyn Moment,
    ) -> Result<PointInTime> {
        let switching = async |deadline| moment.switch(deadline).await;
        let begun = Instant::now();
        Ok(match self {
            Self::Not => {
                switching(within(COMMAND)).await?;
                unfrozen(begun.elapsed())
            }
            Self::Stopped(stopper) => {
                let consistency = stopper.shut_down(line, recorder).await?;
                switching(within(COMMAND)).await?;
                stopper.start(line).await?;
                PointInTime { consistency, stopped: true, ..unfrozen(begun.elapsed()) }
            }
            Self::Frozen(freezer) => match freezer.during(recorder, switching).await {
                Ok(((), frozen)) => worth(freezer, frozen, mode)?,
                Err(error) if mode == Mode::FreezeOrCrash && nothing_frozen(&error) => {
                    recorder.note(format!("not frozen: {error}"));
                    let begun = Instant::now();
                    switching(within(COMMAND)).await?;
                    unfrozen(begun.elapsed())
                }
                Err(error) => return Err(error),
            },
        })
    }
}

/// Why a guest that did not shut down is not imaged; `place` is where its
/// `shutdown_seconds` stand.
pub(super) fn still_there(instance: &str, limit: Duration, place: &str) -> Error {
    let context = format!(
        "instance {instance:?} did not shut down within {} s of its agent's order or its power \
         button",
        limit.as_secs()
    );
    Error::new(Reason::ShutdownRefused, context).advice(format!(
        "it goes on running, unless it is still about to shut down: look; give it more time \
         (`shutdown_seconds` in its {place}), or ask with --force-stop for what a pulled plug leaves"
    ))
}

/// A point in time that no freeze protects.
fn unfrozen(window: Duration) -> PointInTime {
    PointInTime {
        consistency: Consistency::Crash,
        window_micros: micros(window),
        frozen: 0,
        thawed: 0,
        fuse: false,
        stopped: false,
        scratch: ByteSize::default(),
    }
}

/// What the freeze was worth.
fn worth(freezer: &Freezer, frozen: Frozen, mode: Mode) -> Result<PointInTime> {
    let Frozen { filesystems, thawed, window, fuse } = frozen;
    let held = thawed >= filesystems;
    if !held && mode != Mode::FreezeOrCrash {
        let context = format!(
            "the guest did not stay frozen: it froze {filesystems} filesystems, and {thawed} of \
             them were left to thaw"
        );
        return Err(Error::new(Reason::SnapshotRefused, context).advice(
            "find out what thawed it (its own timeout, another backup, the fuse) and ask again, or \
             accept a crash-consistent image (freeze-or-crash)",
        ));
    }
    let consistency = match (held, freezer.applications) {
        (false, _) => Consistency::Crash,
        (true, true) => Consistency::Application,
        (true, false) => Consistency::Filesystem,
    };
    Ok(PointInTime { consistency, frozen: filesystems, thawed, fuse, ..unfrozen(window) })
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
