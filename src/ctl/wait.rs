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
    client::{Client, is_broken},
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
const PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// A wait for `work_request_id`.
pub(super) struct Wait<'a> {
    pub client: &'a Client,
    pub work_request_id: &'a str,
    pub until: Until,
    /// `None`: as long as the work takes, which imaged bounds.
    pub limit: Option<Duration>,
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
                let failure = self.client.failure(&broken).await;
                return Err(self.goes_on(failure, "the work may go on"));
            }
            if attempts == 0 {
                progress.note("the connection to imaged broke; trying to get it back");
            }
            tokio::time::sleep(PAUSE.saturating_mul(1 << attempts).min(MAX_PAUSE)).await;
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
        let mut stream =
            self.client.work_requests().watch_work_request(request).await?.into_inner();
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

    fn wait_interrupted_after(millis: u64) -> (Exit, String) {
        let script = Script::default();
        script.watches.lock().unwrap().push_back(vec![Step::send(samples::reading()), Step::Hang]);
        let twin = Twin::start(script);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let failure = runtime.block_on(async {
            let client = Client::connect(twin.socket().to_str().unwrap()).await.unwrap();
            let wait = Wait {
                client: &client,
                work_request_id: samples::WORK_ID,
                until: Until::Ended,
                limit: None,
            };
            let mut err = Vec::new();
            let interrupt = tokio::time::sleep(Duration::from_millis(millis));
            wait.run_until(interrupt, &mut Progress::lines(&mut err)).await.unwrap_err()
        });
        let text = failure.to_string().replace(twin.socket().to_str().unwrap(), "SOCKET");
        (failure.exit, text)
    }

    #[test]
    fn ctrl_c_ends_the_wait_and_not_the_work() {
        let (exit, text) = wait_interrupted_after(300);
        assert_eq!(exit, Exit::Interrupted);
        insta::assert_snapshot!(text, @"
        stopped waiting; the work goes on
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
