//! Reads under way: through io_uring, or on threads where that is refused.

use std::{
    fs::File,
    io,
    num::NonZero,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::{
        Arc, Mutex, Once, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
};

use crate::sys::{
    ring::{Finished, Read, ReadRing, Wait},
    slab::Slab,
};

/// How volumes are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring; where the kernel refuses it, [`Threads`](Self::Threads),
    /// with one warning.
    Uring,
    /// pread(2) on a few threads.
    Threads,
}

/// How many threads read at most. Four outstanding reads of an extent keep
/// most devices busy; more threads would compete with guests.
const MAX_THREADS: u16 = 4;

/// Reads that were started and not yet given back. Dropping it waits for
/// them.
#[derive(Debug)]
pub(super) enum Queue {
    Ring(Box<ReadRing>),
    Threads(Threads),
}

impl Queue {
    /// A queue of reads from `file` into the buffers of `slab`.
    pub(super) fn new(engine: Engine, file: &Arc<File>, slab: &Arc<Slab>) -> io::Result<Self> {
        static WARNED: Once = Once::new();
        if engine == Engine::Uring {
            match ReadRing::new(file.as_fd(), slab) {
                Ok(ring) => return Ok(Self::Ring(Box::new(ring))),
                Err(error) => WARNED.call_once(|| {
                    tracing::warn!(
                        %error,
                        "the kernel refuses io_uring; volumes are read on threads, which is slower \
                         (see kernel.io_uring_disabled, LimitMEMLOCK and seccomp filters)"
                    );
                }),
            }
        }
        Threads::new(slab.count().min(MAX_THREADS), file).map(Self::Threads)
    }

    /// Starts `read`.
    pub(super) fn start(&mut self, read: Read) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.start(read),
            Self::Threads(threads) => threads.start(read),
        }
    }

    /// Appends what is finished to `done`.
    pub(super) fn finished(&mut self, wait: Wait, done: &mut Vec<Finished>) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.finished(wait, done),
            Self::Threads(threads) => threads.finished(wait, done),
        }
    }

    /// How many reads are under way.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::Ring(ring) => ring.in_flight(),
            Self::Threads(threads) => threads.in_flight,
        }
    }
}

/// The same over pread(2).
#[derive(Debug)]
pub(super) struct Threads {
    /// `None` when it ends.
    jobs: Option<Sender<Read>>,
    finished: Receiver<Finished>,
    in_flight: usize,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn new(count: u16, file: &Arc<File>) -> io::Result<Self> {
        let (jobs, todo) = mpsc::channel();
        let (done, finished) = mpsc::channel();
        let todo = Arc::new(Mutex::new(todo));
        let count = NonZero::new(count).map_or(1, NonZero::get);
        let mut queue = Self { jobs: Some(jobs), finished, in_flight: 0, threads: Vec::new() };
        for number in 0..count {
            let (file, todo, done) = (Arc::clone(file), Arc::clone(&todo), done.clone());
            let thread = thread::Builder::new()
                .name(format!("read-{number}"))
                .spawn(move || serve(&file, &todo, &done))?;
            queue.threads.push(thread);
        }
        Ok(queue)
    }

    fn start(&mut self, read: Read) -> io::Result<()> {
        let jobs = self.jobs.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        jobs.send(read).map_err(|_| io::ErrorKind::BrokenPipe)?;
        self.in_flight += 1;
        Ok(())
    }

    fn finished(&mut self, wait: Wait, done: &mut Vec<Finished>) -> io::Result<()> {
        let before = done.len();
        if wait == Wait::ForOne && self.in_flight > 0 {
            done.push(self.finished.recv().map_err(io::Error::other)?);
        }
        done.extend(self.finished.try_iter());
        self.in_flight -= done.len() - before;
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked reads no more: that is all that matters.
            let _ = thread.join();
        }
    }
}

fn serve(file: &File, todo: &Mutex<Receiver<Read>>, done: &Sender<Finished>) {
    loop {
        // The lock is held while waiting: one thread waits for the next read,
        // the others for the lock.
        let next = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut read) = next else { return };
        let result = match read.buffer.get_mut(read.range.clone()) {
            Some(bytes) => file.read_at(bytes, read.offset),
            None => Err(io::ErrorKind::InvalidInput.into()),
        };
        if done.send((read, result)).is_err() {
            return;
        }
    }
}
