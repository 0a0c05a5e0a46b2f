//! Publishes what a work request does, and keeps it in the journal.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::{
    encode::Checkpoint,
    error::{ErrorKind, Reason, Result},
    model::{
        Timestamp, WorkRequestId,
        image::{PhaseTime, StoredPart},
        iscsi::IscsiUndo,
        live::{Rehearsal, Undo},
        trace::Trace,
        upload::{KeptPart, Outgoing, Receipt, Resume},
        work_request::{ErrorEntry, LogEntry, Phase, Progress, Status, WorkRequest},
    },
    port::{Clock, Journal, Part},
    recorder::Recorder,
};

/// Time over which the rate is measured: steady to look at, and soon true
/// again after a pause.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// The one writer of a work request's state while its task runs; cancelling
/// alone changes it from outside.
#[derive(Debug)]
pub(super) struct Tracker {
    teller: Teller,
    journal: Arc<dyn Journal>,
    recorder: Arc<Recorder>,
    /// What an earlier process said to the instance.
    earlier: Trace,
    /// When each phase began.
    time_line: Vec<PhaseTime>,
    /// Bytes that were done at some moments of the last seconds.
    samples: VecDeque<(Instant, u64)>,
}

impl Tracker {
    pub(super) fn new(
        state: watch::Sender<WorkRequest>,
        journal: Arc<dyn Journal>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            teller: Teller { state, clock },
            journal,
            recorder: Arc::default(),
            earlier: Trace::default(),
            time_line: Vec::new(),
            samples: VecDeque::new(),
        }
    }

    /// Work begins.
    pub(super) async fn start(&mut self) -> Result<()> {
        let now = self.teller.clock.now();
        self.teller.state.send_modify(|request| {
            request.time_started = Some(now);
            if request.status == Status::Accepted {
                request.status = Status::InProgress;
            }
        });
        self.keep().await
    }

    /// A phase begins.
    pub(super) async fn phase(&mut self, phase: Phase) -> Result<()> {
        let time_started = self.teller.clock.now();
        self.time_line.push(PhaseTime { phase: phase.to_string(), time_started });
        self.teller.state.send_modify(|request| request.phase = phase);
        self.samples.clear();
        self.keep().await
    }

    /// Goes on where another process of imaged ended.
    pub(super) fn resumed(&mut self, time_line: Vec<PhaseTime>, earlier: Trace) {
        self.time_line = time_line;
        self.earlier = earlier;
    }

    /// How a later process goes on with it, from here on; `None`: it cannot.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`.
    pub(super) async fn resumable(&self, resume: Option<Box<Resume>>) -> Result<()> {
        self.teller.state.send_modify(|request| request.resume = resume);
        self.keep().await
    }

    /// Whether the work is left to a later process: it can go on with it, and
    /// nobody asked for its end.
    pub(super) fn is_left_to_a_later_process(&self) -> bool {
        let request = self.teller.state.borrow();
        request.resume.is_some() && request.status != Status::Canceling
    }

    /// What keeps the parts of the upload.
    pub(super) fn keeper(&self) -> Keeper {
        let id = self.teller.state.borrow().id.clone();
        Keeper { journal: Arc::clone(&self.journal), id }
    }

    /// When each phase began, so far.
    pub(super) fn time_line(&self) -> Vec<PhaseTime> {
        self.time_line.clone()
    }

    /// Shows how far the work is. The rate is computed here.
    pub(super) fn progress(&mut self, mut progress: Progress) {
        let (now, done) = (Instant::now(), progress.read + progress.skipped);
        self.samples.push_back((now, done));
        while self.samples.len() > 2
            && self.samples.front().is_some_and(|(then, _)| now - *then > RATE_WINDOW)
        {
            self.samples.pop_front();
        }
        if let Some((then, before)) = self.samples.front() {
            let millis = u64::try_from((now - *then).as_millis()).unwrap_or(u64::MAX);
            let bytes = done.saturating_sub(*before);
            progress.per_second = bytes.saturating_mul(1000).checked_div(millis).unwrap_or(0);
        }
        self.teller.state.send_if_modified(|request| {
            let changes = request.progress != progress;
            request.progress = progress;
            changes
        });
    }

    /// Says something worth telling.
    pub(super) fn log(&self, message: String) {
        self.teller.log(message);
    }

    /// Who says so while something else has the tracker.
    pub(super) fn teller(&self) -> Teller {
        self.teller.clone()
    }

    /// What is said to the instance goes there.
    pub(super) fn recorder(&self) -> Arc<Recorder> {
        Arc::clone(&self.recorder)
    }

    /// The end. A cancelled request is CANCELED; one that was stopped for
    /// another reason FAILED.
    pub(super) async fn finish(self, outcome: Result<()>) {
        let now = self.teller.clock.now();
        let (status, error) = match outcome {
            Ok(()) => (Status::Succeeded, None),
            Err(error) => {
                let status = match error.reason() {
                    Reason::Canceled => Status::Canceled,
                    _ => Status::Failed,
                };
                let entry = entry(&error, now);
                if error.kind() == ErrorKind::Internal {
                    tracing::error!(work_request = %self.teller.state.borrow().id, "{error:?}");
                }
                (status, Some(entry))
            }
        };
        let mut ended = self.teller.state.borrow().clone();
        ended.finish(status, error, now);
        match ended.errors.last() {
            Some(error) if status == Status::Failed => tracing::warn!(
                work_request = %ended.id, ?status, code = error.code,
                "work request ended: {}", error.message.lines().next().unwrap_or_default()
            ),
            _ => tracing::info!(work_request = %ended.id, ?status, "work request ended"),
        }
        if let Err(error) = self.keep_trace().await {
            tracing::error!(work_request = %ended.id, "{error:?}");
        }
        // Durable before anyone is told.
        if let Err(error) = self.journal.put(&ended).await {
            tracing::error!(work_request = %ended.id, "{error:?}");
        }
        // After the end is durable: without its parts it could not be gone on
        // with.
        if let Err(error) = self.journal.forget_parts(&ended.id).await {
            tracing::error!(work_request = %ended.id, "{error:?}");
        }
        self.teller.state.send_replace(ended);
    }

    /// Keeps what was said to the instance so far.
    async fn keep_trace(&self) -> Result<()> {
        let trace = self.trace();
        if trace.is_empty() {
            return Ok(());
        }
        let id = self.teller.state.borrow().id.clone();
        self.journal.put_trace(&id, &trace).await
    }

    /// What was said to the instance so far.
    pub(super) fn trace(&self) -> Trace {
        self.earlier.clone().then(self.recorder.trace())
    }

    /// What is to be done to the instance whatever happens to imaged from
    /// here on; `None`: nothing any more. What was said to it is kept, too.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`: it would not be known after a crash.
    pub(super) async fn owe(&self, undo: Option<Undo>) -> Result<()> {
        self.teller.state.send_modify(|request| request.undo = undo);
        self.keep().await?;
        self.keep_trace().await
    }

    /// What gives the instance its iSCSI back whatever happens to imaged from
    /// here on; `None`: nothing any more. What was said to it is kept, too.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`: it would not be known after a crash.
    pub(super) async fn owe_iscsi(&self, undo: Option<IscsiUndo>) -> Result<()> {
        self.teller.state.send_modify(|request| request.iscsi = undo);
        self.keep().await?;
        self.keep_trace().await
    }

    /// What still is to be given back of it.
    pub(super) fn owed_iscsi(&self) -> Option<IscsiUndo> {
        self.teller.state.borrow().iscsi.clone()
    }

    /// What is to be aborted whatever happens to imaged from here on; `None`:
    /// nothing any more.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`: it would not be known after a crash.
    pub(super) async fn sends(&self, outgoing: Option<Outgoing>) -> Result<()> {
        self.teller.state.send_modify(|request| request.outgoing = outgoing);
        self.keep().await
    }

    /// Says what a rehearsal found.
    pub(super) fn rehearsed(&self, rehearsal: Rehearsal) {
        self.teller.state.send_modify(|request| request.rehearsal = Some(rehearsal));
    }

    /// What is still to be done to the instance.
    pub(super) fn owed(&self) -> Option<Undo> {
        self.teller.state.borrow().undo.clone()
    }

    async fn keep(&self) -> Result<()> {
        let request = self.teller.state.borrow().clone();
        self.journal.put(&request).await
    }
}

/// Keeps what a store has of an upload.
#[derive(Debug)]
pub(super) struct Keeper {
    journal: Arc<dyn Journal>,
    id: WorkRequestId,
}

impl Keeper {
    /// Keeps a part, `receipt` from its store, or the first one, which none
    /// has.
    pub(super) async fn keep(
        &self,
        part: &Part,
        receipt: Option<Receipt>,
        after: &Checkpoint,
    ) -> Result<()> {
        let body = match receipt {
            None => part.pieces().collect::<Vec<_>>().concat(),
            Some(_) => Vec::new(),
        };
        let kept = KeptPart {
            number: part.number,
            stored: StoredPart { size: part.size, sha256: part.sha256 },
            receipt,
            standing: after.standing()?,
            digests: after.digests()?,
            body,
        };
        self.journal.put_part(&self.id, kept).await
    }
}

/// Says what is worth telling in a work request.
#[derive(Debug, Clone)]
pub(super) struct Teller {
    state: watch::Sender<WorkRequest>,
    clock: Arc<dyn Clock>,
}

impl Teller {
    /// Adds to the work request's log.
    pub(super) fn log(&self, message: String) {
        tracing::info!(work_request = %self.state.borrow().id, "{message}");
        let time = self.clock.now();
        self.state.send_modify(|request| request.logs.push(LogEntry { message, time }));
    }

    /// Bytes that are read or skipped a second now.
    pub(super) fn per_second(&self) -> u64 {
        self.state.borrow().progress.per_second
    }
}

/// An error as a work request shows it.
pub(super) fn entry(error: &crate::error::Error, time: Timestamp) -> ErrorEntry {
    ErrorEntry { code: error.reason().code().to_owned(), message: error.report(), time }
}
