//! A Unix socket on which every wait has an end.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket,
            sockopt::SendTimeout,
        },
        time::TimeVal,
    },
};

/// What a client talks to.
pub trait Stream: Read + Write {
    /// Until when reads and writes from now on may wait.
    fn set_deadline(&mut self, deadline: Instant);

    /// Waits until bytes or an end of the stream can be read, at most so
    /// long. Whether there are any.
    ///
    /// # Errors
    ///
    /// What the system says.
    fn ready(&mut self, at_most: Duration) -> io::Result<bool>;
}

/// A connected socket; after its deadline, reads and writes fail with
/// `TimedOut`.
#[derive(Debug)]
pub struct Socket {
    stream: UnixStream,
    deadline: Instant,
    limits: Limits,
}

/// Whether the socket's own time-outs were set since the deadline was. They
/// are of a deadline's whole length: a wait may end as much later as the
/// deadline was away, and costs no system call each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limits {
    Stale,
    Read,
    Write,
}

impl Socket {
    /// Connects to the socket at `path`. A listener whose queue is full makes
    /// this wait, until `deadline`.
    pub(super) fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        let address = UnixAddr::new(path)?;
        let fd: OwnedFd =
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // The time to send is the time to connect as well: unix(7).
        let limit = left(deadline)?;
        let seconds = libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX);
        let limit = TimeVal::new(seconds, limit.subsec_micros().into());
        setsockopt(&fd, SendTimeout, &limit)?;
        connect(fd.as_raw_fd(), &address).map_err(|error| timed_out(error.into()))?;
        Ok(Self { stream: fd.into(), deadline, limits: Limits::Stale })
    }
}

/// Time until `deadline`, never zero, which would mean for ever.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left < Duration::from_micros(1) { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A socket's time-outs come as `EAGAIN`.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = left(self.deadline)?;
        if self.limits != Limits::Read {
            self.stream.set_read_timeout(Some(left))?;
            self.limits = Limits::Read;
        }
        self.stream.read(buf).map_err(timed_out)
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let left = left(self.deadline)?;
        if self.limits != Limits::Write {
            self.stream.set_write_timeout(Some(left))?;
            self.limits = Limits::Write;
        }
        self.stream.write(buf).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Stream for Socket {
    fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
        self.limits = Limits::Stale;
    }

    fn ready(&mut self, at_most: Duration) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        let at_most = PollTimeout::try_from(at_most).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, at_most) {
            Ok(count) => Ok(count > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
