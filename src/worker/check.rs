//! Shows that the confinement holds, for operators and for tests.

use std::{fmt, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{
    Workers,
    attempt::Attempt,
    frame::{FromWorker, Job, Work},
    limits::Limits,
    line::Watch,
    process::{Death, Failed, Process},
};
use crate::error::Result;

/// Starting a process and a second of processor time, on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of an attempt.
#[derive(Debug)]
pub struct Tried {
    /// What was tried.
    pub attempt: Attempt,
    /// How the worker was confined.
    pub how: String,
    outcome: Outcome,
}

#[derive(Debug)]
enum Outcome {
    /// The worker lived to say this.
    Said(String),
    /// It did not.
    Failed(Failed),
}

impl Tried {
    /// Whether it ended as it must.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        match &self.outcome {
            Outcome::Said(_) => self.attempt.must_end() == Death::Exit,
            Outcome::Failed(failed) => failed.ended.death == self.attempt.must_end(),
        }
    }
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Outcome::Said(what) => f.write_str(what),
            Outcome::Failed(failed) => failed.fmt(f),
        }
    }
}

impl Workers {
    /// Lets a worker try this. Blocks for up to a few seconds.
    ///
    /// # Errors
    ///
    /// `CONFINEMENT_UNAVAILABLE` when there is no confined worker at all.
    pub fn attempt(&self, attempt: Attempt) -> Result<Tried> {
        let watch = Watch::new(CancellationToken::new(), PATIENCE);
        let job = Job { limits: Limits::for_attempts(), work: Work::Attempt(attempt) };
        let (process, mut control, _) = Process::start(&self.program, &job, 0, None, &watch)?;
        let how = process.how.clone();
        let outcome = match control.receive() {
            Ok(FromWorker::Said(what)) => Outcome::Said(what),
            Ok(_) => Outcome::Said("it said something else".to_owned()),
            Err(why) => Outcome::Failed(process.end(why)),
        };
        Ok(Tried { attempt, how, outcome })
    }
}
