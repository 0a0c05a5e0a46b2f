//! Reads or writes under way: through io_uring, or on threads where that is
//! refused.

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
    ring::{Direction, Finished, Ring, Transfer, Wait},
    slab::Slab,
};

/// How volumes are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring; where the kernel refuses it, [`Threads`](Self::Threads),
    /// with one warning.
    Uring,
    /// pread(2) and pwrite(2) on a few threads.
    Threads,
}

/// How many threads there are at most. Four outstanding reads of an extent keep
/// most devices busy; more threads would compete with guests.
const MAX_THREADS: u16 = 4;

/// Transfers that were started and not yet given back. Dropping it waits for
/// them.
#[derive(Debug)]
pub(super) enum Queue {
    Ring(Box<Ring>),
    Threads(Threads),
}

impl Queue {
    /// A queue of transfers between `file` and the buffers of `slab`.
    pub(super) fn new(
        engine: Engine,
        direction: Direction,
        file: &Arc<File>,
        slab: &Arc<Slab>,
    ) -> io::Result<Self> {
        static WARNED: Once = Once::new();
        if engine == Engine::Uring {
            match Ring::new(direction, file.as_fd(), slab) {
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
        Threads::new(slab.count().min(MAX_THREADS), direction, file).map(Self::Threads)
    }

    /// Starts `transfer`.
    pub(super) fn start(&mut self, transfer: Transfer) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.start(transfer),
            Self::Threads(threads) => threads.start(transfer),
        }
    }

    /// Appends what is finished to `done`.
    pub(super) fn finished(&mut self, wait: Wait, done: &mut Vec<Finished>) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.finished(wait, done),
            Self::Threads(threads) => threads.finished(wait, done),
        }
    }

    /// How many are under way.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::Ring(ring) => ring.in_flight(),
            Self::Threads(threads) => threads.in_flight,
        }
    }
}

/// The same over pread(2) and pwrite(2).
#[derive(Debug)]
pub(super) struct Threads {
    /// `None` when it ends.
    jobs: Option<Sender<Transfer>>,
    finished: Receiver<Finished>,
    in_flight: usize,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn new(count: u16, direction: Direction, file: &Arc<File>) -> io::Result<Self> {
        let (jobs, todo) = mpsc::channel();
        let (done, finished) = mpsc::channel();
        let todo = Arc::new(Mutex::new(todo));
        let count = NonZero::new(count).map_or(1, NonZero::get);
        let mut queue = Self { jobs: Some(jobs), finished, in_flight: 0, threads: Vec::new() };
        for number in 0..count {
            let (file, todo, done) = (Arc::clone(file), Arc::clone(&todo), done.clone());
            let thread = thread::Builder::new()
                .name(format!("volume-{number}"))
                .spawn(move || serve(direction, &file, &todo, &done))?;
            queue.threads.push(thread);
        }
        Ok(queue)
    }

    fn start(&mut self, transfer: Transfer) -> io::Result<()> {
        let jobs = self.jobs.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        jobs.send(transfer).map_err(|_| io::ErrorKind::BrokenPipe)?;
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
            // A thread that panicked does no more: that is all that matters.
            let _ = thread.join();
        }
    }
}

fn serve(
    direction: Direction,
    file: &File,
    todo: &Mutex<Receiver<Transfer>>,
    done: &Sender<Finished>,
) {
    loop {
        // The lock is held while waiting: one thread waits for the next
        // transfer, the others for the lock.
        let next = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut transfer) = next else { return };
        let Transfer { buffer, offset, range } = &mut transfer;
        let result = match (buffer.get_mut(range.clone()), direction) {
            (Some(bytes), Direction::Read) => file.read_at(bytes, *offset),
            (Some(bytes), Direction::Write) => file.write_at(bytes, *offset),
            (None, _) => Err(io::ErrorKind::InvalidInput.into()),
        };
        if done.send((transfer, result)).is_err() {
            return;
        }
    }
}
