//! Reads a held volume from one end to the other.
//!
//! ```text
//!          ┌──────────── home: buffers that consumers dropped ◄───────────┐
//!          ▼                                                              │
//! plan ► free buffer ► queue (kernel) ► outbox ► pieces (bounded) ► consumer
//!   └──────── zeroes ─────────────────────┘
//! ```
//!
//! Everything is bounded by the number of buffers: nothing new is planned
//! while a piece waits in the outbox.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    iter::Peekable,
    ops::Range,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, FileTypeExt},
    },
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::{
    map::{Plan, Step, extents_to_read},
    pace::Budget,
    queue::{Engine, Queue},
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::{ByteSize, image::EXTENT_SIZE},
    port::{Extent, Pace, Piece, VolumeFacts},
    sys::{
        aligned::AlignedBuf,
        ioctl,
        ring::{Direction, Finished, Transfer, Wait},
        slab::{Buffer, Slab},
    },
};

/// How volumes are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReaderSettings {
    /// Through what.
    pub engine: Engine,
    /// Extents of 1 MiB that are read or wait for their consumer at once, at
    /// least 1. It is the reader's memory in mebibytes.
    pub depth: u16,
}

impl Default for ReaderSettings {
    /// io_uring, 16 deep: 16 MiB under way keep an NVMe disk or a network
    /// volume at its limit and are an eighth of the memory that imaged may
    /// use.
    fn default() -> Self {
        Self { engine: Engine::Uring, depth: 16 }
    }
}

/// How soon a waiting reader notices that it is to stop.
pub(super) const STOP_LATENCY: Duration = Duration::from_millis(100);

/// How soon a waiting reader notices that the consumer took a piece. The
/// channel tells nobody; a millisecond is short against the reading of the
/// extents that it then has buffered.
pub(super) const ROOM_LATENCY: Duration = Duration::from_millis(1);

/// How often in a row reads may be interrupted or put off before it counts
/// as an error.
const PATIENCE: u32 = 1000;

/// Length of an extent as the buffers have it.
#[allow(clippy::cast_possible_truncation, reason = "1 MiB fits every usize")]
pub(super) const EXTENT_LEN: usize = EXTENT_SIZE as usize;

/// Bytes in the larger steps of the search for an unreadable sector: few
/// enough reads for an extent, and few sectors in each.
const SEARCH_STEP: usize = 64 << 10;

/// What is read.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) file: Arc<File>,
    pub(super) facts: VolumeFacts,
    /// The volume's last bytes, fewer than a sector, where the device has
    /// them in a last sector that is cut off and cannot be read.
    pub(super) tail: Vec<u8>,
}

/// Puts right what was read of a volume that its guest writes to.
pub(super) trait Past {
    /// Makes `bytes`, which were read at `offset`, those of the point in time.
    fn correct(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()>;
}

/// Of a snapshot that nobody writes to: there is nothing to be put right.
pub(super) struct AsItIs;

impl Past for AsItIs {
    fn correct(&mut self, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}

/// Reads `source`, extents from `from` on, into `pieces`, as
/// [`HeldVolume::read`](crate::port::HeldVolume::read) promises. Of a volume
/// that its `guest` writes to, every extent is corrected after it was read, and
/// nothing is read faster than it bears.
pub(super) fn read<'a>(
    source: &'a Source,
    settings: ReaderSettings,
    from: u64,
    guest: Option<(&'a mut dyn Past, &'a Pace)>,
    pieces: &'a SyncSender<Piece>,
    stop: &'a CancellationToken,
) -> Result<()> {
    let facts = &source.facts;
    let size = facts.size.get();
    let depth = usize::from(settings.depth.max(1));
    // A small volume needs no more buffers than extents.
    let count = extents_to_read(size, &facts.data, depth).max(1);
    let (slab, free) = Slab::cut(u16::try_from(count).unwrap_or(u16::MAX), EXTENT_LEN);
    let queue = Queue::new(settings.engine, Direction::Read, &source.file, &slab)
        .context(Reason::ReadFailed, || format!("cannot begin to read {}", facts.path.display()))?;
    let (home, returned) = mpsc::channel();
    let (past, pace) = guest.unzip();
    let reading = Reading {
        source,
        budget: Budget::new(pace.cloned().unwrap_or_default()),
        plan: Plan::new(size, &facts.data).from(from).peekable(),
        queue,
        past,
        free,
        home,
        returned,
        outbox: VecDeque::new(),
        pieces,
        stop,
        put_off: 0,
    };
    reading.run()
}

/// A reading under way.
struct Reading<'a> {
    source: &'a Source,
    plan: Peekable<Plan<'a>>,
    queue: Queue,
    budget: Budget,
    past: Option<&'a mut dyn Past>,
    free: Vec<Buffer>,
    home: Sender<Buffer>,
    returned: Receiver<Buffer>,
    /// Pieces that found no room in the channel.
    outbox: VecDeque<Piece>,
    pieces: &'a SyncSender<Piece>,
    stop: &'a CancellationToken,
    put_off: u32,
}

impl Reading<'_> {
    /// Dropping `self`, on every way out, takes back what the kernel holds.
    fn run(mut self) -> Result<()> {
        let mut done = Vec::new();
        loop {
            if self.stop.is_cancelled() {
                return Err(self.canceled());
            }
            self.deliver()?;
            self.free.extend(self.returned.try_iter());
            self.fill()?;
            match (self.queue.in_flight(), self.outbox.is_empty()) {
                (0, true) if self.plan.peek().is_none() => return Ok(()),
                (0, true) if self.free.is_empty() => self.wait_for_buffer(STOP_LATENCY),
                (0, true) => self.wait_for_buffer(self.budget.due(EXTENT_SIZE).min(STOP_LATENCY)),
                (0, false) => self.wait_for_buffer(ROOM_LATENCY),
                (_, waiting) => {
                    let wait = if waiting { Wait::ForOne } else { Wait::No };
                    self.queue.finished(wait, &mut done).context(Reason::ReadFailed, || {
                        format!("cannot go on reading {}", self.source.facts.path.display())
                    })?;
                    if done.is_empty() && wait == Wait::No {
                        self.wait_for_buffer(ROOM_LATENCY);
                    }
                    let mut batch = done.drain(..);
                    while let Some(finished) = batch.next() {
                        self.settle(finished, &mut batch)?;
                    }
                }
            }
        }
    }

    /// Starts reads and passes runs of zeroes on, until buffers or room in
    /// the channel are used up.
    fn fill(&mut self) -> Result<()> {
        while self.outbox.is_empty() {
            match self.plan.peek().copied() {
                None => break,
                Some(Step::Zeroes { first, count }) => {
                    self.outbox.push_back(Piece::Zeroes { first, count });
                    self.deliver()?;
                }
                Some(Step::Read { index }) => {
                    if self.free.is_empty() || !self.budget.take(EXTENT_SIZE) {
                        break;
                    }
                    let Some(buffer) = self.free.pop() else { break };
                    let extent = index * EXTENT_SIZE;
                    match self.source.readable(extent) {
                        0 => self.lend(buffer, extent)?,
                        _ => self.start(buffer, extent, 0)?,
                    }
                }
            }
            self.plan.next();
        }
        Ok(())
    }

    /// Hands pieces over while there is room.
    fn deliver(&mut self) -> Result<()> {
        while let Some(piece) = self.outbox.pop_front() {
            match self.pieces.try_send(piece) {
                Ok(()) => {}
                Err(TrySendError::Full(piece)) => {
                    self.outbox.push_front(piece);
                    break;
                }
                Err(TrySendError::Disconnected(_)) => return Err(self.canceled()),
            }
        }
        Ok(())
    }

    fn wait_for_buffer(&mut self, at_most: Duration) {
        match self.returned.recv_timeout(at_most) {
            Ok(buffer) => self.free.push(buffer),
            // `self.home` is alive, so the channel is too.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }

    /// Reads the extent at `extent` on from byte `filled`, a multiple of the
    /// sector size.
    fn start(&mut self, buffer: Buffer, extent: u64, filled: usize) -> Result<()> {
        let sector = self.source.sector();
        // A file's tail is read with a length that direct I/O accepts; the
        // kernel returns what there is.
        let end = self.source.readable(extent).next_multiple_of(sector).min(buffer.len());
        let read = Transfer { buffer, offset: extent + filled as u64, range: filled..end };
        let (offset, len) = (read.offset, read.range.len() as u64);
        self.queue.start(read).context(Reason::ReadFailed, || self.source.sentence(offset, len))
    }

    /// Passes a buffer on that has all of the extent that can be read.
    fn lend(&mut self, mut buffer: Buffer, extent: u64) -> Result<()> {
        let (readable, len) = (self.source.readable(extent), self.source.len(extent));
        if readable < len {
            buffer[readable..len].copy_from_slice(&self.source.tail);
        }
        if let Some(past) = &mut self.past {
            past.correct(extent, &mut buffer[..len])?;
        }
        let lent = Lent { buffer: Some(buffer), len, home: self.home.clone() };
        let index = extent / EXTENT_SIZE;
        self.outbox.push_back(Piece::Data(Extent { index, bytes: Box::new(lent) }));
        self.deliver()
    }

    /// What to do with a read that came back; `others` came back with it.
    fn settle(
        &mut self,
        (read, result): Finished,
        others: &mut dyn Iterator<Item = Finished>,
    ) -> Result<()> {
        let extent = read.offset - read.range.start as u64;
        let wanted = self.source.readable(extent);
        let came = match result {
            Ok(came) => came,
            Err(error) if puts_off(&error) && self.put_off < PATIENCE => {
                self.put_off += 1;
                return self.start(read.buffer, extent, read.range.start);
            }
            Err(error) => return Err(self.unreadable(extent, error, others)),
        };
        self.put_off = 0;
        let filled = read.range.start + came;
        if filled >= wanted {
            return self.lend(read.buffer, extent);
        }
        // Direct reads go on at a sector's start only. When that is no
        // progress, there is nothing more to come.
        let again = filled - filled % self.source.sector();
        if again > read.range.start {
            return self.start(read.buffer, extent, again);
        }
        let (path, size) = (self.source.facts.path.display(), self.source.facts.size.get());
        let end = extent + filled as u64;
        Err(Error::new(
            Reason::ReadFailed,
            format!("{path} has no bytes at offset {end}, within its size of {size}"),
        )
        .advice("it was truncated while it was read: find out by what, then ask again"))
    }

    /// Takes everything back, then names the first place that cannot be read.
    fn unreadable(
        &mut self,
        extent: u64,
        cause: io::Error,
        others: &mut dyn Iterator<Item = Finished>,
    ) -> Error {
        let mut done: Vec<_> = others.collect();
        while self.queue.in_flight() > 0 {
            if self.queue.finished(Wait::ForOne, &mut done).is_err() {
                break;
            }
        }
        // Reads end in any order, and one that met a bad place may be short.
        let mut suspects: Vec<u64> = done
            .iter()
            .filter(|(read, result)| !matches!(result, Ok(came) if *came == read.range.len()))
            .map(|(read, _)| read.offset - read.range.start as u64)
            .chain([extent])
            .collect();
        suspects.sort_unstable();
        let readable = |extent| extent..extent + self.source.readable(extent) as u64;
        let found = suspects.into_iter().find_map(|e| self.source.first_unreadable(readable(e)));
        let (place, cause) = found.unwrap_or((readable(extent), cause));
        let sentence = self.source.sentence(place.start, place.end - place.start);
        Error::new(Reason::ReadFailed, sentence)
            .because(cause)
            .advice("the volume's device is failing: look into the kernel's log")
    }

    fn canceled(&self) -> Error {
        let path = self.source.facts.path.display();
        Error::new(Reason::Canceled, format!("the reading of {path} was stopped"))
    }
}

impl Source {
    /// The volume's size as it is by now.
    pub(super) fn size_now(&self) -> Result<ByteSize> {
        let kind = self.file.metadata().map(|metadata| metadata.file_type());
        let size = kind.and_then(|kind| match kind.is_block_device() {
            true => ioctl::device_size(self.file.as_fd()),
            false => self.file.metadata().map(|metadata| metadata.len()),
        });
        size.map(ByteSize).context(Reason::ReadFailed, || {
            format!("the size of {} cannot be told", self.facts.path.display())
        })
    }

    /// Bytes of the extent at offset `extent`.
    fn len(&self, extent: u64) -> usize {
        within_extent(self.facts.size.get(), extent)
    }

    /// How many of them can be read.
    fn readable(&self, extent: u64) -> usize {
        within_extent(self.facts.size.get() - self.tail.len() as u64, extent)
    }

    fn sector(&self) -> usize {
        usize::try_from(self.facts.sector_size).unwrap_or(EXTENT_LEN).clamp(1, EXTENT_LEN)
    }

    fn sentence(&self, offset: u64, len: u64) -> String {
        let (len, path) = (ByteSize(len), self.facts.path.display());
        format!("cannot read {len} at offset {offset} of {path}")
    }

    /// The first sector in `place` that cannot be read, and why. `None` when
    /// everything can be read now.
    fn first_unreadable(&self, place: Range<u64>) -> Option<(Range<u64>, io::Error)> {
        let mut place = place;
        let mut found = None;
        for step in [SEARCH_STEP.max(self.sector()), self.sector()] {
            let mut buffer = AlignedBuf::zeroed(step);
            let bad = place.clone().step_by(step).find_map(|offset| {
                let wanted = (place.end - offset).min(step as u64);
                match self.file.read_at(&mut buffer[..step], offset) {
                    Ok(came) if came as u64 >= wanted => None,
                    // It stopped at the bad place.
                    Ok(_) => Some((offset, io::ErrorKind::UnexpectedEof.into())),
                    Err(error) if puts_off(&error) => None,
                    Err(error) => Some((offset, error)),
                }
            });
            // What can be read in sectors could not in one piece: the larger
            // place stands.
            let Some((offset, error)) = bad else { break };
            place = offset..place.end.min(offset + step as u64);
            found = Some((place.clone(), error));
        }
        found
    }
}

/// How many of the first `size` bytes lie in the extent at offset `extent`.
fn within_extent(size: u64, extent: u64) -> usize {
    let rest = size.saturating_sub(extent);
    usize::try_from(rest).map_or(EXTENT_LEN, |rest| rest.min(EXTENT_LEN))
}

/// Whether the same read is to be asked for again.
fn puts_off(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// A buffer on its way through the consumer; dropping it sends it home.
pub(super) struct Lent {
    /// `None` only while it is dropped.
    pub(super) buffer: Option<Buffer>,
    pub(super) len: usize,
    pub(super) home: Sender<Buffer>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_deref().and_then(|bytes| bytes.get(..self.len)).unwrap_or_default()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            // The reader may be done: then this was the buffer's last owner.
            let _ = self.home.send(buffer);
        }
    }
}
