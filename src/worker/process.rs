//! The daemon's side of a worker's life: started with nothing but sockets,
//! killed and reaped whatever happens.

use std::{
    fmt,
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
        unix::process::CommandExt,
        unix::process::ExitStatusExt,
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use super::{
    frame::{FromWorker, Job, shown},
    limits::Limits,
    line::{Break, Line, Watch},
};
use crate::{
    error::{Context, Error, Reason, Result},
    sys,
};

/// What a pipe holds (pipe(7)): a worker cannot have said more without being
/// read.
const MAX_STDERR: u64 = 64 << 10;

/// How much of it an error shows, from its end.
const SHOWN_STDERR: usize = 512;

/// How long a worker that hung up may take to end by itself, so that it can
/// be seen how: unmapping its memory is all that is left to do.
const GRACE: Duration = Duration::from_secs(2);

/// A running worker. Dropping it kills and reaps it.
///
/// The thread that started it must outlive it: its death kills the worker
/// (`PR_SET_PDEATHSIG` means threads, not processes).
#[derive(Debug)]
pub struct Process {
    child: Child,
    limits: Limits,
    /// How it is confined.
    pub how: String,
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// By itself.
    Exit,
    /// By a system call that is not allowed.
    SystemCall,
    /// At the limit of its memory.
    Memory,
    /// At the limit of its processor time.
    Processor,
    /// By another signal.
    Signal(i32),
}

/// A worker that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub death: Death,
    /// What it said before, in one line that may be shown.
    pub said: String,
    limits: Limits,
}

impl Process {
    /// Starts `program` as a worker for `job`, which `memory` belongs to, waits
    /// until it is confined, and returns the daemon's ends of so many lanes and
    /// its control.
    ///
    /// Blocks, no longer than the watch's patience.
    ///
    /// # Errors
    ///
    /// `CONFINEMENT_UNAVAILABLE`, `CANCELED`, `INTERNAL`.
    pub fn start<'a>(
        program: &Path,
        job: &Job,
        lanes: usize,
        memory: Option<&File>,
        watch: &'a Watch,
    ) -> Result<(Self, Line<'a>, Vec<Line<'a>>)> {
        let context = || "a worker's sockets cannot be made";
        let pairs: std::io::Result<Vec<_>> = (0..lanes).map(|_| UnixStream::pair()).collect();
        let (near, far): (Vec<_>, Vec<_>) =
            pairs.context(Reason::Internal, context)?.into_iter().unzip();
        let lines: std::io::Result<Vec<_>> =
            near.into_iter().map(|stream| Line::new(stream, watch)).collect();
        let lines = lines.context(Reason::Internal, context)?;
        let (control, stdin) = UnixStream::pair().context(Reason::Internal, context)?;

        let child = Command::new(program)
            .arg0("imaged")
            .arg("worker")
            .env_clear()
            .current_dir("/")
            .stdin(OwnedFd::from(stdin))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // What a terminal interrupts is the daemon, which ends this.
            .process_group(0)
            .spawn()
            .context(Reason::Internal, || {
                format!("a worker cannot be started from {}", program.display())
            })?;
        let mut process = Self { child, limits: job.limits, how: String::new() };

        let job = serde_json::to_vec(job).context(Reason::Internal, || "a job without words")?;
        // A worker that has ended already is told of below.
        let passed: Vec<_> = far.iter().map(AsFd::as_fd).chain(memory.map(AsFd::as_fd)).collect();
        let _ = sys::descriptors::send(&control, &job, &passed);
        drop(far);
        let mut control = Line::new(control, watch).context(Reason::Internal, context)?;
        let why = match control.receive() {
            Ok(FromWorker::Confined(how)) => {
                tracing::debug!(pid = process.child.id(), "worker: {how}");
                process.how = how;
                return Ok((process, control, lines));
            }
            Ok(FromWorker::Refused(why)) => return Err(unconfined().because(why)),
            Ok(_) => Break::Nonsense("it worked before it was confined"),
            Err(why) => why,
        };
        Err(match process.end(why) {
            Failed { why: Break::Stopped, .. } => stopped(),
            failed => unconfined().because(failed.cause()),
        })
    }

    /// Ends the worker because of `why`.
    #[must_use]
    pub fn end(mut self, why: Break) -> Failed {
        let ended = match why {
            Break::HungUp => {
                let since = Instant::now();
                while self.is_running() && since.elapsed() < GRACE {
                    thread::sleep(Duration::from_millis(5));
                }
                self.reap()
            }
            _ => self.reap(),
        };
        Failed { why, ended }
    }

    fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn reap(&mut self) -> Ended {
        // Fails when it has ended.
        let _ = self.child.kill();
        let status = self.child.wait();
        let mut stderr = Vec::new();
        if let Some(pipe) = self.child.stderr.take() {
            // Nobody else has the other end: this cannot block.
            let _ = pipe.take(MAX_STDERR).read_to_end(&mut stderr);
        }
        let tail = &stderr[stderr.len().saturating_sub(SHOWN_STDERR)..];
        let death = status.map_or(Death::Exit, |status| death(status, &stderr));
        Ended { death, said: shown(tail), limits: self.limits }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unconfined() -> Error {
    Error::new(
        Reason::ConfinementUnavailable,
        "this host cannot confine the process that reads foreign bytes",
    )
    .advice("see `imaged --check-confinement`; imaged never decodes an image unconfined")
}

fn stopped() -> Error {
    Error::new(Reason::Canceled, "the worker was stopped")
}

fn death(status: ExitStatus, stderr: &[u8]) -> Death {
    let Some(number) = status.signal() else { return Death::Exit };
    // What Rust's runtime says before it aborts.
    let starved = || stderr.windows(20).any(|text| text == b"memory allocation of");
    match Signal::try_from(number) {
        Ok(Signal::SIGSYS) => Death::SystemCall,
        Ok(Signal::SIGXCPU) => Death::Processor,
        Ok(Signal::SIGABRT) if starved() => Death::Memory,
        _ => Death::Signal(number),
    }
}

/// A worker that did not do its work.
#[derive(Debug)]
pub struct Failed {
    /// How the conversation ended.
    pub why: Break,
    /// How the worker did.
    pub ended: Ended,
}

impl Failed {
    /// As `IMAGE_UNREADABLE`, or `CANCELED` when it was not wanted any more.
    #[must_use]
    pub fn error(self) -> Error {
        if self.why == Break::Stopped {
            return stopped();
        }
        let advice = match (&self.why, self.ended.death) {
            (Break::HungUp, Death::Signal(_)) => {
                "see what ended it: `journalctl -k`; then ask again"
            }
            _ => "take the image for hostile or damaged: make it again",
        };
        Error::new(Reason::ImageUnreadable, "the image cannot be decoded")
            .because(self.cause())
            .advice(advice)
    }

    /// What happened, and what the worker said of it.
    fn cause(&self) -> Error {
        let cause = Error::new(Reason::ImageUnreadable, self.to_string());
        match self.ended.said.as_str() {
            "" => cause,
            said => cause.because(format!("it said: {said}")),
        }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("its worker ")?;
        match self.why {
            Break::Stopped => f.write_str("was stopped"),
            Break::Silent => f.write_str("produced nothing for too long and was stopped"),
            Break::Nonsense(what) => write!(f, "was stopped: {what}"),
            Break::HungUp => match self.ended.death {
                Death::Exit => f.write_str("gave up"),
                Death::SystemCall => {
                    f.write_str("made a system call that it may not make, and was killed (SIGSYS)")
                }
                Death::Memory => {
                    write!(f, "used up its {} of address space", self.ended.limits.address_space)
                }
                Death::Processor => {
                    let seconds = self.ended.limits.processor_seconds;
                    write!(f, "used up its {seconds} s of processor time")
                }
                Death::Signal(number) => match Signal::try_from(number) {
                    Ok(signal) => write!(f, "was ended by {signal}"),
                    Err(_) => write!(f, "was ended by signal {number}"),
                },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ByteSize;

    fn report(why: Break, raw_status: i32, stderr: &str) -> String {
        let limits = Limits { address_space: ByteSize(256 << 20), processor_seconds: 120 };
        let death = death(ExitStatus::from_raw(raw_status), stderr.as_bytes());
        Failed { why, ended: Ended { death, said: shown(stderr.as_bytes()), limits } }
            .error()
            .report()
    }

    #[test]
    fn every_end_has_its_words() {
        let reports = [
            report(Break::HungUp, libc::SIGSYS, ""),
            report(Break::HungUp, libc::SIGXCPU, ""),
            report(Break::HungUp, libc::SIGABRT, "memory allocation of 67108864 bytes failed\n"),
            report(Break::HungUp, libc::SIGKILL, ""),
            report(Break::HungUp, 101 << 8, "panicked at src/a.rs:1:1:\nindex out of bounds\n"),
            report(Break::Silent, libc::SIGKILL, ""),
            report(Break::Nonsense("it sent a frame of no kind"), libc::SIGKILL, ""),
        ];
        insta::assert_snapshot!(reports.join("\n\n"), @"
        the image cannot be decoded
          0: its worker made a system call that it may not make, and was killed (SIGSYS)
          help: take the image for hostile or damaged: make it again

        the image cannot be decoded
          0: its worker used up its 120 s of processor time
          help: take the image for hostile or damaged: make it again

        the image cannot be decoded
          0: its worker used up its 256 MiB of address space
          1: it said: memory allocation of 67108864 bytes failed
          help: take the image for hostile or damaged: make it again

        the image cannot be decoded
          0: its worker was ended by SIGKILL
          help: see what ended it: `journalctl -k`; then ask again

        the image cannot be decoded
          0: its worker gave up
          1: it said: panicked at src/a.rs:1:1:; index out of bounds
          help: take the image for hostile or damaged: make it again

        the image cannot be decoded
          0: its worker produced nothing for too long and was stopped
          help: take the image for hostile or damaged: make it again

        the image cannot be decoded
          0: its worker was stopped: it sent a frame of no kind
          help: take the image for hostile or damaged: make it again
        ");
    }
}
