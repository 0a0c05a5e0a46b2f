//! Connections, who is behind them, and whether they may call.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::stream::{self, Stream};
use nix::unistd::{Uid, User};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tonic::{Request, transport::server::Connected};

use crate::{
    error::{Error, Reason, Result},
    sys::peer::PeerCredentials,
};

/// Connections at once. Others wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 128;

/// Wait after a failed accept: usually all file descriptors are in use, and
/// asking again at once would only burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Names of users may come over the network; a number is good enough then.
const NAME_PATIENCE: Duration = Duration::from_secs(1);

/// Who may call.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    /// The user that the daemon runs as.
    pub owner: u32,
    /// The socket's group, if it has one: its members may call.
    pub group: Option<u32>,
}

impl Access {
    /// Whether a peer with these credentials may call. The socket's mode says
    /// the same; this holds also when somebody changes the mode.
    #[must_use]
    pub fn allows(self, peer: &PeerCredentials) -> bool {
        peer.uid == 0
            || peer.uid == self.owner
            || self.group.is_some_and(|group| peer.is_member(group))
    }

    /// Refuses a call of whoever may not.
    ///
    /// # Errors
    ///
    /// `PERMISSION_DENIED`.
    pub fn check(self, peer: &Peer) -> Result<()> {
        if self.allows(&peer.0) {
            return Ok(());
        }
        let uid = peer.0.uid;
        let (message, advice) = match self.group {
            Some(group) => (
                format!(
                    "uid {uid} is neither root nor a member of the group {group} of the socket"
                ),
                "add the user to that group, or ask as root; then connect anew",
            ),
            None => (
                format!("uid {uid} is not root, and the socket has no group"),
                "ask as root; `imagectl host get` tells root how to give the socket a group",
            ),
        };
        Err(Error::new(Reason::PermissionDenied, message).advice(advice))
    }
}

/// Who is at the other end of a connection, as of connecting.
#[derive(Debug, Clone)]
pub struct Peer(Arc<PeerCredentials>);

impl Peer {
    /// Who sent `request`.
    ///
    /// # Errors
    ///
    /// `PERMISSION_DENIED` for a request that came through no connection of
    /// ours.
    pub fn of<T>(request: &Request<T>) -> Result<Self> {
        request.extensions().get::<Self>().cloned().ok_or_else(|| {
            Error::new(Reason::PermissionDenied, "it is not known who sent the request")
        })
    }

    /// The user: `uid 1000 (alice)`.
    pub async fn describe(&self) -> String {
        let uid = self.0.uid;
        let lookup = tokio::task::spawn_blocking(move || User::from_uid(Uid::from_raw(uid)));
        match timeout(NAME_PATIENCE, lookup).await {
            Ok(Ok(Ok(Some(user)))) => format!("uid {uid} ({})", user.name),
            _ => format!("uid {uid}"),
        }
    }
}

/// A connection of a known peer.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    peer: Peer,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    /// The connections that `listener` accepts; never ends and never fails.
    pub fn accept(listener: UnixListener) -> impl Stream<Item = io::Result<Self>> {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        stream::unfold((listener, places), |(listener, places)| async move {
            loop {
                let place = Arc::clone(&places).acquire_owned().await.ok()?;
                match listener.accept().await {
                    Ok((stream, _)) => match PeerCredentials::of(&stream) {
                        Ok(credentials) => {
                            let peer = Peer(Arc::new(credentials));
                            let connection = Self { stream, peer, _place: place };
                            return Some((Ok(connection), (listener, places)));
                        }
                        Err(cause) => {
                            tracing::warn!("a connection is dropped, its peer is unknown: {cause}");
                        }
                    },
                    Err(cause) => {
                        tracing::warn!("no connection can be accepted: {cause}");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        })
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    #[test]
    fn root_the_owner_and_the_group_may_call_and_nobody_else() {
        let access = Access { owner: 500, group: Some(77) };
        let peer = |uid, gid, groups: &[u32]| {
            access.allows(&PeerCredentials { uid, gid, groups: groups.to_vec() })
        };
        assert!(peer(0, 0, &[]), "root");
        assert!(peer(500, 9, &[]), "the daemon's own user");
        assert!(peer(1000, 77, &[]), "primary group");
        assert!(peer(1000, 1000, &[4, 77]), "supplementary group");
        assert!(!peer(1000, 1000, &[4, 78]));
        assert!(!peer(77, 500, &[500]), "a uid is not a gid");
    }

    #[test]
    fn without_a_group_the_group_root_is_nobody_special() {
        let access = Access { owner: 0, group: None };
        let peer = |uid, gid, groups: &[u32]| {
            access.allows(&PeerCredentials { uid, gid, groups: groups.to_vec() })
        };
        assert!(peer(0, 0, &[]));
        assert!(!peer(1000, 0, &[0]));
        assert!(!peer(1000, 1000, &[0]));
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let peer = Peer(Arc::new(PeerCredentials { uid: 1000, gid: 1000, groups: vec![] }));
        let refusal = |group| Access { owner: 0, group }.check(&peer).unwrap_err().report();
        insta::assert_snapshot!(refusal(Some(77)), @"
        uid 1000 is neither root nor a member of the group 77 of the socket
          help: add the user to that group, or ask as root; then connect anew
        ");
        insta::assert_snapshot!(refusal(None), @"
        uid 1000 is not root, and the socket has no group
          help: ask as root; `imagectl host get` tells root how to give the socket a group
        ");
    }

    #[tokio::test]
    async fn a_user_is_described_by_number_and_name() {
        let peer = |uid| Peer(Arc::new(PeerCredentials { uid, gid: 0, groups: vec![] }));
        assert_eq!(peer(0).describe().await, "uid 0 (root)");
        assert_eq!(peer(3_999_999_999).describe().await, "uid 3999999999");
    }

    #[tokio::test]
    async fn so_many_connections_at_once_and_the_next_when_one_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let mut accepted = Box::pin(Connection::accept(UnixListener::bind(&path).unwrap()));
        let mut connections = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            let client = UnixStream::connect(&path).await.unwrap();
            connections.push((client, accepted.next().await.unwrap().unwrap()));
        }
        let _waits = UnixStream::connect(&path).await.unwrap();
        let none = tokio::time::timeout(Duration::from_millis(200), accepted.next()).await;
        assert!(none.is_err(), "one too many");
        connections.remove(0);
        assert!(accepted.next().await.unwrap().is_ok());
    }
}
