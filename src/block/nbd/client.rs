//! A client of one export, with several requests under way.
//!
//! ```text
//! connect ──► idle ◄──────────────────────────────► under way ──drop──► disconnected
//!               └─ read, status ─►      ◄─ finished ─┘ │
//!                                                      └─ any failure but a refusal ─► dead
//! ```
//!
//! It never connects again by itself: what a snapshot's server has promised
//! holds for the server that promised it, not for another at the same path.

use std::{
    io::{BufReader, Read as _},
    ops::{DerefMut, Range},
    time::{Duration, Instant},
};

use super::{
    answer::{Asked, Descriptor, Payload},
    endpoint::{Context, Endpoint},
    fault::{Fault, Violation},
    negotiate::{Replies, Session, negotiate},
    protocol::{self, CHUNK_REST, ChunkKind, Command, Last, REPLY_HEAD, ReplyHead},
    request::{Ended, Request},
    socket::{Socket, Stream},
};
use crate::{
    error::{Error, Result},
    model::ByteSize,
    sys::slab::Buffer,
};

/// Most reads under way at once. QEMU serves so many requests of a connection
/// (`MAX_NBD_REQUESTS`) and leaves further ones in the socket.
pub const MAX_IN_FLIGHT: usize = 16;

/// How much is read ahead of what is parsed: a message's head comes with the
/// first of its bytes in one system call, and few bytes are copied twice.
const READ_AHEAD: usize = 4096;

/// A connection to an export that is read.
///
/// Blocks: for threads, not for tasks. Buffers of `B` come back with the
/// reads that were given them; when the connection fails they are dropped.
#[derive(Debug)]
pub struct Client<B = Buffer, S: Stream = Socket> {
    pub(super) stream: BufReader<S>,
    endpoint: Endpoint,
    context: Context,
    session: Session,
    patience: Duration,
    /// For how long the server was waited for in vain.
    silence: Duration,
    in_flight: Vec<Request<B>>,
    next_cookie: u64,
    health: Health,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Good,
    Dead,
}

/// A read that succeeded.
#[derive(Debug)]
pub struct Finished<B> {
    /// With the bytes.
    pub buffer: B,
    /// Where in the export they are from.
    pub offset: u64,
    /// Where in the buffer they are.
    pub range: Range<usize>,
}

/// What the server has finished.
#[derive(Debug)]
enum Done<B> {
    Read(Finished<B>),
    Status(Vec<Descriptor>),
}

impl<B: DerefMut<Target = [u8]>> Client<B> {
    /// Connects to an export and agrees on its map with the server. The
    /// connection, the handshake as a whole, and later each silence of the
    /// server may take `patience`, at least a millisecond.
    ///
    /// # Errors
    ///
    /// `VOLUME_UNAVAILABLE`, with a [`Fault`] as the cause.
    pub fn connect(endpoint: &Endpoint, context: Context, patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        let stream = Socket::connect(&endpoint.socket, deadline).map_err(|error| {
            endpoint
                .unavailable(error.into())
                .advice("look whether the instance's QEMU still runs, and into its log")
        })?;
        Self::over(stream, endpoint, context, patience)
    }
}

impl<B: DerefMut<Target = [u8]>, S: Stream> Client<B, S> {
    /// The same over a stream that is connected.
    ///
    /// # Errors
    ///
    /// `VOLUME_UNAVAILABLE`, with a [`Fault`] as the cause.
    pub fn over(
        mut stream: S,
        endpoint: &Endpoint,
        context: Context,
        patience: Duration,
    ) -> Result<Self> {
        stream.set_deadline(Instant::now() + patience);
        let session = negotiate(&mut stream, &endpoint.export, context)
            .map_err(|fault| endpoint.unavailable(quiet(fault, patience)))?;
        let stream = BufReader::with_capacity(READ_AHEAD, stream);
        Ok(Self {
            stream,
            endpoint: endpoint.clone(),
            context,
            session,
            patience,
            silence: Duration::ZERO,
            in_flight: Vec::new(),
            next_cookie: 1,
            health: Health::Good,
        })
    }

    /// Bytes in the export. QEMU rounds up to a multiple of 512.
    #[must_use]
    pub fn size(&self) -> ByteSize {
        ByteSize(self.session.size)
    }

    /// Offsets and lengths of reads should be multiples of so many bytes, a
    /// power of two of at most 64 KiB.
    #[must_use]
    pub fn unit(&self) -> u64 {
        self.session.unit.into()
    }

    /// Where it is.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// What its map tells.
    #[must_use]
    pub fn context(&self) -> Context {
        self.context
    }

    /// How many reads are under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether the server has the map that was asked for at
    /// [`connect`](Self::connect).
    #[must_use]
    pub fn has_map(&self) -> bool {
        matches!(self.session.replies, Replies::Structured(Some(_)))
    }

    /// Starts to read `range.len()` bytes at `offset` into `buffer[range]`.
    ///
    /// # Errors
    ///
    /// `INTERNAL` when [`MAX_IN_FLIGHT`] are under way or the range is empty
    /// or not within the buffer and the export; `READ_FAILED` when the
    /// connection fails.
    pub fn read(&mut self, buffer: B, offset: u64, range: Range<usize>) -> Result<()> {
        let end = offset.saturating_add(range.len() as u64);
        let maximum = u64::from(self.session.maximum);
        let step = self.endpoint.role.boundary().unwrap_or(maximum).min(maximum);
        let fits = range.end <= buffer.len()
            && end <= self.session.size
            && !range.is_empty()
            && step > 0
            && self.in_flight.len() < MAX_IN_FLIGHT;
        if !fits {
            return Err(self.endpoint.misused(offset, end));
        }
        self.send(Request::read(self.next_cookie, offset, buffer, range, step))
    }

    /// Waits for the end of any read, at most so long. Reads end in any
    /// order. `None` when none ended.
    ///
    /// # Errors
    ///
    /// `SNAPSHOT_BROKEN` or `READ_FAILED` with a [`Fault`] as the cause. After
    /// [`Fault::Refused`] the other reads go on; after any other the
    /// connection is dead and all buffers are dropped.
    pub fn finished(&mut self, at_most: Duration) -> Result<Option<Finished<B>>> {
        match self.next(at_most)? {
            None => Ok(None),
            Some(Done::Read(finished)) => Ok(Some(finished)),
            Some(Done::Status(_)) => Err(self.endpoint.out_of_turn()),
        }
    }

    /// Reads a little into `buffer` and gives it back: the server still stands
    /// by what it sent before. No read may be under way.
    ///
    /// The snapshot of a guest's volume that breaks never heals
    /// (`snapshot_error` in QEMU's `block/copy-before-write.c` is set once and
    /// for all), and it breaks before the write that it could not save is let
    /// through. So when this succeeds, every earlier answer was of the
    /// snapshot. Without it none is known to be: once a snapshot is broken,
    /// the guest's writes no longer wait for reads that are under way, and
    /// such a read can return the new bytes and success.
    ///
    /// # Errors
    ///
    /// As [`finished`](Self::finished); `INTERNAL` while reads are under way.
    pub fn vouch(&mut self, buffer: B) -> Result<B> {
        let len = self.session.unit.max(512).min(u32::try_from(self.session.size).unwrap_or(512));
        self.read_alone(buffer, 0, 0..len as usize)
    }

    /// Reads as [`read`](Self::read), waits for the end, and gives the buffer
    /// back. No other read may be under way.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read) and [`finished`](Self::finished).
    pub fn read_alone(&mut self, buffer: B, offset: u64, range: Range<usize>) -> Result<B> {
        if self.in_flight() > 0 {
            let end = offset.saturating_add(range.len() as u64);
            return Err(self.endpoint.misused(offset, end));
        }
        self.read(buffer, offset, range)?;
        loop {
            if let Some(finished) = self.finished(self.patience)? {
                return Ok(finished.buffer);
            }
        }
    }

    /// Asks for the map of `range`, which is not empty, and waits. It may
    /// tell less than was asked, never nothing. No read may be under way.
    pub(super) fn status(&mut self, range: Range<u64>) -> Result<Vec<Descriptor>> {
        let Replies::Structured(Some(context)) = self.session.replies else {
            let fault = Fault::Lacking(self.context.name());
            return Err(self.endpoint.failed(&Asked::Status(range, 0), fault));
        };
        let len = range.end.saturating_sub(range.start);
        let crosses = self.endpoint.role.boundary().is_some_and(|boundary| {
            range.start / boundary != range.end.saturating_sub(1) / boundary
        });
        let fits = len > 0
            && u32::try_from(len).is_ok()
            && range.end <= self.session.size
            && self.in_flight.is_empty()
            && !crosses;
        if !fits {
            return Err(self.endpoint.misused(range.start, range.end));
        }
        self.send(Request::status(self.next_cookie, range, context))?;
        loop {
            match self.next(self.patience)? {
                None => {}
                Some(Done::Status(descriptors)) => return Ok(descriptors),
                Some(Done::Read(_)) => return Err(self.endpoint.out_of_turn()),
            }
        }
    }

    /// Sends a request with all its messages at once: together they are one
    /// small piece of the socket's memory, which a server that is busy
    /// sending takes no notice of.
    fn send(&mut self, request: Request<B>) -> Result<()> {
        let asked = request.waits_for().cloned().unwrap_or(Asked::Read(0..0));
        if self.health == Health::Dead {
            return Err(self.endpoint.failed(&asked, Fault::Dead));
        }
        let (messages, next_cookie) = request.messages();
        self.next_cookie = next_cookie;
        let stream = self.stream.get_mut();
        stream.set_deadline(Instant::now() + self.patience);
        if let Err(error) = stream.write_all(&messages) {
            return Err(self.died(&asked, error.into()));
        }
        self.in_flight.push(request);
        Ok(())
    }

    /// Waits for the end of any request.
    fn next(&mut self, at_most: Duration) -> Result<Option<Done<B>>> {
        let until = Instant::now() + at_most;
        loop {
            // Whoever asks in vain waits for the oldest.
            let oldest = self.in_flight.first().and_then(Request::waits_for);
            let Some(asked) = oldest.cloned() else { return Ok(None) };
            let began = Instant::now();
            let wait = until.saturating_duration_since(began).min(self.patience);
            let ahead = !self.stream.buffer().is_empty();
            match if ahead { Ok(true) } else { self.stream.get_mut().ready(wait) } {
                Err(error) => return Err(self.died(&asked, error.into())),
                Ok(true) => self.silence = Duration::ZERO,
                Ok(false) => {
                    // Only time spent waiting counts: a caller who was busy
                    // elsewhere kept the server from sending.
                    self.silence += began.elapsed();
                    if self.silence >= self.patience {
                        return Err(self.died(&asked, Fault::Silent(self.patience)));
                    }
                    if Instant::now() >= until {
                        return Ok(None);
                    }
                    continue;
                }
            }
            self.stream.get_mut().set_deadline(Instant::now() + self.patience);
            match self.message() {
                Ok(None) => {}
                Ok(Some((at, cookie))) => {
                    if let Some(done) = self.settle(at, cookie)? {
                        return Ok(Some(done));
                    }
                }
                Err(fault) => return Err(self.died(&asked, quiet(fault, self.patience))),
            }
        }
    }

    /// Reads one message. Which request it is for, and its cookie, if it ends
    /// an answer.
    fn message(&mut self) -> std::result::Result<Option<(usize, u64)>, Fault> {
        let mut head = [0; REPLY_HEAD];
        self.stream.read_exact(&mut head)?;
        let head = ReplyHead::parse(&head)?;
        let (ReplyHead::Simple { cookie, .. } | ReplyHead::Chunk { cookie, .. }) = head;
        let found = self.in_flight.iter_mut().position(|request| request.answer(cookie).is_some());
        let at = found.ok_or(Violation::Cookie)?;
        let last = match head {
            ReplyHead::Simple { error, .. } => {
                self.simple(at, cookie, error)?;
                Last::Yes
            }
            ReplyHead::Chunk { last, kind, .. } => {
                let mut len = [0; CHUNK_REST];
                self.stream.read_exact(&mut len)?;
                self.chunk(at, cookie, kind, u32::from_be_bytes(len))?;
                last
            }
        };
        Ok((last == Last::Yes).then_some((at, cookie)))
    }

    fn simple(&mut self, at: usize, cookie: u64, error: u32) -> std::result::Result<(), Fault> {
        let request = &mut self.in_flight[at];
        let answer = request.answer(cookie).ok_or(Violation::Cookie)?;
        let (Replies::Simple, Asked::Read(range)) = (self.session.replies, answer.asked()) else {
            return Err(Violation::Unexpected.into());
        };
        if error != 0 {
            let payload = [&error.to_be_bytes()[..], &[0; 2]].concat();
            answer.take(ChunkKind::Error, &payload)?;
            return Ok(());
        }
        let range = range.clone();
        let place = answer.place(range.start, range.end - range.start)?;
        let bytes = request.bytes(range.start, place)?;
        Ok(self.stream.read_exact(bytes)?)
    }

    fn chunk(
        &mut self,
        at: usize,
        cookie: u64,
        kind: ChunkKind,
        len: u32,
    ) -> std::result::Result<(), Fault> {
        if self.session.replies == Replies::Simple {
            return Err(Violation::Unexpected.into());
        }
        let request = &mut self.in_flight[at];
        let answer = request.answer(cookie).ok_or(Violation::Cookie)?;
        let (Asked::Read(asked) | Asked::Status(asked, _)) = answer.asked();
        let asked = asked.start;
        match answer.expect(kind, len)? {
            Payload::Data(len) => {
                let mut offset = [0; 8];
                self.stream.read_exact(&mut offset)?;
                let place = answer.place(u64::from_be_bytes(offset), len)?;
                self.stream.read_exact(request.bytes(asked, place)?)?;
            }
            Payload::Small(len) => {
                let mut payload = vec![0; len];
                self.stream.read_exact(&mut payload)?;
                if let Some(zeroes) = answer.take(kind, &payload)? {
                    request.bytes(asked, zeroes)?.fill(0);
                }
            }
        }
        Ok(())
    }

    /// The end of an answer, and perhaps of its request.
    fn settle(&mut self, at: usize, cookie: u64) -> Result<Option<Done<B>>> {
        let ended = match self.in_flight[at].end(cookie) {
            Ok(None) => return Ok(None),
            Ok(Some(ended)) => ended,
            Err((asked, fault)) => return Err(self.died(&asked, fault)),
        };
        self.in_flight.remove(at);
        match ended {
            Ended::Read(offset, buffer, range) => {
                Ok(Some(Done::Read(Finished { buffer, offset, range })))
            }
            Ended::Status(descriptors) => Ok(Some(Done::Status(descriptors))),
            Ended::Refused(asked, fault) => Err(self.endpoint.failed(&asked, fault)),
        }
    }

    /// An error after which the connection is in no known state.
    fn died(&mut self, asked: &Asked, fault: Fault) -> Error {
        self.health = Health::Dead;
        self.in_flight.clear();
        self.endpoint.failed(asked, fault)
    }
}

impl<B, S: Stream> Drop for Client<B, S> {
    fn drop(&mut self) {
        if self.health == Health::Good {
            // A courtesy, for which nobody waits long.
            let stream = self.stream.get_mut();
            stream.set_deadline(Instant::now() + Duration::from_millis(10));
            let _ = stream.write_all(&protocol::request(Command::Disconnect, 0, 0, 0));
        }
    }
}

/// Gives time-outs and ends of the stream their own words.
fn quiet(fault: Fault, patience: Duration) -> Fault {
    use std::io::{Error, ErrorKind};
    match fault {
        Fault::Transport(error) if error.kind() == ErrorKind::TimedOut => Fault::Silent(patience),
        Fault::Transport(error) if error.kind() == ErrorKind::UnexpectedEof => {
            Fault::Transport(Error::new(error.kind(), "the server closed the connection"))
        }
        fault => fault,
    }
}
