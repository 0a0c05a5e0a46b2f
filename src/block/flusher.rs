//! Sends what was written to the medium while more is written: little is left
//! to wait for at the end, and where a volume is a file or a loop device, the
//! host's memory does not fill with it.

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
};

/// Bytes that are written before they are flushed.
const EVERY: usize = 16 << 20;

/// Flushes a file from time to time. Dropped, it waits for the flush that is
/// under way.
pub(super) struct Flusher {
    written: usize,
    /// At most one flush waits: it is for all that was written before.
    ask: Option<SyncSender<()>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Flusher {
    /// Starts the thread that flushes `file`.
    ///
    /// # Errors
    ///
    /// When there is none to be had.
    pub(super) fn start(file: Arc<File>) -> io::Result<Self> {
        let (ask, asked) = sync_channel(1);
        let body = move || asked.iter().try_for_each(|()| file.sync_data());
        let thread = thread::Builder::new().name("flush".into()).spawn(body)?;
        Ok(Self { written: 0, ask: Some(ask), thread: Some(thread) })
    }

    /// Counts `len` further bytes that were written.
    ///
    /// # Errors
    ///
    /// That of an earlier flush. The kernel tells it once, so nobody else
    /// hears of it.
    pub(super) fn wrote(&mut self, len: usize) -> io::Result<()> {
        self.written += len;
        if self.written < EVERY {
            return Ok(());
        }
        self.written = 0;
        match self.ask.as_ref().map(|ask| ask.try_send(())) {
            Some(Err(TrySendError::Disconnected(()))) => self.end(),
            _ => Ok(()),
        }
    }

    /// Waits for the flushes that were begun.
    ///
    /// # Errors
    ///
    /// Those of [`Self::wrote`].
    pub(super) fn end(&mut self) -> io::Result<()> {
        self.ask = None;
        let ended = self.thread.take().map(JoinHandle::join);
        ended.unwrap_or(Ok(Ok(()))).unwrap_or_else(|_| Err(io::Error::other("a flush panicked")))
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        // Whoever drops it knows already that nothing came of it.
        let _ = self.end();
    }
}
