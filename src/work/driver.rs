//! One task for each work request, from its place in the queue to its end.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;

use super::{Work, capture::Capture, registry::Job, tracker::Tracker, verify};
use crate::{
    catalogue::Found,
    error::{Error, Reason, Result},
};

/// What is to be done.
#[derive(Debug)]
pub(super) enum Task {
    /// Make an image.
    Capture(Box<Capture>),
    /// Recompute an image's digests.
    Verify(Box<Found>),
}

/// Starts the task. It ends by itself, by the request's token, or with the
/// daemon, and has undone its effects by then.
pub(super) fn spawn(work: &Work, job: Job, task: Task) {
    let tasks = work.0.tasks.clone();
    tasks.spawn(Box::pin(drive(work.clone(), job, task)));
}

async fn drive(work: Work, job: Job, task: Task) {
    let Job { id, state, stop } = job;
    let inner = &work.0;
    let ports = &inner.ports;
    let mut tracker = Tracker::new(state, ports.journal.clone(), ports.clock.clone());
    let image = match &task {
        Task::Capture(capture) => Some(capture.image.id.clone()),
        Task::Verify(_) => None,
    };

    let steps = async {
        let _place = tokio::select! {
            biased;
            () = stop.cancelled() => return Err(canceled()),
            place = inner.places.acquire() => place,
        };
        tracker.start().await?;
        match task {
            Task::Capture(capture) => capture.run(&work, &mut tracker, &stop).await,
            Task::Verify(found) => verify::run(&work, &found, &mut tracker, &stop).await,
        }
    };
    // A defect must not leave the source locked for ever.
    let outcome = AssertUnwindSafe(steps).catch_unwind().await;
    let outcome = outcome.unwrap_or_else(|_| Err(Error::new(Reason::Internal, "a step panicked")));
    let outcome = outcome.map_err(|error| why_stopped(error, inner.closing.is_cancelled()));

    // Before the end is told: who is told may act at once.
    inner.registry.release(&id);
    if let Some(image) = image {
        inner.catalogue.end(&image);
    }
    tracker.finish(outcome).await;
}

/// Steps only know that they were stopped.
fn why_stopped(error: Error, closing: bool) -> Error {
    match error.reason() {
        Reason::Canceled if closing => {
            Error::new(Reason::DaemonStopped, "imaged was stopped before the work was done")
                .advice("nothing is left of it; ask again")
        }
        Reason::Canceled => canceled(),
        _ => error,
    }
}

fn canceled() -> Error {
    Error::new(Reason::Canceled, "the work request was canceled")
}

/// Whether work must go on.
pub(super) fn check(stop: &tokio_util::sync::CancellationToken) -> Result<()> {
    if stop.is_cancelled() { Err(canceled()) } else { Ok(()) }
}
