//! Sends an image's object elsewhere, as it is.
//!
//! ```text
//! preflight ─► begin ─► journal ─► parts, a few at once ─► complete
//!                                    │ read, checked, sent: never held whole
//! ```
//! Nothing of it is visible before the end. What cannot be aborted now stays
//! in the journal, for the next start and for `store gc`. A daemon that dies
//! between the service's answer to the beginning and the journal leaves an
//! upload without parts: only the answer says what it is called.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    driver::check, object::Object, rates, recover::in_one_line, tracker::Tracker,
    watchdog::Watchdog,
};
use crate::{
    catalogue::Found,
    error::{Error, Reason, Result},
    model::{
        image::{ImageState, Stored},
        upload::{Outgoing, OutgoingUpload},
        work_request::{Phase, Progress},
    },
    port::{Delivery, Outlet},
};

/// Parts that are sent at once: one connection alone does not fill a long
/// line, and each keeps a few MiB of memory.
const AT_ONCE: usize = 4;

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(250);

/// An export to be done.
#[derive(Debug)]
pub(super) struct Export {
    pub found: Found,
    /// Where to.
    pub outlet: Box<dyn Outlet>,
    /// The store that it is in; none: at a URL.
    pub store: Option<String>,
}

impl Export {
    /// Sends the object. `place` is held until every thread has ended.
    pub(super) async fn run(
        self,
        tracker: &mut Tracker,
        watchdog: &Watchdog,
        stop: &CancellationToken,
        place: Arc<OwnedSemaphorePermit>,
        rates: &rates::All,
    ) -> Result<()> {
        let stored = self.stored()?;
        let who = || format!("the store {:?} or {}", self.found.store.name(), self.location());
        tracker.phase(Phase::Preflight).await?;
        let begun = async {
            let object = self.found.store.open(&self.found.image.id).await?;
            Ok((Object::new(object.into(), &stored, place)?, self.outlet.begin().await?))
        };
        let begun = async {
            tokio::select! {
                biased;
                () = stop.cancelled() => Err(check(stop).err().unwrap_or_else(unknown)),
                begun = begun => begun,
            }
        };
        let (object, delivery) = watchdog.guard(who, begun).await?;
        let outgoing = self.outgoing(&*delivery, tracker).await;
        let sent = async {
            tracker.sends(Some(outgoing.clone())).await?;
            watchdog.guard(who, self.send(&object, &*delivery, rates, tracker, stop)).await
        };
        match sent.await {
            Ok(etag) => {
                self.tell(&stored, etag, tracker);
                tracker.sends(None).await
            }
            Err(error) => {
                self.take_back(&*delivery, &outgoing, watchdog, tracker).await;
                Err(error)
            }
        }
    }

    fn stored(&self) -> Result<Stored> {
        match &self.found.image.state {
            ImageState::Available(stored) | ImageState::Exporting(stored) => Ok(*stored.clone()),
            ImageState::Provisioning | ImageState::Deleted => {
                let context = format!("image {} is not whole", self.found.image.id);
                Err(Error::new(Reason::ImageNotFound, context))
            }
        }
    }

    fn location(&self) -> String {
        self.outlet.location()
    }

    /// What must be known to take it back. Where that cannot be kept the
    /// object is sent all the same.
    async fn outgoing(&self, delivery: &dyn Delivery, tracker: &Tracker) -> Outgoing {
        let upload = match delivery.token().await {
            Ok(token) => Some(OutgoingUpload { store: self.store.clone(), token }),
            Err(error) => {
                tracker.log(format!(
                    "should imaged die before the end, what is sent to {} stays as an upload: {}",
                    self.location(),
                    in_one_line(&error)
                ));
                None
            }
        };
        Outgoing { location: self.location(), upload }
    }

    /// Sends all parts and makes the object exist.
    async fn send(
        &self,
        object: &Object,
        delivery: &dyn Delivery,
        rates: &rates::All,
        tracker: &mut Tracker,
        stop: &CancellationToken,
    ) -> Result<Option<String>> {
        tracker.phase(Phase::Export).await?;
        let total = object.size().get();
        let sending = stream::iter(object.parts())
            .map(|part| async {
                let size = part.size;
                delivery.put(Arc::new(rates.paced(Arc::new(part)))).await?;
                object.add_stored(size);
                Ok(())
            })
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>();
        tokio::pin!(sending);
        let mut ticks = interval(TICK);
        let sent = loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break check(stop),
                sent = &mut sending => break sent,
                _ = ticks.tick() => tracker.progress(object.progress(total)),
            }
        };
        tracker.progress(object.progress(total));
        sent?;
        // From here on it may be there, whoever asks for its end.
        tracker.phase(Phase::Seal).await?;
        delivery.complete().await
    }

    fn tell(&self, stored: &Stored, etag: Option<String>, tracker: &mut Tracker) {
        let size = stored.object_size;
        tracker.progress(Progress {
            total: size.get(),
            read: size.get(),
            stored: size.get(),
            ..Progress::default()
        });
        let etag = etag.map_or("its service tells no ETag".into(), |etag| format!("ETag {etag}"));
        tracker.log(format!("the object is at {}: {size:#}, {etag}", self.location()));
    }

    /// Aborts the delivery; what cannot be aborted now stays in the journal.
    async fn take_back(
        &self,
        delivery: &dyn Delivery,
        outgoing: &Outgoing,
        watchdog: &Watchdog,
        tracker: &Tracker,
    ) {
        let aborted = match timeout(watchdog.undoing(), delivery.abort()).await {
            Ok(Ok(())) => tracker.sends(None).await,
            Ok(failed) => failed,
            Err(late) => {
                let context = format!("{} did not abort the upload", self.location());
                Err(Error::new(Reason::Stalled, context).because(late))
            }
        };
        let Err(left) = aborted else { return };
        tracing::error!(image = %self.found.image.id, "{left:?}");
        tracker.log(match (&self.store, &outgoing.upload) {
            (Some(store), _) => format!(
                "the upload could not be aborted; the next start of imaged, or `imagectl store gc \
                 {store}`, does that: {left}"
            ),
            (None, Some(_)) => format!(
                "the upload could not be aborted; the next start of imaged does that: {left}"
            ),
            (None, None) => format!(
                "the upload could not be aborted, and its URL is not kept: a lifecycle rule of \
                 the bucket that aborts uploads, or `oci os multipart abort`, removes it: {left}"
            ),
        });
    }
}

fn unknown() -> Error {
    Error::new(Reason::Internal, "it was stopped, and nobody says why")
}
