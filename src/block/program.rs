//! Programs of the host.

use std::{
    env,
    io::{self, Read},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::error::{Context, Error, Reason, Result};

/// Where administrators' programs are, also for a service whose PATH lacks
/// it.
const PLACES: [&str; 2] = ["/usr/sbin", "/sbin"];
/// Longest run. A storage pool that answers slowly takes seconds.
const DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks whether it has ended.
const LOOK: Duration = Duration::from_millis(5);
/// What is kept of each of its outputs.
const SAID: u64 = 1 << 20;
/// What of its complaint is told.
const TOLD: usize = 500;

/// A program that was found.
#[derive(Debug, Clone)]
pub(super) struct Program {
    path: PathBuf,
    name: &'static str,
}

impl Program {
    /// Looks for it.
    pub(super) fn find(name: &'static str) -> Option<Self> {
        let path = env::var_os("PATH").unwrap_or_default();
        let places = env::split_paths(&path).chain(PLACES.map(PathBuf::from));
        let mut found = places.map(|place| place.join(name)).filter(|path| path.is_file());
        found.next().map(|path| Self { path, name })
    }

    /// Runs it: what it printed. Blocks, a minute at most.
    ///
    /// # Errors
    ///
    /// `VOLUME_UNAVAILABLE` with what it complained of.
    pub(super) fn run(&self, args: &[&str]) -> Result<Vec<u8>> {
        let failed = || format!("{} failed", self.name);
        let mut command = Command::new(&self.path);
        command.args(args).env("LC_ALL", "C").env("LVM_SUPPRESS_FD_WARNINGS", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context(Reason::VolumeUnavailable, failed)?;
        let printed = child.stdout.take().map(reading);
        let complained = child.stderr.take().map(reading);
        let ended = ended(child).context(Reason::VolumeUnavailable, failed)?;
        // What a child of its own keeps open would be waited for.
        let (Some(success), Some(printed), Some(complained)) = (ended, printed, complained) else {
            let context = format!("{} did not end within {} s", self.name, DEADLINE.as_secs());
            return Err(Error::new(Reason::VolumeUnavailable, context)
                .advice("look into the kernel's log (dmesg)"));
        };
        if success {
            return Ok(printed.join().unwrap_or_default());
        }
        let complained = complained.join().unwrap_or_default();
        let said = String::from_utf8_lossy(&complained);
        let said: String = said.trim().chars().take(TOLD).collect();
        Err(Error::new(Reason::VolumeUnavailable, failed()).because(said))
    }
}

fn reading(from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut said = Vec::new();
        let mut from = from.take(SAID);
        // What was said until then is told.
        let _ = from.read_to_end(&mut said);
        said
    })
}

/// Whether it succeeded; `None`: it was killed, because it took too long.
fn ended(mut child: Child) -> io::Result<Option<bool>> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.success()));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            // One that the kernel does not let go would be waited for.
            thread::spawn(move || child.wait());
            return Ok(None);
        }
        thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_prints_is_answered_and_its_complaint_is_told() {
        let sh = Program::find("sh").unwrap();
        assert_eq!(sh.run(&["-c", "echo one; echo two >&2"]).unwrap(), b"one\n");
        let error = sh.run(&["-c", "echo 'no such volume' >&2; exit 5"]).unwrap_err();
        let said = format!("{error:?}");
        assert!(said.contains("sh failed") && said.contains("no such volume"), "{said}");
        assert!(Program::find("no-such-program").is_none());
    }
}
