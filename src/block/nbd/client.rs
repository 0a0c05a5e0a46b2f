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
    fmt,
    ops::{DerefMut, Range},
    path::PathBuf,
    time::{Duration, Instant},
};

use super::{
    answer::{Answer, Asked, Descriptor, Payload},
    fault::{Fault, Violation},
    negotiate::{Replies, Session, negotiate},
    protocol::{self, CHUNK_REST, ChunkKind, Command, Last, REPLY_HEAD, ReplyHead},
    socket::{Socket, Stream},
};
use crate::{
    error::{Error, Reason, Result},
    model::ByteSize,
    sys::slab::Buffer,
};

/// Where an export is, and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The Unix socket of its server.
    pub socket: PathBuf,
    /// Its name; at most 4096 bytes.
    pub export: String,
    /// What it shows, which decides what a refusal means.
    pub role: Role,
}

/// What an export shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A volume in itself: a refusal is a failed read.
    Volume,
    /// The snapshot of a volume that a guest writes to: a refusal means that
    /// it is broken.
    Snapshot,
    /// What copy-before-write saved of a volume.
    Scratch,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the NBD export {:?} at {}", self.export, self.socket.display())
    }
}

/// What the map of an export tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// What reads as zeroes: `base:allocation`.
    Content,
    /// What is allocated in the image itself: `qemu:allocation-depth`
    /// (`docs/interop/nbd.txt` of QEMU).
    Depth,
}

impl Context {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Content => "base:allocation",
            Self::Depth => "qemu:allocation-depth",
        }
    }
}

/// Most requests under way at once. QEMU serves so many of a connection
/// (`MAX_NBD_REQUESTS`) and leaves further ones in the socket.
pub const MAX_IN_FLIGHT: usize = 16;

/// A connection to an export that is read.
///
/// Blocks: for threads, not for tasks. Buffers of `B` come back with the
/// reads that were given them; when the connection fails they are dropped.
#[derive(Debug)]
pub struct Client<B = Buffer, S: Stream = Socket> {
    pub(super) stream: S,
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

/// A request under way.
#[derive(Debug)]
struct Request<B> {
    cookie: u64,
    answer: Answer,
    /// A read's buffer, and where in it the bytes go.
    target: Option<(B, Range<usize>)>,
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
            unavailable(endpoint, error.into())
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
            .map_err(|fault| unavailable(endpoint, quiet(fault, patience)))?;
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
    /// `INTERNAL` when [`MAX_IN_FLIGHT`] are under way or the range is empty,
    /// not within the buffer and the export, or too long; `READ_FAILED` when
    /// the connection fails.
    pub fn read(&mut self, buffer: B, offset: u64, range: Range<usize>) -> Result<()> {
        let bytes = offset..offset.saturating_add(range.len() as u64);
        let len = u32::try_from(range.len()).unwrap_or(u32::MAX);
        let fits = range.end <= buffer.len()
            && bytes.end <= self.session.size
            && !range.is_empty()
            && len <= self.session.maximum
            && self.in_flight.len() < MAX_IN_FLIGHT;
        if !fits {
            return Err(self.misused(&bytes));
        }
        self.send(Command::Read, offset, len, Asked::Read(bytes), Some((buffer, range)))
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
            Some(Done::Status(_)) => {
                Err(Error::new(Reason::Internal, format!("{} answers out of turn", self.endpoint)))
            }
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
            return Err(self.misused(&(offset..offset.saturating_add(range.len() as u64))));
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
            return Err(self.failed(&Asked::Status(range, 0), fault));
        };
        let len = range.end.saturating_sub(range.start);
        let len = u32::try_from(len).unwrap_or(0);
        if len == 0 || range.end > self.session.size || !self.in_flight.is_empty() {
            return Err(self.misused(&range));
        }
        let start = range.start;
        self.send(Command::BlockStatus, start, len, Asked::Status(range, context), None)?;
        loop {
            match self.next(self.patience)? {
                None => {}
                Some(Done::Status(descriptors)) => return Ok(descriptors),
                Some(Done::Read(_)) => {
                    let sentence = format!("{} answers out of turn", self.endpoint);
                    return Err(Error::new(Reason::Internal, sentence));
                }
            }
        }
    }

    fn send(
        &mut self,
        command: Command,
        offset: u64,
        len: u32,
        asked: Asked,
        target: Option<(B, Range<usize>)>,
    ) -> Result<()> {
        if self.health == Health::Dead {
            return Err(self.failed(&asked, Fault::Dead));
        }
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.stream.set_deadline(Instant::now() + self.patience);
        let request = protocol::request(command, cookie, offset, len);
        if let Err(error) = self.stream.write_all(&request) {
            return Err(self.died(&asked, error.into()));
        }
        self.in_flight.push(Request { cookie, answer: Answer::to(asked), target });
        Ok(())
    }

    /// Waits for the end of any request.
    fn next(&mut self, at_most: Duration) -> Result<Option<Done<B>>> {
        let until = Instant::now() + at_most;
        loop {
            // Whoever asks in vain waits for the oldest.
            let Some(oldest) = self.in_flight.first() else { return Ok(None) };
            let asked = oldest.answer.asked().clone();
            if self.health == Health::Dead {
                return Err(self.failed(&asked, Fault::Dead));
            }
            let began = Instant::now();
            let wait = until.saturating_duration_since(began);
            match self.stream.ready(wait.min(self.patience)) {
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
            self.stream.set_deadline(Instant::now() + self.patience);
            match self.message() {
                Ok(None) => {}
                Ok(Some(at)) => return self.settle(at).map(Some),
                Err(fault) => return Err(self.died(&asked, quiet(fault, self.patience))),
            }
        }
    }

    /// Reads one message. Which request it ends, if it ends one.
    fn message(&mut self) -> std::result::Result<Option<usize>, Fault> {
        let mut head = [0; REPLY_HEAD];
        self.stream.read_exact(&mut head)?;
        match ReplyHead::parse(&head)? {
            ReplyHead::Simple { cookie, error } => {
                let at = self.find(cookie)?;
                self.simple(at, error)?;
                Ok(Some(at))
            }
            ReplyHead::Chunk { cookie, last, kind } => {
                let at = self.find(cookie)?;
                let mut len = [0; CHUNK_REST];
                self.stream.read_exact(&mut len)?;
                self.chunk(at, kind, u32::from_be_bytes(len))?;
                Ok((last == Last::Yes).then_some(at))
            }
        }
    }

    fn find(&self, cookie: u64) -> std::result::Result<usize, Violation> {
        let found = self.in_flight.iter().position(|request| request.cookie == cookie);
        found.ok_or(Violation::Cookie)
    }

    fn simple(&mut self, at: usize, error: u32) -> std::result::Result<(), Fault> {
        let request = &mut self.in_flight[at];
        let (Replies::Simple, Asked::Read(range)) = (self.session.replies, request.answer.asked())
        else {
            return Err(Violation::Unexpected.into());
        };
        if error != 0 {
            let payload = [&error.to_be_bytes()[..], &[0; 2]].concat();
            request.answer.take(ChunkKind::Error, &payload)?;
            return Ok(());
        }
        let range = range.clone();
        let place = request.answer.place(range.start, range.end - range.start)?;
        let bytes = request.bytes(place)?;
        Ok(self.stream.read_exact(bytes)?)
    }

    fn chunk(&mut self, at: usize, kind: ChunkKind, len: u32) -> std::result::Result<(), Fault> {
        if self.session.replies == Replies::Simple {
            return Err(Violation::Unexpected.into());
        }
        let request = &mut self.in_flight[at];
        match request.answer.expect(kind, len)? {
            Payload::Data(len) => {
                let mut offset = [0; 8];
                self.stream.read_exact(&mut offset)?;
                let place = request.answer.place(u64::from_be_bytes(offset), len)?;
                self.stream.read_exact(request.bytes(place)?)?;
            }
            Payload::Small(len) => {
                let mut payload = vec![0; len];
                self.stream.read_exact(&mut payload)?;
                if let Some(zeroes) = request.answer.take(kind, &payload)? {
                    request.bytes(zeroes)?.fill(0);
                }
            }
        }
        Ok(())
    }

    /// The end of the request at this place.
    fn settle(&mut self, at: usize) -> Result<Done<B>> {
        let request = self.in_flight.remove(at);
        let asked = request.answer.asked().clone();
        let descriptors = match request.answer.finish() {
            Ok(descriptors) => descriptors,
            Err(fault @ Fault::Refused { .. }) => return Err(self.failed(&asked, fault)),
            Err(fault) => return Err(self.died(&asked, fault)),
        };
        Ok(match (asked, request.target) {
            (Asked::Read(bytes), Some((buffer, range))) => {
                Done::Read(Finished { buffer, offset: bytes.start, range })
            }
            _ => Done::Status(descriptors),
        })
    }

    /// An error after which the connection is in no known state.
    fn died(&mut self, asked: &Asked, fault: Fault) -> Error {
        self.health = Health::Dead;
        self.in_flight.clear();
        self.failed(asked, fault)
    }

    fn failed(&self, asked: &Asked, fault: Fault) -> Error {
        let endpoint = &self.endpoint;
        let sentence = match asked {
            Asked::Read(range) => {
                let (len, at) = (ByteSize(range.end - range.start), range.start);
                format!("cannot read {len} at offset {at} of {endpoint}")
            }
            Asked::Status(range, _) => {
                let (len, at) = (ByteSize(range.end - range.start), range.start);
                format!("cannot get the map of {len} at offset {at} of {endpoint}")
            }
        };
        let (reason, advice) = match (&fault, endpoint.role) {
            (Fault::Refused { .. }, Role::Snapshot) => (
                Reason::SnapshotBroken,
                "the guest wrote faster than the scratch area could save what was there: give it \
                 more room or a faster disk, then ask again",
            ),
            (Fault::Refused { .. }, _) => {
                (Reason::ReadFailed, "look into the log of the instance's QEMU")
            }
            (Fault::Violation(_) | Fault::Lacking(_), _) => {
                (Reason::ReadFailed, "look which program serves this socket")
            }
            _ => (
                Reason::ReadFailed,
                "look whether the instance's QEMU still runs, and into its log",
            ),
        };
        Error::new(reason, sentence).because(fault).advice(advice)
    }

    fn misused(&self, range: &Range<u64>) -> Error {
        let (start, end) = (range.start, range.end);
        let sentence = format!("a request for {start}..{end} does not fit {}", self.endpoint);
        Error::new(Reason::Internal, sentence)
    }
}

impl<B: DerefMut<Target = [u8]>> Request<B> {
    /// The place in the buffer for bytes of the request.
    fn bytes(&mut self, place: Range<usize>) -> std::result::Result<&mut [u8], Violation> {
        let (buffer, range) = self.target.as_mut().ok_or(Violation::Unexpected)?;
        let target = buffer.get_mut(range.clone()).and_then(|bytes| bytes.get_mut(place));
        target.ok_or(Violation::Outside)
    }
}

impl<B, S: Stream> Drop for Client<B, S> {
    fn drop(&mut self) {
        if self.health == Health::Good {
            // A courtesy, for which nobody waits long.
            self.stream.set_deadline(Instant::now() + Duration::from_millis(10));
            let _ = self.stream.write_all(&protocol::request(Command::Disconnect, 0, 0, 0));
        }
    }
}

fn unavailable(endpoint: &Endpoint, fault: Fault) -> Error {
    Error::new(Reason::VolumeUnavailable, format!("cannot open {endpoint}")).because(fault)
}

/// Gives time-outs and ends of the stream their own words.
fn quiet(fault: Fault, patience: Duration) -> Fault {
    match fault {
        Fault::Transport(error) if error.kind() == std::io::ErrorKind::TimedOut => {
            Fault::Silent(patience)
        }
        Fault::Transport(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Fault::Transport(std::io::Error::new(error.kind(), "the server closed the connection"))
        }
        fault => fault,
    }
}

/// The fault under an error of a [`Client`], if it is one.
#[must_use]
pub fn fault(error: &Error) -> Option<&Fault> {
    std::error::Error::source(error)?.downcast_ref()
}
