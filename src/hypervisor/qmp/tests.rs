//! The client against a peer that follows a script.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
    time::Instant,
};

use super::*;
use crate::{
    error::{Error, Reason},
    hypervisor::Refusal,
    model::trace::Kind,
    recorder::Recorder,
};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}}}"#;

/// QEMU's side of a connection.
struct Peer {
    stream: BufReader<UnixStream>,
}

impl Peer {
    /// The id of the next command, which is `name`.
    async fn expect(&mut self, name: &str) -> u64 {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["execute"], name);
        value["id"].as_u64().unwrap()
    }

    async fn say(&mut self, text: &str) {
        self.stream.get_mut().write_all(format!("{text}\r\n").as_bytes()).await.unwrap();
    }

    async fn done(&mut self, id: u64, value: &str) {
        self.say(&format!(r#"{{"return": {value}, "id": {id}}}"#)).await;
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(200)
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// A session whose other side follows `script` after the greeting.
async fn session<F: Future<Output = ()> + Send + 'static>(
    script: impl FnOnce(Peer) -> F + Send + 'static,
) -> (Qmp, Arc<Recorder>, JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut peer = Peer { stream: BufReader::new(stream) };
        peer.say(GREETING).await;
        let id = peer.expect("qmp_capabilities").await;
        peer.done(id, "{}").await;
        script(peer).await;
    });
    let recorder = Arc::new(Recorder::new());
    let qmp = Qmp::connect(&path, Arc::clone(&recorder), later()).await.unwrap();
    (qmp, recorder, peer)
}

/// What no test here waits for.
fn removal() -> Command<Done> {
    Command::delete_node("imaged-x".parse().unwrap())
}

fn report(error: &Error) -> String {
    format!("{}\n{}", error.reason().code(), error.report())
}

#[tokio::test]
async fn commands_are_answered_and_recorded() {
    let (qmp, recorder, peer) = session(async |mut peer: Peer| {
        let id = peer.expect("query-status").await;
        peer.done(id, r#"{"running": true, "status": "running", "singlestep": false}"#).await;
        let id = peer.expect("blockdev-del").await;
        let error = r#"{"class": "GenericError", "desc": "Node imaged-a is in use"}"#;
        peer.say(&format!(r#"{{"error": {error}, "id": {id}}}"#)).await;
    })
    .await;
    assert_eq!(qmp.version().to_string(), "7.2.22");
    assert_eq!(qmp.process(), Some(std::process::id()));
    let status = qmp.execute(Command::query_status(), later()).await.unwrap();
    assert_eq!(status, Status { running: true, status: "running".into() });
    let node = "imaged-a".parse().unwrap();
    let error = qmp.execute(Command::delete_node(node), later()).await.unwrap_err();
    assert_eq!(Refusal::behind(&error).unwrap().class, "GenericError");
    insta::assert_snapshot!(report(&error), @r#"
    HYPERVISOR_REFUSED
    QEMU 7.2.22 refused to remove the node imaged-a
      0: Node imaged-a is in use (GenericError)
    "#);
    peer.await.unwrap();
    let kinds: Vec<_> = recorder
        .trace()
        .entries
        .into_iter()
        .filter(|entry| entry.kind != Kind::Note)
        .map(|entry| format!("{:?} {}", entry.kind, entry.name))
        .collect();
    assert_eq!(
        kinds,
        [
            "Command qmp_capabilities",
            "Answer qmp_capabilities",
            "Command query-status",
            "Answer query-status",
            "Command blockdev-del",
            "Refusal blockdev-del",
        ]
    );
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_another() {
    let (qmp, recorder, peer) = session(async |mut peer: Peer| {
        let late = peer.expect("blockdev-del").await;
        let now = peer.expect("query-status").await;
        peer.done(late, "{}").await;
        peer.done(now, r#"{"running": false, "status": "paused"}"#).await;
    })
    .await;
    let error = qmp.execute(removal(), soon()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HypervisorTimeout);
    assert_eq!(error.to_string(), "QEMU did not remove the node imaged-x within 0.2 s");
    let status = qmp.execute(Command::query_status(), later()).await.unwrap();
    assert_eq!(status.status, "paused");
    peer.await.unwrap();
    let late = recorder
        .trace()
        .entries
        .into_iter()
        .any(|e| e.kind == Kind::Answer && e.name == "blockdev-del");
    assert!(late, "the late answer is in the recording");
}

#[tokio::test]
async fn death_in_the_middle_wakes_every_waiter() {
    let (qmp, _, peer) = session(async |mut peer: Peer| {
        peer.expect("blockdev-del").await;
        peer.expect("query-jobs").await;
    })
    .await;
    let mut events = qmp.events();
    let (stop, jobs) =
        tokio::join!(qmp.execute(removal(), later()), qmp.execute(Command::query_jobs(), later()),);
    assert_eq!(jobs.unwrap_err().reason(), Reason::HypervisorGone);
    insta::assert_snapshot!(report(&stop.unwrap_err()), @r#"
    HYPERVISOR_GONE
    QEMU can no longer remove the node imaged-x
      0: QEMU has closed the connection
    "#);
    let after = qmp.execute(removal(), later()).await.unwrap_err();
    assert_eq!(after.reason(), Reason::HypervisorGone);
    let Observed::Ended(error) = events.next().await else { panic!() };
    assert_eq!(error.reason(), Reason::HypervisorGone);
    peer.await.unwrap();
}

#[tokio::test]
async fn a_giant_message_ends_the_session_not_the_memory() {
    let (qmp, _, peer) = session(async |mut peer: Peer| {
        peer.expect("query-jobs").await;
        let chunk = vec![b'['; 1 << 20];
        for _ in 0..8 {
            // The client hangs up before the end.
            if peer.stream.get_mut().write_all(&chunk).await.is_err() {
                return;
            }
        }
        panic!("the client took 8 MiB");
    })
    .await;
    let error = qmp.execute(Command::query_jobs(), later()).await.unwrap_err();
    insta::assert_snapshot!(report(&error), @r#"
    HYPERVISOR_UNAVAILABLE
    QEMU can no longer list the jobs
      0: a message of more than 4194304 bytes
    "#);
    drop(qmp);
    peer.await.unwrap();
}

#[tokio::test]
async fn a_flood_of_events_neither_blocks_nor_hides() {
    let (qmp, recorder, peer) = session(async |mut peer: Peer| {
        let id = peer.expect("query-jobs").await;
        for _ in 0..1000 {
            peer.say(r#"{"event": "RESET", "data": {"guest": true, "reason": "guest-reset"}}"#)
                .await;
            peer.say(r#"{"event": "RTC_CHANGE", "data": {"offset": 1}}"#).await;
        }
        peer.say(r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#)
            .await;
        peer.done(id, "[]").await;
        peer.expect("blockdev-del").await;
    })
    .await;
    let mut events = qmp.events();
    assert_eq!(qmp.execute(Command::query_jobs(), later()).await.unwrap(), []);
    let Observed::Missed(missed) = events.next().await else { panic!() };
    let mut last = None;
    let mut seen = 0;
    while let Ok(Observed::Event(event)) =
        tokio::time::timeout(Duration::from_millis(100), events.next()).await
    {
        (seen, last) = (seen + 1, Some(event));
    }
    assert_eq!(missed + seen, 1001, "unknown events are not among them");
    let last = last.unwrap();
    assert_eq!(last.kind, EventKind::Shutdown);
    assert_eq!(last.details.reason.as_deref(), Some("guest-shutdown"));
    assert_eq!(recorder.trace().dropped.events, 2001 - 256);
    let _ = qmp.execute(removal(), soon()).await;
    peer.await.unwrap();
}

#[tokio::test]
async fn a_peer_that_does_not_read_costs_no_more_than_deadlines() {
    let (qmp, _, peer) = session(async |_peer: Peer| std::future::pending().await).await;
    let begun = Clock::now();
    let deadline = soon();
    let waiting = (0..200).map(|_| qmp.execute(Command::query_jobs(), deadline));
    for answer in futures_util::future::join_all(waiting).await {
        assert_eq!(answer.unwrap_err().reason(), Reason::HypervisorTimeout);
    }
    assert!(begun.elapsed() < Duration::from_secs(2));
    peer.abort();
}

#[tokio::test]
async fn what_is_no_qmp_ends_the_session() {
    for odd in
        ["SSH-2.0", r#"{"return": {}}"#, r#"{"error": {"class": "c", "desc": "d"}}"#, GREETING]
    {
        let (qmp, _, peer) = session(async move |mut peer: Peer| {
            peer.expect("blockdev-del").await;
            peer.say(odd).await;
            std::future::pending().await
        })
        .await;
        let error = qmp.execute(removal(), later()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::HypervisorUnavailable, "{odd}: {error:?}");
        peer.abort();
    }
}

#[tokio::test]
async fn closing_frees_the_monitor() {
    let (qmp, _, peer) = session(async |mut peer: Peer| {
        let mut line = String::new();
        assert_eq!(peer.stream.read_line(&mut line).await.unwrap(), 0);
    })
    .await;
    qmp.close().await;
    peer.await.unwrap();
}

/// A socket's path in a directory that lives as long.
fn socket() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    (dir, path)
}

#[tokio::test]
async fn a_monitor_that_another_has_is_told_as_such() {
    let (_dir, path) = socket();
    let _listener = UnixListener::bind(&path).unwrap();
    let error = Qmp::connect(&path, Arc::default(), soon()).await.unwrap_err();
    let text = report(&error).replace(path.to_str().unwrap(), "/run/web-1/qmp");
    insta::assert_snapshot!(text, @r#"
    HYPERVISOR_BUSY
    QEMU did not greet on /run/web-1/qmp within 0.2 s
      help: QEMU serves one client at a time: end the other one (libvirt, a backup tool, a second imaged), or give the instance a QMP socket of imaged's own; `ss -xp` shows who is connected
    "#);
}

#[tokio::test]
async fn nobody_there_means_gone() {
    let (_dir, path) = socket();
    let error = Qmp::connect(&path, Arc::default(), later()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HypervisorGone);
    drop(UnixListener::bind(&path).unwrap());
    let error = Qmp::connect(&path, Arc::default(), later()).await.unwrap_err();
    let text = report(&error).replace(path.to_str().unwrap(), "/run/web-1/qmp");
    insta::assert_snapshot!(text, @r#"
    HYPERVISOR_GONE
    QEMU cannot be reached on /run/web-1/qmp
      0: Connection refused (os error 111)
    "#);
}

/// What happens when a device has `has` and is to have `to` instead of `from`.
async fn switch(has: &'static str, from: &str, to: &str) -> crate::error::Result<Switch> {
    let (qmp, _, peer) = session(async move |mut peer: Peer| {
        let id = peer.expect("query-blockstats").await;
        let devices = format!(r#"[{{"qdev": "d", "node-name": "{has}", "stats": {{}}}}]"#);
        peer.done(id, &devices).await;
        // Anything but a qom-set is the end of the session.
        let mut line = String::new();
        if peer.stream.read_line(&mut line).await.unwrap() > 0 {
            assert!(line.contains("qom-set"), "{line}");
            peer.done(id + 1, "{}").await;
        }
    })
    .await;
    let device = DevicePath::from_qdev("d").unwrap();
    let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
    let switched = qmp.switch_drive(&device, &from, &to, later()).await;
    drop(qmp);
    peer.await.unwrap();
    switched
}

#[tokio::test]
async fn a_device_is_never_given_the_node_that_it_has() {
    assert_eq!(switch("boot", "boot", "imaged-f").await.unwrap(), Switch::Switched);
    assert_eq!(switch("imaged-f", "boot", "imaged-f").await.unwrap(), Switch::AlreadyThere);
    assert_eq!(switch("boot", "boot", "boot").await.unwrap(), Switch::AlreadyThere);
    let error = switch("other", "boot", "imaged-f").await.unwrap_err();
    insta::assert_snapshot!(report(&error), @r#"
    HYPERVISOR_REFUSED
    the device /machine/peripheral/d was not given the node imaged-f
      0: it has the node other instead of boot
    "#);
}

#[tokio::test]
async fn the_server_of_others_is_not_stopped() {
    let (qmp, _, peer) = session(async |mut peer: Peer| {
        for id in ["imaged-e", "backup"] {
            let ask = peer.expect("query-block-exports").await;
            let exports = format!(
                r#"[{{"id": "{id}", "type": "nbd", "node-name": "n", "shutting-down": false}}]"#
            );
            peer.done(ask, &exports).await;
            if id == "imaged-e" {
                let stop = peer.expect("nbd-server-stop").await;
                let error = r#"{"class": "GenericError", "desc": "NBD server not running"}"#;
                peer.say(&format!(r#"{{"error": {error}, "id": {stop}}}"#)).await;
            }
        }
    })
    .await;
    assert_eq!(qmp.stop_nbd_server(later()).await.unwrap(), ServerStop::AlreadyStopped);
    let error = qmp.stop_nbd_server(later()).await.unwrap_err();
    insta::assert_snapshot!(report(&error), @r#"
    HYPERVISOR_REFUSED
    QEMU's NBD server was not ended: it also serves "backup", which is not imaged's
    "#);
    peer.await.unwrap();
}
