//! What a started daemon does before it takes orders: end what a dead one
//! began.

use super::{Ports, tracker};
use crate::{
    error::{Error, Reason, Result},
    model::work_request::{Status, WorkRequest},
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
        let error = Error::new(Reason::DaemonStopped, "imaged died before the work was done")
            .advice("nothing is left of it; ask again");
        let status = match request.status {
            Status::Canceling => Status::Canceled,
            _ => Status::Failed,
        };
        request.finish(status, Some(tracker::entry(&error, now)), now);
        ports.journal.put(request).await?;
        tracing::warn!(work_request = %request.id, "ended: imaged had died before it was done");
    }
    Ok(requests)
}
