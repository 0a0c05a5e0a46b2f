//! An image becomes a volume again.

use std::{path::PathBuf, sync::Arc};

use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{Work, aside::aside, driver::check, tracker::Tracker, verify, watchdog::Watchdog};
use crate::{
    catalogue::Found,
    error::{Error, Reason, Result},
    model::{
        image::{ImageState, Stored},
        work_request::Phase,
    },
    port::{Meter, Target},
};

/// What goes where.
#[derive(Debug)]
pub(super) struct Restore {
    /// The image.
    pub found: Found,
    /// Where it is to be written.
    pub path: PathBuf,
}

impl Restore {
    /// Takes the volume, to see whether it can be.
    pub(super) async fn target(&self, work: &Work) -> Result<Box<dyn Target>> {
        let size = stored(&self.found)?.virtual_size;
        work.0.ports.volumes.target(&self.path, size).await
    }

    /// Writes the image. `place` is held until every thread has ended.
    pub(super) async fn run(
        &self,
        work: &Work,
        tracker: &mut Tracker,
        watchdog: &Watchdog,
        stop: &CancellationToken,
        place: Arc<OwnedSemaphorePermit>,
    ) -> Result<()> {
        let who = || {
            let store = self.found.store.name();
            format!("the store {store:?} or the volume {}", self.path.display())
        };
        watchdog.guard(who, self.written(work, tracker, stop, place)).await
    }

    async fn written(
        &self,
        work: &Work,
        tracker: &mut Tracker,
        stop: &CancellationToken,
        place: Arc<OwnedSemaphorePermit>,
    ) -> Result<()> {
        tracker.phase(Phase::Preflight).await?;
        let Found { image, store, .. } = &self.found;
        let stored = stored(&self.found)?.clone();
        let (target, object, digests) = tokio::try_join!(
            self.target(work),
            store.open(&image.id),
            store.extent_digests(&image.id)
        )?;
        check(stop)?;
        tracker.phase(Phase::Restore).await?;

        let (path, is_new) = (target.path().display().to_string(), target.is_new());
        // What lies behind the image is zeroed.
        let total = target.room().get();
        let (threads, inspector) =
            (work.0.settings.encode_threads, Arc::clone(&work.0.ports.inspector));
        let meter = Arc::new(Meter::default());
        let token = stop.child_token();
        let _ends_with_us = token.clone().drop_guard();
        let seen = Arc::clone(&meter);
        let body = move || {
            let _place = place;
            let sink = target.begin(&token)?;
            let (object, sink_ref) = (&*object, &*sink);
            let fault =
                inspector.decode(object, &stored, &digests, threads, sink_ref, &seen, &token)?;
            if fault.is_none() {
                sink.finish(&seen)?;
            }
            Ok(fault)
        };
        let outcome = aside("restore-0", tracker, (meter, total), body).await;
        let outcome = outcome.and_then(|fault| match fault {
            None => Ok(()),
            Some(fault) => Err(verify::corrupt(&self.found, fault)),
        });
        match &outcome {
            Ok(()) => tracker.log(format!("{path} is the image, as its digests say")),
            Err(_) if is_new => tracker.log(format!("{path} was not made")),
            Err(_) => tracker.log(format!(
                "what {path} held is lost, and no machine boots from it until a restore succeeds"
            )),
        }
        outcome
    }
}

fn stored(found: &Found) -> Result<&Stored> {
    match &found.image.state {
        ImageState::Available(stored) => Ok(stored),
        _ => {
            let context = format!("image {} is not whole", found.image.id);
            Err(Error::new(Reason::ImageNotFound, context))
        }
    }
}
