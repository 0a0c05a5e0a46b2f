//! A client of a guest agent.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::de::DeserializeOwned;
use serde_json::{json, value::RawValue};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::Mutex,
    time::{Instant, sleep, timeout_at},
};

use super::{
    answer::{ExecStatus, Filesystem, FreezeStatus, HostName, Info, Nothing, OsInfo, Started},
    codec::{self, Answer, MAX_MESSAGE, Malformed},
    command::{Call, ShutdownMode},
    program::{GuestProcess, GuestProgram},
};
use crate::{
    error::{Cause, Context, Error, Reason, Result},
    hypervisor::{
        libvirt::{Failed, Line},
        lines::{Lines, TooLong},
        refusal::{printable, seconds},
    },
    model::trace::{Channel, Kind},
    recorder::{Lane, Recorder},
    steps,
};

/// What to do about an agent that does not answer.
const NO_ANSWER: &str = "see that the agent runs in the guest (qemu-guest-agent), and that no \
                         other program is connected to its socket: QEMU serves one at a time; \
                         or ask for a crash-consistent image";

/// Between two looks whether a program in the guest has ended, at first.
const PAUSE: Duration = Duration::from_millis(20);

/// And at last.
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// A client of the agent in one guest. Share it: one command runs at a time,
/// others wait until their deadlines.
///
/// Every command ends with its deadline. One that has been sent when its
/// caller gives up (`GUEST_AGENT_TIMEOUT`, dropped future) may still be done
/// by the guest, even much later: **after a freeze that did not succeed, thaw
/// until that succeeds.** The thaw is then done after the freeze, because an
/// agent keeps the order.
#[derive(Debug)]
pub struct Agent {
    way: Way,
    recorder: Arc<Recorder>,
}

/// How an agent is reached.
#[derive(Debug)]
enum Way {
    /// By a socket that is ours.
    Socket { socket: PathBuf, link: Mutex<Option<Link>> },
    /// By libvirt, whose socket it is.
    Libvirt(Line),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket { socket, .. } => write!(f, "on {}", socket.display()),
            Self::Libvirt(_) => f.write_str("by libvirt"),
        }
    }
}

/// A connection to QEMU's end of the agent's line.
#[derive(Debug)]
struct Link {
    stream: UnixStream,
    lines: Lines,
    /// Nothing is on its way in either direction.
    in_step: bool,
    /// A message has been sent whole or not at all.
    whole: bool,
}

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("QEMU has closed the connection")]
    Closed,
    #[error(transparent)]
    TooLong(#[from] TooLong),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl Agent {
    /// Connects to the agent's socket and waits until the agent answers.
    ///
    /// # Errors
    ///
    /// `GUEST_AGENT_UNAVAILABLE`.
    pub async fn connect(
        socket: &Path,
        recorder: Arc<Recorder>,
        deadline: Instant,
    ) -> Result<Self> {
        let way = Way::Socket { socket: socket.to_owned(), link: Mutex::new(None) };
        let agent = Self { way, recorder };
        agent.ping(deadline).await?;
        Ok(agent)
    }

    /// The agent of a domain, whose socket libvirt has: each command is one
    /// of libvirt's own where it has one (it must know that its guest is
    /// frozen), and is passed on by it otherwise.
    pub(in crate::hypervisor) fn of_domain(line: Line) -> Self {
        let recorder = Arc::clone(&line.recorder);
        Self { way: Way::Libvirt(line), recorder }
    }

    /// Whether the agent answers.
    ///
    /// # Errors
    ///
    /// As all others: `GUEST_AGENT_UNAVAILABLE` when there is no connection or
    /// the agent does not get in step, so nothing was sent;
    /// `GUEST_AGENT_TIMEOUT` when it was sent and not answered in a way that
    /// can be understood, so it may have been done or may still be; `GUEST_AGENT_REFUSED` with the agent's own words (a
    /// [`Refusal`](crate::hypervisor::Refusal)) as the cause;
    /// `GUEST_AGENT_DISABLED` when the agent does not know the command or was
    /// told not to run it.
    pub async fn ping(&self, deadline: Instant) -> Result<()> {
        let Nothing {} = self.call(Call::Ping, deadline).await?;
        Ok(())
    }

    /// What the agent can do.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping).
    pub async fn info(&self, deadline: Instant) -> Result<Info> {
        self.call(Call::Info, deadline).await
    }

    /// The guest's operating system.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping).
    pub async fn os_info(&self, deadline: Instant) -> Result<OsInfo> {
        self.call(Call::GetOsinfo, deadline).await
    }

    /// The guest's name.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping).
    pub async fn host_name(&self, deadline: Instant) -> Result<String> {
        let HostName { host_name } = self.call(Call::GetHostName, deadline).await?;
        Ok(host_name)
    }

    /// The guest's filesystems on disks. Those of a network are not listed.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping).
    pub async fn filesystems(&self, deadline: Instant) -> Result<Vec<Filesystem>> {
        self.call(Call::GetFsinfo, deadline).await
    }

    /// Whether the agent has frozen the guest.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping).
    pub async fn freeze_status(&self, deadline: Instant) -> Result<FreezeStatus> {
        self.call(Call::FsfreezeStatus, deadline).await
    }

    /// Freezes the guest's filesystems; how many. Zero: none, and the guest
    /// is not frozen. Refused when it is frozen already.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping). After `GUEST_AGENT_REFUSED` and
    /// `GUEST_AGENT_UNAVAILABLE` this call has frozen nothing.
    pub async fn freeze(&self, deadline: Instant) -> Result<u32> {
        self.call(Call::FsfreezeFreeze, deadline).await
    }

    /// Thaws the guest's filesystems; how many. Less than were frozen:
    /// something else has thawed the rest before. Thawing what is not frozen
    /// is success, with a count of zero.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping).
    pub async fn thaw(&self, deadline: Instant) -> Result<u32> {
        self.call(Call::FsfreezeThaw, deadline).await
    }

    /// Starts `program` in the guest. Impossible while the guest is frozen.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping).
    pub async fn start(&self, program: GuestProgram, deadline: Instant) -> Result<GuestProcess> {
        let Started { pid } = self.call(Call::Exec(program), deadline).await?;
        Ok(GuestProcess(pid))
    }

    /// What has become of a program. Impossible while the guest is frozen;
    /// once it said that the program has ended, the agent forgets it.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping).
    pub async fn status(&self, process: GuestProcess, deadline: Instant) -> Result<ExecStatus> {
        self.call(Call::ExecStatus { pid: process }, deadline).await
    }

    /// Runs `program`, which is to do `purpose`, to its end; what it printed.
    ///
    /// # Errors
    ///
    /// As [`ended`](Self::ended); `GUEST_BUSY` when something is in use,
    /// `GUEST_AGENT_REFUSED` with its own last words when it failed otherwise.
    pub async fn run(
        &self,
        program: GuestProgram,
        purpose: &str,
        deadline: Instant,
    ) -> Result<Vec<u8>> {
        let process = self.start(program, deadline).await?;
        let status = self.ended(process, purpose, deadline).await?;
        match (status.exit_code, status.printed()) {
            (Some(0), Some(printed)) => Ok(printed),
            _ => Err(failed(purpose, &status)),
        }
    }

    /// Waits for the end of a program that is to do `purpose`. One that has
    /// not ended by the deadline may go on in the guest.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping); `GUEST_AGENT_TIMEOUT` when it has not ended.
    pub async fn ended(
        &self,
        process: GuestProcess,
        purpose: &str,
        deadline: Instant,
    ) -> Result<ExecStatus> {
        let (begun, mut pause) = (Instant::now(), PAUSE);
        loop {
            let status = self.status(process, deadline).await?;
            if status.exited {
                return Ok(status);
            }
            if Instant::now() + pause >= deadline {
                let waited = seconds(begun.elapsed());
                let context = format!("the guest did not {purpose} within {waited}");
                return Err(Error::new(Reason::GuestAgentTimeout, context));
            }
            sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// Has the agent shut the guest down. It answers nothing when it does
    /// (QEMU, `qga/qapi-schema.json`): watch the VM instead, and drop this
    /// when it has shut down. Ends only with an error.
    ///
    /// # Errors
    ///
    /// As [`ping`](Self::ping); `GUEST_AGENT_TIMEOUT` means little.
    pub async fn shut_down(&self, deadline: Instant) -> Error {
        let call = Call::Shutdown { mode: ShutdownMode::Powerdown };
        match self.call::<Nothing>(call, deadline).await {
            Err(error) => error,
            // Some agents do answer.
            Ok(Nothing {}) => {
                tokio::time::sleep_until(deadline).await;
                Error::new(Reason::GuestAgentTimeout, "the guest did not shut down")
            }
        }
    }

    /// Has the agent do `call`: gets in step if need be, sends, waits.
    async fn call<A: DeserializeOwned>(&self, call: Call, deadline: Instant) -> Result<A> {
        let purpose = call.purpose();
        let line = codec::encode(&call)
            .context(Reason::Internal, || format!("the agent was not asked to {purpose}"))?;
        let begun = Instant::now();
        let unavailable = |why: Cause| {
            let context = match call {
                Call::Ping => format!("no guest agent answers {}", self.way),
                _ => format!("no guest agent answers {} to {purpose}", self.way),
            };
            Error::new(Reason::GuestAgentUnavailable, context).because(why).advice(NO_ANSWER)
        };
        let (socket, link) = match &self.way {
            Way::Socket { socket, link } => (socket, link),
            Way::Libvirt(line) => {
                self.record(Kind::Command, &call, call.recorded());
                let said = steps::effect(call.name(), by_libvirt(line, &call, deadline)).await;
                return self.heard(said, &call, begun, unavailable);
            }
        };
        let held = timeout_at(deadline, link.lock()).await;
        let mut held =
            held.map_err(|_| unavailable("another command waits for its answer".into()))?;
        match timeout_at(deadline, self.in_step(socket, &mut held)).await {
            Ok(Ok(())) => {}
            Ok(Err(cause)) => return Err(unavailable(cause.into())),
            Err(_) => {
                let why = format!("nothing came within {}", seconds(begun.elapsed()));
                return Err(unavailable(why.into()));
            }
        }
        let Some(link) = held.as_mut() else {
            return Err(unavailable("the connection is gone".into()));
        };
        self.record(Kind::Command, &call, call.recorded());
        let exchanged = timeout_at(deadline, link.exchange(&line));
        let exchanged = match call.lane() {
            Lane::Commands => steps::effect(call.name(), exchanged).await,
            _ => exchanged.await,
        };
        match exchanged {
            Ok(Ok(answer)) => self.answered(&answer, &call),
            // It was sent, so nobody knows.
            Ok(Err(cause)) => {
                self.recorder.note(format!("the agent's answer was lost: {cause}"));
                *held = None;
                let context = format!("the guest agent was lost while asked to {purpose}");
                Err(Error::new(Reason::GuestAgentTimeout, context).because(cause))
            }
            Err(_) => {
                self.recorder.note(format!("{} was not answered in time", call.name()));
                let waited = seconds(begun.elapsed());
                let context = format!("the guest agent did not {purpose} within {waited}");
                Err(Error::new(Reason::GuestAgentTimeout, context))
            }
        }
    }

    /// What an answer is worth.
    fn answered<A: DeserializeOwned>(&self, answer: &Answer, call: &Call) -> Result<A> {
        let purpose = call.purpose();
        match answer {
            Answer::Done(value) => {
                self.record(Kind::Answer, call, Some(call.keep().of_text(value.get())));
                read(value, &purpose)
            }
            Answer::Refused(refusal) => {
                self.record(Kind::Refusal, call, Some(refusal.to_string().into()));
                let reason = match refusal.is_unknown_command() {
                    true => Reason::GuestAgentDisabled,
                    false => Reason::GuestAgentRefused,
                };
                let context = format!("the guest agent refused to {purpose}");
                Err(Error::new(reason, context).because(refusal.clone()))
            }
        }
    }

    /// What libvirt says of an agent.
    fn heard<A: DeserializeOwned>(
        &self,
        said: Result<Answer, Failed>,
        call: &Call,
        begun: Instant,
        unavailable: impl FnOnce(Cause) -> Error,
    ) -> Result<A> {
        let purpose = call.purpose();
        let failed = match said {
            Ok(answer) => return self.answered(&answer, call),
            Err(failed) => failed,
        };
        self.record(Kind::Refusal, call, Some(failed.to_string().into()));
        Err(match failed {
            Failed::NoConnection(_) | Failed::Io(_) => unavailable(failed.into()),
            Failed::Refused(ref words) if words.contains("agent is not co") => {
                unavailable(failed.into())
            }
            Failed::Refused(ref words)
                if words.contains("unable to execute QEMU agent command") =>
            {
                let context = format!("the guest agent refused to {purpose}");
                Error::new(Reason::GuestAgentRefused, context).because(failed)
            }
            Failed::Late => {
                let waited = seconds(begun.elapsed());
                let context = format!("the guest agent did not {purpose} within {waited}");
                Error::new(Reason::GuestAgentTimeout, context)
            }
            failed => {
                let context = format!("the guest agent was lost while asked to {purpose}");
                Error::new(Reason::GuestAgentTimeout, context).because(failed)
            }
        })
    }

    /// Connects if there is no connection, and syncs unless it is in step.
    async fn in_step(&self, socket: &Path, held: &mut Option<Link>) -> Result<(), Broken> {
        // Half a message cannot be finished, and a fresh connection is what
        // helps against a closed one.
        if held.as_mut().is_some_and(|link| !link.whole || link.has_ended()) {
            *held = None;
        }
        let link = match held {
            Some(link) => link,
            None => held.insert(Link::open(socket).await?),
        };
        if link.in_step {
            return Ok(());
        }
        let id = random_id()?;
        let call = Call::SyncDelimited { id };
        let line = codec::encode(&call).map_err(io::Error::other)?;
        self.record(Kind::Command, &call, call.recorded());
        match link.sync(&line, id).await {
            Ok(0) => self.record(Kind::Answer, &call, None),
            Ok(discarded) => {
                self.record(Kind::Answer, &call, Some(json!({ "discardedBytes": discarded })));
            }
            Err(cause) => {
                *held = None;
                return Err(cause);
            }
        }
        Ok(())
    }

    fn record(&self, kind: Kind, call: &Call, data: Option<serde_json::Value>) {
        self.recorder.record(call.lane(), Channel::Agent, kind, call.name(), None, data);
    }
}

/// How a program in the guest failed that was to do `purpose`.
fn failed(purpose: &str, status: &ExecStatus) -> Error {
    let context = format!("the guest did not {purpose}");
    if status.exit_code == Some(GuestProgram::IN_USE) {
        let said = status.printed().unwrap_or_default();
        let users = printable(String::from_utf8_lossy(&said).trim());
        return Error::new(Reason::GuestBusy, context).because(users);
    }
    let how = match (status.exit_code, status.signal) {
        (Some(0), _) => "it printed nothing that can be read".into(),
        (Some(code), _) => format!("its script ended with exit status {code}"),
        (None, Some(signal)) => format!("its script was ended by signal {signal}"),
        (None, None) => "its script ended without saying how".into(),
    };
    let words = status.complaint();
    Error::new(Reason::GuestAgentRefused, context).because(match words.is_empty() {
        true => how,
        false => format!("{how}: {words}"),
    })
}

/// Has libvirt ask an agent. A freeze is libvirt's own: it keeps in mind that
/// its guest is frozen, and refuses another.
async fn by_libvirt(line: &Line, call: &Call, deadline: Instant) -> Result<Answer, Failed> {
    let odd = |cause: &dyn fmt::Display| Failed::Lost(format!("an odd answer: {cause}"));
    let verb = match call {
        Call::FsfreezeFreeze => "domfsfreeze",
        Call::FsfreezeThaw => "domfsthaw",
        _ => {
            let asked = serde_json::to_string(call).map_err(|cause| odd(&cause))?;
            let patience = deadline.saturating_duration_since(Instant::now()).as_secs().max(1);
            let patience = patience.to_string();
            let more = [asked.as_str(), "--timeout", &patience];
            let said = match call.is_secret() {
                true => line.agent_unseen("qemu-agent-command", &more, deadline).await?,
                false => line.agent("qemu-agent-command", &more, deadline).await?,
            };
            return codec::decode(said.trim().as_bytes()).map_err(|cause| odd(&cause));
        }
    };
    // "Froze 3 filesystem(s)", in C's words.
    let said = line.agent(verb, &[], deadline).await?;
    let count = said.split_whitespace().find_map(|word| word.parse::<u32>().ok());
    let count = count.ok_or_else(|| odd(&said.trim()))?;
    let count = RawValue::from_string(count.to_string()).map_err(|cause| odd(&cause))?;
    Ok(Answer::Done(count))
}

fn read<A: DeserializeOwned>(value: &RawValue, purpose: &str) -> Result<A> {
    // It was done, whatever it was: refused would say that it was not.
    serde_json::from_str(value.get()).context(Reason::GuestAgentTimeout, || {
        format!("the guest agent was asked to {purpose} and gave an odd answer")
    })
}

/// Not to be guessed by a guest that would like to be out of step. Agents
/// read it into a signed 64-bit number.
fn random_id() -> Result<u32, Broken> {
    getrandom::u32().map_err(|cause| io::Error::other(cause).into())
}

impl Link {
    async fn open(socket: &Path) -> Result<Self, Broken> {
        let stream = UnixStream::connect(socket).await?;
        Ok(Self { stream, lines: Lines::new(MAX_MESSAGE), in_step: false, whole: true })
    }

    /// Whether the other side has hung up since the last exchange.
    fn has_ended(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.try_read(&mut byte) {
            Ok(0) => true,
            // An answer that nobody waits for any more.
            Ok(count) => {
                self.lines.push(&byte[..count]);
                self.in_step = false;
                false
            }
            Err(_) => false,
        }
    }

    /// Sends a sync and reads up to its answer; bytes left behind before it.
    /// Dropped halfway, the link stays out of step.
    async fn sync(&mut self, line: &[u8], id: u32) -> Result<usize, Broken> {
        self.send(line).await?;
        let mut discarded = 0;
        loop {
            match self.line().await {
                Ok(line) if codec::is_synced(&line, id) => break,
                Ok(line) => discarded += line.len() + 1,
                Err(Broken::TooLong(cause)) => discarded += cause.limit,
                Err(cause) => return Err(cause),
            }
        }
        self.in_step = true;
        Ok(discarded)
    }

    /// Sends a command and reads its answer. Dropped halfway, or after an
    /// error, the link is out of step.
    async fn exchange(&mut self, line: &[u8]) -> Result<Answer, Broken> {
        self.in_step = false;
        self.send(line).await?;
        let answer = codec::decode(&self.line().await?)?;
        // An agent that says more than it was asked for is out of step.
        self.in_step = self.lines.untaken() == 0;
        Ok(answer)
    }

    async fn send(&mut self, line: &[u8]) -> Result<(), Broken> {
        self.whole = false;
        self.stream.write_all(line).await?;
        self.whole = true;
        Ok(())
    }

    /// The next line. Dropped halfway, nothing is lost.
    async fn line(&mut self) -> Result<Vec<u8>, Broken> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(line) = self.lines.next_line() {
                return Ok(line?);
            }
            match self.stream.read(&mut chunk).await? {
                0 => return Err(Broken::Closed),
                count => self.lines.push(&chunk[..count]),
            }
        }
    }
}
