//! The work requests in memory: those that run, and those that are
//! remembered.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::admission::{self, Admission, Denial, Known, Lock, Wanted};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ImageId, Timestamp, WorkRequestId,
        work_request::{Retry, Status, WorkRequest},
    },
};

/// Work requests that are remembered after their end: weeks of images, a few
/// MiB of memory.
const REMEMBERED: usize = 1000;

/// All work requests, by id and so by age.
#[derive(Debug)]
pub(super) struct Registry(Mutex<BTreeMap<WorkRequestId, Entry>>);

#[derive(Debug)]
struct Entry {
    state: watch::Sender<WorkRequest>,
    /// What it holds, until it has ended.
    lock: Option<Lock>,
    stop: CancellationToken,
}

/// What its task needs of an accepted request.
#[derive(Debug)]
pub(super) struct Job {
    pub id: WorkRequestId,
    pub state: watch::Sender<WorkRequest>,
    pub stop: CancellationToken,
}

/// What became of a request.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "short-lived, one at a time")]
pub(super) enum Admitted {
    /// It is one that was asked before.
    Known(WorkRequest),
    /// It is to be done.
    New(WorkRequest, Job),
}

impl Registry {
    /// Remembers `requests`, which have all ended.
    pub(super) fn new(requests: Vec<WorkRequest>) -> Self {
        let entry = |request: WorkRequest| {
            let id = request.id.clone();
            let (state, stop) = (watch::Sender::new(request), CancellationToken::new());
            (id, Entry { state, lock: None, stop })
        };
        Self(Mutex::new(requests.into_iter().map(entry).collect()))
    }

    /// The request that this retry token was used for.
    pub(super) fn known(
        &self,
        retry: Option<&Retry>,
        now: Timestamp,
    ) -> Result<Option<WorkRequest>> {
        let entries = self.entries();
        match lookup(&entries, |known| admission::lookup(retry, now, known)) {
            (Admission::Known(_), request) => Ok(request),
            (Admission::Deny(denial), _) => Err(denial.into()),
            (Admission::Accept, _) => Ok(None),
        }
    }

    /// Decides on `request` and registers it if it may run.
    pub(super) fn admit(
        &self,
        request: WorkRequest,
        lock: Lock,
        max: usize,
        stop: CancellationToken,
    ) -> Result<Admitted> {
        let mut entries = self.entries();
        let wanted =
            Wanted { lock: &lock, retry: request.retry.as_ref(), now: request.time_accepted };
        match lookup(&entries, |known| admission::consider(wanted, known, max)) {
            (Admission::Known(_), Some(known)) => return Ok(Admitted::Known(known)),
            (Admission::Deny(denial), _) => return Err(denial.into()),
            (Admission::Accept | Admission::Known(_), _) => {}
        }
        let state = watch::Sender::new(request.clone());
        let job = Job { id: request.id.clone(), state: state.clone(), stop: stop.clone() };
        entries.insert(request.id.clone(), Entry { state, lock: Some(lock), stop });
        Ok(Admitted::New(request, job))
    }

    /// Fails while work on `image` goes on.
    pub(super) fn check_unused(&self, image: &ImageId) -> Result<()> {
        let entries = self.entries();
        let uses = |entry: &Entry| {
            let request = entry.state.borrow();
            entry.lock.is_some()
                && request.resources.iter().any(|resource| resource.identifier == image.as_str())
        };
        match entries.iter().find(|(_, entry)| uses(entry)) {
            None => Ok(()),
            Some((id, _)) => {
                Err(Denial::Locked { holder: id.clone(), lock: Lock::Image(image.clone()) }.into())
            }
        }
    }

    /// Gives back what `id` held.
    pub(super) fn release(&self, id: &WorkRequestId) {
        if let Some(entry) = self.entries().get_mut(id) {
            entry.lock = None;
        }
    }

    /// As if `id` had never been.
    pub(super) fn forget(&self, id: &WorkRequestId) {
        self.entries().remove(id);
    }

    /// Forgets the oldest of those that have ended when there are too many.
    pub(super) fn evict(&self) -> Vec<WorkRequestId> {
        let mut entries = self.entries();
        let surplus = entries.len().saturating_sub(REMEMBERED);
        let ended = entries.iter().filter(|(_, entry)| entry.lock.is_none());
        let evicted: Vec<_> = ended.map(|(id, _)| id.clone()).take(surplus).collect();
        evicted.iter().for_each(|id| drop(entries.remove(id)));
        evicted
    }

    /// All, newest first.
    pub(super) fn all(&self) -> Vec<WorkRequest> {
        self.entries().values().rev().map(|entry| entry.state.borrow().clone()).collect()
    }

    /// Follows `id`.
    pub(super) fn watch(&self, id: &WorkRequestId) -> Result<watch::Receiver<WorkRequest>> {
        match self.entries().get(id) {
            Some(entry) => Ok(entry.state.subscribe()),
            None => Err(not_found(id)),
        }
    }

    /// Asks `id` to end.
    pub(super) fn cancel(&self, id: &WorkRequestId) -> Result<WorkRequest> {
        let entries = self.entries();
        let entry = entries.get(id).ok_or_else(|| not_found(id))?;
        entry.state.send_if_modified(|request| {
            let changes = !request.status.is_final() && request.status != Status::Canceling;
            if changes {
                request.status = Status::Canceling;
            }
            changes
        });
        entry.stop.cancel();
        Ok(entry.state.borrow().clone())
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<WorkRequestId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks `decide` about all entries; with the request that it found.
fn lookup(
    entries: &BTreeMap<WorkRequestId, Entry>,
    decide: impl FnOnce(std::vec::IntoIter<Known<'_>>) -> Admission,
) -> (Admission, Option<WorkRequest>) {
    let states: Vec<_> =
        entries.iter().map(|(id, entry)| (id, entry, entry.state.borrow())).collect();
    let known: Vec<_> = states
        .iter()
        .map(|(id, entry, state)| Known {
            id,
            lock: entry.lock.as_ref(),
            retry: state.retry.as_ref(),
            time_accepted: state.time_accepted,
        })
        .collect();
    let admission = decide(known.into_iter());
    // From the guards that are held: borrowing again could wait for a writer
    // that waits for them.
    let request = match &admission {
        Admission::Known(found) => states.iter().find(|(id, _, _)| *id == found),
        _ => None,
    };
    let request = request.map(|(_, _, state)| WorkRequest::clone(state));
    (admission, request)
}

fn not_found(id: &WorkRequestId) -> Error {
    Error::new(Reason::WorkRequestNotFound, format!("there is no work request {id}")).advice(
        format!("`imagectl work-request list` shows those of the last {REMEMBERED} operations"),
    )
}
