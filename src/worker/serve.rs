//! Serving one lane: hands out tasks, reads the object for them, and compares
//! what comes back.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    frame::{FromWorker, HEADER, Held, MAX_READ, Task, ToWorker},
    line::{Break, Line, Watch},
};
use crate::{
    encode::verify::unreadable,
    error::Error,
    format::qcow2::content,
    model::image::EXTENT_SIZE,
    port::{Fault, Meter, ReadAt, Undecodable},
};

/// Most extents of one task: neighbours lie near each other in the object,
/// and the other threads are not left without work for long.
const TASK: u64 = 16;

/// An object whose extents are to be decoded, and what they should be.
pub struct Server<'a> {
    /// The bytes.
    pub object: &'a dyn ReadAt,
    /// Size of the volume in it.
    pub volume_size: u64,
    /// Digest of each extent, all of them.
    pub extent_digests: &'a [u8],
    /// Counts what was decoded.
    pub meter: &'a Meter,
    /// Whose waits the reads explain.
    pub watch: &'a Watch,
    /// Extents of one task.
    pub task: u64,
    /// The next extent that nobody has.
    pub next: AtomicU64,
    /// Bytes that may still be read: see [`super::limits::reads`].
    pub allowance: AtomicU64,
}

/// Why a lane ended early.
#[derive(Debug)]
pub enum Cut {
    /// Because of the worker.
    Worker(Break),
    /// Because of the store.
    Store(Error),
}

impl From<Break> for Cut {
    fn from(why: Break) -> Self {
        Self::Worker(why)
    }
}

/// Extents of one task, so that `lanes` all have some.
pub fn task_length(volume_size: u64, lanes: usize) -> u64 {
    (content::extent_count(volume_size) / (4 * lanes as u64)).clamp(1, TASK)
}

impl Server<'_> {
    /// Serves a lane until no extent is left, or one differs.
    ///
    /// # Errors
    ///
    /// Any [`Cut`].
    pub fn serve(&self, line: &mut Line<'_>) -> Result<Option<Fault>, Cut> {
        let mut opened = false;
        let mut buf = Vec::new();
        while let Some(task) = self.next_task() {
            line.say(&ToWorker::Task(task))?;
            let mut index = task.first;
            while index < task.first + task.count {
                match line.receive()? {
                    FromWorker::Read { offset, len } => {
                        self.read(offset, len, &mut buf)?;
                        line.send(&buf)?;
                    }
                    FromWorker::Opened(size) if !opened => {
                        if size != self.volume_size {
                            return Ok(Some(Fault::Sum("virtual size")));
                        }
                        opened = true;
                    }
                    FromWorker::Extent(held, digest) if opened => {
                        line.satisfied();
                        if !self.is_expected(index, &digest) {
                            return Ok(Some(Fault::Extent { offset: index * EXTENT_SIZE }));
                        }
                        self.count(index, held);
                        index += 1;
                    }
                    FromWorker::Broken(why) => {
                        return Ok(Some(Fault::Undecodable(Undecodable(why))));
                    }
                    _ => return Err(Break::Nonsense("it spoke out of turn").into()),
                }
            }
        }
        line.finish();
        Ok(None)
    }

    fn next_task(&self) -> Option<Task> {
        let first = self.next.fetch_add(self.task, Ordering::Relaxed);
        let left = content::extent_count(self.volume_size).checked_sub(first)?;
        let count = left.min(self.task);
        (count > 0).then_some(Task { first, count, volume_size: self.volume_size })
    }

    /// The answer to a read: its header and the bytes, in `buf`.
    fn read(&self, offset: u64, len: usize, buf: &mut Vec<u8>) -> Result<(), Cut> {
        let end = offset.checked_add(len as u64);
        if len > MAX_READ || end.is_none_or(|end| end > self.object.len()) {
            return Err(Break::Nonsense("it wants bytes beyond the object's end").into());
        }
        let spent = self.allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(len as u64)
        });
        if spent.is_err() {
            return Err(Break::Nonsense("it reads more than any image of this size needs").into());
        }
        buf.clear();
        ToWorker::Bytes(len).encode(buf);
        buf.resize(HEADER + len, 0);
        self.watch.reading.fetch_add(1, Ordering::Relaxed);
        let outcome = self.object.read_at(&mut buf[HEADER..], offset);
        self.watch.reading.fetch_sub(1, Ordering::Relaxed);
        outcome.map_err(|cause| Cut::Store(unreadable(offset, cause)))
    }

    fn is_expected(&self, index: u64, digest: &[u8; content::DIGEST_SIZE]) -> bool {
        let at = usize::try_from(index).ok().and_then(|index| index.checked_mul(digest.len()));
        let expected = at.and_then(|at| self.extent_digests.get(at..at + digest.len()));
        expected == Some(&digest[..])
    }

    fn count(&self, index: u64, held: Held) {
        let len = content::extent_len(self.volume_size, index) as u64;
        match held {
            Held::Data => self.meter.add_read(len),
            Held::Zeroes => self.meter.add_skipped(len),
        }
    }
}
