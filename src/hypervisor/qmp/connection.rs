//! One connection to QEMU: a task that owns the socket.
//!
//! ```text
//! callers ──asks──► task ──socket──► QEMU
//!    ▲                │ ◄───────────
//!    ├──answers───────┤
//!    └──events────────┘
//! ```
//! The task ends when nobody can ask any more, or when QEMU or the protocol
//! does. It never waits for a caller: what a caller has stopped waiting for
//! is received and recorded all the same, so the connection stays in step.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, OnceLock},
};

use serde_json::value::RawValue;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot},
};

use super::{
    call::Call,
    codec::{self, MAX_MESSAGE, Malformed, Message, Version},
    event::{Event, EventKind},
};
use crate::{
    hypervisor::{
        allowed::NotAllowed,
        keep::Keep,
        lines::{Lines, TooLong},
        refusal::Refusal,
    },
    model::trace::{Channel, Kind},
    recorder::{Lane, Recorder},
};

/// Commands without an answer yet. A capture sends one after the other; the
/// rest are those whose callers no longer wait.
const MAX_WAITING: usize = 64;

/// Bytes read at once. Most messages have some hundred.
const CHUNK: usize = 16 << 10;

/// Greetings have some hundred bytes. What sends more is not QEMU.
const MAX_GREETING: usize = 64 << 10;

/// Why a connection is over.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Ended {
    #[error("QEMU has closed the connection")]
    Closed,
    #[error("{0}")]
    Io(Arc<io::Error>),
    #[error(transparent)]
    TooLong(#[from] TooLong),
    #[error("{0}")]
    Malformed(Arc<Malformed>),
    #[error("QEMU could not read what was sent: {0}")]
    Unread(Refusal),
}

impl Ended {
    /// Whether QEMU itself has gone, as far as the socket shows.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Closed | Self::Io(_))
    }
}

/// Why there is no greeting.
#[derive(Debug)]
pub(crate) enum NoGreeting {
    /// Nobody can be reached.
    Connect(io::Error),
    /// The connection was closed first.
    Closed,
    /// The connection broke.
    Read(io::Error),
    /// Something else was said.
    NotQmp,
}

/// Connects and reads QEMU's greeting. May wait for ever: QEMU greets one
/// client at a time.
pub(crate) async fn greet(socket: &Path) -> Result<Greeted, NoGreeting> {
    let mut stream = UnixStream::connect(socket).await.map_err(NoGreeting::Connect)?;
    let mut lines = Lines::new(MAX_GREETING);
    loop {
        // QEMU says nothing more until it is asked, so nothing is lost that
        // was read behind the greeting.
        match lines.next_line() {
            Some(Ok(line)) => match codec::decode(&line) {
                Ok(Message::Greeting(version)) => return Ok(Greeted { stream, version }),
                _ => return Err(NoGreeting::NotQmp),
            },
            Some(Err(_)) => return Err(NoGreeting::NotQmp),
            None => {}
        }
        let mut chunk = [0; 1024];
        match stream.read(&mut chunk).await {
            Ok(0) if lines.untaken() == 0 => return Err(NoGreeting::Closed),
            Ok(0) => return Err(NoGreeting::NotQmp),
            Ok(count) => lines.push(&chunk[..count]),
            Err(cause) if cause.kind() == io::ErrorKind::ConnectionReset => {
                return Err(NoGreeting::Closed);
            }
            Err(cause) => return Err(NoGreeting::Read(cause)),
        }
    }
}

/// A QEMU that is ready for a client.
#[derive(Debug)]
pub(crate) struct Greeted {
    pub(super) stream: UnixStream,
    pub(super) version: Version,
}

/// A command on its way.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) call: Call,
    pub(super) done: oneshot::Sender<Outcome>,
}

/// What became of it. No outcome at all: the connection ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Done(Box<RawValue>),
    Refused(Refusal),
    NotAllowed(NotAllowed),
}

/// What the task works with.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) recorder: Arc<Recorder>,
    pub(super) asks: mpsc::Receiver<Ask>,
    pub(super) events: broadcast::Sender<Event>,
    pub(super) ended: Arc<OnceLock<Ended>>,
    waiting: HashMap<u64, Waiting>,
    next_id: u64,
    outgoing: Vec<u8>,
}

#[derive(Debug)]
struct Waiting {
    name: &'static str,
    lane: Lane,
    keep: Keep,
    done: oneshot::Sender<Outcome>,
}

impl Connection {
    pub(super) fn new(
        recorder: Arc<Recorder>,
        asks: mpsc::Receiver<Ask>,
        events: broadcast::Sender<Event>,
        ended: Arc<OnceLock<Ended>>,
    ) -> Self {
        let waiting = HashMap::new();
        Self { recorder, asks, events, ended, waiting, next_id: 1, outgoing: Vec::new() }
    }

    /// Serves until the end.
    pub(super) async fn run(mut self, stream: UnixStream) {
        if let Err(ended) = self.serve(stream).await {
            self.recorder.note(format!("the connection to QEMU ended: {ended}"));
            // Before the callers wake, who look there.
            let _ = self.ended.set(ended);
        }
    }

    async fn serve(&mut self, stream: UnixStream) -> Result<(), Ended> {
        let (mut reader, mut writer) = stream.into_split();
        let mut lines = Lines::new(MAX_MESSAGE);
        let mut chunk = vec![0; CHUNK];
        loop {
            // All three can be dropped halfway without losing anything.
            tokio::select! {
                read = reader.read(&mut chunk) => {
                    match read.map_err(|cause| Ended::Io(Arc::new(cause)))? {
                        0 => return Err(Ended::Closed),
                        count => lines.push(&chunk[..count]),
                    }
                    while let Some(line) = lines.next_line() {
                        self.receive(codec::decode(&line?))?;
                    }
                }
                written = writer.write(&self.outgoing), if !self.outgoing.is_empty() => {
                    let count = written.map_err(|cause| Ended::Io(Arc::new(cause)))?;
                    self.outgoing.drain(..count);
                }
                ask = self.asks.recv(), if self.has_room() => match ask {
                    Some(ask) => self.send(ask),
                    None => return Ok(()),
                },
            }
        }
    }

    /// Whether another command may be sent. A QEMU that does not answer
    /// leaves further callers to their deadlines.
    fn has_room(&self) -> bool {
        self.outgoing.is_empty() && self.waiting.len() < MAX_WAITING
    }

    fn send(&mut self, Ask { call, done }: Ask) {
        // Who has given up already has been told that nothing was sent.
        if done.is_closed() {
            return;
        }
        let id = self.next_id;
        match codec::encode(&call, id) {
            Ok(line) => self.outgoing = line,
            Err(refused) => return drop(done.send(Outcome::NotAllowed(refused))),
        }
        self.next_id += 1;
        let (name, lane, keep) = (call.name(), call.lane(), call.keep());
        let arguments = serde_json::to_value(&call).ok();
        let arguments = arguments.and_then(|mut call| Some(call.get_mut("arguments")?.take()));
        self.recorder.record(lane, Channel::Qmp, Kind::Command, name, Some(id), arguments);
        self.waiting.insert(id, Waiting { name, lane, keep, done });
    }

    fn receive(&mut self, message: Result<Message, Malformed>) -> Result<(), Ended> {
        match message.map_err(|cause| Ended::Malformed(Arc::new(cause)))? {
            Message::Answer { id, value } => {
                let Some(waiting) = self.waiting.remove(&id) else { return Ok(()) };
                let Waiting { name, lane, keep, done } = waiting;
                let data = Some(keep.of_text(value.get()));
                self.recorder.record(lane, Channel::Qmp, Kind::Answer, name, Some(id), data);
                let _ = done.send(Outcome::Done(value));
            }
            Message::Refused { id: Some(id), refusal } => {
                let Some(waiting) = self.waiting.remove(&id) else { return Ok(()) };
                let Waiting { name, lane, done, .. } = waiting;
                let data = Some(refusal.to_string().into());
                self.recorder.record(lane, Channel::Qmp, Kind::Refusal, name, Some(id), data);
                let _ = done.send(Outcome::Refused(refusal));
            }
            // Whom it answers is unknown, so nobody can be answered any more.
            Message::Refused { id: None, refusal } => return Err(Ended::Unread(refusal)),
            Message::Event(event) => {
                let (name, data) = (event.kind.name(), event.recorded());
                self.recorder.record(Lane::Events, Channel::Qmp, Kind::Event, name, None, data);
                // What nobody knows only pushes out what observers wait for.
                if !matches!(event.kind, EventKind::Other(_)) {
                    let _ = self.events.send(event);
                }
            }
            Message::Greeting(_) => return Err(Ended::Malformed(Arc::new(Malformed::Kind))),
        }
        Ok(())
    }
}
