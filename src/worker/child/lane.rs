//! The object, read over a socket.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    port::ReadAt,
    worker::frame::{FromWorker, HEADER, MAX_READ, Task, ToWorker},
};

/// Bytes that are read ahead where reads ascend: so many that asking costs
/// nothing beside decoding, so few that they stay in the processor's cache.
const WINDOW: usize = 256 << 10;

/// One thread's connection to the daemon: its tasks, and the object.
pub struct Lane {
    object_size: u64,
    state: Mutex<State>,
}

struct State {
    stream: UnixStream,
    /// What is said with the next question.
    outbox: Vec<u8>,
    /// The bytes of the object from `start` on that are here.
    window: Vec<u8>,
    start: u64,
}

impl Lane {
    /// Over `stream`, to an object of `object_size` bytes.
    pub fn new(stream: UnixStream, object_size: u64) -> Self {
        let state = State { stream, outbox: Vec::new(), window: Vec::new(), start: 0 };
        Self { object_size, state: Mutex::new(state) }
    }

    /// Says something, at the latest with the next read or task.
    pub fn push(&self, message: &FromWorker) {
        message.encode(&mut self.state().outbox);
    }

    /// Waits for the next task; `None`: there are no more.
    pub fn next_task(&self) -> io::Result<Option<Task>> {
        let mut state = self.state();
        state.flush()?;
        let mut bytes = [0; HEADER];
        if state.stream.read(&mut bytes[..1])? == 0 {
            return Ok(None);
        }
        state.hear(&mut bytes[1..])?;
        match ToWorker::header(bytes) {
            Ok((1, _)) => {
                let mut payload = [0; 24];
                state.hear(&mut payload)?;
                Ok(Some(ToWorker::task(&payload)))
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// One thread owns a lane; the lock is for the type.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadAt for Lane {
    fn len(&self) -> u64 {
        self.object_size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.object_size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut state = self.state();
        if buf.len() > WINDOW {
            for (index, piece) in buf.chunks_mut(MAX_READ).enumerate() {
                state.fetch(piece, offset + (index * MAX_READ) as u64)?;
            }
            return Ok(());
        }
        if !state.holds(buf.len(), offset) {
            state.turn(buf.len(), offset, self.object_size)?;
        }
        let at = (offset - state.start) as usize;
        buf.copy_from_slice(&state.window[at..at + buf.len()]);
        Ok(())
    }
}

impl State {
    fn holds(&self, len: usize, offset: u64) -> bool {
        let end = self.start + self.window.len() as u64;
        offset >= self.start && offset + len as u64 <= end
    }

    /// Moves the window so that it begins at `offset` and holds `len` bytes
    /// at least; more where the reads seem to ascend.
    fn turn(&mut self, len: usize, offset: u64, object_size: u64) -> io::Result<()> {
        let end = self.start + self.window.len() as u64;
        let ascends = offset >= self.start && offset <= end + WINDOW as u64;
        let left = usize::try_from(object_size - offset).unwrap_or(usize::MAX);
        let wanted = if ascends { WINDOW.min(left).max(len) } else { len };
        // What is here already is not asked for again.
        let kept = if ascends { end.saturating_sub(offset) as usize } else { 0 };
        let mut window = std::mem::take(&mut self.window);
        let old = window.len();
        window.copy_within(old - kept.., 0);
        window.resize(wanted, 0);
        let fetched = self.fetch(&mut window[kept..], offset + kept as u64);
        if fetched.is_ok() {
            (self.window, self.start) = (window, offset);
        }
        fetched
    }

    /// Asks for bytes, at most [`MAX_READ`].
    fn fetch(&mut self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FromWorker::Read { offset, len: buf.len() }.encode(&mut self.outbox);
        self.flush()?;
        let mut bytes = [0; HEADER];
        self.hear(&mut bytes)?;
        match ToWorker::header(bytes) {
            Ok((2, len)) if len == buf.len() => self.hear(buf),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// A daemon that hangs up must not look like the end of the object.
    fn hear(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(buf).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::ErrorKind::ConnectionAborted.into(),
            _ => error,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        let sent = self.stream.write_all(&self.outbox);
        self.outbox.clear();
        sent
    }
}
