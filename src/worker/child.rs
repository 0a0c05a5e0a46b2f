//! The worker's side: confines itself, then works for whoever started it.

mod decode;
mod lane;

use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::ExitCode,
};

use self::lane::Lane;
use super::{
    confine,
    frame::{FromWorker, Job, MAX_JOB, SLOTS, Work},
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::image::EXTENT_SIZE,
    sys::{self, shared::Mapped},
};

/// Memory of a lane for what it decodes.
const REGION: usize = SLOTS as usize * EXTENT_SIZE as usize;

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
    let Some((job, passed)) = job(&control)? else { return Ok(()) };
    let control = Control(control);
    let (lanes, regions) = lanes(&job, passed)?;
    let how = match confine::restrict(&job.limits) {
        Ok(how) => how,
        Err(error) => return Err(control.refuse(error)),
    };
    match job.work {
        Work::Decode { object_size } | Work::Fill { object_size } => {
            decode::run(&control, &how, lanes, regions, object_size)
        }
        Work::Attempt(attempt) => {
            control.seal(&how)?;
            control.say(&FromWorker::Said(attempt.run()))
        }
    }
}

/// The job and what was passed with it, before anything is confined: they come from the
/// daemon. `None`: it has ended.
fn job(control: &UnixStream) -> Result<Option<(Job, Vec<OwnedFd>)>> {
    let mut buf = [0; MAX_JOB];
    let received = sys::descriptors::receive(control, &mut buf);
    let (len, passed) = received
        .context(Reason::Internal, || "no job came over stdin")
        .map_err(|error| error.advice("workers are started by imaged itself"))?;
    if len == 0 {
        return Ok(None);
    }
    let job = serde_json::from_slice(&buf[..len])
        .context(Reason::Internal, || "the job is not understood")?;
    Ok(Some((job, passed)))
}

/// The lanes, and for each its memory where the job has some.
fn lanes(job: &Job, mut passed: Vec<OwnedFd>) -> Result<(Vec<UnixStream>, Vec<Mapped>)> {
    let memory = match job.work {
        Work::Fill { .. } => passed.pop(),
        Work::Decode { .. } | Work::Attempt(_) => None,
    };
    let lanes: Vec<_> = passed.into_iter().map(UnixStream::from).collect();
    let regions: io::Result<Vec<_>> = (memory.iter())
        .flat_map(|memory| (0..lanes.len()).map(move |lane| (memory, lane)))
        .map(|(memory, lane)| Mapped::new(memory.as_fd(), (lane * REGION) as u64, REGION))
        .collect();
    let regions = regions.context(Reason::Internal, || "the memory cannot be mapped")?;
    Ok((lanes, regions))
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
