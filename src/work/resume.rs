//! Going on with a capture that another process of imaged began.
//!
//! ```text
//! journal: Resume, parts ─► the upload ─► the source ─► the encoder ─► read on
//!                             │             │
//!                             │             └ as it was, or nothing can be gone on with
//!                             └ waited for, as long as work may take without progress
//! ```

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Work, driver::check, live::Live, preflight::free, tracker::Tracker};
use crate::{
    encode::Resumed,
    error::{Error, Reason, Result},
    model::{
        image::{Image, ImageState},
        live::Undo,
        upload::{KeptPart, Resume, ResumeSource},
        work_request::{Status, WorkRequest},
    },
    port::{HeldVolume, NamedBy, ObjectStore, Pace, Upload},
};

/// How often a store that is away is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// Whether `request`, of a daemon that has ended, can be gone on with.
pub(super) fn resumable(request: &WorkRequest) -> bool {
    let held = request.undo.as_ref().is_some_and(|undo| undo.held.is_held());
    request.resume.is_some()
        && !held
        && matches!(request.status, Status::Accepted | Status::InProgress)
}

/// An interrupted capture.
#[derive(Debug)]
pub(super) struct Interrupted {
    pub resume: Resume,
    /// What takes its snapshot back.
    pub undo: Option<Undo>,
    /// What the store had of it, by number.
    pub parts: Vec<KeptPart>,
}

impl Interrupted {
    /// The image that it was making.
    pub(super) fn image(&self) -> Image {
        let Resume { image_id, record, origin, .. } = &self.resume;
        Image {
            id: image_id.clone(),
            record: record.clone(),
            origin: origin.clone(),
            state: ImageState::Provisioning,
        }
    }

    /// Its upload. A store that is away is waited for.
    pub(super) async fn upload(
        &self,
        store: &dyn ObjectStore,
        patience: Duration,
        tracker: &Tracker,
        stop: &CancellationToken,
    ) -> Result<Box<dyn Upload>> {
        let (begin, mut told) = (Instant::now(), false);
        // Without the first part's bytes, which only the encoder needs.
        let light = |part: &KeptPart| KeptPart { body: Vec::new(), ..part.clone() };
        loop {
            check(stop)?;
            let parts = self.parts.iter().map(light).collect();
            let resumed = store.resume(&self.resume.image_id, &self.resume.token, parts).await;
            match resumed {
                Err(error)
                    if error.reason() == Reason::StoreUnavailable && begin.elapsed() < patience =>
                {
                    if !told {
                        tracker.log(format!("the store is waited for: {error}"));
                        told = true;
                    }
                }
                resumed => return resumed,
            }
            tokio::select! { () = stop.cancelled() => {} () = sleep(AGAIN) => {} }
        }
    }

    /// What it was reading, if it is still the same.
    pub(super) async fn source(
        &self,
        work: &Work,
        tracker: &Tracker,
    ) -> Result<(Box<dyn HeldVolume>, Option<Live>)> {
        let ports = &work.0.ports;
        match (&self.resume.source, &self.undo) {
            (ResumeSource::AtRest(mark), _) => {
                let path = &self.resume.origin.source_volume;
                let named = match &self.resume.origin.source_instance_id {
                    Some(_) => NamedBy::Instance,
                    None => NamedBy::Request,
                };
                let held = ports.volumes.hold(path, named).await?;
                if held.mark().as_ref() != Some(mark) {
                    let context = format!(
                        "the volume {} was written to, or exchanged, since its point in time",
                        path.display()
                    );
                    return Err(Error::new(Reason::VolumeHeld, context).advice(
                        "what was stored of it was removed; ask for the image again, with a new \
                         retry token",
                    ));
                }
                Ok((free(work, (held, named), tracker).await, None))
            }
            (source, Some(undo)) => {
                let snapshot = ports.hypervisor.regain(undo, source, tracker.recorder()).await?;
                let live = Live::new(snapshot, Pace::default());
                Ok((live.open(work).await?, Some(live)))
            }
            (ResumeSource::Live { .. }, None) => {
                Err(Error::new(Reason::SnapshotBroken, "the snapshot was given back"))
            }
        }
    }

    /// Where the encoder goes on; `None`: from the beginning.
    pub(super) fn encoder(&mut self) -> Result<Option<Resumed>> {
        let whole = self.parts.iter().zip(1..).take_while(|(part, number)| part.number == *number);
        let known = whole.count();
        let known = &mut self.parts[..known];
        let (Some(last), Some(first)) = (known.last(), known.first()) else { return Ok(None) };
        if last.standing.is_empty() || first.body.is_empty() {
            return Ok(None);
        }
        let standing = last.standing.clone();
        let body = std::mem::take(&mut known[0].body);
        let stored = known[1..].iter().map(|part| part.stored.clone()).collect();
        let digests = known.iter().map(|part| &*part.digests);
        Resumed::new(&standing, digests, body, stored).map(Some)
    }
}
