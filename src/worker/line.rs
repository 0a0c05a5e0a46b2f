//! The daemon's end of a conversation with a worker: it waits, but not for
//! ever, and believes nothing.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use tokio_util::sync::CancellationToken;

use super::frame::{FromWorker, HEADER, MAX_TEXT, Nonsense, ToWorker};

/// How often a wait looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(100);

/// Why a conversation ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Break {
    /// It is not wanted any more.
    Stopped,
    /// The worker owed an answer for too long.
    Silent,
    /// The worker closed its end, or ended.
    HungUp,
    /// The worker said what no worker of ours says.
    Nonsense(&'static str),
}

impl From<Nonsense> for Break {
    fn from(Nonsense(what): Nonsense) -> Self {
        Self::Nonsense(what)
    }
}

/// What all lines of one worker have in common.
#[derive(Debug)]
pub struct Watch {
    /// Ends every wait.
    pub stop: CancellationToken,
    /// How long a worker may owe an answer.
    pub patience: Duration,
    /// Reads of the store that are under way: as long as there are any, a
    /// worker may have to wait for them.
    pub reading: AtomicUsize,
}

impl Watch {
    /// Nothing is being read.
    pub fn new(stop: CancellationToken, patience: Duration) -> Self {
        Self { stop, patience, reading: AtomicUsize::new(0) }
    }
}

/// One socket to a worker. No call waits longer than the watch's patience,
/// nor a tick longer than its `stop`.
#[derive(Debug)]
pub struct Line<'a> {
    stream: UnixStream,
    watch: &'a Watch,
    /// What was received and is no whole message yet.
    inbox: Vec<u8>,
    /// How long the worker has owed an answer since it last did its duty.
    owed: Duration,
}

impl<'a> Line<'a> {
    /// Over `stream`.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn new(stream: UnixStream, watch: &'a Watch) -> io::Result<Self> {
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        Ok(Self { stream, watch, inbox: Vec::new(), owed: Duration::ZERO })
    }

    /// The next message.
    ///
    /// # Errors
    ///
    /// Any [`Break`].
    pub fn receive(&mut self) -> Result<FromWorker, Break> {
        loop {
            if let Some(message) = self.whole()? {
                return Ok(message);
            }
            let mut buf = [0; HEADER + MAX_TEXT];
            match self.wait(|mut stream| stream.read(&mut buf))? {
                0 => return Err(Break::HungUp),
                len => self.inbox.extend(&buf[..len]),
            }
        }
    }

    /// The next message if it has come: does not wait.
    ///
    /// # Errors
    ///
    /// Nonsense, or that the worker hung up.
    pub fn received(&mut self) -> Result<Option<FromWorker>, Break> {
        if let Some(message) = self.whole()? {
            return Ok(Some(message));
        }
        let mut buf = [0; HEADER + MAX_TEXT];
        match recv(self.stream.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Err(Break::HungUp),
            Ok(len) => {
                self.inbox.extend(&buf[..len]);
                self.whole()
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(_) => Err(Break::HungUp),
        }
    }

    /// The first message in the inbox.
    fn whole(&mut self) -> Result<Option<FromWorker>, Break> {
        let decoded = FromWorker::decode(&self.inbox)?;
        Ok(decoded.map(|(message, used)| {
            self.inbox.drain(..used);
            message
        }))
    }

    /// Sends `bytes`, which are whole messages.
    ///
    /// # Errors
    ///
    /// Any [`Break`] but nonsense.
    pub fn send(&mut self, mut bytes: &[u8]) -> Result<(), Break> {
        while !bytes.is_empty() {
            let sent = self.wait(|mut stream| stream.write(bytes))?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// Any [`Break`] but nonsense.
    pub fn say(&mut self, message: &ToWorker) -> Result<(), Break> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.send(&bytes)
    }

    /// Tells the worker that no more tasks come.
    pub fn finish(&self) {
        // A worker that is gone already need not be told.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The worker did what it is there for: it owes nothing.
    pub fn satisfied(&mut self) {
        self.owed = Duration::ZERO;
    }

    fn wait<T>(&mut self, mut step: impl FnMut(&UnixStream) -> io::Result<T>) -> Result<T, Break> {
        loop {
            if self.watch.stop.is_cancelled() {
                return Err(Break::Stopped);
            }
            if self.owed >= self.watch.patience {
                return Err(Break::Silent);
            }
            let start = Instant::now();
            let outcome = step(&self.stream);
            if self.watch.reading.load(Ordering::Relaxed) == 0 {
                self.owed += start.elapsed();
            }
            match outcome.map_err(|error| error.kind()) {
                Ok(done) => return Ok(done),
                Err(ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
                Err(_) => return Err(Break::HungUp),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(patience: Duration) -> Watch {
        Watch::new(CancellationToken::new(), patience)
    }

    #[test]
    fn a_worker_that_says_nothing_is_given_up() {
        let watch = watch(Duration::from_millis(250));
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut line = Line::new(near, &watch).unwrap();
        // Half a message is no answer, and small talk is no work.
        far.write_all(&[1, 200, 0, 0, 0]).unwrap();
        let start = Instant::now();
        assert_eq!(line.receive(), Err(Break::Silent));
        assert!(start.elapsed() >= Duration::from_millis(250), "{:?}", start.elapsed());
        far.write_all(&[b' '; 200]).unwrap();
        assert_eq!(line.receive(), Err(Break::Silent));
        line.satisfied();
        assert_eq!(line.receive(), Ok(FromWorker::Confined(String::new())));
    }

    #[test]
    fn a_worker_that_does_not_listen_is_given_up() {
        let watch = watch(Duration::from_millis(250));
        let (near, _far) = UnixStream::pair().unwrap();
        let mut line = Line::new(near, &watch).unwrap();
        assert_eq!(line.send(&vec![0; 4 << 20]), Err(Break::Silent));
    }

    #[test]
    fn nobody_is_blamed_while_the_store_reads() {
        let watch = watch(Duration::from_millis(150));
        watch.reading.fetch_add(1, Ordering::Relaxed);
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut line = Line::new(near, &watch).unwrap();
        let teller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(600));
            let mut bytes = Vec::new();
            FromWorker::Opened(7).encode(&mut bytes);
            far.write_all(&bytes).unwrap();
            far
        });
        assert_eq!(line.receive(), Ok(FromWorker::Opened(7)));
        drop(teller.join().unwrap());
        assert_eq!(line.receive(), Err(Break::HungUp));
    }

    #[test]
    fn stopping_ends_a_wait() {
        let watch = watch(Duration::from_secs(60));
        let (near, _far) = UnixStream::pair().unwrap();
        let mut line = Line::new(near, &watch).unwrap();
        let stop = watch.stop.clone();
        let stopper = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            stop.cancel();
        });
        let start = Instant::now();
        assert_eq!(line.receive(), Err(Break::Stopped));
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        stopper.join().unwrap();
    }
}
