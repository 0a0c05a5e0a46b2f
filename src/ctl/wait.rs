//! Waiting for work: follow its stream, reconnect, give up in time.
//!
//! ```text
//! follow ──final status──► done
//!   │ ▲
//!   │ └─pause── connection broke, up to RECONNECTS times without news
//!   └──► time is over | Ctrl-C: the work goes on
//! ```

use std::{future::Future, time::Duration};

use tonic::{Code, Status};

use super::{
    args::Until,
    client::{CALL_LIMIT, Client, is_broken},
    exit::Exit,
    failure::Failure,
    progress::Progress,
    render::words,
};
use crate::pb::{self, work_request::Status as WorkStatus};

/// Attempts to get a broken stream back before giving up. With the pauses
/// below about half a minute: systemd restarts imaged in less.
const RECONNECTS: u32 = 10;

/// First and longest pause between two attempts.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// A wait for `work_request_id`.
pub(super) struct Wait<'a> {
    pub client: &'a Client,
    pub work_request_id: &'a str,
    pub until: Until,
    /// `None`: as long as the work takes, which imaged bounds.
    pub limit: Option<Duration>,
    /// Before the first attempt to reconnect; doubles for each further one.
    pub first_pause: Duration,
}

impl Wait<'_> {
    /// Shows progress until the work is where it is waited for, and returns
    /// its state then. Ctrl-C ends the wait.
    pub async fn run(&self, progress: &mut Progress<'_>) -> Result<pb::WorkRequest, Failure> {
        // Where no signal can be caught, the signal ends the process instead.
        let interrupt = async {
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        self.run_until(interrupt, progress).await
    }

    async fn run_until(
        &self,
        interrupt: impl Future<Output = ()>,
        progress: &mut Progress<'_>,
    ) -> Result<pb::WorkRequest, Failure> {
        let too_long = async {
            match self.limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        let result = tokio::select! {
            biased;
            () = interrupt => Err(self.gave_up(Exit::Interrupted, "stopped waiting")),
            result = self.follow(progress) => result,
            () = too_long => Err(self.gave_up(
                Exit::TimedOut,
                &format!("waited {}", words::duration(self.limit.unwrap_or_default())),
            )),
        };
        progress.end(result.as_ref().ok());
        result
    }

    async fn follow(&self, progress: &mut Progress<'_>) -> Result<pb::WorkRequest, Failure> {
        let mut last = None;
        let mut attempts = 0;
        loop {
            let broken = match self.stream(progress, &mut last, &mut attempts).await {
                Ok(work) => return Ok(work),
                Err(status) if is_broken(&status) || status.code() == Code::Unavailable => status,
                Err(status) => return Err(self.client.failure(&status).await),
            };
            if attempts == RECONNECTS {
                let failure = if is_broken(&broken) {
                    self.client.failure(&broken).await
                } else {
                    Failure::disconnected(&broken)
                };
                return Err(self.goes_on(failure, "the work may go on"));
            }
            if attempts == 0 {
                progress.note("the connection to imaged broke; trying to get it back");
            }
            tokio::time::sleep(self.first_pause.saturating_mul(1 << attempts).min(MAX_PAUSE)).await;
            attempts += 1;
        }
    }

    /// Reads one stream to the point that is waited for.
    async fn stream(
        &self,
        progress: &mut Progress<'_>,
        last: &mut Option<pb::WorkRequest>,
        attempts: &mut u32,
    ) -> Result<pb::WorkRequest, Status> {
        let request = pb::WatchWorkRequestRequest { work_request_id: self.work_request_id.into() };
        let mut client = self.client.work_requests();
        let mut stream = tokio::time::timeout(CALL_LIMIT, client.watch_work_request(request))
            .await
            .map_err(|_| Status::unavailable("imaged did not answer"))??
            .into_inner();
        while let Some(work) = stream.message().await? {
            progress.show(&work);
            if reached(self.until, work.status()) {
                return Ok(work);
            }
            // Only news count as a connection that works: else a daemon that
            // ends every stream at once would be asked for ever.
            if last.as_ref() != Some(&work) {
                *attempts = 0;
                *last = Some(work);
            }
        }
        Err(Status::unavailable("imaged ended the stream before the work"))
    }

    fn gave_up(&self, exit: Exit, what: &str) -> Failure {
        self.goes_on(Failure::new(exit, format!("{what}; the work goes on")), "")
    }

    /// Tells how to go on watching or to end the work.
    fn goes_on(&self, failure: Failure, doubt: &str) -> Failure {
        let failure = if doubt.is_empty() { failure } else { failure.note("note", doubt) };
        let command = |verb: &str| {
            self.client
                .command(&format!("work-request {verb} --work-request-id {}", self.work_request_id))
        };
        failure.note("watch", command("watch")).note("cancel", command("cancel"))
    }
}

fn reached(until: Until, status: WorkStatus) -> bool {
    let is_final =
        matches!(status, WorkStatus::Succeeded | WorkStatus::Failed | WorkStatus::Canceled);
    match until {
        Until::Accepted => true,
        Until::Started => is_final || status == WorkStatus::InProgress,
        Until::Ended => is_final,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::tests::{self as samples, Script, Step, Twin};

    fn failed_wait(twin: &Twin, interrupt: impl Future<Output = ()>) -> Failure {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let client = Client::connect(twin.socket().to_str().unwrap()).await.unwrap();
            let wait = Wait {
                client: &client,
                work_request_id: samples::WORK_ID,
                until: Until::Ended,
                limit: None,
                first_pause: Duration::from_millis(1),
            };
            wait.run_until(interrupt, &mut Progress::lines(&mut Vec::new())).await.unwrap_err()
        })
    }

    fn text(failure: &Failure, twin: &Twin) -> String {
        failure.to_string().replace(twin.socket().to_str().unwrap(), "SOCKET")
    }

    #[test]
    fn ctrl_c_ends_the_wait_and_not_the_work() {
        let script = Script::default();
        script.watches.lock().unwrap().push_back(vec![Step::send(samples::reading()), Step::Hang]);
        let twin = Twin::start(script);
        let interrupt = async { tokio::time::sleep(Duration::from_millis(300)).await };
        let failure = failed_wait(&twin, interrupt);
        assert_eq!(failure.exit, Exit::Interrupted);
        insta::assert_snapshot!(text(&failure, &twin), @"
        stopped waiting; the work goes on
          watch: imagectl --socket SOCKET work-request watch --work-request-id ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
          cancel: imagectl --socket SOCKET work-request cancel --work-request-id ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        ");
    }

    #[test]
    fn streams_without_news_are_not_asked_for_for_ever() {
        let twin = Twin::start(Script::default());
        let failure = failed_wait(&twin, std::future::pending());
        assert_eq!(failure.exit, Exit::Unreachable);
        let watched = twin.script.watched.load(std::sync::atomic::Ordering::SeqCst);
        assert_eq!(watched, RECONNECTS + 1);
        insta::assert_snapshot!(text(&failure, &twin), @"
        the connection to imaged broke
          0: imaged ended the stream before the work
          help: see what imaged says: `journalctl -u imaged`
          note: the work may go on
          watch: imagectl --socket SOCKET work-request watch --work-request-id ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
          cancel: imagectl --socket SOCKET work-request cancel --work-request-id ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        ");
    }

    #[test]
    fn points_of_a_wait_are_reached_in_order() {
        use WorkStatus::{Accepted, Canceling, InProgress, Succeeded};
        assert!(reached(Until::Accepted, Accepted));
        assert!(!reached(Until::Started, Accepted));
        assert!(reached(Until::Started, InProgress));
        assert!(reached(Until::Started, Succeeded));
        assert!(!reached(Until::Ended, InProgress));
        assert!(!reached(Until::Ended, Canceling));
        assert!(reached(Until::Ended, Succeeded));
    }
}
