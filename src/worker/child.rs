//! The worker's side: confines itself, then works for whoever started it.

mod decode;
mod lane;

use std::{
    io::{self, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    process::ExitCode,
};

use self::lane::Lane;
use super::{
    confine,
    frame::{FromWorker, Job, MAX_JOB, Work},
};
use crate::{
    error::{Context, Error, Reason, Result},
    sys,
};

/// Runs a worker; its job comes over the socket that is its stdin. To be
/// called at the very start of a process: it closes whatever was inherited.
pub fn main() -> ExitCode {
    // A thread that panics would leave the others waiting; the daemon reads
    // stderr.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        std::process::exit(101);
    }));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.report());
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    sys::descriptors::close_from(3)
        .context(Reason::Internal, || "inherited files cannot be closed")?;
    sys::arenas::one_for_all();
    // Only a name for ps(1): what was executed is called /proc/self/exe.
    let _ = nix::sys::prctl::set_name(c"imaged-worker");
    // Threads that are started later are idle too. A kernel that refuses it
    // runs them at normal priority, as the daemon's own.
    let _ = sys::sched::set_idle();

    let control = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from);
    let control = control.context(Reason::Internal, || "there is no control socket")?;
    let Some((job, lanes)) = job(&control)? else { return Ok(()) };
    let control = Control(control);
    let how = match confine::restrict(&job.limits) {
        Ok(how) => how,
        Err(error) => return Err(control.refuse(error)),
    };
    match job.work {
        Work::Decode { object_size } => decode::run(&control, &how, lanes, object_size),
        Work::Attempt(attempt) => {
            control.seal(&how)?;
            control.say(&FromWorker::Said(attempt.run()))
        }
    }
}

/// The job and its lanes, before anything is confined: they come from the
/// daemon. `None`: it has ended.
fn job(control: &UnixStream) -> Result<Option<(Job, Vec<UnixStream>)>> {
    let mut buf = [0; MAX_JOB];
    let received = sys::descriptors::receive(control, &mut buf);
    let (len, lanes) = received
        .context(Reason::Internal, || "no job came over stdin")
        .map_err(|error| error.advice("workers are started by imaged itself"))?;
    if len == 0 {
        return Ok(None);
    }
    let job = serde_json::from_slice(&buf[..len])
        .context(Reason::Internal, || "the job is not understood")?;
    Ok(Some((job, lanes.into_iter().map(UnixStream::from).collect())))
}

/// The socket over which a worker tells how it stands.
struct Control(UnixStream);

impl Control {
    fn say(&self, message: &FromWorker) -> Result<()> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        (&self.0).write_all(&bytes).context(Reason::Internal, || "the daemon does not listen")
    }

    /// Seals every thread, and tells how the worker is confined.
    fn seal(&self, how: &str) -> Result<()> {
        confine::seal().map_err(|error| self.refuse(error))?;
        self.say(&FromWorker::Confined(format!("{how}, seccomp")))
    }

    fn refuse(&self, error: Error) -> Error {
        // Without a listener there is nobody to tell.
        let _ = self.say(&FromWorker::Refused(error.report()));
        error
    }
}
