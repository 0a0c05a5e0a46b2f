//! QEMU processes with a machine protocol (QMP) socket each.

use std::{
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::time::timeout;

use super::{
    guard::Guards,
    live,
    qmp::{self, NoGreeting},
};
use crate::{
    error::{Context, Reason, Result},
    model::{
        instance::{Instance, PowerState},
        live::Undo,
        upload::ResumeSource,
    },
    port::{BoxFuture, Hypervisor, LiveSnapshot, Prepared, SnapshotOrder},
    recorder::Recorder,
};

/// A QEMU that is alive greets within milliseconds; a loaded host is given
/// this long, and a caller that lists many instances is not kept longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// The instances of a host that plain QEMU runs.
///
/// Whether one runs is asked of its QMP socket: QEMU listens there as long as
/// it lives, and the kernel refuses the connection once it is gone, even when
/// the socket's file is left. An instance whose socket is configured wrongly
/// therefore looks stopped; what really guards its disk is the lock on it.
#[derive(Debug)]
pub struct QemuHost {
    scratch_dir: PathBuf,
    guards: Arc<Guards>,
}

impl QemuHost {
    /// What running instances overwrite while they are imaged goes to
    /// `scratch_dir`; `guards` watch over those that are held.
    #[must_use]
    pub fn new(scratch_dir: PathBuf, guards: Arc<Guards>) -> Self {
        Self { scratch_dir, guards }
    }
}

impl Hypervisor for QemuHost {
    fn power_state<'a>(&'a self, instance: &'a Instance) -> BoxFuture<'a, PowerState> {
        Box::pin(async move {
            match instance.machine.sockets() {
                Some(sockets) => probe(&sockets.qmp_socket, PATIENCE).await,
                None => PowerState::Unknown("it has no QMP socket of its own".into()),
            }
        })
    }

    fn prepare<'a>(
        &'a self,
        instance: &'a Instance,
        order: SnapshotOrder,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async move {
            let random = getrandom::u64()
                .context(Reason::Internal, || "the kernel gives no random numbers")?;
            let tag = format!("{:012x}", random >> 16);
            let guards = Arc::clone(&self.guards);
            live::prepare(instance, order, &self.scratch_dir, tag, guards, recorder).await
        })
    }

    fn regain<'a>(
        &'a self,
        undo: &'a Undo,
        source: &'a ResumeSource,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn LiveSnapshot>>> {
        Box::pin(live::regain(undo, source, recorder))
    }

    fn undo<'a>(&'a self, undo: &'a Undo, recorder: Arc<Recorder>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            live::undo(undo, recorder).await?;
            self.guards.lift(undo).await;
            Ok(())
        })
    }
}

/// Greets and goes: QEMU serves one client at a time, so its monitor is held
/// for no longer than a greeting takes.
async fn probe(socket: &Path, patience: Duration) -> PowerState {
    let unknown = |why: &dyn std::fmt::Display| {
        PowerState::Unknown(format!("the QMP socket {} {why}", socket.display()))
    };
    match timeout(patience, qmp::greet(socket)).await {
        Ok(Ok(_)) => PowerState::Running,
        Ok(Err(NoGreeting::NotQmp)) => unknown(&"is served by something that does not speak QMP"),
        Ok(Err(NoGreeting::Closed)) => unknown(&"was closed before a greeting"),
        Ok(Err(NoGreeting::Read(cause))) => unknown(&format_args!("cannot be asked: {cause}")),
        // QEMU lets other clients wait in the backlog, or is too busy to
        // greet. Somebody listens either way, and taking a running instance
        // for stopped is the mistake that harms.
        Err(_) => PowerState::Running,
        Ok(Err(NoGreeting::Connect(cause))) => match cause.kind() {
            io::ErrorKind::NotFound => PowerState::Stopped,
            // The kernel's answer for a plain file, too.
            io::ErrorKind::ConnectionRefused => match tokio::fs::metadata(socket).await {
                Ok(file) if !file.file_type().is_socket() => unknown(&"is not a socket"),
                _ => PowerState::Stopped,
            },
            // The backlog is full.
            io::ErrorKind::WouldBlock => PowerState::Running,
            _ => unknown(&format_args!("cannot be asked: {cause}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt, net::UnixListener};

    use super::*;

    const SHORT: Duration = Duration::from_millis(100);
    const GREETING: &[u8] =
        b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}}}}\r\n";

    /// What the probe says when the socket's owner sends `bytes` and then
    /// waits or closes.
    async fn served(bytes: &'static [u8], close: bool) -> PowerState {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            client.write_all(bytes).await.unwrap();
            if !close {
                std::future::pending::<()>().await;
            }
        });
        let state = probe(&path, SHORT).await;
        server.abort();
        state
    }

    fn unknown(state: PowerState, what: &str) {
        match state {
            PowerState::Unknown(why) => assert!(why.contains(what), "{why}"),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_greeting_means_running() {
        assert_eq!(served(GREETING, false).await, PowerState::Running);
    }

    #[tokio::test]
    async fn a_silent_listener_means_that_another_client_holds_qmp() {
        assert_eq!(served(b"", false).await, PowerState::Running);
    }

    #[tokio::test]
    async fn what_is_not_qmp_is_unknown() {
        unknown(served(b"SSH-2.0-OpenSSH\r\n", false).await, "does not speak QMP");
        unknown(served(b"", true).await, "closed before a greeting");
    }

    #[tokio::test]
    async fn no_socket_or_nobody_behind_it_means_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        assert_eq!(probe(&path, SHORT).await, PowerState::Stopped);
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        assert_eq!(probe(&path, SHORT).await, PowerState::Stopped);
    }

    #[tokio::test]
    async fn a_path_that_is_no_socket_is_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        std::fs::write(&path, "").unwrap();
        unknown(probe(&path, SHORT).await, "is not a socket");
        unknown(probe(&path.join("below"), SHORT).await, "Not a directory");
    }

    #[tokio::test]
    async fn a_full_backlog_means_running() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let socket = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::Stream,
            nix::sys::socket::SockFlag::empty(),
            None,
        )
        .unwrap();
        let address = nix::sys::socket::UnixAddr::new(&path).unwrap();
        nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).unwrap();
        nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let _waiting = std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert_eq!(probe(&path, SHORT).await, PowerState::Running);
    }
}
