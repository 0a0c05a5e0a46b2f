//! From pieces of a volume to parts of a qcow2, in parallel and in order.
//!
//! Every thread does everything: it takes a piece, digests and compresses it,
//! and hands it to the `assembler`, which appends what is next
//! in order; whoever completes a part hashes it and sends it on. So there is
//! one knob, the number of threads, and one place that waits, the channel of
//! parts: backpressure from the store stops the threads, and they, holding
//! the reader's buffers, stop the reader.
//!
//! ```text
//!            ┌─ digest, compress ─┐
//!  pieces ──►├─ digest, compress ─┤──► reorder, lay out ──► hash ──► parts
//!            └─ digest, compress ─┘      (one at a time)
//! ```

#![allow(clippy::cast_possible_truncation, reason = "usize has 64 bits: see lib.rs")]

mod assembler;
mod checkpoint;
mod extent;
pub mod plan;
#[cfg(test)]
mod tests;
pub mod verify;
mod window;

use std::{
    num::NonZeroUsize,
    sync::{Mutex, MutexGuard, PoisonError, mpsc::Receiver},
    thread,
};

use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::{
    assembler::{Assembler, Step},
    window::{Cut, FullPart},
};
pub use self::{
    checkpoint::{Checkpoint, Resumed},
    window::SpareMemory,
};
use crate::{
    error::{Context, Error, Reason, Result},
    format::qcow2::{cluster::Encoder, content},
    model::{
        ByteSize,
        image::{Compression, ContentDigest, EXTENT_SIZE, ObjectDigest, StoredPart},
    },
    port::{Part, Piece, pieces},
    sys,
};

pub use crate::port::Meter;

/// What to encode, and with how much of the machine.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The volume's exact size.
    pub volume_size: ByteSize,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Threads, all at `SCHED_IDLE`: they run when nothing else wants to,
    /// because a hypervisor's cores are sold.
    pub threads: NonZeroUsize,
    /// Memory that this image shares with those that are encoded at once.
    pub spare: SpareMemory,
    /// Whether the encoding may have to go on in another process.
    pub resumable: bool,
}

/// What comes of encoding.
#[derive(Debug)]
pub enum Output {
    /// A part that is to be stored, and how everything stands after it, where
    /// that is of use. The first part comes last.
    Part(Part, Option<Checkpoint>),
    /// The first part without its header, which comes at the end: only to be
    /// remembered, when the encoding is resumable.
    First(Part, Checkpoint),
}

/// The digest of an object that is in memory.
#[must_use]
pub fn object_digest(bytes: &[u8]) -> ObjectDigest {
    ObjectDigest(Sha256::digest(bytes).into())
}

/// What is known of the image when all of it was encoded.
#[derive(Debug)]
pub struct Encoded {
    /// Size that the guest sees.
    pub virtual_size: ByteSize,
    /// Size of the object.
    pub object_size: ByteSize,
    /// Digest of what the guest sees.
    pub content_digest: ContentDigest,
    /// Digest of the object.
    pub object_digest: ObjectDigest,
    /// 32 bytes for each extent.
    pub extent_digests: Vec<u8>,
    /// The parts, in the object's order.
    pub parts: Vec<StoredPart>,
}

/// Encodes everything that comes through `pieces` and sends it as `parts`:
/// the first part, which holds the header, last. Returns when `pieces` has
/// ended and all parts were taken.
///
/// Blocks, and lowers the priority of its thread: call it on a thread of its
/// own. The memory of the first part, of the open one and of two more is alive, less
/// when others are encoded at once.
///
/// # Errors
///
/// Every error cancels `stop`. `CANCELED` after `stop`, or when nobody takes parts or the pieces ended
/// early; the one who caused that knows why.
pub fn run(
    settings: &Settings,
    pieces: Receiver<Piece>,
    parts: mpsc::Sender<Output>,
    meter: &Meter,
    stop: &CancellationToken,
) -> Result<Encoded> {
    run_from(settings, None, pieces, parts, meter, stop)
}

/// As [`run`], from where an earlier one was interrupted: the pieces begin at
/// its [`Resumed::next_extent`], and the parts that it made do not come again,
/// but for the first.
///
/// # Errors
///
/// As [`run`].
pub fn run_from(
    settings: &Settings,
    from: Option<Resumed>,
    pieces: Receiver<Piece>,
    parts: mpsc::Sender<Output>,
    meter: &Meter,
    stop: &CancellationToken,
) -> Result<Encoded> {
    let (volume, compression, spare) =
        (settings.volume_size, settings.compression, &settings.spare);
    let mut digests = Vec::new();
    let assembler = match from {
        None => Assembler::new(volume, compression, spare, stop),
        Some(mut from) => {
            // The first part's is not known before it has its header.
            digests.push(None);
            digests.extend(std::mem::take(&mut from.parts).into_iter().map(Some));
            Assembler::resume(volume, compression, spare, stop, from)
        }
    };
    let line = Line {
        volume_size: settings.volume_size.get(),
        compression: settings.compression,
        pieces: Mutex::new(pieces),
        assembler: Mutex::new(assembler),
        outlet: Outlet { digests: Mutex::new(digests), parts, stop },
        resumable: settings.resumable,
        meter,
    };
    let outcomes = in_parallel(settings.threads, "encode", || {
        // A thread that fails, or panics, takes an extent with it: the others
        // would wait for it for ever.
        let others = stop.clone().drop_guard();
        line.work().inspect(|()| drop(others.disarm()))
    });
    let (stopped, failed): (Vec<_>, Vec<_>) = (outcomes.into_iter().filter_map(Result::err))
        .partition(|error| error.reason() == Reason::Canceled);
    if let Some(error) = failed.into_iter().chain(stopped).next() {
        return Err(error);
    }
    line.finish()
}

/// Does `work` on `threads` threads at `SCHED_IDLE`, the calling one among
/// them, and returns what each says when all have ended.
pub fn in_parallel<T: Send>(
    threads: NonZeroUsize,
    name: &str,
    work: impl Fn() -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let idle = || {
        if let Err(cause) = sys::sched::set_idle() {
            tracing::warn!(error = %cause, "{name} runs at normal priority");
        }
        work()
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads.get())
            .map(|index| {
                thread::Builder::new().name(format!("{name}-{index}")).spawn_scoped(scope, idle)
            })
            .collect();
        let mut outcomes = vec![idle()];
        outcomes.extend(others.into_iter().map(|other| match other {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err(defect("a thread panicked"))),
            Err(cause) => Err(defect("a thread cannot be started").because(cause)),
        }));
        outcomes
    })
}

fn defect(what: &str) -> Error {
    Error::new(Reason::Internal, format!("encoding: {what}"))
}

/// What the threads share.
struct Line<'a> {
    volume_size: u64,
    compression: Compression,
    pieces: Mutex<Receiver<Piece>>,
    assembler: Mutex<Assembler<'a>>,
    outlet: Outlet<'a>,
    resumable: bool,
    meter: &'a Meter,
}

/// Where full parts leave.
struct Outlet<'a> {
    /// SHA-256 and size of each part, by number less one.
    digests: Mutex<Vec<Option<StoredPart>>>,
    parts: mpsc::Sender<Output>,
    stop: &'a CancellationToken,
}

impl Line<'_> {
    /// One thread: until the pieces end.
    fn work(&self) -> Result<()> {
        let mut encoder = Encoder::new(self.compression)
            .context(Reason::Internal, || "encoding: no compressor could be made")?;
        loop {
            // The lock is held while waiting: the others wait for it instead.
            let Ok(piece) = lock(&self.pieces).recv() else { return Ok(()) };
            self.outlet.check()?;
            let (first, encoded) = match piece {
                Piece::Data(extent) => {
                    let bytes = (*extent.bytes).as_ref().len() as u64;
                    self.meter.add_read(bytes);
                    let scratch = lock(&self.assembler).scratch();
                    (extent.index, extent::encode(extent, &mut encoder, scratch))
                }
                Piece::Zeroes { first, count } => {
                    let end = self.volume_size.min((first + count) * EXTENT_SIZE);
                    let bytes = end.saturating_sub(first * EXTENT_SIZE);
                    self.meter.add_skipped(bytes);
                    (first, extent::Encoded::Zeroes { count })
                }
            };
            self.append(first, encoded)?;
        }
    }

    /// Hands an extent to the assembler and lets it go on as far as it can.
    fn append(&self, first: u64, encoded: extent::Encoded) -> Result<()> {
        let mut assembler = lock(&self.assembler);
        assembler.insert(first, encoded);
        loop {
            match assembler.step() {
                Step::Waiting => return Ok(()),
                Step::Appended => {}
                Step::Full(cut, checkpoint) => {
                    let kept = match &cut {
                        Cut::Kept if self.resumable => assembler.copy_of_first(),
                        _ => None,
                    };
                    // Hashing and a full store must not stop the others.
                    drop(assembler);
                    match (cut, kept) {
                        (Cut::Full(part), _) => {
                            self.outlet.send(part, Some(*checkpoint).filter(|_| self.resumable))?;
                        }
                        (Cut::Kept, Some(first)) => self.outlet.remember(first, *checkpoint)?,
                        (Cut::Kept, None) => {}
                    }
                    assembler = lock(&self.assembler);
                }
            }
        }
    }

    /// After the last piece: the tables, the last parts, the first part.
    fn finish(self) -> Result<Encoded> {
        self.outlet.check()?;
        let assembler = self.assembler.into_inner().unwrap_or_else(PoisonError::into_inner);
        let finished = assembler.finish().ok_or_else(canceled)?;
        for part in finished.parts {
            self.outlet.send(part, None)?;
        }
        let parts = self.outlet.into_parts()?;
        let mut sha256 = Sha256::new();
        parts.iter().for_each(|part| sha256.update(part.sha256.0));
        Ok(Encoded {
            virtual_size: ByteSize(finished.virtual_size),
            object_size: ByteSize(finished.object_size),
            content_digest: content::content_digest(&finished.extent_digests),
            object_digest: ObjectDigest(sha256.finalize().into()),
            extent_digests: finished.extent_digests,
            parts,
        })
    }
}

impl Outlet<'_> {
    /// Hashes a part and waits until someone takes it.
    fn send(&self, part: FullPart, after: Option<Checkpoint>) -> Result<()> {
        self.check()?;
        let part = hashed(part);
        let Part { size, sha256, .. } = part;
        let index = part.number as usize - 1;
        {
            let mut digests = lock(&self.digests);
            if digests.len() <= index {
                digests.resize(index + 1, None);
            }
            digests[index] = Some(StoredPart { size, sha256 });
        }
        self.hand_over(Output::Part(part, after))
    }

    /// Has the first part remembered as it is now.
    fn remember(&self, first: FullPart, after: Checkpoint) -> Result<()> {
        self.hand_over(Output::First(hashed(first), after))
    }

    /// Waits until someone takes it.
    fn hand_over(&self, output: Output) -> Result<()> {
        self.parts.blocking_send(output).map_err(|_| canceled())
    }

    fn check(&self) -> Result<()> {
        if self.stop.is_cancelled() { Err(canceled()) } else { Ok(()) }
    }

    fn into_parts(self) -> Result<Vec<StoredPart>> {
        let digests = self.digests.into_inner().unwrap_or_else(PoisonError::into_inner);
        let parts: Option<Vec<_>> = digests.into_iter().collect();
        parts.ok_or_else(|| defect("a part is missing"))
    }
}

fn hashed(part: FullPart) -> Part {
    let mut sha256 = Sha256::new();
    pieces(&part).for_each(|piece| sha256.update(piece));
    let sha256 = ObjectDigest(sha256.finalize().into());
    let (number, offset, size) = (part.number, part.offset, ByteSize(part.size));
    Part { number, offset, size, body: Box::new(part), sha256 }
}

fn canceled() -> Error {
    Error::new(Reason::Canceled, "encoding was stopped")
}

/// A panic elsewhere is reported by its thread; the data are consistent
/// between statements here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
