//! Whether an image in a store is still what was stored.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{Work, aside::aside, tracker::Tracker, watchdog::Watchdog};
use crate::{
    catalogue::Found,
    error::{Error, Reason, Result},
    model::{image::ImageState, work_request::Phase},
    port::{Fault, Meter},
};

/// Recomputes both digests from the store alone. `place` is held until every
/// thread has ended.
pub(super) async fn run(
    work: &Work,
    found: &Found,
    tracker: &mut Tracker,
    watchdog: &Watchdog,
    stop: &CancellationToken,
    place: Arc<OwnedSemaphorePermit>,
) -> Result<()> {
    let who = || format!("the store {:?}", found.store.name());
    watchdog.guard(who, recomputed(work, found, tracker, stop, place)).await
}

async fn recomputed(
    work: &Work,
    found: &Found,
    tracker: &mut Tracker,
    stop: &CancellationToken,
    place: Arc<OwnedSemaphorePermit>,
) -> Result<()> {
    tracker.phase(Phase::Verify).await?;
    let image = &found.image;
    let ImageState::Available(stored) = &image.state else {
        return Err(Error::new(Reason::ImageNotFound, format!("image {} is not whole", image.id)));
    };
    let object = found.store.open(&image.id).await?;
    let digests = found.store.extent_digests(&image.id).await?;

    // Each byte counts twice: as one of the object, and as the guest's.
    let total = stored.object_size.get() + stored.virtual_size.get();
    let threads = work.0.settings.encode_threads;
    let meter = Arc::new(Meter::default());
    let token = stop.child_token();
    let _ends_with_us = token.clone().drop_guard();
    let (stored, seen) = (stored.clone(), Arc::clone(&meter));
    let inspector = Arc::clone(&work.0.ports.inspector);
    let body = move || {
        let _place = place;
        inspector.verify(&*object, &stored, &digests, threads, &seen, &token)
    };
    match aside("verify-0", tracker, (meter, total), body).await? {
        None => {
            tracker.log("content and object are what was stored".into());
            Ok(())
        }
        Some(fault) => Err(corrupt(found, fault)),
    }
}

/// An image that is not what its digests say.
pub(super) fn corrupt(found: &Found, fault: Fault) -> Error {
    let context = format!(
        "image {} in store {:?} is not what was stored",
        found.image.id,
        found.store.name()
    );
    Error::new(Reason::ImageCorrupt, context)
        .because(fault)
        .advice("do not launch from it: make the image again, and look after the store's disks")
}
