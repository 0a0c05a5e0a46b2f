//! A store that is opened when it is first used.
//!
//! ```text
//! Closed ──use──► Opening ──opened and swept──► Open
//!    └──────◄─────── failed
//! ```
//!
//! A store that is away when the daemon starts must not keep it from
//! answering, nor from undoing what a dead daemon left elsewhere. There is at
//! most one attempt at a time: it goes on whoever waits for it, for a thread
//! that hangs in a dead server cannot be taken back, and whoever asks
//! meanwhile waits for the same one.

use std::{
    error::Error as StdError,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, future::Shared};

use super::DirectoryStore;
use crate::{
    error::{Context, Error, Reason, Result},
    model::{
        ByteSize, ImageId,
        host::Space,
        image::{Manifest, Record},
        upload::{KeptPart, UploadToken},
    },
    port::{BoxFuture, Delete, ObjectReader, ObjectStore, Outlet, Over, Upload},
};

/// Longest wait for an attempt: well below the minute after which a call is
/// given up, so that its caller learns which store is at fault.
const PATIENCE: Duration = Duration::from_secs(20);

/// A store that is there, and how many dead uploads were swept from it.
type Opened = (Arc<dyn ObjectStore>, usize);

/// One attempt, shared by all who wait for it.
type Attempt = Shared<BoxFuture<'static, Result<Opened, Arc<Error>>>>;

/// Opens the store. Its future is ready only when nothing of the attempt
/// runs any more.
pub type Open = Box<dyn Fn() -> BoxFuture<'static, Result<Arc<dyn ObjectStore>>> + Send + Sync>;

/// An [`ObjectStore`] that need not be there yet.
///
/// Every call opens it first, and sweeps it, where that has not been done. A
/// call whose future is dropped leaves the attempt going on.
///
/// # Errors
///
/// Every call: `STORE_UNAVAILABLE` when the store cannot be opened, or not
/// within 20 seconds.
pub struct LazyStore {
    name: String,
    kind: &'static str,
    location: String,
    open: Open,
    state: Arc<Mutex<State>>,
    /// Images whose uploads a sweep must leave.
    keep: Arc<Mutex<Vec<ImageId>>>,
    patience: Duration,
}

enum State {
    Closed,
    Opening(Attempt),
    Open(Arc<dyn ObjectStore>),
}

impl LazyStore {
    /// The directory store called `name` at `path`: see
    /// [`DirectoryStore::open`]. Nothing is touched yet.
    #[must_use]
    pub fn directory(name: String, path: PathBuf, min_free: ByteSize, host_id: String) -> Self {
        let location = path.display().to_string();
        let store = name.clone();
        let open = move || -> BoxFuture<'static, Result<Arc<dyn ObjectStore>>> {
            let (store, path, host_id) = (store.clone(), path.clone(), host_id.clone());
            let open = move || DirectoryStore::open_now(store, &path, min_free, host_id);
            Box::pin(async move {
                let opened = tokio::task::spawn_blocking(open).await;
                let opened = opened.context(Reason::Internal, || "the opening ended early")?;
                Ok(Arc::new(opened?) as Arc<dyn ObjectStore>)
            })
        };
        Self::new(name, "directory", location, Box::new(open))
    }

    /// The store called `name`, of this kind and at this place, that `open`
    /// opens, as often as it must be tried.
    #[must_use]
    pub fn new(name: String, kind: &'static str, location: String, open: Open) -> Self {
        let state = Arc::new(Mutex::new(State::Closed));
        let keep = Arc::default();
        Self { name, kind, location, open, state, keep, patience: PATIENCE }
    }

    /// The store itself.
    async fn store(&self) -> Result<Arc<dyn ObjectStore>> {
        Ok(self.opened().await?.0)
    }

    /// The store itself; with it, when this call had to wait for its opening,
    /// how many dead uploads were swept then.
    async fn opened(&self) -> Result<(Arc<dyn ObjectStore>, Option<usize>)> {
        let attempt = match &mut *lock(&self.state) {
            State::Open(store) => return Ok((Arc::clone(store), None)),
            State::Opening(attempt) => attempt.clone(),
            closed @ State::Closed => {
                let attempt = self.attempt();
                *closed = State::Opening(attempt.clone());
                attempt
            }
        };
        let outcome = match tokio::time::timeout(self.patience, attempt).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let seconds = self.patience.as_secs();
                let context = format!("{} did not answer within {seconds} s", self.location);
                let slow = Error::new(Reason::StoreUnavailable, context)
                    .advice("look whether the disk or the NFS server under it hangs");
                Err(Arc::new(slow))
            }
        };
        let (store, swept) = outcome.map_err(|cause| self.unavailable(cause))?;
        Ok((store, Some(swept)))
    }

    /// Begins to open and sweep, in a task of its own. To be called with the
    /// state locked: it ends `Opening` under that lock.
    fn attempt(&self) -> Attempt {
        let (opening, state) = ((self.open)(), Arc::clone(&self.state));
        let (name, keep) = (self.name.clone(), Arc::clone(&self.keep));
        let task = tokio::spawn(async move {
            let outcome = async {
                let store = opening.await?;
                // Before any upload can begin.
                let keep = lock(&keep).clone();
                let swept = store.sweep(&keep).await?;
                Ok((store, swept))
            };
            let outcome = outcome.await.map_err(Arc::new);
            *lock(&state) = match &outcome {
                Ok((store, swept)) => {
                    tracing::info!(store = name, swept, "the store is open");
                    State::Open(Arc::clone(store))
                }
                Err(_) => State::Closed,
            };
            outcome
        });
        let state = Arc::clone(&self.state);
        async move {
            task.await.unwrap_or_else(|defect| {
                *lock(&state) = State::Closed;
                Err(Arc::new(
                    Error::new(Reason::Internal, "the opening ended early").because(defect),
                ))
            })
        }
        .boxed()
        .shared()
    }

    fn unavailable(&self, cause: Arc<Error>) -> Error {
        let advice = cause.advice_text().unwrap_or("see why in imaged's log").to_owned();
        let context = format!("the store {:?} cannot be opened", self.name);
        Error::new(cause.reason(), context)
            .because(SharedCause(Arc::clone(&cause)))
            .advice(format!("{advice}; imaged tries again whenever the store is used"))
    }
}

impl fmt::Debug for LazyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &*lock(&self.state) {
            State::Closed => "closed",
            State::Opening(_) => "opening",
            State::Open(_) => "open",
        };
        write!(f, "LazyStore({} at {}, {state})", self.name, self.location)
    }
}

fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The one error of an attempt, as the cause of each caller's.
#[derive(Debug)]
struct SharedCause(Arc<Error>);

impl fmt::Display for SharedCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StdError for SharedCause {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}

impl ObjectStore for LazyStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        self.kind
    }

    fn location(&self) -> String {
        self.location.clone()
    }

    fn space(&self) -> BoxFuture<'_, Result<Option<Space>>> {
        Box::pin(async { self.store().await?.space().await })
    }

    fn begin<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        Box::pin(async { self.store().await?.begin(id).await })
    }

    fn resume<'a>(
        &'a self,
        id: &'a ImageId,
        token: &'a UploadToken,
        parts: Vec<KeptPart>,
    ) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        Box::pin(async { self.store().await?.resume(id, token, parts).await })
    }

    fn sweep<'a>(&'a self, keep: &'a [ImageId]) -> BoxFuture<'a, Result<usize>> {
        // Also for the opening, whenever that succeeds.
        *lock(&self.keep) = keep.to_vec();
        Box::pin(async {
            match self.opened().await? {
                (_, Some(swept)) => Ok(swept),
                (store, None) => store.sweep(keep).await,
            }
        })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<(Manifest, Record)>>> {
        Box::pin(async { self.store().await?.list().await })
    }

    fn get<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Option<(Manifest, Record)>>> {
        Box::pin(async { self.store().await?.get(id).await })
    }

    fn open<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn ObjectReader>>> {
        Box::pin(async { self.store().await?.open(id).await })
    }

    fn extent_digests<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Vec<u8>>> {
        Box::pin(async { self.store().await?.extent_digests(id).await })
    }

    fn delete<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Delete>> {
        Box::pin(async { self.store().await?.delete(id).await })
    }

    fn outlet<'a>(&'a self, name: &'a str, over: Over) -> BoxFuture<'a, Result<Box<dyn Outlet>>> {
        Box::pin(async move { self.store().await?.outlet(name, over).await })
    }

    fn abandon<'a>(&'a self, token: &'a UploadToken) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { self.store().await?.abandon(token).await })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::Path,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use tokio::sync::Semaphore;

    use super::*;

    const ROOM: ByteSize = ByteSize::mib(1);

    fn at(path: &Path) -> LazyStore {
        LazyStore::directory("far".into(), path.to_owned(), ROOM, "host-a".into())
    }

    fn id() -> ImageId {
        "ocid1.image.imaged..test1".parse().unwrap()
    }

    #[tokio::test]
    async fn a_store_that_is_away_says_so_in_every_call_and_is_there_when_it_is_back() {
        let temp = tempfile::tempdir().unwrap();
        let mount = temp.path().join("mount");
        let store = at(&mount.join("images"));
        let errors = [
            store.space().await.unwrap_err(),
            store.begin(&id()).await.unwrap_err(),
            store.sweep(&[]).await.unwrap_err(),
            store.list().await.unwrap_err(),
            store.get(&id()).await.unwrap_err(),
            store.open(&id()).await.unwrap_err(),
            store.extent_digests(&id()).await.unwrap_err(),
            store.delete(&id()).await.unwrap_err(),
        ];
        for error in errors {
            let text = format!("{error:?}").replace(temp.path().to_str().unwrap(), "/srv");
            insta::allow_duplicates! {
                insta::assert_snapshot!(text, @r#"
                STORE_UNAVAILABLE: the store "far" cannot be opened
                  0: cannot make the store /srv/mount/images because /srv/mount does not exist
                  help: mount its filesystem, or make the directory; imaged tries again whenever the store is used
                "#);
            }
        }
        assert_eq!((store.name(), store.kind()), ("far", "directory"));
        assert!(store.location().ends_with("mount/images"));

        fs::create_dir(&mount).unwrap();
        assert!(store.space().await.unwrap().is_some());
        assert_eq!(store.get(&id()).await.unwrap(), None);
        store.begin(&id()).await.unwrap().abort().await.unwrap();
    }

    #[tokio::test]
    async fn it_is_swept_when_it_opens_whatever_opens_it() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("images");
        let leave_a_dead_upload = async || {
            let store = DirectoryStore::open("far", &path, ROOM, "host-a").await.unwrap();
            drop(store.begin(&id()).await.unwrap());
        };
        let left = || fs::read_dir(path.join("images")).unwrap().count();
        leave_a_dead_upload().await;
        let store = at(&path);
        assert_eq!(left(), 1, "nothing is opened before it is used");
        assert!(store.list().await.unwrap().is_empty());
        assert_eq!(left(), 0);
        assert_eq!(store.sweep(&[]).await.unwrap(), 0);

        leave_a_dead_upload().await;
        assert_eq!(at(&path).sweep(&[]).await.unwrap(), 1);
        leave_a_dead_upload().await;
        assert_eq!(store.sweep(&[]).await.unwrap(), 1, "an open store is swept again");
    }

    /// A store whose opening waits for `gate` and fails.
    fn gated(patience: Duration) -> (Arc<LazyStore>, Arc<Semaphore>, Arc<AtomicUsize>) {
        let (gate, attempts) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
        let (gate_of_open, counted) = (Arc::clone(&gate), Arc::clone(&attempts));
        let open = move || -> BoxFuture<'static, Result<Arc<dyn ObjectStore>>> {
            counted.fetch_add(1, Ordering::SeqCst);
            let gate = Arc::clone(&gate_of_open);
            Box::pin(async move {
                gate.acquire().await.unwrap().forget();
                Err(Error::new(Reason::StoreUnavailable, "the server refused"))
            })
        };
        let mut store = LazyStore::new("far".into(), "test", "host:/x".into(), Box::new(open));
        store.patience = patience;
        (Arc::new(store), gate, attempts)
    }

    #[tokio::test]
    async fn there_is_one_attempt_at_a_time_and_all_hear_of_it() {
        let (store, gate, attempts) = gated(Duration::from_secs(20));
        let calls: Vec<_> = (0..5)
            .map(|_| {
                let store = Arc::clone(&store);
                tokio::spawn(async move { store.space().await })
            })
            .collect();
        tokio::task::yield_now().await;
        gate.add_permits(1);
        for call in calls {
            let error = call.await.unwrap().unwrap_err();
            assert!(error.report().contains("the server refused"), "{error:?}");
        }
        assert_eq!(attempts.load(Ordering::SeqCst), 1);
        // A failure is not remembered.
        gate.add_permits(1);
        store.list().await.unwrap_err();
        assert_eq!(attempts.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn nobody_waits_for_ever_and_a_hung_attempt_is_not_begun_again() {
        let (store, gate, attempts) = gated(Duration::from_millis(20));
        for _ in 0..3 {
            let error = store.list().await.unwrap_err();
            insta::allow_duplicates! {
                insta::assert_snapshot!(error.report(), @r#"
                the store "far" cannot be opened
                  0: host:/x did not answer within 0 s
                  help: look whether the disk or the NFS server under it hangs; imaged tries again whenever the store is used
                "#);
            }
        }
        assert_eq!(attempts.load(Ordering::SeqCst), 1);
        // It ends while nobody waits; its outcome, by now old, is nobody's.
        gate.add_permits(1);
        while matches!(&*lock(&store.state), State::Opening(_)) {
            tokio::task::yield_now().await;
        }
        gate.add_permits(1);
        store.list().await.unwrap_err();
        assert_eq!(attempts.load(Ordering::SeqCst), 2);
    }
}
