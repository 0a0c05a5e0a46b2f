//! Ends work that gets nowhere.
//!
//! A device or a store that stops answering keeps the threads that wait for
//! it inside the kernel, where nobody can reach them. The work request must
//! not wait with them: its instance would stay locked for ever. So each long
//! wait of a work request goes through [`Watchdog::guard`], and what gets no
//! further for too long is left behind. It owns its buffers, its files and
//! its place in the queue until the kernel lets go of it.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Reason, Result},
    model::work_request::{Phase, WorkRequest},
};

/// How long undoing may take without progress after a cancellation: shorter
/// than a stopping daemon waits for it.
const UNDOING: Duration = Duration::from_secs(50);

/// How often progress is looked for.
const LOOK: Duration = Duration::from_millis(250);

/// Watches one work request.
#[derive(Debug)]
pub(super) struct Watchdog {
    state: watch::Receiver<WorkRequest>,
    stop: CancellationToken,
    patience: Duration,
}

/// What changes while a work request gets on.
#[derive(Debug, PartialEq, Eq)]
struct Mark {
    phase: Phase,
    read: u64,
    skipped: u64,
    stored: u64,
}

impl Watchdog {
    /// Gives up after `patience` without progress.
    pub(super) fn new(
        state: watch::Receiver<WorkRequest>,
        stop: CancellationToken,
        patience: Duration,
    ) -> Self {
        Self { state, stop, patience }
    }

    /// The outcome of `work`, or an error when nothing came of it for too
    /// long: then `work` is dropped, and `who` names what did not answer, as
    /// the subject of "did not answer for 20 minutes".
    ///
    /// # Errors
    ///
    /// `STALLED`, also after a cancellation, for which the patience is
    /// [`UNDOING`] at most; and what `work` says.
    pub(super) async fn guard<T>(
        &self,
        who: impl Fn() -> String,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            outcome = work => outcome,
            silence = self.silence() => Err(stalled(&who(), silence)),
        }
    }

    /// How long an undoing may take that shows no progress.
    pub(super) fn undoing(&self) -> Duration {
        self.patience.min(UNDOING)
    }

    /// Returns when there was no progress for too long: for how long.
    async fn silence(&self) -> Duration {
        let mut mark = self.mark();
        let (mut since, mut canceled) = (Instant::now(), false);
        loop {
            sleep(LOOK).await;
            let now = self.mark();
            if now != mark || self.stop.is_cancelled() != canceled {
                (mark, since, canceled) = (now, Instant::now(), self.stop.is_cancelled());
            }
            let patience = if canceled { self.undoing() } else { self.patience };
            if since.elapsed() >= patience {
                return patience;
            }
        }
    }

    fn mark(&self) -> Mark {
        let request = self.state.borrow();
        let progress = &request.progress;
        let (read, skipped, stored) = (progress.read, progress.skipped, progress.stored);
        Mark { phase: request.phase, read, skipped, stored }
    }
}

fn stalled(who: &str, silence: Duration) -> Error {
    let time = match silence.as_secs() {
        seconds @ 0..120 => format!("{seconds} seconds"),
        seconds => format!("{} minutes", seconds / 60),
    };
    Error::new(Reason::Stalled, format!("{who} did not answer for {time}")).advice(
        "find out why in the kernel's log (dmesg), then ask again; what still waits for it is let \
         go when it answers",
    )
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;
    use crate::model::{
        CompartmentId, Timestamp,
        work_request::{Operation, Progress},
    };

    const PATIENCE: Duration = Duration::from_secs(1200);

    fn watched() -> (watch::Sender<WorkRequest>, CancellationToken, Watchdog) {
        let request = WorkRequest::accepted(
            "ocid1.workrequest.imaged..01".parse().unwrap(),
            Operation::CreateImage,
            CompartmentId::default(),
            Vec::new(),
            Timestamp::from_millis(0),
            "uid 0".into(),
            None,
        );
        let (state, stop) = (watch::Sender::new(request), CancellationToken::new());
        let dog = Watchdog::new(state.subscribe(), stop.clone(), PATIENCE);
        (state, stop, dog)
    }

    async fn bite(dog: &Watchdog) -> (Error, Duration) {
        let begin = Instant::now();
        let outcome = dog.guard(|| "the volume /dev/vdb".into(), pending::<Result<()>>()).await;
        (outcome.unwrap_err(), begin.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_the_work() {
        let (_state, _stop, dog) = watched();
        let (error, after) = bite(&dog).await;
        assert!(after >= PATIENCE && after < PATIENCE + 2 * LOOK, "{after:?}");
        insta::assert_snapshot!(error.report(), @r"
        the volume /dev/vdb did not answer for 20 minutes
          help: find out why in the kernel's log (dmesg), then ask again; what still waits for it is let go when it answers
        ");
    }

    #[tokio::test(start_paused = true)]
    async fn progress_of_any_kind_gives_it_time() {
        let (state, _stop, dog) = watched();
        let steps = [
            Progress { read: 1, ..Progress::default() },
            Progress { read: 1, skipped: 1, ..Progress::default() },
            Progress { read: 1, skipped: 1, stored: 1, ..Progress::default() },
        ];
        let work = async {
            for progress in steps {
                sleep(PATIENCE - 2 * LOOK).await;
                state.send_modify(|request| request.progress = progress);
            }
            sleep(PATIENCE - 2 * LOOK).await;
            Ok(())
        };
        dog.guard(String::new, work).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_that_fades_is_no_progress() {
        let (state, _stop, dog) = watched();
        let fading = async {
            for per_second in (0..u64::MAX).rev() {
                sleep(LOOK).await;
                state.send_modify(|request| request.progress.per_second = per_second);
            }
            Ok(())
        };
        let error = dog.guard(String::new, fading).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Stalled);
    }

    #[tokio::test(start_paused = true)]
    async fn undoing_gets_less_time_and_all_of_it() {
        let (_state, stop, dog) = watched();
        let cancel = async {
            sleep(PATIENCE / 2).await;
            stop.cancel();
        };
        let ((error, after), ()) = tokio::join!(bite(&dog), cancel);
        let undoing = after - PATIENCE / 2;
        assert!(undoing >= UNDOING && undoing < UNDOING + 3 * LOOK, "{undoing:?}");
        assert!(error.to_string().ends_with("for 50 seconds"), "{error}");
    }
}
