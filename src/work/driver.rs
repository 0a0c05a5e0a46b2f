//! One task for each work request, from its place in the queue to its end.

use std::{future::pending, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Inner, Work,
    capture::Capture,
    export::Export,
    iscsi::{self, Reconnect},
    rates,
    registry::{Job, Reservation},
    rehearse::Rehearse,
    restore::Restore,
    tracker::Tracker,
    verify,
    watchdog::Watchdog,
};
use crate::{
    catalogue::Found,
    error::{Error, Reason, Result},
    model::{
        instance::Instance,
        live::Undo,
        upload::Resume,
        work_request::{Phase, Status},
    },
};

/// What is to be done.
#[derive(Debug)]
pub(super) enum Task {
    /// Make an image.
    Capture(Box<Capture>),
    /// Recompute an image's digests.
    Verify(Box<Found>),
    /// Try what an image would cost.
    Rehearse(Box<Rehearse>),
    /// Send an image's object elsewhere.
    Export(Box<Export>),
    /// Write an image over a volume.
    Restore(Box<Restore>),
    /// Take its iSCSI from a guest.
    Disconnect(Box<Instance>),
    /// Give it back.
    Reconnect(Box<Reconnect>),
}

/// Starts the task. It ends by itself, by the request's token, or with the
/// daemon, and has undone its effects by then.
pub(super) fn spawn(work: &Work, reservation: Reservation, task: Task) {
    let Some(job) = reservation.accept() else { return };
    spawn_job(work, job, task);
}

/// Starts the task of a job that everyone knows of.
pub(super) fn spawn_job(work: &Work, job: Job, task: Task) {
    let tasks = work.0.tasks.clone();
    tasks.spawn(Box::pin(drive(work.clone(), job, task)));
}

async fn drive(work: Work, job: Job, task: Task) {
    let Job { id, state, stop, limits } = job;
    let inner = &work.0;
    let ports = &inner.ports;
    let mut tracker = Tracker::new(state.clone(), ports.journal.clone(), ports.clock.clone());
    let (image, interrupted) = match &task {
        Task::Capture(capture) => {
            let resume = capture.interrupted.as_ref().map(|interrupted| interrupted.resume.clone());
            (Some(capture.image.id.clone()), resume)
        }
        _ => (None, None),
    };
    if let Some(resume) = &interrupted {
        let earlier = ports.journal.trace(&id).await.ok().flatten().unwrap_or_default();
        tracker.resumed(resume.time_line.clone(), earlier);
    }

    let rates = rates::All::new([limits, inner.limits.clone()], stop.clone());
    let watchdog = Watchdog::new(state.subscribe(), stop.clone(), inner.settings.progress_timeout);
    let steps = async {
        let place = place(inner, &stop).await?;
        tracker.start().await?;
        match task {
            Task::Capture(capture) => {
                capture.run(&work, &mut tracker, &watchdog, &stop, place, &rates).await
            }
            Task::Verify(found) => {
                verify::run(&work, &found, &mut tracker, &watchdog, &stop, place).await
            }
            Task::Rehearse(rehearse) => rehearse.run(&work, &mut tracker, &stop).await,
            Task::Export(export) => export.run(&mut tracker, &watchdog, &stop, place, &rates).await,
            Task::Restore(restore) => {
                restore.run(&work, &mut tracker, &watchdog, &stop, place).await
            }
            Task::Disconnect(instance) => {
                tracker.phase(Phase::Preflight).await?;
                work.disconnect(&instance, &mut tracker, &stop).await
            }
            Task::Reconnect(reconnect) => reconnect.run(&work, &mut tracker).await,
        }
    };
    // Who dies while it undoes must find on its return that it was to.
    let noted = async {
        stop.cancelled().await;
        let request = state.borrow().clone();
        if let Err(error) = ports.journal.put(&request).await {
            tracing::error!(work_request = %id, "{error:?}");
        }
        pending().await
    };
    let steps = async {
        tokio::select! { biased; outcome = steps => outcome, never = noted => never }
    };
    // A defect must not leave the source locked for ever.
    let outcome = AssertUnwindSafe(steps).catch_unwind().await;
    let outcome = outcome.unwrap_or_else(|_| Err(Error::new(Reason::Internal, "a step panicked")));
    let asked = state.borrow().status == Status::Canceling;
    let stopped = outcome.as_ref().is_err_and(|error| error.reason() == Reason::Canceled);
    if stopped && inner.closing.is_cancelled() && tracker.is_left_to_a_later_process() {
        tracing::info!(work_request = %id, "left to the next start, which goes on with it");
        return;
    }
    let outcome = outcome.map_err(|error| match why_stopped(&error, asked, stop.is_cancelled()) {
        Some(why) => {
            if error.reason() == Reason::Stalled {
                tracker.log(error.to_string());
            }
            why
        }
        None => error,
    });

    if let Some(undo) = tracker.owed() {
        give_back(&work, &tracker, undo).await;
    }
    if outcome.is_err()
        && let Some(undo) = tracker.owed_iscsi()
    {
        iscsi::undo(&work, &tracker, &undo).await;
    }
    if outcome.is_err()
        && let Some(resume) = interrupted
    {
        remove(&work, &tracker, &resume, watchdog.undoing()).await;
    }
    // Before the end is told: who is told may act at once.
    inner.registry.release(&id);
    if let Some(image) = image {
        inner.catalogue.end(&image);
    }
    tracker.finish(outcome).await;
    work.goes_on_giving_back(&state.borrow().clone());
}

/// Gives an instance back what a failed capture took. What cannot be done
/// now stays in the journal.
async fn give_back(work: &Work, tracker: &Tracker, undo: Undo) {
    let told = match work.0.ports.hypervisor.undo(&undo, tracker.recorder()).await {
        Ok(()) => tracker.owe(None).await,
        Err(error) => Err(error),
    };
    if let Err(error) = told {
        tracker.log(format!(
            "the next start of imaged will take the snapshot out of instance {:?}: {error}",
            undo.instance
        ));
        tracing::error!(instance = undo.instance, "{error:?}");
    }
}

/// Removes what the store has of a capture that nobody goes on with any more:
/// it may have ended before its upload was found again. Takes `patience` at
/// most.
async fn remove(work: &Work, tracker: &Tracker, resume: &Resume, patience: Duration) {
    let removed = async {
        let store = work.0.catalogue.store(&resume.origin.store)?;
        match store.resume(&resume.image_id, &resume.token, Vec::new()).await {
            // It is removed already, or was never there.
            Err(error) if error.reason() == Reason::StoreRefused => Ok(()),
            Err(error) => Err(error),
            Ok(upload) => upload.abort().await,
        }
    };
    let left = match timeout(patience, removed).await {
        Ok(removed) => removed,
        Err(late) => Err(Error::new(Reason::Stalled, "the store did not answer").because(late)),
    };
    if let Err(left) = left {
        tracker.log(format!("the next start will remove what is left: {left}"));
        tracing::error!(image = %resume.image_id, "{left:?}");
    }
}

/// How often a queue looks whether it can still move.
const LOOK: Duration = Duration::from_secs(1);
/// How often in a row nobody may be seen to work though no place is free:
/// more than a place takes from one to the next.
const DOUBTS: u32 = 5;

/// Waits for a place among the work that runs at once.
///
/// Threads that a device or a store never answered keep theirs, because their
/// memory is bounded by it. A queue behind nothing but such would not move.
async fn place(inner: &Inner, stop: &CancellationToken) -> Result<Arc<OwnedSemaphorePermit>> {
    let mut doubts = 0;
    let waiting = Arc::clone(&inner.places).acquire_owned();
    tokio::pin!(waiting);
    while doubts < DOUBTS {
        tokio::select! {
            biased;
            () = stop.cancelled() => return Err(canceled()),
            place = &mut waiting => {
                return place.map(Arc::new).map_err(|closed| {
                    Error::new(Reason::Internal, "the queue is closed").because(closed)
                });
            }
            () = sleep(LOOK) => {
                let stuck = inner.places.available_permits() == 0 && inner.registry.working() == 0;
                doubts = if stuck { doubts + 1 } else { 0 };
            }
        }
    }
    Err(Error::new(
        Reason::Stalled,
        "no work can begin: all that runs waits for devices or stores that do not answer",
    )
    .advice(
        "find out why in the kernel's log (dmesg); when they cannot be brought back, restart \
         imaged and raise `max_captures` only if its memory allows",
    ))
}

/// Steps only know that they were stopped: `asked` by a user, or with the
/// daemon. `None`: the error says it best.
fn why_stopped(error: &Error, asked: bool, stopped: bool) -> Option<Error> {
    match error.reason() {
        Reason::Canceled | Reason::Stalled if asked => Some(canceled()),
        Reason::Canceled => {
            let context = "imaged was stopped before the work was done";
            let advice = "nothing is left of it; ask again, with a new retry token";
            Some(Error::new(Reason::DaemonStopped, context).advice(advice))
        }
        Reason::Stalled if stopped => {
            let context = "imaged was stopped before the work was done";
            let advice =
                "the next start removes what is left; ask again then, with a new retry token";
            Some(Error::new(Reason::DaemonStopped, context).advice(advice))
        }
        _ => None,
    }
}

pub(super) fn canceled() -> Error {
    Error::new(Reason::Canceled, "the work request was canceled")
}

/// Whether work must go on.
pub(super) fn check(stop: &CancellationToken) -> Result<()> {
    if stop.is_cancelled() { Err(canceled()) } else { Ok(()) }
}
