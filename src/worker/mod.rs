//! Where foreign bytes are parsed: a process that can do nothing else.
//!
//! What lies in a store, and in a guest's volume, may have been written by an
//! attacker who knows of a defect in a decoder. So no decoder runs in the
//! daemon, which is root. It runs in a worker: this program, executed again,
//! without environment, paths or files.
//!
//! ```text
//! daemon (root)                            worker (nobody, seccomp, landlock)
//!   store ─► Server ──── lane: reads ────►  decoder, a thread a lane
//!   expected digests ◄── lane: digests ──     │
//!   compares, counts                          └ stderr: its last words
//!     └ or copies out ◄─ shared memory: bytes
//! ```
//!
//! The daemon serves what a worker reads, of one object and within its bounds,
//! so every kind of store works alike. It believes nothing that comes back: a
//! worker that was taken over can claim wrong digests of one image, and no
//! more. `confine` says what is taken away and how, `limits` how much of the
//! rest there is and why, `frame` what is said.
//!
//! A worker is killed when its work is cancelled, when it owes an answer for
//! too long, when it says what no worker says, and with the daemon. It is
//! reaped in every case.

#![allow(clippy::cast_possible_truncation, reason = "usize has 64 bits: see lib.rs")]

mod attempt;
mod check;
pub mod child;
mod confine;
pub mod frame;
mod limits;
mod line;
mod process;
mod serve;

use std::{
    num::NonZeroUsize,
    path::PathBuf,
    sync::{Mutex, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

pub use self::{attempt::Attempt, check::Tried};
use self::{
    frame::{Job, SLOTS, Work},
    limits::{Limits, MAX_LANES, PATIENCE},
    line::{Break, Line, Watch},
    process::Process,
    serve::{Cut, Output, Server},
};
use crate::{
    encode::{
        in_parallel,
        verify::{Parts, sums},
    },
    error::{Context, Error, Reason, Result},
    format::qcow2::content,
    model::{
        ByteSize,
        image::{EXTENT_SIZE, Stored},
    },
    port::{Fault, Inspector, Meter, ReadAt, Sink},
    sys::shared::memory,
};

/// This program, also when its file was replaced or removed meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Starts workers.
#[derive(Debug, Clone)]
pub struct Workers {
    program: PathBuf,
    patience: Duration,
}

impl Workers {
    /// Workers of the running program, which must be imaged.
    #[must_use]
    pub fn of_this_program() -> Self {
        Self::of(THIS_PROGRAM.into())
    }

    /// Workers of the imaged at `program`.
    #[must_use]
    pub fn of(program: PathBuf) -> Self {
        Self { program, patience: PATIENCE }
    }

    /// Gives a worker that produces nothing up after `patience` instead of
    /// five minutes.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }
}

impl Inspector for Workers {
    fn verify(
        &self,
        object: &dyn ReadAt,
        stored: &Stored,
        extent_digests: &[u8],
        threads: NonZeroUsize,
        meter: &Meter,
        stop: &CancellationToken,
    ) -> Result<Option<Fault>> {
        if let Some(fault) = sums(object, stored, extent_digests) {
            return Ok(Some(fault));
        }
        let volume = stored.virtual_size;
        let lanes = lanes(volume, threads, MAX_LANES);
        // Ends with `stop`, and when one thread has found something.
        let watch = Watch::new(stop.child_token(), self.patience);
        let job = Job {
            limits: Limits::for_decoding(volume, lanes),
            work: Work::Decode { object_size: object.len() },
        };
        let (process, _control, lines) = Process::start(&self.program, &job, lanes, None, &watch)?;
        let server = Server {
            object,
            volume_size: volume.get(),
            extent_digests,
            output: Output::Digests,
            meter,
            watch: &watch,
            task: serve::task_length(volume.get(), lanes, serve::TASK),
            next: AtomicU64::new(0),
            allowance: AtomicU64::new(limits::reads(object.len(), volume.get(), lanes)),
        };
        let parts = Some(Parts::new(object, stored));
        Decoding::new(parts, lines, server, stop).run(threads, process, stop)
    }

    fn decode(
        &self,
        object: &dyn ReadAt,
        stored: &Stored,
        extent_digests: &[u8],
        threads: NonZeroUsize,
        sink: &dyn Sink,
        meter: &Meter,
        stop: &CancellationToken,
    ) -> Result<Option<Fault>> {
        if let Some(fault) = sums(object, stored, extent_digests) {
            return Ok(Some(fault));
        }
        let volume = stored.virtual_size;
        // One descriptor is the memory's.
        let lanes = lanes(volume, threads, MAX_LANES - 1);
        let watch = Watch::new(stop.child_token(), self.patience);
        let job = Job {
            limits: Limits::for_filling(volume, lanes),
            work: Work::Fill { object_size: object.len() },
        };
        let memory = memory(lanes as u64 * SLOTS * EXTENT_SIZE)
            .context(Reason::Internal, || "there is no memory to share with a worker")?;
        let (process, _control, lines) =
            Process::start(&self.program, &job, lanes, Some(&memory), &watch)?;
        let server = Server {
            object,
            volume_size: volume.get(),
            extent_digests,
            output: Output::Sink { memory: &memory, sink },
            meter,
            watch: &watch,
            task: serve::task_length(volume.get(), lanes, SLOTS),
            next: AtomicU64::new(0),
            allowance: AtomicU64::new(limits::reads(object.len(), volume.get(), lanes)),
        };
        Decoding::new(None, lines, server, stop).run(threads, process, stop)
    }
}

/// How many lanes: one for each thread, `most` at most.
fn lanes(volume: ByteSize, threads: NonZeroUsize, most: usize) -> usize {
    let extents = content::extent_count(volume.get()) as usize;
    threads.get().min(most).min(extents.max(1))
}

/// What the threads of one decoding share: first the parts, as bytes, where
/// those are wanted, then the extents, each thread with a lane of the worker.
struct Decoding<'a> {
    parts: Option<Parts<'a>>,
    /// Ends the hashing of parts. An extent that differs does not: the part
    /// that another thread has in hand tells more.
    hashing: CancellationToken,
    /// With their numbers.
    lines: Mutex<Vec<(u64, Line<'a>)>>,
    server: Server<'a>,
}

type Outcome = Result<Option<Fault>, Cut>;

impl<'a> Decoding<'a> {
    fn new(
        parts: Option<Parts<'a>>,
        lines: Vec<Line<'a>>,
        server: Server<'a>,
        stop: &CancellationToken,
    ) -> Self {
        let lines = Mutex::new((0..).zip(lines).collect());
        Self { parts, hashing: stop.child_token(), lines, server }
    }

    fn run(
        self,
        threads: NonZeroUsize,
        process: Process,
        stop: &CancellationToken,
    ) -> Result<Option<Fault>> {
        let outcomes = in_parallel(threads, "decode", || Ok(self.work()));
        Self::conclude(outcomes, process, stop)
    }

    fn work(&self) -> Outcome {
        let outcome = match self.parts() {
            Ok(None) => self.extents(),
            ended => {
                self.hashing.cancel();
                ended
            }
        };
        if !matches!(outcome, Ok(None)) {
            // The others need not go on.
            self.server.watch.stop.cancel();
        }
        outcome
    }

    fn parts(&self) -> Outcome {
        let Some(parts) = &self.parts else { return Ok(None) };
        parts.hash(self.server.meter, &self.hashing).map_err(Cut::Failed)
    }

    fn extents(&self) -> Outcome {
        let line = self.lines.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // More threads than lanes: there is nothing left for this one.
        line.map_or(Ok(None), |(lane, mut line)| self.server.serve(lane, &mut line))
    }

    /// A fault is worth more than the error of another thread, and one of the
    /// object's bytes more than what follows from it. A worker breaks off when
    /// the daemon does, so that a failing store, or whoever said `stop`, is
    /// the cause of that; being stopped without either follows from any other.
    fn conclude(
        outcomes: Vec<Result<Outcome>>,
        process: Process,
        stop: &CancellationToken,
    ) -> Result<Option<Fault>> {
        let (mut found, mut error, mut broken) = (None, None, None);
        for outcome in outcomes {
            match outcome {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(fault))) => {
                    if found.is_none() || matches!(fault, Fault::Part { .. }) {
                        found = Some(fault);
                    }
                }
                Ok(Err(Cut::Worker(why))) => {
                    if matches!(broken, None | Some(Break::Stopped)) {
                        broken = Some(why);
                    }
                }
                Ok(Err(Cut::Failed(failed))) | Err(failed) => {
                    error = Some(graver(error, failed));
                }
            }
        }
        match (found, error, broken) {
            (Some(fault), _, _) => Ok(Some(fault)),
            (None, None, None) => Ok(None),
            (None, Some(error), _) if error.reason() != Reason::Canceled => Err(error),
            (None, _, _) if stop.is_cancelled() => Err(process.end(Break::Stopped).error()),
            (None, _, Some(why)) if why != Break::Stopped => Err(process.end(why).error()),
            (None, Some(error), _) => Err(error),
            (None, None, Some(why)) => Err(process.end(why).error()),
        }
    }
}

/// The one that is not just a consequence of being stopped.
fn graver(before: Option<Error>, now: Error) -> Error {
    match before {
        Some(before) if before.reason() != Reason::Canceled => before,
        _ => now,
    }
}
