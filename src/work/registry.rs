//! The work requests in memory: those that run, and those that are
//! remembered.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::admission::{self, Admission, Denial, Known, Lock, Standing, Wanted};
use super::rates::Limits;
use crate::{
    error::{Error, Reason, Result},
    model::{
        ImageId, Timestamp, WorkRequestId,
        work_request::{NewRates, Operation, Rates, Retry, Status, WorkRequest},
    },
};

/// Work requests that are remembered after their end: weeks of images, a few
/// MiB of memory.
const REMEMBERED: usize = 1000;
/// The same while their retry tokens are valid: one every 20 seconds for a
/// day.
const TOKENS_REMEMBERED: usize = 4 * REMEMBERED;

/// All work requests, by id and so by age. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Registry(Arc<Mutex<BTreeMap<WorkRequestId, Entry>>>);

#[derive(Debug)]
struct Entry {
    state: watch::Sender<WorkRequest>,
    /// What it holds, until it has ended.
    lock: Option<Lock>,
    stop: CancellationToken,
    standing: Standing,
    limits: Limits,
}

/// A request that keeps others away while it is looked at. Dropped without
/// [`accept`](Self::accept), it has never been.
#[derive(Debug)]
pub(super) struct Reservation {
    registry: Registry,
    /// `None` when it was accepted.
    job: Option<Job>,
}

impl Reservation {
    /// From here on everyone sees the request, and its task must end it.
    pub(super) fn accept(mut self) -> Option<Job> {
        let job = self.job.take()?;
        if let Some(entry) = self.registry.entries().get_mut(&job.id) {
            entry.standing = Standing::Accepted;
        }
        Some(job)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(job) = &self.job {
            self.registry.entries().remove(&job.id);
        }
    }
}

/// What its task needs of an accepted request.
#[derive(Debug)]
pub(super) struct Job {
    pub id: WorkRequestId,
    pub state: watch::Sender<WorkRequest>,
    pub stop: CancellationToken,
    pub limits: Limits,
}

/// What became of a request.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "short-lived, one at a time")]
pub(super) enum Admitted {
    /// It is one that was asked before.
    Known(WorkRequest),
    /// It is new.
    New(WorkRequest, Reservation),
}

impl Registry {
    /// Remembers `requests`, which have all ended.
    pub(super) fn new(requests: Vec<WorkRequest>) -> Self {
        let entry = |request: WorkRequest| {
            let id = request.id.clone();
            let (state, stop) = (watch::Sender::new(request), CancellationToken::new());
            let limits = Limits::new(Rates::default());
            (id, Entry { state, lock: None, stop, standing: Standing::Accepted, limits })
        };
        Self(Arc::new(Mutex::new(requests.into_iter().map(entry).collect())))
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

    /// Decides on `request` and reserves what it needs if it may run.
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
        let (job, entry) = begun(request.clone(), lock, stop, Standing::Reserved);
        entries.insert(request.id.clone(), entry);
        Ok(Admitted::New(request, Reservation { registry: self.clone(), job: Some(job) }))
    }

    /// Takes a request of an earlier process in again, which holds `lock`.
    pub(super) fn readmit(&self, request: WorkRequest, lock: Lock, stop: CancellationToken) -> Job {
        let (job, entry) = begun(request, lock, stop, Standing::Accepted);
        self.entries().insert(job.id.clone(), entry);
        job
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

    /// Fails while another work request holds `lock`.
    pub(super) fn check_free(&self, lock: &Lock) -> Result<()> {
        let entries = self.entries();
        let holder = entries.iter().find(|(_, entry)| entry.lock.as_ref() == Some(lock));
        holder.map_or(Ok(()), |(holder, _)| {
            Err(Denial::Locked { holder: holder.clone(), lock: lock.clone() }.into())
        })
    }

    /// The iSCSI that `id` took was given back; the request as it is now.
    pub(super) fn settle_iscsi(&self, id: &WorkRequestId) -> Option<WorkRequest> {
        let entries = self.entries();
        let state = &entries.get(id)?.state;
        state.send_modify(|request| request.iscsi = None);
        Some(state.borrow().clone())
    }

    /// Images whose objects are being sent elsewhere.
    pub(super) fn exporting(&self) -> BTreeSet<String> {
        let entries = self.entries();
        let alive = entries.values().filter(|entry| entry.lock.is_some());
        let exports = alive.filter(|entry| entry.standing == Standing::Accepted).filter_map(|e| {
            let request = e.state.borrow();
            let image = || request.resources.first().map(|image| image.identifier.clone());
            (request.operation == Operation::ExportImage).then(image)?
        });
        exports.collect()
    }

    /// Takes note that nothing of what `id` sent is left; as it is then.
    pub(super) fn taken_back(&self, id: &WorkRequestId) -> Option<WorkRequest> {
        let entries = self.entries();
        let state = &entries.get(id)?.state;
        state.send_modify(|request| request.outgoing = None);
        let request = state.borrow().clone();
        Some(request)
    }

    /// Gives back what `id` held.
    pub(super) fn release(&self, id: &WorkRequestId) {
        if let Some(entry) = self.entries().get_mut(id) {
            entry.lock = None;
        }
    }

    /// How many hold a place and have not ended.
    pub(super) fn working(&self) -> usize {
        let entries = self.entries();
        let works =
            |entry: &&Entry| entry.lock.is_some() && entry.state.borrow().time_started.is_some();
        entries.values().filter(works).count()
    }

    /// Forgets the oldest of those that have ended when there are too many.
    pub(super) fn evict(&self, now: Timestamp) -> Vec<WorkRequestId> {
        let mut entries = self.entries();
        let surplus = entries.len().saturating_sub(REMEMBERED);
        let excess = entries.len().saturating_sub(TOKENS_REMEMBERED);
        // What is still to be undone is known by its request alone.
        let ended = entries
            .iter()
            .filter(|(_, entry)| entry.lock.is_none() && !entry.state.borrow().owes());
        let evicted: Vec<_> = ended
            .take(surplus)
            .enumerate()
            .filter(|(nth, (_, entry))| {
                let request = entry.state.borrow();
                let token = request.retry.is_some()
                    && admission::remembers_token(request.time_accepted, now);
                !token || *nth < excess
            })
            .map(|(_, (id, _))| id.clone())
            .collect();
        evicted.iter().for_each(|id| drop(entries.remove(id)));
        evicted
    }

    /// All, newest first.
    pub(super) fn all(&self) -> Vec<WorkRequest> {
        let entries = self.entries();
        let seen = entries.values().rev().filter(|entry| entry.standing == Standing::Accepted);
        seen.map(|entry| entry.state.borrow().clone()).collect()
    }

    /// Follows `id`.
    pub(super) fn watch(&self, id: &WorkRequestId) -> Result<watch::Receiver<WorkRequest>> {
        match self.entries().get(id) {
            Some(entry) if entry.standing == Standing::Accepted => Ok(entry.state.subscribe()),
            _ => Err(not_found(id)),
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

    /// Changes how fast `id` may go; one that has ended stays as it is.
    pub(super) fn set_rates(&self, id: &WorkRequestId, new: NewRates) -> Result<WorkRequest> {
        let entries = self.entries();
        let entry = entries.get(id).ok_or_else(|| not_found(id))?;
        if entry.state.borrow().status.is_final() {
            return Ok(entry.state.borrow().clone());
        }
        entry.limits.set(new);
        entry.state.send_modify(|request| request.rates = entry.limits.get());
        Ok(entry.state.borrow().clone())
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<WorkRequestId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that begins, and what its task needs.
fn begun(
    request: WorkRequest,
    lock: Lock,
    stop: CancellationToken,
    standing: Standing,
) -> (Job, Entry) {
    let (id, limits) = (request.id.clone(), Limits::new(request.rates));
    let state = watch::Sender::new(request);
    let job = Job { id, state: state.clone(), stop: stop.clone(), limits: limits.clone() };
    (job, Entry { state, lock: Some(lock), stop, standing, limits })
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
            standing: entry.standing,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CompartmentId;

    fn request(number: u64, token: Option<&str>) -> WorkRequest {
        let retry = token.map(|token| Retry {
            user: "uid 0".into(),
            token: token.into(),
            fingerprint: String::new(),
        });
        WorkRequest::accepted(
            format!("ocid1.workrequest.imaged..{number:06}").parse().unwrap(),
            Operation::CreateImage,
            CompartmentId::default(),
            Vec::new(),
            Timestamp::from_millis(number),
            "uid 0".into(),
            retry,
        )
    }

    fn admit(registry: &Registry, request: WorkRequest, lock: &str) -> Result<Admitted> {
        registry.admit(request, Lock::Source(lock.into()), 9, CancellationToken::new())
    }

    #[test]
    fn what_is_only_looked_at_is_not_seen_and_leaves_nothing() {
        let registry = Registry::new(Vec::new());
        let Ok(Admitted::New(wanted, reservation)) = admit(&registry, request(1, None), "/a")
        else {
            panic!("not admitted")
        };
        assert!(registry.all().is_empty() && registry.watch(&wanted.id).is_err());
        assert!(admit(&registry, request(2, None), "/a").is_err(), "it keeps others away");
        drop(reservation);
        let Ok(Admitted::New(wanted, reservation)) = admit(&registry, request(3, None), "/a")
        else {
            panic!("the lock stayed behind")
        };
        assert!(reservation.accept().is_some());
        assert_eq!(registry.all(), [wanted]);
    }

    #[test]
    fn fresh_retry_tokens_are_kept_beyond_the_others() {
        let all = |tokens: usize| {
            let token = |number| (number < tokens).then_some("t");
            (0..TOKENS_REMEMBERED + 10).map(|n| request(n as u64, token(n))).collect()
        };
        let now = Timestamp::from_millis(admission::RETRY_TOKEN_MILLIS - 1);
        let kept = |tokens| {
            let registry = Registry::new(all(tokens));
            let evicted = registry.evict(now).len();
            (evicted, registry.entries().len())
        };
        assert_eq!(kept(0), (TOKENS_REMEMBERED + 10 - REMEMBERED, REMEMBERED));
        let (evicted, left) = kept(usize::MAX);
        assert_eq!((evicted, left), (10, TOKENS_REMEMBERED));
        let registry = Registry::new(all(usize::MAX));
        let later = Timestamp::from_millis(admission::RETRY_TOKEN_MILLIS + 2000);
        registry.evict(later);
        assert_eq!(registry.entries().len(), TOKENS_REMEMBERED + 10 - 2001);
    }
}
