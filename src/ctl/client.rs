//! The way to imaged: one connection over its Unix socket.

use std::time::Duration;
use std::{
    error::Error as StdError, fs, future::Future, io, os::unix::fs::MetadataExt, path::Path,
};

use nix::unistd::{Gid, Group};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};

use super::{args::DEFAULT_SOCKET, exit::Exit, failure::Failure};
use crate::pb::{
    host_service_client::HostServiceClient, image_service_client::ImageServiceClient,
    instance_service_client::InstanceServiceClient, store_service_client::StoreServiceClient,
    volume_service_client::VolumeServiceClient,
    work_request_service_client::WorkRequestServiceClient,
};

/// imaged accepts at once; a backlog that is full this long is a hung daemon.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Longest call that is answered once. The slowest removes the files of a
/// large image.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(60);

/// Pause before a call is made once more: systemd starts imaged again in
/// less.
const SECOND_CALL_AFTER: Duration = Duration::from_secs(1);

/// How often a silent daemon is asked whether it lives, and how long it may
/// take to say so: a stream without news is else not told from a dead peer.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Largest answer: 1000 work requests with their logs are a few MiB.
const MAX_ANSWER: usize = 32 << 20;

/// A connection. Clients of the services share it; it reconnects by itself
/// when a call finds it broken.
#[derive(Debug, Clone)]
pub(super) struct Client {
    channel: Channel,
    socket: String,
}

macro_rules! services {
    ($($name:ident -> $client:ident,)+) => {
        $(pub fn $name(&self) -> $client<Channel> {
            $client::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
        })+
    };
}

impl Client {
    /// Connects to the imaged that listens on `socket`.
    pub async fn connect(socket: &str) -> Result<Self, Failure> {
        let endpoint = Endpoint::try_from(format!("unix:{socket}")).map_err(|error| {
            Failure::new(Exit::Usage, format!("{socket:?} cannot be the path of a socket"))
                .cause(error)
        })?;
        let endpoint = endpoint
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        match tokio::time::timeout(CONNECT_LIMIT, endpoint.connect()).await {
            Ok(Ok(channel)) => Ok(Self { channel, socket: socket.to_owned() }),
            Ok(Err(error)) => Err(not_connected(socket, &error).await),
            Err(_) => Err(Failure::silent(CONNECT_LIMIT)),
        }
    }

    services! {
        images -> ImageServiceClient,
        instances -> InstanceServiceClient,
        work_requests -> WorkRequestServiceClient,
        host -> HostServiceClient,
        stores -> StoreServiceClient,
        volumes -> VolumeServiceClient,
    }

    /// Waits for one answer, no longer than [`CALL_LIMIT`].
    pub async fn call<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        self.explain(limited(call).await).await
    }

    /// As [`Self::call`], and asks once more when the connection breaks
    /// before the answer. For requests with a retry token: imaged does not do
    /// them twice.
    pub async fn call_twice<T, F>(&self, mut call: impl FnMut() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        match limited(call()).await {
            Some(Err(status)) if is_broken(&status) => {
                tokio::time::sleep(SECOND_CALL_AFTER).await;
                self.call(call()).await
            }
            answer => self.explain(answer).await,
        }
    }

    /// What `status` means for the user.
    pub async fn failure(&self, status: &Status) -> Failure {
        if !is_broken(status) {
            return Failure::refused(status);
        }
        match os_error(status).filter(|error| is_connect_error(error)) {
            Some(_) => not_connected(&self.socket, status).await,
            None => Failure::disconnected(status),
        }
    }

    async fn explain<T>(&self, answer: Option<Result<Response<T>, Status>>) -> Result<T, Failure> {
        match answer {
            Some(Ok(response)) => Ok(response.into_inner()),
            Some(Err(status)) => Err(self.failure(&status).await),
            None => Err(Failure::silent(CALL_LIMIT)),
        }
    }

    /// A command for the user to type that reaches the same imaged.
    pub fn command(&self, verb: &str) -> String {
        if self.socket == DEFAULT_SOCKET {
            format!("imagectl {verb}")
        } else {
            format!("imagectl --socket {} {verb}", self.socket)
        }
    }
}

async fn limited<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Option<Result<Response<T>, Status>> {
    tokio::time::timeout(CALL_LIMIT, call).await.ok()
}

/// Whether the connection failed, not imaged: a status that imaged sent has
/// no source.
pub(super) fn is_broken(status: &Status) -> bool {
    status.source().is_some()
}

fn os_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref() {
            return Some(error);
        }
        next = error.source();
    }
    None
}

fn is_connect_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
    matches!(error.kind(), ConnectionRefused | NotFound | PermissionDenied)
}

/// Says why there is no connection and what to do about it.
async fn not_connected(socket: &str, error: &(dyn StdError + 'static)) -> Failure {
    let failure = Failure::new(Exit::Unreachable, format!("cannot connect to imaged at {socket}"));
    let Some(error) = os_error(error) else {
        return failure.cause(error);
    };
    let (failure, kind) = (failure.cause(error), error.kind());
    let path = socket.to_owned();
    let advice = tokio::task::spawn_blocking(move || advice(Path::new(&path), kind)).await;
    match advice {
        Ok(advice) => failure.help(advice),
        Err(_) => failure,
    }
}

fn advice(socket: &Path, kind: io::ErrorKind) -> String {
    match kind {
        io::ErrorKind::NotFound => "imaged is not running, or listens elsewhere: see \
             `systemctl status imaged`, or name the socket by --socket"
            .into(),
        io::ErrorKind::ConnectionRefused => "imaged is not running, it left its socket behind: \
             see `systemctl status imaged`"
            .into(),
        io::ErrorKind::PermissionDenied => match group_of(socket) {
            // Nobody is to join that one.
            Some(group) if group == "root" => "only root may: use sudo".into(),
            Some(group) => format!(
                "only root and members of the group `{group}` may: become one by \
                 `usermod -aG {group} USER` and log in again, or use sudo"
            ),
            None => "become a member of the socket's group, or use sudo".into(),
        },
        _ => "see `systemctl status imaged`, or name the socket by --socket".into(),
    }
}

/// The group that may connect: the socket's, or its directory's where that
/// is closed.
fn group_of(socket: &Path) -> Option<String> {
    let owner =
        fs::metadata(socket).or_else(|_| fs::metadata(socket.parent().unwrap_or(socket))).ok()?;
    let group = Group::from_gid(Gid::from_raw(owner.gid())).ok()??;
    Some(group.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_connect_learns_which_group_may() {
        let dir = tempfile::tempdir().unwrap();
        let group = Group::from_gid(nix::unistd::getegid()).unwrap().unwrap().name;
        let absent = dir.path().join("imaged.sock");
        for path in [dir.path(), &absent] {
            let advice = advice(path, io::ErrorKind::PermissionDenied);
            let expected = if group == "root" { "only root".into() } else { format!("`{group}`") };
            assert!(advice.contains(&expected), "{advice}");
        }
    }
}
