//! Who is at the other end of a Unix socket.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::sys::socket::{getsockopt, sockopt};

/// The peer of a Unix socket as the kernel saw it when it connected.
///
/// The process id is left out on purpose: it may belong to another process by
/// the time it is looked at, and must not decide what a caller may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Effective user.
    pub uid: u32,
    /// Effective primary group.
    pub gid: u32,
    /// Supplementary groups, in the kernel's order; may or may not contain
    /// `gid`.
    pub groups: Vec<u32>,
}

impl PeerCredentials {
    /// Credentials of the peer of `socket`, a connected `AF_UNIX` stream
    /// (`SO_PEERCRED`, which tells the primary group only, and
    /// `SO_PEERGROUPS`, Linux 4.13; see unix(7) and socket(7)).
    ///
    /// # Errors
    ///
    /// What the kernel says: `ENOTSOCK`, `ENODATA` for a socket of another
    /// kind.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let fd = socket.as_fd();
        let peer = getsockopt(&fd, sockopt::PeerCredentials)?;
        Ok(Self { uid: peer.uid(), gid: peer.gid(), groups: groups(fd.as_raw_fd())? })
    }

    /// Whether the peer is in group `gid`, primary or supplementary.
    #[must_use]
    pub fn is_member(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }
}

fn groups(fd: libc::c_int) -> io::Result<Vec<u32>> {
    // Enough for almost everyone; otherwise the kernel tells how many, once,
    // for the list of a connected peer does not change.
    let mut groups = vec![0_u32; 32];
    for _ in 0..2 {
        let bytes = size_of_val(groups.as_slice());
        let mut len = libc::socklen_t::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: `groups` has `len` writable bytes, `len` is writable, both
        // outlive the call.
        let answer = unsafe {
            libc::getsockopt(
                fd,
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let count = len as usize / size_of::<u32>();
        if answer == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) {
            return Err(error);
        }
        groups.resize(count, 0);
    }
    Err(io::Error::from_raw_os_error(libc::ERANGE))
}

/// The process that listens at the other end of `socket`, a connected
/// `AF_UNIX` stream: more exactly the one that called listen(2), which may
/// have ended since, and may have given the socket to another (unix(7),
/// `SO_PEERCRED`). `None` when it is not in this process's pid namespace.
///
/// Good for saying who it is; whoever acts on it must make sure first.
///
/// # Errors
///
/// What the kernel says: `ENOTSOCK`.
pub fn listener(socket: impl AsFd) -> io::Result<Option<u32>> {
    let peer = getsockopt(&socket.as_fd(), sockopt::PeerCredentials)?;
    Ok(u32::try_from(peer.pid()).ok().filter(|&pid| pid != 0))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::unistd::{getegid, geteuid, getgroups};

    use super::*;

    #[test]
    fn a_pair_of_sockets_shows_this_process() {
        let (here, _there) = UnixStream::pair().unwrap();
        let peer = PeerCredentials::of(&here).unwrap();
        let mut expected: Vec<_> = getgroups().unwrap().iter().map(|gid| gid.as_raw()).collect();
        let mut groups = peer.groups.clone();
        expected.sort_unstable();
        groups.sort_unstable();
        assert_eq!((peer.uid, peer.gid), (geteuid().as_raw(), getegid().as_raw()));
        assert_eq!(groups, expected);
        assert_eq!(listener(&here).unwrap(), Some(std::process::id()));
        assert!(peer.is_member(peer.gid));
        assert!(!peer.is_member(u32::MAX));
    }

    #[test]
    #[ignore = "needs root and setpriv"]
    fn root_more_groups_than_the_first_guess() {
        use std::{os::unix::net::UnixListener, process::Command};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let list = (1000..1100).map(|gid| gid.to_string()).collect::<Vec<_>>().join(",");
        let connect = format!(
            "use Socket; socket(S,AF_UNIX,SOCK_STREAM,0); connect(S,pack_sockaddr_un('{}'))||die; sleep 5",
            path.display()
        );
        let mut client = Command::new("setpriv")
            .args(["--groups", &list, "perl", "-e", &connect])
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().unwrap();
        let peer = PeerCredentials::of(&stream);
        client.kill().unwrap();
        client.wait().unwrap();
        assert_eq!(peer.unwrap().groups, (1000..1100).collect::<Vec<_>>());
    }

    #[test]
    fn a_file_has_no_peer() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(PeerCredentials::of(&file).unwrap_err().raw_os_error(), Some(libc::ENOTSOCK));
    }
}
