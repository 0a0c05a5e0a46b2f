//! Reads a whole export into pieces, as the reader of devices does.
//!
//! ```text
//!          ┌──────────── home: buffers that consumers dropped ◄───────────┐
//!          ▼                                                              │
//! map ► free buffer ► client (socket) ► outbox ► pieces (bounded) ► consumer ► vouch
//!   └──────── zeroes ──────────────────────┘
//! ```

use std::{
    iter::Peekable,
    ops::Range,
    sync::mpsc::{self, Receiver, Sender, SyncSender, TrySendError},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::{
    client::{Client, Finished, MAX_IN_FLIGHT},
    endpoint::Role,
    live::ScratchExport,
    map::Content,
};
use crate::{
    block::{
        map::{Map, Plan, Step, everything, extents_to_read, united},
        pace::Budget,
        reader::{EXTENT_LEN, Lent, ROOM_LATENCY, STOP_LATENCY},
        reconcile::Saved as _,
    },
    error::{Error, Reason, Result},
    model::{ByteSize, image::EXTENT_SIZE},
    port::{Extent, Pace, Piece},
    sys::slab::{Buffer, Slab},
};

/// By how much an export may be longer than its volume: QEMU counts in
/// sectors of so many bytes.
const SECTOR: u64 = 512;

/// How the reader knows what it need not read.
#[derive(Debug)]
pub enum Guide<'a> {
    /// By the export's own map. A snapshot's is not asked for, because it can
    /// be asked about 64 KiB at a time only: all of it is read, and what is
    /// zeroes is still not sent through the socket.
    Own,
    /// A snapshot's zeroes by the map of what the guest sees now, less what
    /// it has overwritten: what is zeroes, and was not written since the point
    /// in time, was zeroes then (see [`reconcile`](crate::block::reconcile)).
    Live {
        /// An export of the filter itself, connected for
        /// [`Context::Content`](super::Context::Content).
        live: &'a mut Client,
        /// What the filter saved.
        scratch: &'a mut ScratchExport,
    },
}

/// What is to be read, and how.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The volume's size.
    pub size: ByteSize,
    /// The first extent.
    pub from: u64,
    /// Extents that are read or wait for their consumer at most, at least 1 and
    /// at most [`MAX_IN_FLIGHT`].
    pub depth: u16,
    /// No faster than this.
    pub pace: &'a Pace,
}

/// Reads what is `wanted` of a volume from its export, and sends it as
/// [`HeldVolume::read`](crate::port::HeldVolume::read) promises: every extent
/// once, holes in order.
//////
/// What was sent is right only when this returns success: a snapshot can
/// break while it is read, and its last read is of the past (see
/// [`Client::vouch`]).
///
/// Blocks: call it on a thread of its own. Stops soon after `stop` is
/// cancelled or the receiver is gone; then reads may be under way, and the
/// client is of no more use.
///
/// # Errors
///
/// `SNAPSHOT_BROKEN`, `READ_FAILED`; `VOLUME_UNAVAILABLE` when the export has
/// another size; `CANCELED` after `stop`; `INTERNAL` unless the client was
/// connected for [`Context::Content`](super::Context::Content).
pub fn read_all(
    export: &mut Client,
    guide: Guide<'_>,
    wanted: Wanted<'_>,
    pieces: &SyncSender<Piece>,
    stop: &CancellationToken,
) -> Result<()> {
    let Wanted { size, from, depth, pace } = wanted;
    check_size(export, size)?;
    let data = match (guide, export.endpoint().role) {
        (Guide::Live { live, scratch }, _) => {
            check_size(live, size)?;
            data_now(live, scratch, size.get(), stop)?
        }
        (Guide::Own, Role::Snapshot) => Some(everything(size.get())),
        (Guide::Own, Role::Volume | Role::Scratch) => data_of(export, size.get(), stop)?,
    };
    let Some(data) = data else { return Err(stopped(export)) };
    let depth = usize::from(depth).clamp(1, MAX_IN_FLIGHT);
    // A small volume needs no more buffers than extents.
    let count = extents_to_read(size.get(), &data, depth).max(1);
    let (_, free) = Slab::cut(u16::try_from(count).unwrap_or(u16::MAX), EXTENT_LEN);
    let (home, returned) = mpsc::channel();
    let reading = Reading {
        export,
        size: size.get(),
        budget: Budget::new(pace.clone()),
        plan: Plan::new(size.get(), &data).from(from).peekable(),
        free,
        home,
        returned,
        outbox: None,
        pieces,
        stop,
    };
    reading.run()
}

/// Whether an export is that of a volume of `size` bytes.
///
/// # Errors
///
/// `VOLUME_UNAVAILABLE`.
pub fn check_size(export: &Client, size: ByteSize) -> Result<()> {
    let found = export.size();
    if found.get().checked_sub(size.get()).is_some_and(|more| more < SECTOR) {
        return Ok(());
    }
    let sentence = format!("{} has {found:#}, its volume {size:#}", export.endpoint());
    Err(Error::new(Reason::VolumeUnavailable, sentence)
        .advice("do not resize a volume while it is imaged; ask again"))
}

/// Where the export has data; `None` after `stop`.
fn data_of(
    export: &mut Client,
    size: u64,
    stop: &CancellationToken,
) -> Result<Option<Vec<Range<u64>>>> {
    let mut data = Map::new();
    for extent in export.contents(0..size)? {
        let (range, content) = extent?;
        if stop.is_cancelled() {
            return Ok(None);
        }
        if content == Content::Data {
            data.push(range);
        }
    }
    Ok(Some(data.into_ranges()))
}

/// Where the snapshot may have data: where the volume has some now, and where
/// the scratch, asked afterwards, has saved something; `None` after `stop`.
fn data_now(
    live: &mut Client,
    scratch: &mut ScratchExport,
    size: u64,
    stop: &CancellationToken,
) -> Result<Option<Vec<Range<u64>>>> {
    let Some(now) = data_of(live, size, stop)? else { return Ok(None) };
    Ok(Some(united(&now, &scratch.saved(0..size)?)))
}

fn stopped(export: &Client) -> Error {
    Error::new(Reason::Canceled, format!("the reading of {} was stopped", export.endpoint()))
}

/// A reading under way.
struct Reading<'a> {
    export: &'a mut Client,
    size: u64,
    budget: Budget,
    plan: Peekable<Plan<'a>>,
    free: Vec<Buffer>,
    home: Sender<Buffer>,
    returned: Receiver<Buffer>,
    /// A piece that found no room in the channel: nothing goes on before it.
    outbox: Option<Piece>,
    pieces: &'a SyncSender<Piece>,
    stop: &'a CancellationToken,
}

impl Reading<'_> {
    fn run(mut self) -> Result<()> {
        loop {
            if self.stop.is_cancelled() {
                return Err(stopped(self.export));
            }
            if let Some(piece) = self.outbox.take() {
                self.deliver(piece)?;
            }
            self.free.extend(self.returned.try_iter());
            self.fill()?;
            match (self.export.in_flight(), self.outbox.is_some()) {
                (_, true) => self.wait_for_buffer(ROOM_LATENCY),
                (0, false) if self.plan.peek().is_none() => break,
                (0, false) if self.free.is_empty() => self.wait_for_buffer(STOP_LATENCY),
                (0, false) => self.wait_for_buffer(self.budget.due(EXTENT_SIZE).min(STOP_LATENCY)),
                (_, false) => {
                    if let Some(finished) = self.export.finished(STOP_LATENCY)? {
                        self.lend(finished)?;
                    }
                }
            }
        }
        self.vouch()
    }

    /// Starts reads and passes runs of zeroes on, until buffers or room in
    /// the channel are used up.
    fn fill(&mut self) -> Result<()> {
        while self.outbox.is_none() {
            match self.plan.peek().copied() {
                None => break,
                Some(Step::Zeroes { first, count }) => {
                    self.deliver(Piece::Zeroes { first, count })?;
                }
                Some(Step::Read { index }) => {
                    if self.free.is_empty() || !self.budget.take(EXTENT_SIZE) {
                        break;
                    }
                    let Some(buffer) = self.free.pop() else { break };
                    let offset = index * EXTENT_SIZE;
                    // The export's own length: a volume's last sector may be
                    // cut off, and requests come in whole units.
                    let rest = self.export.size().get() - offset;
                    let len = usize::try_from(rest).map_or(EXTENT_LEN, |rest| rest.min(EXTENT_LEN));
                    self.export.read(buffer, offset, 0..len)?;
                }
            }
            self.plan.next();
        }
        Ok(())
    }

    fn lend(&mut self, finished: Finished<Buffer>) -> Result<()> {
        let rest = self.size - finished.offset;
        let len = usize::try_from(rest).map_or(EXTENT_LEN, |rest| rest.min(EXTENT_LEN));
        let lent = Lent { buffer: Some(finished.buffer), len, home: self.home.clone() };
        let index = finished.offset / EXTENT_SIZE;
        self.deliver(Piece::Data(Extent { index, bytes: Box::new(lent) }))
    }

    fn deliver(&mut self, piece: Piece) -> Result<()> {
        match self.pieces.try_send(piece) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(piece)) => {
                self.outbox = Some(piece);
                Ok(())
            }
            Err(TrySendError::Disconnected(_)) => Err(stopped(self.export)),
        }
    }

    fn wait_for_buffer(&mut self, at_most: Duration) {
        if let Ok(buffer) = self.returned.recv_timeout(at_most) {
            self.free.push(buffer);
        }
    }

    /// Everything was read: was it still right when it was read last?
    fn vouch(mut self) -> Result<()> {
        // Consumers may keep all buffers as long as they like.
        let buffer = self.free.pop().or_else(|| Slab::cut(1, EXTENT_LEN).1.pop());
        let Some(buffer) = buffer else { return Err(stopped(self.export)) };
        self.export.vouch(buffer).map(drop)
    }
}
