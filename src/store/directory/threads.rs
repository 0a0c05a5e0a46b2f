//! Threads on which a store's blocking work runs, and bounds on how long
//! anyone waits for it.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::sync::Semaphore;

use crate::error::{Error, Reason, Result};

/// Longest wait for work on names and small files. A disk answers within
/// milliseconds, an NFS server that was restarted within its grace period of
/// 45 to 90 seconds.
pub const NAMES: Duration = Duration::from_secs(120);

/// Longest wait for a part or a flush. A part of 64 MiB takes this long at
/// 110 KB/s; half of the 20 minutes for which an instance may stay locked
/// without progress.
pub const BYTES: Duration = Duration::from_secs(600);

/// Threads that one store may hold at once. A hung NFS server keeps every
/// thread that enters it: these must not be all of the runtime's 512.
const THREADS: usize = 32;

/// Runs a store's blocking work.
#[derive(Debug, Clone)]
pub struct Threads {
    free: Arc<Semaphore>,
    path: Arc<Path>,
}

impl Threads {
    /// For the store at `path`.
    pub fn new(path: &Path) -> Self {
        Self { free: Arc::new(Semaphore::new(THREADS)), path: path.into() }
    }

    /// Runs `job` on a thread of its own and waits for it, at most `limit`.
    ///
    /// When the caller stops waiting the job runs to its end all the same,
    /// with everything that it owns.
    pub async fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        job: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let work = async {
            let slot = Arc::clone(&self.free).acquire_owned().await;
            let job = move || {
                let _slot = slot;
                job()
            };
            tokio::task::spawn_blocking(job).await.unwrap_or_else(|cause| {
                let context = format!("work on the store at {} ended", self.path.display());
                Err(Error::new(Reason::Internal, context).because(cause))
            })
        };
        self.within(limit, work).await?
    }

    /// What `work` gives, unless it takes longer than `limit`.
    pub async fn within<T>(&self, limit: Duration, work: impl Future<Output = T>) -> Result<T> {
        tokio::time::timeout(limit, work).await.map_err(|_| {
            let path = self.path.display();
            let seconds = limit.as_secs();
            Error::new(
                Reason::StoreUnavailable,
                format!("the store at {path} did not answer within {seconds} seconds"),
            )
            .advice("look whether the disk or the NFS server under it hangs")
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc::channel,
    };

    use super::*;

    #[tokio::test]
    async fn a_hung_store_is_an_error_and_holds_a_bounded_number_of_threads() {
        let threads = Threads::new(Path::new("/srv/images"));
        let (release, hang) = channel::<()>();
        let hang = Arc::new(Mutex::new(hang));
        let entered = Arc::new(AtomicUsize::new(0));
        let jobs = (0..THREADS + 3).map(|_| {
            let (hang, entered) = (Arc::clone(&hang), Arc::clone(&entered));
            threads.run(Duration::from_secs(1), move || {
                entered.fetch_add(1, Ordering::SeqCst);
                let _ = hang.lock().map(|hang| hang.recv());
                Ok(())
            })
        });
        let ended = futures_util::future::join_all(jobs.collect::<Vec<_>>()).await;
        assert_eq!(entered.load(Ordering::SeqCst), THREADS);
        assert!(ended.iter().all(Result::is_err));
        insta::assert_snapshot!(ended[0].as_ref().unwrap_err().report(), @"
        the store at /srv/images did not answer within 1 seconds
          help: look whether the disk or the NFS server under it hangs
        ");
        drop(release);
        threads.run(NAMES, || Ok(())).await.unwrap();
    }
}
