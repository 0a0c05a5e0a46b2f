//! Work on a thread of its own, whose progress is shown.

use std::{sync::Arc, thread, time::Duration};

use tokio::sync::oneshot;

use super::tracker::Tracker;
use crate::{
    error::{Error, Reason, Result},
    model::work_request::Progress,
    port::Meter,
};

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(250);

/// The outcome of `body`, which blocks, on a thread called `name`; shows what
/// `meter` counts of `total` bytes. Dropped, it leaves the thread to itself.
pub(super) async fn aside<T: Send + 'static>(
    name: &str,
    tracker: &mut Tracker,
    (meter, total): (Arc<Meter>, u64),
    body: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, mut running) = oneshot::channel();
    let body = move || {
        // Nobody waits any more: the daemon is going down.
        let _ = done.send(body());
    };
    thread::Builder::new().name(name.into()).spawn(body).map_err(|cause| {
        Error::new(Reason::Internal, format!("the thread {name} cannot be started")).because(cause)
    })?;
    let mut show = || {
        let (read, skipped) = (meter.read(), meter.skipped());
        tracker.progress(Progress { total, read, skipped, ..Progress::default() });
    };
    let mut ticks = tokio::time::interval(TICK);
    let outcome = loop {
        tokio::select! {
            outcome = &mut running => break outcome,
            _ = ticks.tick() => show(),
        }
    };
    let panicked = || Error::new(Reason::Internal, format!("the thread {name} panicked"));
    let outcome = outcome.unwrap_or_else(|_| Err(panicked()))?;
    show();
    Ok(outcome)
}
