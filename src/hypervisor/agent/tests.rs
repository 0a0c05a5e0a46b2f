//! The client against an agent that follows a script.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
    time::Instant,
};

use super::*;
use crate::{
    error::{Error, Reason, Result},
    model::trace::{Kind, Trace},
    recorder::Recorder,
};

/// The guest's side.
struct Peer {
    listener: UnixListener,
    stream: Option<BufReader<UnixStream>>,
}

impl Peer {
    async fn stream(&mut self) -> &mut BufReader<UnixStream> {
        if self.stream.is_none() {
            let (stream, _) = self.listener.accept().await.unwrap();
            self.stream = Some(BufReader::new(stream));
        }
        self.stream.as_mut().unwrap()
    }

    /// The number of the next command, a sync, which begins with a sentinel.
    async fn sync(&mut self) -> u64 {
        let mut line = Vec::new();
        self.stream().await.read_until(b'\n', &mut line).await.unwrap();
        let value: serde_json::Value = serde_json::from_slice(&line[1..]).unwrap();
        assert_eq!((line[0], &value["execute"]), (0xff, &"guest-sync-delimited".into()));
        value["arguments"]["id"].as_u64().unwrap()
    }

    /// The next command is `name`.
    async fn expect(&mut self, name: &str) {
        let mut line = String::new();
        self.stream().await.read_line(&mut line).await.unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["execute"], name);
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream().await.get_mut().write_all(bytes).await.unwrap();
    }

    async fn say(&mut self, text: &str) {
        self.send(format!("{text}\n").as_bytes()).await;
    }

    /// Gets in step, as an agent does.
    async fn in_step(&mut self) {
        let id = self.sync().await;
        self.synced(id).await;
    }

    async fn synced(&mut self, id: u64) {
        self.send(&[b"\xff", format!("{{\"return\": {id}}}\n").as_bytes()].concat()).await;
    }

    /// Answers the first ping, which `Agent::connect` sends.
    async fn connected(&mut self) {
        self.in_step().await;
        self.expect("guest-ping").await;
        self.say(r#"{"return": {}}"#).await;
    }
}

struct Lab {
    path: PathBuf,
    recorder: Arc<Recorder>,
    peer: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new<F: Future<Output = ()> + Send + 'static>(
        script: impl FnOnce(Peer) -> F + Send + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let peer = tokio::spawn(script(Peer { listener, stream: None }));
        Self { path, recorder: Arc::default(), peer, _dir: dir }
    }

    async fn connect(&self, deadline: Instant) -> Result<Agent> {
        Agent::connect(&self.path, Arc::clone(&self.recorder), deadline).await
    }

    async fn finish(self) -> Trace {
        self.peer.await.unwrap();
        self.recorder.trace()
    }

    fn report(&self, error: &Error) -> String {
        let text = format!("{}\n{}", error.reason().code(), error.report());
        text.replace(self.path.to_str().unwrap(), "/run/web-1/agent")
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(200)
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[tokio::test]
async fn junk_before_the_sentinel_is_left_behind() {
    let lab = Lab::new(async |mut peer: Peer| {
        let id = peer.sync().await;
        // What an earlier client was owed, one answer cut off.
        peer.say(r#"{"return": 3}"#).await;
        peer.send(b"\xff{\"return\": 99}\n{\"return\": {\"vers").await;
        peer.synced(id).await;
        peer.expect("guest-ping").await;
        peer.say(r#"{"return": {}}"#).await;
        peer.expect("guest-fsfreeze-status").await;
        peer.say(r#"{"return": "frozen"}"#).await;
    });
    let agent = lab.connect(later()).await.unwrap();
    assert_eq!(agent.freeze_status(later()).await.unwrap(), FreezeStatus::Frozen);
    let trace = lab.finish().await;
    let synced = trace.entries.iter().find(|entry| entry.kind == Kind::Answer).unwrap();
    assert_eq!(synced.name, "guest-sync-delimited");
    assert!(synced.data.as_ref().unwrap()["discardedBytes"].as_u64() > Some(20), "{synced:?}");
}

#[tokio::test]
async fn a_late_answer_is_never_taken_for_the_next() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.connected().await;
        peer.expect("guest-fsfreeze-freeze").await;
        let id = peer.sync().await;
        peer.say(r#"{"return": 3}"#).await;
        peer.synced(id).await;
        peer.expect("guest-fsfreeze-thaw").await;
        peer.say(r#"{"return": 5}"#).await;
    });
    let agent = lab.connect(later()).await.unwrap();
    let error = agent.freeze(soon()).await.unwrap_err();
    insta::assert_snapshot!(lab.report(&error), @r#"
    GUEST_AGENT_TIMEOUT
    the guest agent did not freeze the guest's filesystems within 0.2 s
    "#);
    assert_eq!(agent.thaw(later()).await.unwrap(), 5);
    lab.finish().await;
}

#[tokio::test]
async fn nothing_is_sent_to_an_agent_that_is_out_of_step() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.connected().await;
        peer.expect("guest-fsfreeze-freeze").await;
        // Hung: three tries, of which each is a sync and nothing else.
        for _ in 0..2 {
            peer.sync().await;
        }
        let id = peer.sync().await;
        peer.say(r#"{"return": 3}"#).await;
        peer.synced(1).await;
        peer.synced(id).await;
        peer.expect("guest-fsfreeze-thaw").await;
        peer.say(r#"{"return": 3}"#).await;
    });
    let agent = lab.connect(later()).await.unwrap();
    assert_eq!(agent.freeze(soon()).await.unwrap_err().reason(), Reason::GuestAgentTimeout);
    for _ in 0..2 {
        let error = agent.thaw(soon()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::GuestAgentUnavailable);
    }
    assert_eq!(agent.thaw(later()).await.unwrap(), 3);
    lab.finish().await;
}

#[tokio::test]
async fn a_dropped_call_costs_a_sync() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.connected().await;
        peer.expect("guest-info").await;
        peer.say(r#"{"return": {"version": "1", "supported_commands": []}}"#).await;
        peer.in_step().await;
        peer.expect("guest-get-host-name").await;
        peer.say(r#"{"return": {"host-name": "web-1"}}"#).await;
    });
    let agent = lab.connect(later()).await.unwrap();
    tokio::select! {
        biased;
        _ = agent.info(later()) => panic!("it was not to wait"),
        () = async {} => {}
    }
    assert_eq!(agent.host_name(later()).await.unwrap(), "web-1");
    lab.finish().await;
}

#[tokio::test]
async fn a_connection_that_ends_is_made_anew() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.connected().await;
        peer.stream = None;
        peer.in_step().await;
        peer.expect("guest-fsfreeze-thaw").await;
        // Death after the command.
        peer.stream = None;
        peer.in_step().await;
        peer.expect("guest-fsfreeze-thaw").await;
        peer.say(r#"{"return": 0}"#).await;
    });
    let agent = lab.connect(later()).await.unwrap();
    // Let the end arrive.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let error = agent.thaw(later()).await.unwrap_err();
    insta::assert_snapshot!(lab.report(&error), @r#"
    GUEST_AGENT_TIMEOUT
    the guest agent was lost while asked to thaw the guest's filesystems
      0: QEMU has closed the connection
    "#);
    assert_eq!(agent.thaw(later()).await.unwrap(), 0);
    lab.finish().await;
}

#[tokio::test]
async fn a_giant_answer_is_skipped_not_kept() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.connected().await;
        peer.expect("guest-get-fsinfo").await;
        // The client hangs up before the end.
        let giant = vec![b'['; 3 << 20];
        peer.stream().await.get_mut().write_all(&giant).await.unwrap_err();
        peer.stream = None;
        let id = peer.sync().await;
        peer.send(&vec![b'['; 3 << 20]).await;
        peer.send(b"\n").await;
        peer.synced(id).await;
        peer.expect("guest-ping").await;
        peer.say(r#"{"return": {}}"#).await;
    });
    let agent = lab.connect(later()).await.unwrap();
    let error = agent.filesystems(later()).await.unwrap_err();
    insta::assert_snapshot!(lab.report(&error), @r#"
    GUEST_AGENT_TIMEOUT
    the guest agent was lost while asked to list the guest's filesystems
      0: a message of more than 1048576 bytes
    "#);
    agent.ping(later()).await.unwrap();
    lab.peer.abort();
}

#[tokio::test]
async fn a_chatty_agent_is_put_back_in_step() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.connected().await;
        peer.expect("guest-fsfreeze-freeze").await;
        peer.say("{\"return\": 3}\n{\"return\": 7}").await;
        peer.in_step().await;
        peer.expect("guest-fsfreeze-thaw").await;
        peer.say(r#"{"return": 3}"#).await;
    });
    let agent = lab.connect(later()).await.unwrap();
    assert_eq!(agent.freeze(later()).await.unwrap(), 3);
    assert_eq!(agent.thaw(later()).await.unwrap(), 3);
    lab.finish().await;
}

#[tokio::test]
async fn refusals_tell_disabled_from_frozen() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.connected().await;
        for why in ["", ": the agent is in frozen state"] {
            peer.expect("guest-get-osinfo").await;
            let desc = format!("Command guest-get-osinfo has been disabled{why}");
            peer.say(&format!(r#"{{"error": {{"class": "CommandNotFound", "desc": "{desc}"}}}}"#))
                .await;
        }
        peer.expect("guest-fsfreeze-freeze").await;
        peer.say(r#"{"error": {"class": "GenericError", "desc": "hook\u001b[2J failed"}}"#).await;
    });
    let agent = lab.connect(later()).await.unwrap();
    let disabled = agent.os_info(later()).await.unwrap_err();
    assert_eq!(disabled.reason(), Reason::GuestAgentDisabled);
    let frozen = agent.os_info(later()).await.unwrap_err();
    assert_eq!(frozen.reason(), Reason::GuestAgentRefused);
    insta::assert_snapshot!(lab.report(&agent.freeze(later()).await.unwrap_err()), @r#"
    GUEST_AGENT_REFUSED
    the guest agent refused to freeze the guest's filesystems
      0: hook [2J failed (GenericError)
    "#);
    lab.finish().await;
}

#[tokio::test]
async fn an_odd_answer_is_no_refusal() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.connected().await;
        peer.expect("guest-fsfreeze-freeze").await;
        peer.say(r#"{"return": -1}"#).await;
    });
    let agent = lab.connect(later()).await.unwrap();
    let error = agent.freeze(later()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::GuestAgentTimeout, "the guest may be frozen: {error:?}");
    lab.finish().await;
}

#[tokio::test]
async fn no_agent_is_told_as_such() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.sync().await;
        std::future::pending().await
    });
    insta::assert_snapshot!(lab.report(&lab.connect(soon()).await.unwrap_err()), @r#"
    GUEST_AGENT_UNAVAILABLE
    no guest agent answers on /run/web-1/agent
      0: nothing came within 0.2 s
      help: see that the agent runs in the guest (qemu-guest-agent), and that no other program is connected to its socket: QEMU serves one at a time; or ask for a crash-consistent image
    "#);
    lab.peer.abort();

    let none = Lab::new(async |peer: Peer| drop(peer));
    tokio::time::sleep(Duration::from_millis(20)).await;
    insta::assert_snapshot!(none.report(&none.connect(soon()).await.unwrap_err()), @r#"
    GUEST_AGENT_UNAVAILABLE
    no guest agent answers on /run/web-1/agent
      0: Connection refused (os error 111)
      help: see that the agent runs in the guest (qemu-guest-agent), and that no other program is connected to its socket: QEMU serves one at a time; or ask for a crash-consistent image
    "#);
}

#[tokio::test]
async fn one_command_at_a_time() {
    let lab = Lab::new(async |mut peer: Peer| {
        peer.connected().await;
        for _ in 0..2 {
            peer.expect("guest-ping").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            peer.say(r#"{"return": {}}"#).await;
        }
    });
    let agent = lab.connect(later()).await.unwrap();
    let (one, two) = tokio::join!(agent.ping(later()), agent.ping(later()));
    one.and(two).unwrap();
    lab.finish().await;
}
