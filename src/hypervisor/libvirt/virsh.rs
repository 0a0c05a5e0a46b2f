//! virsh: libvirt's own shell, one process for each thing that is asked.
//!
//! libvirt's library would be linked, and a host without it could not start
//! imaged at all. A process has a deadline of its own, too, whatever libvirtd
//! does with its end of the line.

use std::{
    env,
    ffi::OsStr,
    fmt,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::Arc,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{ChildStdin, Command},
    time::{Instant, timeout_at},
};

use crate::{
    error::{Error, Reason, Result},
    hypervisor::refusal::printable,
    model::trace::{Channel, Kind},
    recorder::{Lane, Recorder},
    steps,
};

/// The program.
const NAME: &str = "virsh";

/// Where it is looked for without a `PATH`.
const USUAL: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Longest answer: ten thousand descriptions of domains.
const MAX_ANSWER: u64 = 256 << 20;

/// Longest complaint that is read.
const MAX_COMPLAINT: u64 = 64 << 10;

/// A virsh, and which libvirtd it speaks to.
#[derive(Debug, Clone)]
pub struct Virsh {
    program: PathBuf,
    uri: String,
}

/// Why virsh did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(in crate::hypervisor) enum Failed {
    /// Nothing was asked: there is no libvirtd.
    #[error("{0}")]
    NoConnection(String),
    /// It refused, in these words.
    #[error("{0}")]
    Refused(String),
    /// Nobody knows whether it was done: the answer did not come in time.
    #[error("nothing came in time")]
    Late,
    /// Nobody knows whether it was done: the connection broke.
    #[error("{0}")]
    Lost(String),
    /// virsh itself.
    #[error("it cannot be run")]
    Io(#[from] std::io::Error),
}

impl Failed {
    fn reason(&self) -> Reason {
        match self {
            Self::NoConnection(_) | Self::Io(_) => Reason::HypervisorUnavailable,
            Self::Refused(_) => Reason::HypervisorRefused,
            Self::Late | Self::Lost(_) => Reason::HypervisorTimeout,
        }
    }
}

impl Virsh {
    /// Looks for the program.
    ///
    /// # Errors
    ///
    /// `HYPERVISOR_UNAVAILABLE`: it is not there.
    pub fn find(uri: &str) -> Result<Self> {
        let path = env::var_os("PATH");
        let path = path.as_deref().unwrap_or(OsStr::new(USUAL));
        let found = env::split_paths(path).map(|dir| dir.join(NAME)).find(|file| file.is_file());
        match found {
            Some(program) => Ok(Self { program, uri: uri.to_owned() }),
            None => Err(Error::new(Reason::HypervisorUnavailable, "virsh is not installed")
                .advice("install libvirt's clients (Debian: libvirt-clients) and start imaged again; without them it does not see libvirt's domains")),
        }
    }

    /// Whom it speaks to.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Runs it until `deadline`. `input` is what it reads.
    async fn run(
        &self,
        words: &[&str],
        input: Option<&str>,
        deadline: Instant,
    ) -> Result<String, Failed> {
        let mut child = Command::new(&self.program)
            .args(["--connect", &self.uri])
            .args(words)
            .env_clear()
            // Its words are read, and of no other language.
            .env("LC_ALL", "C")
            .env("PATH", USUAL)
            .current_dir("/")
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (answer, complaint) = (child.stdout.take(), child.stderr.take());
        let stdin = child.stdin.take();
        let heard = async {
            tokio::try_join!(
                write(stdin, input),
                read(answer, MAX_ANSWER),
                read(complaint, MAX_COMPLAINT),
                child.wait()
            )
        };
        let heard = timeout_at(deadline, heard).await;
        let ((), answer, complaint, status) = heard.map_err(|_| Failed::Late)??;
        // Its shell ends well whatever became of a line.
        let ended_well = status.success() && (input.is_none() || complaint.trim().is_empty());
        if ended_well { Ok(answer) } else { Err(judge(&complaint, status)) }
    }

    /// Asks what changes nothing; `purpose` follows "libvirt was asked to".
    ///
    /// # Errors
    ///
    /// All that begin with `HYPERVISOR_`.
    pub(super) async fn ask(
        &self,
        purpose: &str,
        words: &[&str],
        deadline: Instant,
    ) -> Result<String> {
        self.run(words, None, deadline).await.map_err(|failed| told(purpose, failed))
    }
}

/// Closes it, so that virsh ends.
async fn write(to: Option<ChildStdin>, text: Option<&str>) -> std::io::Result<()> {
    match (to, text) {
        (Some(mut to), Some(text)) => to.write_all(text.as_bytes()).await,
        _ => Ok(()),
    }
}

async fn read(from: Option<impl AsyncRead + Unpin>, most: u64) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        let _ = from.take(most).read_to_end(&mut bytes).await?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What a bad end means. libvirt has no words for machines in virsh; those of
/// C are read as little as possible.
fn judge(complaint: &str, status: ExitStatus) -> Failed {
    let said: Vec<_> = complaint
        .lines()
        .map(|line| line.strip_prefix("error: ").unwrap_or(line))
        .filter(|line| !line.is_empty())
        .collect();
    let words = match said.is_empty() {
        true => format!("virsh ended with {status}"),
        false => printable(&said.join(": ")),
    };
    let first = said.first().copied().unwrap_or_default();
    if first.starts_with("failed to connect to the hypervisor") {
        Failed::NoConnection(words)
    } else if ["Disconnected from", "client socket is closed", "Cannot recv data"]
        .iter()
        .any(|sign| words.contains(sign))
    {
        Failed::Lost(words)
    } else {
        Failed::Refused(words)
    }
}

fn told(purpose: &str, failed: Failed) -> Error {
    let reason = failed.reason();
    let context = match reason {
        Reason::HypervisorUnavailable => format!("libvirt cannot be asked to {purpose}"),
        Reason::HypervisorRefused => format!("libvirt refused to {purpose}"),
        _ => format!("libvirt was asked to {purpose} and did not answer"),
    };
    let error = Error::new(reason, context).because(failed);
    match reason {
        Reason::HypervisorRefused => error,
        _ => error.advice("see that libvirtd works: `virsh list --all` must answer at once"),
    }
}

/// How a domain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Running,
    Paused,
    Off,
    /// There is no such domain (any more).
    Gone,
}

/// One domain, asked by its UUID.
#[derive(Clone)]
pub struct Line {
    pub(super) virsh: Virsh,
    pub(super) domain: String,
    pub(in crate::hypervisor) recorder: Arc<Recorder>,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Line({} of {})", self.domain, self.virsh.uri)
    }
}

impl Line {
    /// Asks what changes nothing.
    pub(super) async fn ask(
        &self,
        purpose: &str,
        verb: &str,
        more: &[&str],
        deadline: Instant,
    ) -> Result<String> {
        let words = [&[verb, self.domain.as_str()], more].concat();
        self.virsh.ask(purpose, &words, deadline).await
    }

    /// Has something done, and records it.
    pub(super) async fn tell(
        &self,
        purpose: &str,
        verb: &str,
        more: &[&str],
        deadline: Instant,
    ) -> Result<String> {
        self.record(Kind::Command, verb, more);
        let done = steps::effect(verb, self.ask(purpose, verb, more, deadline)).await;
        match &done {
            Ok(_) => self.record(Kind::Answer, verb, &[]),
            Err(error) => {
                let why: Vec<_> = error.causes().collect();
                self.record(Kind::Refusal, verb, &[&why.join(": ")]);
            }
        }
        done
    }

    /// The same for the guest's agent, whose client records it.
    pub(in crate::hypervisor) async fn agent(
        &self,
        verb: &str,
        more: &[&str],
        deadline: Instant,
    ) -> Result<String, Failed> {
        let words = [&[verb, self.domain.as_str()], more].concat();
        self.virsh.run(&words, None, deadline).await
    }

    /// The same for words that nobody may see, in no process's arguments: as
    /// a line of virsh's shell. Its prompt repeats the line; the answer, which
    /// must be JSON, stands on one of its own.
    pub(in crate::hypervisor) async fn agent_unseen(
        &self,
        verb: &str,
        more: &[&str],
        deadline: Instant,
    ) -> Result<String, Failed> {
        let words = [&[verb, self.domain.as_str()], more].concat();
        let quoted = words.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''")));
        let line = quoted.collect::<Vec<_>>().join(" ");
        let said = self.virsh.run(&["--quiet"], Some(&format!("{line}\n")), deadline).await?;
        let answer = said.lines().find(|line| line.starts_with('{')).map(str::to_owned);
        answer.ok_or_else(|| Failed::Lost("virsh told nothing of it".into()))
    }

    fn record(&self, kind: Kind, verb: &str, more: &[&str]) {
        let data = (!more.is_empty()).then(|| more.into());
        self.recorder.record(Lane::Commands, Channel::Libvirt, kind, verb, None, data);
    }

    /// How it stands.
    pub(super) async fn state(&self, deadline: Instant) -> Result<State> {
        let told = self.ask("tell how a domain stands", "domstate", &[], deadline).await;
        let error = match told {
            Ok(told) => {
                return Ok(match told.trim() {
                    "shut off" | "crashed" => State::Off,
                    "paused" => State::Paused,
                    // Idle, in shutdown, suspended by itself: QEMU is there.
                    _ => State::Running,
                });
            }
            Err(error) => error,
        };
        if error.reason() != Reason::HypervisorRefused {
            return Err(error);
        }
        let all = ["list", "--all", "--uuid"];
        let all = self.virsh.ask("list its domains", &all, deadline).await?;
        match all.lines().any(|domain| domain.trim() == self.domain) {
            true => Err(error),
            false => Ok(State::Gone),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn judged(complaint: &str) -> Error {
        told("start a domain", judge(complaint, ExitStatus::from_raw(256)))
    }

    #[test]
    fn a_refusal_a_missing_libvirtd_and_a_lost_answer_are_told_apart() {
        insta::assert_snapshot!(judged("error: Failed to start domain 'web-9'\nerror: Requested operation is not valid: domain is already running\n").report(), @"
        libvirt refused to start a domain
          0: Failed to start domain 'web-9': Requested operation is not valid: domain is already running
        ");
        insta::assert_snapshot!(judged("error: failed to connect to the hypervisor\nerror: Failed to connect socket to '/run/libvirt/libvirt-sock': Connection refused\n").report(), @"
        libvirt cannot be asked to start a domain
          0: failed to connect to the hypervisor: Failed to connect socket to '/run/libvirt/libvirt-sock': Connection refused
          help: see that libvirtd works: `virsh list --all` must answer at once
        ");
        insta::assert_snapshot!(judged("error: Disconnected from qemu:///system due to end of file\n").report(), @"
        libvirt was asked to start a domain and did not answer
          0: Disconnected from qemu:///system due to end of file
          help: see that libvirtd works: `virsh list --all` must answer at once
        ");
    }

    #[tokio::test]
    async fn a_program_that_hangs_ends_at_its_deadline() {
        use std::{fs, os::unix::fs::PermissionsExt, time::Duration};
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("virsh");
        fs::write(&program, "#!/bin/sh\nexec sleep 60\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let virsh = Virsh { program, uri: "qemu:///system".into() };
        let begun = Instant::now();
        let asked = virsh.ask("answer", &["version"], begun + Duration::from_millis(100)).await;
        assert_eq!(asked.unwrap_err().reason(), Reason::HypervisorTimeout);
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
