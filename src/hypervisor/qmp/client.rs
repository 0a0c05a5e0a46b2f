//! A session with a QEMU.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use serde::de::DeserializeOwned;
use tokio::{
    sync::{Mutex, broadcast, mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, timeout_at},
};

use super::{
    answer::Done,
    codec::Version,
    command::Command,
    connection::{Ask, Connection, Ended, Greeted, NoGreeting, Outcome, greet},
    event::Event,
    names::{DevicePath, NodeRef, PREFIX},
};
use crate::{
    error::{Context, Error, Reason, Result},
    hypervisor::{Refusal, refusal::seconds},
    recorder::Recorder,
    steps,
    sys::peer,
};

/// Events that an observer may be behind. More than a capture sees in all.
const EVENTS: usize = 256;

/// Callers whose commands wait for the connection.
const ASKS: usize = 16;

/// What to do about a monitor that does not greet.
const MONITOR_HELD: &str = "QEMU serves one client at a time: end the other one (libvirt, a \
                            backup tool, a second imaged), or give the instance a QMP socket of \
                            imaged's own; `ss -xp` shows who is connected";

/// A session with one QEMU over its machine protocol (QMP).
///
/// QEMU runs commands in the order in which they are sent. Every wait ends
/// with its deadline; a command that has been sent when its caller gives up
/// (deadline, dropped future) may still be done. Dropping the session, or
/// [`close`](Self::close), frees QEMU's monitor for the next client.
#[derive(Debug)]
pub struct Qmp {
    socket: PathBuf,
    version: Version,
    process: Option<u32>,
    asks: mpsc::Sender<Ask>,
    /// Weak: observers learn of the end when the connection lets go of it.
    events: broadcast::WeakSender<Event>,
    ended: Arc<OnceLock<Ended>>,
    task: JoinHandle<()>,
    /// Held from looking at a device's node until it is changed.
    switching: Mutex<()>,
}

/// What switching a device's node changed.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// It uses the node from now on.
    Switched,
    /// It used it before.
    AlreadyThere,
}

/// What ending the NBD server changed.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerStop {
    /// It ran and is gone.
    Stopped,
    /// None ran.
    AlreadyStopped,
}

impl Qmp {
    /// Begins a session with the QEMU that listens on `socket`. All that is
    /// said goes to `recorder`.
    ///
    /// # Errors
    ///
    /// `HYPERVISOR_GONE` when nobody listens; `HYPERVISOR_BUSY` when nobody
    /// greets: somebody else has the monitor, or QEMU hangs;
    /// `HYPERVISOR_UNAVAILABLE` otherwise.
    pub async fn connect(
        socket: &Path,
        recorder: Arc<Recorder>,
        deadline: Instant,
    ) -> Result<Self> {
        let begun = Instant::now();
        let unreachable =
            |reason| Error::new(reason, format!("QEMU cannot be reached on {}", socket.display()));
        let greeted = timeout_at(deadline, greet(socket)).await;
        let Greeted { stream, version } = match greeted {
            Ok(Ok(greeted)) => greeted,
            Err(_) => {
                let context = format!(
                    "QEMU did not greet on {} within {}",
                    socket.display(),
                    seconds(begun.elapsed())
                );
                return Err(Error::new(Reason::HypervisorBusy, context).advice(MONITOR_HELD));
            }
            Ok(Err(NoGreeting::Connect(cause))) => {
                return Err(match cause.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                        unreachable(Reason::HypervisorGone)
                    }
                    // Others wait already, as many as the socket lets.
                    io::ErrorKind::WouldBlock => {
                        unreachable(Reason::HypervisorBusy).advice(MONITOR_HELD)
                    }
                    _ => unreachable(Reason::HypervisorUnavailable),
                }
                .because(cause));
            }
            Ok(Err(NoGreeting::Read(cause))) => {
                return Err(unreachable(Reason::HypervisorUnavailable).because(cause));
            }
            Ok(Err(NoGreeting::Closed)) => {
                return Err(unreachable(Reason::HypervisorGone)
                    .because("the connection was closed before a greeting"));
            }
            Ok(Err(NoGreeting::NotQmp)) => {
                return Err(unreachable(Reason::HypervisorUnavailable)
                    .because("what listens there does not speak QMP"));
            }
        };
        let process = peer::listener(&stream)
            .context(Reason::HypervisorUnavailable, || "QEMU's process cannot be told")?;
        recorder.note(format!("connected to QEMU {version} on {}", socket.display()));

        let (asks, receiver) = mpsc::channel(ASKS);
        let events = broadcast::Sender::new(EVENTS);
        let observers = events.downgrade();
        let ended = Arc::new(OnceLock::new());
        let connection = Connection::new(recorder, receiver, events, Arc::clone(&ended));
        let qmp = Self {
            socket: socket.to_owned(),
            version,
            process,
            asks,
            events: observers,
            ended,
            task: tokio::spawn(connection.run(stream)),
            switching: Mutex::new(()),
        };
        qmp.execute(Command::begin_session(), deadline).await?;
        Ok(qmp)
    }

    /// Has QEMU do `command`.
    ///
    /// # Errors
    ///
    /// `HYPERVISOR_REFUSED` with QEMU's own words (a
    /// [`Refusal`]) as the cause;
    /// `HYPERVISOR_UNSUPPORTED` when this QEMU has no such command;
    /// `HYPERVISOR_TIMEOUT`: it may still be done; `HYPERVISOR_GONE` when
    /// QEMU has ended or ends meanwhile; `HYPERVISOR_UNAVAILABLE` when it
    /// says what cannot be understood.
    pub async fn execute<A: DeserializeOwned>(
        &self,
        command: Command<A>,
        deadline: Instant,
    ) -> Result<A> {
        let begun = Instant::now();
        let purpose = command.call.purpose();
        let changes = command.call.changes().then(|| command.call.name());
        let (done, outcome) = oneshot::channel();
        let ask = Ask { call: command.call, done };
        let asked = async {
            self.asks.send(ask).await.ok()?;
            outcome.await.ok()
        };
        let asked = timeout_at(deadline, asked);
        let asked = match changes {
            Some(name) => steps::effect(name, asked).await,
            None => asked.await,
        };
        match asked {
            Ok(Some(Outcome::Done(value))) => serde_json::from_str(value.get())
                .context(Reason::HypervisorUnavailable, || {
                    format!("QEMU was asked to {purpose} and gave an odd answer")
                }),
            Ok(Some(Outcome::Refused(refusal))) => {
                let reason = match refusal.is_unknown_command() {
                    true => Reason::HypervisorUnsupported,
                    false => Reason::HypervisorRefused,
                };
                let context = format!("QEMU {} refused to {purpose}", self.version);
                Err(Error::new(reason, context).because(refusal))
            }
            Ok(Some(Outcome::NotAllowed(refused))) => {
                let context = format!("QEMU was not asked to {purpose}");
                Err(Error::new(Reason::Internal, context).because(refused))
            }
            Ok(None) => Err(self.over(format!("QEMU can no longer {purpose}"))),
            Err(_) => {
                let waited = seconds(begun.elapsed());
                let context = format!("QEMU did not {purpose} within {waited}");
                let advice = format!(
                    "the instance's QEMU hangs or its disks are slow; it listens on {}",
                    self.socket.display()
                );
                Err(Error::new(Reason::HypervisorTimeout, context).advice(advice))
            }
        }
    }

    /// Gives `device` the node `to` instead of `from`.
    ///
    /// QEMU 7.2 aborts, and the VM with it, when a device is given the node
    /// that it has. So its node is looked at first, every time, and this is
    /// the only way to change one. The device's own property does not tell:
    /// for a disk made with `-drive` it names the drive, whatever node is in
    /// it. The statistics do.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute); `HYPERVISOR_REFUSED` when the device is
    /// not there or uses neither node.
    pub async fn switch_drive(
        &self,
        device: &DevicePath,
        from: &NodeRef,
        to: &NodeRef,
        deadline: Instant,
    ) -> Result<Switch> {
        let lock = timeout_at(deadline, self.switching.lock()).await;
        let _switching = lock.context(Reason::HypervisorTimeout, || {
            format!("another change of a node goes before that of {device}")
        })?;
        let devices = self.execute(Command::query_statistics(), deadline).await?;
        let found = devices.into_iter().find(|found| found.qdev.as_ref() == Some(device));
        let refused = |why: String| {
            let context = format!("the device {device} was not given the node {to}");
            Err(Error::new(Reason::HypervisorRefused, context).because(why))
        };
        match found.map(|found| found.node_name) {
            None => refused("QEMU has no such device with a disk".into()),
            Some(None) => refused("it has no node".into()),
            Some(Some(node)) if node == *to => Ok(Switch::AlreadyThere),
            Some(Some(node)) if node == *from => {
                let set = Command::set_drive(device.clone(), to.clone());
                self.execute(set, deadline).await?;
                Ok(Switch::Switched)
            }
            Some(Some(node)) => refused(format!("it has the node {node} instead of {from}")),
        }
    }

    /// Ends QEMU's NBD server, once no exports but imaged's own are on it.
    /// Ending one's own exports first is up to the caller: they would be cut
    /// off.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute); `HYPERVISOR_REFUSED` when somebody
    /// else's exports are served.
    pub async fn stop_nbd_server(&self, deadline: Instant) -> Result<ServerStop> {
        let exports = self.execute(Command::query_exports(), deadline).await?;
        let foreign =
            exports.iter().find(|export| export.kind == "nbd" && !export.id.starts_with(PREFIX));
        if let Some(foreign) = foreign {
            let context = format!(
                "QEMU's NBD server was not ended: it also serves {:?}, which is not imaged's",
                foreign.id
            );
            return Err(Error::new(Reason::HypervisorRefused, context));
        }
        match self.execute(Command::<Done>::stop_nbd_server(), deadline).await {
            Ok(Done {}) => Ok(ServerStop::Stopped),
            // QEMU has no other way to say or to tell that none runs.
            Err(error)
                if Refusal::behind(&error)
                    .is_some_and(|refusal| refusal.description.contains("not running")) =>
            {
                Ok(ServerStop::AlreadyStopped)
            }
            Err(error) => Err(error),
        }
    }

    /// What happens from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        let receiver = match self.events.upgrade() {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1,
        };
        Events { receiver, ended: Arc::clone(&self.ended) }
    }

    /// Which QEMU it is.
    #[must_use]
    pub const fn version(&self) -> &Version {
        &self.version
    }

    /// The process that listens on the socket: QEMU, unless something else
    /// opened the socket for it. `None` when it is in another namespace.
    #[must_use]
    pub const fn process(&self) -> Option<u32> {
        self.process
    }

    /// Ends the session and returns when the monitor is free. What is being
    /// done is not waited for.
    pub async fn close(self) {
        let Self { asks, task, .. } = self;
        drop(asks);
        let _ = task.await;
    }

    fn over(&self, context: String) -> Error {
        over(&self.ended, context)
    }
}

/// The error of a connection that is over.
fn over(ended: &OnceLock<Ended>, context: String) -> Error {
    // Unset only when the runtime is shutting down.
    let ended = ended.get().cloned().unwrap_or(Ended::Closed);
    let reason = match ended.is_gone() {
        true => Reason::HypervisorGone,
        false => Reason::HypervisorUnavailable,
    };
    Error::new(reason, context).because(ended)
}

/// A view of what happens in a QEMU, from when it was asked for.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
    ended: Arc<OnceLock<Ended>>,
}

/// What [`Events`] shows.
#[derive(Debug)]
pub enum Observed {
    /// This happened.
    Event(Box<Event>),
    /// So many events came faster than they were looked at. What they said
    /// is unknown: ask for the state of what matters.
    Missed(u64),
    /// There will be no more: QEMU is gone, or the session has ended.
    Ended(Error),
}

impl Events {
    /// The next event. Waits for ever while nothing happens; dropping the
    /// future loses nothing.
    pub async fn next(&mut self) -> Observed {
        match self.receiver.recv().await {
            Ok(event) => Observed::Event(event.into()),
            Err(broadcast::error::RecvError::Lagged(missed)) => Observed::Missed(missed),
            Err(broadcast::error::RecvError::Closed) => {
                Observed::Ended(over(&self.ended, "QEMU can no longer be observed".into()))
            }
        }
    }
}
