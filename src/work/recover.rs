//! What a started daemon does before it takes orders: end what a dead one
//! began.

use std::sync::Arc;

use super::{Ports, iscsi, resume::resumable, tracker};
use crate::{
    error::{Error, Reason, Result},
    model::{
        live::Held,
        trace::Trace,
        upload::{Outgoing, OutgoingUpload},
        work_request::{
            Action, EntityType, LogEntry, Operation, Phase, Resource, Status, WorkRequest,
        },
    },
    port::ObjectStore,
    recorder::Recorder,
};

/// Gives instances back what dead captures took, removes what dead uploads
/// left, and ends the requests that they belonged to, but for those that can
/// be gone on with. Returns all requests that are remembered.
pub(super) async fn recover(ports: &Ports) -> Result<Vec<WorkRequest>> {
    let mut requests = ports.journal.load().await?;
    give_back(ports, &mut requests).await?;
    iscsi::recover(ports, &mut requests).await?;
    let keep: Vec<_> = requests
        .iter()
        .filter(|request| resumable(request))
        .filter_map(|request| Some(request.resume.as_ref()?.image_id.clone()))
        .collect();
    match ports.volumes.sweep().await {
        Ok(0) => {}
        Ok(snapshots) => tracing::warn!(snapshots, "removed snapshots that a dead daemon left"),
        Err(error) => tracing::error!("{error:?}"),
    }
    let mut stores = Stores::default();
    for store in &ports.stores {
        match store.sweep(&keep).await {
            Ok(0) => {}
            Ok(uploads) => {
                tracing::warn!(store = store.name(), uploads, "removed unfinished uploads");
            }
            // The others still serve; `host get` tells of this one. It is not
            // asked again for each request: that would take for ever.
            Err(error) => {
                tracing::error!(store = store.name(), "{error:?}");
                stores.away.get_or_insert_with(|| in_one_line(&error));
                continue;
            }
        }
        stores.there.push(store.as_ref());
    }
    stores.take_back(ports, &mut requests).await?;
    wipe(ports, &requests).await;
    for request in requests.iter_mut().filter(|request| !request.status.is_final()) {
        let now = ports.clock.now();
        match stores.made_its_image(request).await {
            Made::No | Made::Unknown(_) if resumable(request) => continue,
            Made::Yes => request.finish(Status::Succeeded, None, now),
            Made::No => {
                let error =
                    Error::new(Reason::DaemonStopped, "imaged died before the work was done")
                        .advice(left(request));
                let status = match request.status {
                    Status::Canceling => Status::Canceled,
                    _ => Status::Failed,
                };
                request.finish(status, Some(tracker::entry(&error, now)), now);
            }
            Made::Unknown(why) => {
                let context = "imaged died before it told of the end of the work, and it is not \
                               known whether the image was made";
                let error = Error::new(Reason::DaemonStopped, context).because(why).advice(
                    "when the store answers again `imagectl image list` shows the image if it \
                     was made, and otherwise its remains are removed: look before asking again",
                );
                request.finish(Status::Failed, Some(tracker::entry(&error, now)), now);
            }
        }
        ports.journal.put(request).await?;
        tracing::warn!(work_request = %request.id, status = ?request.status,
            "ended: imaged had died before it was done");
    }
    Ok(requests)
}

/// What is left of work whose daemon died, and what to do.
fn left(request: &WorkRequest) -> String {
    let advice = match (&request.operation, &request.outgoing) {
        (Operation::RestoreVolume, _) => {
            "if the volume was there before, what it held is lost, and no machine boots from it; \
             ask again, with a new retry token"
                .into()
        }
        (Operation::ExportImage, Some(Outgoing { upload: None, location })) => format!(
            "what was sent to {location} is no object yet, and stays as an upload until a \
             lifecycle rule of the bucket, or `oci os multipart abort`, removes it: imaged \
             cannot; export the image again, with a new retry token"
        ),
        (Operation::ExportImage, Some(Outgoing { upload: Some(upload), .. })) => {
            let or = upload.store.iter().map(|store| format!(", or `imagectl store gc {store}`,"));
            format!(
                "its upload could not be aborted now: the next start of imaged{} does that; then \
                 export the image again, with a new retry token",
                or.collect::<String>()
            )
        }
        (Operation::ExportImage, None) => {
            "nothing of it is left; export the image again, with a new retry token".into()
        }
        _ => "no image came of it, and its remains are removed; ask again, with a new retry token"
            .into(),
    };
    if let Operation::DisconnectIscsi | Operation::ReconnectIscsi = request.operation {
        return "`imagectl instance iscsi list` shows what the guest has now; ask again, with a \
                new retry token"
            .into();
    }
    match (request.operation, request.phase) {
        (Operation::ExportImage, Phase::Seal) => {
            format!("look first whether the object is there, whole; if it is not: {advice}")
        }
        _ => advice,
    }
}

/// Wipes what no request's undo needs any more, and after the journal knows
/// that. It is no reason not to start.
async fn wipe(ports: &Ports, requests: &[WorkRequest]) {
    let uploads = requests.iter().filter_map(|request| request.outgoing.as_ref()?.upload.as_ref());
    let at_urls = uploads.filter(|upload| upload.store.is_none());
    let keep: Vec<_> = at_urls.map(|upload| upload.token.clone()).collect();
    match ports.outlets.sweep(&keep).await {
        Ok(0) => {}
        Ok(secrets) => tracing::warn!(secrets, "wiped what dead exports had kept"),
        Err(error) => tracing::error!("{error:?}"),
    }
}

/// What holds guests, all at once: a QEMU that hangs must not keep the others
/// waiting. What cannot be done now is tried again by the next start.
async fn give_back(ports: &Ports, requests: &mut [WorkRequest]) -> Result<()> {
    let owing = requests.iter_mut().filter(|request| request.undo.is_some() && !resumable(request));
    let given = owing.map(async |request| {
        let Some(undo) = &request.undo else { return Ok(()) };
        let recorder = Arc::new(Recorder::new());
        recorder.note("imaged was started again");
        let message = match ports.hypervisor.undo(undo, Arc::clone(&recorder)).await {
            Ok(()) => {
                let held = match undo.held {
                    Held { stopped: Some(_), .. } => ", and saw to it that it runs",
                    Held { frozen: true, .. } => ", and saw to it that it is not frozen",
                    Held { frozen: false, stopped: None } => "",
                };
                let message =
                    format!("took the snapshot out of instance {:?}{held}", undo.instance);
                request.undo = None;
                message
            }
            Err(error) => {
                tracing::error!(instance = undo.instance, "{error:?}");
                format!(
                    "the snapshot could not be taken out of instance {:?}, the next start tries \
                     again: {}",
                    undo.instance,
                    in_one_line(&error)
                )
            }
        };
        tracing::warn!(work_request = %request.id, "{message}");
        request.logs.push(LogEntry { message, time: ports.clock.now() });
        ports.journal.put(request).await?;
        // What was said is worth telling, and no reason not to start.
        if let Err(error) = keep_trace(ports, request, recorder.trace()).await {
            tracing::error!(work_request = %request.id, "{error:?}");
        }
        Ok(())
    });
    futures_util::future::join_all(given).await.into_iter().collect()
}

/// Adds what was said now to what the dead daemon had kept.
async fn keep_trace(ports: &Ports, request: &WorkRequest, now: Trace) -> Result<()> {
    let before = ports.journal.trace(&request.id).await?.unwrap_or_default();
    ports.journal.put_trace(&request.id, &before.then(now)).await
}

/// Whether imaged died between the last step, which makes the image exist,
/// and telling of it.
enum Made {
    Yes,
    No,
    /// A store that may have it does not answer.
    Unknown(String),
}

/// The stores as they answered to the sweep.
#[derive(Default)]
struct Stores<'a> {
    there: Vec<&'a dyn ObjectStore>,
    /// Why another did not.
    away: Option<String>,
}

impl Stores<'_> {
    /// Aborts what dead exports have begun, also in earlier processes; all at
    /// once: a place that does not answer must not keep the others waiting.
    async fn take_back(&self, ports: &Ports, requests: &mut [WorkRequest]) -> Result<()> {
        let taken = requests.iter_mut().map(async |request| {
            let Some(Outgoing { location, upload: Some(upload) }) = request.outgoing.clone() else {
                return Ok(());
            };
            let (message, left) = match self.abandon(ports, &upload).await {
                None => return Ok(()),
                // Or found that it had ended.
                Some(Ok(())) => (format!("no upload to {location} is left"), None),
                // A pre-authenticated request that has expired does not come back.
                Some(Err(error))
                    if upload.store.is_none() && error.reason() == Reason::StoreDenied =>
                {
                    let why = in_one_line(&error);
                    let message = format!("the upload to {location} cannot be aborted: {why}");
                    (message, Some(Outgoing { location, upload: None }))
                }
                Some(Err(error)) => {
                    tracing::error!(work_request = %request.id, "{error:?}");
                    return Ok(());
                }
            };
            tracing::warn!(work_request = %request.id, "{message}");
            let message = format!("imaged was started again: {message}");
            request.logs.push(LogEntry { message, time: ports.clock.now() });
            request.outgoing = left;
            ports.journal.put(request).await
        });
        futures_util::future::join_all(taken).await.into_iter().collect()
    }

    /// Aborts `upload`; `None`: its store does not answer, or is no more.
    async fn abandon(&self, ports: &Ports, upload: &OutgoingUpload) -> Option<Result<()>> {
        let Some(name) = &upload.store else {
            return Some(ports.outlets.abandon(&upload.token).await);
        };
        let store = self.there.iter().find(|store| store.name() == name)?;
        Some(store.abandon(&upload.token).await)
    }

    async fn made_its_image(&self, request: &WorkRequest) -> Made {
        let made = |resource: &&Resource| {
            (resource.action, resource.entity_type) == (Action::InProgress, EntityType::Image)
        };
        let image = request.resources.iter().find(made);
        let Some(id) = image.and_then(|image| image.identifier.parse().ok()) else {
            return Made::No;
        };
        let mut unknown = self.away.clone();
        for store in &self.there {
            match store.get(&id).await {
                Ok(Some(_)) => return Made::Yes,
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(store = store.name(), "{error:?}");
                    unknown = Some(in_one_line(&error));
                }
            }
        }
        unknown.map_or(Made::No, Made::Unknown)
    }
}

pub(super) fn in_one_line(error: &Error) -> String {
    error.causes().fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}
