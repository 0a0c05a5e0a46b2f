//! Writes extents over a volume, through the page cache's back.
//!
//! ```text
//! room ──► filled by many threads ──► write ──► one thread: queue ──► room again
//!                                       └─ the first extent waits for `finish`
//! ```
//! What was not written to its end has zeroes where a disk begins: no machine
//! boots from it. A new file has no name before `finish`.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError},
    },
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
};
use tokio_util::sync::CancellationToken;

use super::{
    ReaderSettings,
    flusher::Flusher,
    queue::Queue,
    reader::{EXTENT_LEN, STOP_LATENCY},
    target::Output,
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::image::EXTENT_SIZE,
    port::{Meter, Room, Sink},
    sys::{
        aligned::AlignedBuf,
        ring::{Direction, Finished, Transfer, Wait},
        slab::{Buffer, Slab},
    },
};

/// Most that is zeroed by one call: where the device cannot do it by itself,
/// the kernel writes zeroes, and nobody can stop it meanwhile.
const ZERO_STEP: u64 = 64 << 20;

/// Extents that go on being decoded while a flush holds writes up: a loop
/// device writes nothing for the moment of it.
const SPARE: u16 = 8;

/// How often in a row a write may be interrupted or put off before it counts
/// as an error.
const PATIENCE: u32 = 1000;

/// A writing under way. Dropped before [`Sink::finish`] it waits for what the
/// kernel holds, and a new file is gone.
pub(super) struct Writer {
    output: Output,
    stop: CancellationToken,
    free: Mutex<Receiver<Buffer>>,
    home: Sender<Buffer>,
    /// The first extent.
    first: Mutex<Option<Transfer>>,
    /// `None` when nothing more is written.
    jobs: Mutex<Option<Sender<Transfer>>>,
    thread: Mutex<Option<JoinHandle<Result<()>>>>,
}

impl Writer {
    /// Starts the thread that writes.
    pub(super) fn start(
        output: Output,
        settings: ReaderSettings,
        stop: CancellationToken,
    ) -> Result<Self> {
        // One stays behind: the first extent.
        let depth = settings.depth.max(1).saturating_add(SPARE + 1);
        let (slab, buffers) = Slab::cut(depth, EXTENT_LEN);
        let (home, free) = mpsc::channel();
        for buffer in buffers {
            // The other end is here.
            let _ = home.send(buffer);
        }
        // As many as there are buffers.
        let (jobs, todo) = mpsc::channel();
        let (file, path, home_too) = (Arc::clone(&output.file), output.path.clone(), home.clone());
        let body = move || {
            let queue = Queue::new(settings.engine, Direction::Write, &file, &slab)
                .context(Reason::WriteFailed, || format!("cannot write {}", path.display()))?;
            let flusher = Flusher::start(Arc::clone(&file))
                .context(Reason::Internal, || "the flushing thread cannot be started")?;
            Writing { queue, flusher, home: home_too, put_off: 0, path: &path }.run(&todo)
        };
        let thread = thread::Builder::new().name("write".into()).spawn(body).map_err(|cause| {
            Error::new(Reason::Internal, "the writing thread cannot be started").because(cause)
        })?;
        Ok(Self {
            output,
            stop,
            free: Mutex::new(free),
            home,
            first: Mutex::new(None),
            jobs: Mutex::new(Some(jobs)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Why the thread ended, to the first that asks.
    fn why(&self) -> Error {
        let ended = locked(&self.thread).take().map(JoinHandle::join);
        match ended {
            Some(Ok(Err(error))) => error,
            Some(Err(_)) => Error::new(Reason::Internal, "the writing thread panicked"),
            Some(Ok(Ok(()))) | None => canceled(),
        }
    }

    fn has_ended(&self) -> bool {
        locked(&self.thread).as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Sink for Writer {
    fn room(&self) -> Result<Box<dyn Room + '_>> {
        loop {
            let received = locked(&self.free).recv_timeout(STOP_LATENCY);
            match received {
                Ok(buffer) => {
                    return Ok(Box::new(Lent { writer: self, buffer: Some(buffer) }));
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if self.has_ended() {
                return Err(self.why());
            }
            if self.stop.is_cancelled() {
                return Err(canceled());
            }
        }
    }

    fn zeroes(&self, first: u64, count: u64) -> Result<()> {
        if self.output.name.is_some() {
            return Ok(());
        }
        let end = ((first + count) * EXTENT_SIZE).min(self.output.size);
        // What is left of a sector is zeroed, too.
        let end = end.next_multiple_of(self.output.sector).min(self.output.room);
        let range = first * EXTENT_SIZE..end;
        zero(&self.output.file, range.clone(), &self.stop)
            .context(Reason::WriteFailed, || self.output.sentence(range))
    }

    fn finish(self: Box<Self>, meter: &Meter) -> Result<()> {
        locked(&self.jobs).take();
        if let Some(thread) = locked(&self.thread).take() {
            let ended = thread.join();
            ended.map_err(|_| Error::new(Reason::Internal, "the writing thread panicked"))??;
        }
        let Output { file, path, size, room, sector, cut, name, .. } = &self.output;
        let context = || unfinished(path);
        let mut rest = size.next_multiple_of(*sector).min(*room)..*room;
        while !rest.is_empty() {
            let step = rest.start..rest.end.min(rest.start.saturating_add(ZERO_STEP));
            zero(file, step.clone(), &self.stop)
                .context(Reason::WriteFailed, || self.output.sentence(step.clone()))?;
            meter.add_skipped(step.end - step.start);
            rest.start = step.end;
        }
        file.sync_all().context(Reason::WriteFailed, context)?;
        if let Some(Transfer { buffer, offset, range }) = locked(&self.first).take() {
            file.write_all_at(&buffer[range], offset).context(Reason::WriteFailed, context)?;
        }
        if let Some(len) = cut {
            file.set_len(*len).context(Reason::WriteFailed, context)?;
        }
        file.sync_all().context(Reason::WriteFailed, context)?;
        match name.as_ref().map(|missing| missing.name(file)) {
            None | Some(Ok(())) => Ok(()),
            Some(Err(cause)) if cause.kind() == io::ErrorKind::AlreadyExists => {
                let context = format!("{} came into being meanwhile", path.display());
                Err(Error::new(Reason::WriteFailed, context)
                    .advice("it was left as it is: name another path, or remove it"))
            }
            Some(Err(cause)) => Err(cause).context(Reason::WriteFailed, context),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        locked(&self.jobs).take();
        if let Some(thread) = locked(&self.thread).take() {
            // Whoever drops it knows already that nothing came of it.
            let _ = thread.join();
        }
    }
}

/// A buffer, until it is written or dropped.
struct Lent<'a> {
    writer: &'a Writer,
    buffer: Option<Buffer>,
}

impl Room for Lent<'_> {
    fn bytes(&mut self) -> &mut [u8] {
        self.buffer.as_deref_mut().unwrap_or_default()
    }

    fn write(mut self: Box<Self>, index: u64, len: usize) -> Result<()> {
        let Some(mut buffer) = self.buffer.take() else { return Err(canceled()) };
        let writer = self.writer;
        let sector = usize::try_from(writer.output.sector).unwrap_or(EXTENT_LEN);
        let end = len.next_multiple_of(sector).min(buffer.len());
        buffer[len..end].fill(0);
        let transfer = Transfer { buffer, offset: index * EXTENT_SIZE, range: 0..end };
        if index == 0 {
            *locked(&writer.first) = Some(transfer);
            return Ok(());
        }
        let sent = locked(&writer.jobs).as_ref().map(|jobs| jobs.send(transfer));
        if matches!(sent, Some(Ok(()))) { Ok(()) } else { Err(writer.why()) }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            // The other end is the writer's.
            let _ = self.writer.home.send(buffer);
        }
    }
}

/// The thread that writes.
struct Writing<'a> {
    queue: Queue,
    flusher: Flusher,
    home: Sender<Buffer>,
    put_off: u32,
    path: &'a Path,
}

impl Writing<'_> {
    /// Until nobody sends any more. Dropping `self`, on every way out, takes
    /// back what the kernel holds.
    fn run(mut self, jobs: &Receiver<Transfer>) -> Result<()> {
        let mut done = Vec::new();
        loop {
            let more = self.begin(jobs)?;
            if self.queue.in_flight() == 0 {
                if more {
                    continue;
                }
                let flushed = self.flusher.end();
                return flushed.context(Reason::WriteFailed, || unfinished(self.path));
            }
            self.queue
                .finished(Wait::ForOne, &mut done)
                .context(Reason::WriteFailed, || "cannot go on writing")?;
            for finished in done.drain(..) {
                self.settle(finished)?;
            }
        }
    }

    /// Starts what was sent; waits for something if nothing is under way.
    /// Whether more may come.
    fn begin(&mut self, jobs: &Receiver<Transfer>) -> Result<bool> {
        loop {
            let next = match self.queue.in_flight() {
                0 => jobs.recv().map_err(|_| TryRecvError::Disconnected),
                _ => jobs.try_recv(),
            };
            match next {
                Ok(transfer) => self.start(transfer)?,
                Err(TryRecvError::Empty) => return Ok(true),
                Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
    }

    fn start(&mut self, transfer: Transfer) -> Result<()> {
        self.queue.start(transfer).context(Reason::WriteFailed, || "a write cannot be started")
    }

    fn settle(&mut self, (transfer, result): Finished) -> Result<()> {
        let Transfer { buffer, offset, range } = transfer;
        match result {
            Ok(written) if written >= range.len() => {
                self.put_off = 0;
                // Nobody wants it any more.
                let _ = self.home.send(buffer);
                let flushed = self.flusher.wrote(range.len());
                flushed.context(Reason::WriteFailed, || unfinished(self.path))
            }
            // The rest, from the sector on in which it stopped.
            Ok(written) if written >= FINEST => {
                let written = written - written % FINEST;
                let range = range.start + written..range.end;
                self.start(Transfer { buffer, offset: offset + written as u64, range })
            }
            result => {
                let cause = result.map_or_else(|error| error, |_| io::ErrorKind::WriteZero.into());
                let again =
                    matches!(cause.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
                let transfer = Transfer { buffer, offset, range };
                if again && self.put_off < PATIENCE {
                    self.put_off += 1;
                    return self.start(transfer);
                }
                let full = cause.kind() == io::ErrorKind::StorageFull;
                let (offset, len) = (transfer.offset, transfer.range.len());
                let path = self.path.display();
                let context = format!("cannot write {len} bytes at offset {offset} of {path}");
                let error = Error::new(Reason::WriteFailed, context).because(cause);
                Err(match full {
                    true => error.advice("make room where the volume lies, then restore again"),
                    false => error.advice("look into the kernel's log (dmesg)"),
                })
            }
        }
    }
}

/// Largest sector: what is written up to a multiple of it may be gone on with.
const FINEST: usize = crate::sys::aligned::ALIGNMENT;

/// Makes `range` read as zeroes, and gives its blocks back where that can be
/// done: the device is asked first, the kernel writes otherwise.
pub(super) fn zero(file: &File, range: Range<u64>, stop: &CancellationToken) -> io::Result<()> {
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let ways = [FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE];
    let mut rest = range;
    'steps: while !rest.is_empty() {
        if stop.is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let len = (rest.end - rest.start).min(ZERO_STEP);
        let (start, step) = (rest.start, rest.start..rest.start + len);
        rest.start = step.end;
        for way in ways {
            let signed = |n: u64| i64::try_from(n).map_err(io::Error::other);
            match fallocate(file, way | keep, signed(start)?, signed(len)?) {
                Ok(()) => continue 'steps,
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let zeroes = AlignedBuf::zeroed(EXTENT_LEN);
        for offset in step.clone().step_by(EXTENT_LEN) {
            let len = usize::try_from(step.end - offset).unwrap_or(EXTENT_LEN).min(EXTENT_LEN);
            file.write_all_at(&zeroes[..len], offset)?;
        }
    }
    Ok(())
}

fn unfinished(path: &Path) -> String {
    format!("cannot finish writing {}", path.display())
}

fn canceled() -> Error {
    Error::new(Reason::Canceled, "the writing was stopped")
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
