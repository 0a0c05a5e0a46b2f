//! What a started daemon does before it takes orders: end what a dead one
//! began.

use super::{Ports, tracker};
use crate::{
    error::{Error, Reason, Result},
    model::work_request::{Action, Resource, Status, WorkRequest},
};

/// Removes what dead uploads left and ends the requests that they belonged
/// to. Returns all requests that are remembered.
pub(super) async fn recover(ports: &Ports) -> Result<Vec<WorkRequest>> {
    for store in &ports.stores {
        match store.sweep().await {
            Ok(0) => {}
            Ok(uploads) => {
                tracing::warn!(store = store.name(), uploads, "removed unfinished uploads");
            }
            // The others still serve; `host get` tells of this one.
            Err(error) => tracing::error!(store = store.name(), "{error:?}"),
        }
    }
    let mut requests = ports.journal.load().await?;
    for request in requests.iter_mut().filter(|request| !request.status.is_final()) {
        let now = ports.clock.now();
        if made_its_image(ports, request).await {
            request.finish(Status::Succeeded, None, now);
        } else {
            let error = Error::new(Reason::DaemonStopped, "imaged died before the work was done")
                .advice("no image came of it, and its remains are removed; ask again");
            let status = match request.status {
                Status::Canceling => Status::Canceled,
                _ => Status::Failed,
            };
            request.finish(status, Some(tracker::entry(&error, now)), now);
        }
        ports.journal.put(request).await?;
        tracing::warn!(work_request = %request.id, status = ?request.status,
            "ended: imaged had died before it was done");
    }
    Ok(requests)
}

/// Whether imaged died between the last step, which makes the image exist,
/// and telling of it.
async fn made_its_image(ports: &Ports, request: &WorkRequest) -> bool {
    let made = |resource: &&Resource| resource.action == Action::InProgress;
    let image = request.resources.iter().find(made);
    let Some(id) = image.and_then(|image| image.identifier.parse().ok()) else { return false };
    for store in &ports.stores {
        match store.get(&id).await {
            Ok(Some(_)) => return true,
            Ok(None) => {}
            Err(error) => tracing::error!(store = store.name(), "{error:?}"),
        }
    }
    false
}
