//! A ring of reads from one file into registered buffers, or of writes to one
//! from them: io_uring, safely.
//!
//! A transfer owns its buffer from [`Ring::start`] until
//! [`Ring::finished`] gives it back. Dropping the ring first waits for
//! what the kernel holds; when even that fails, the memory is leaked rather
//! than freed under the kernel's hands.
//!
//! ```text
//! Buffer ──start──► owned by the ring ──kernel completes──► finished ──► Buffer
//! ```

use std::{
    fmt, io,
    marker::PhantomData,
    mem,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use io_uring::{IoUring, opcode, types};

use super::slab::{Buffer, Slab};

/// How often in a row the kernel may have no memory for requests, a
/// millisecond apart: ten seconds, longer than reclaim takes on a host that
/// can be saved.
const PATIENCE: u32 = 10_000;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the file into buffers.
    Read,
    /// From buffers to the file.
    Write,
}

/// One read or write: bytes of the file from `offset` on, and `range` of the
/// buffer.
#[derive(Debug)]
pub struct Transfer {
    /// Receives the bytes, or has them.
    pub buffer: Buffer,
    /// Where in the file.
    pub offset: u64,
    /// Which bytes of the buffer; not empty.
    pub range: Range<usize>,
}

/// A transfer that the kernel gave back: the count of bytes from `offset` on,
/// which may be short, or the error.
pub type Finished = (Transfer, io::Result<usize>);

/// Whether to wait for the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Only take what is there.
    No,
    /// Until at least one transfer is finished, if any is under way.
    ForOne,
}

/// How the kernel runs completions; the best that it knows is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `SINGLE_ISSUER` and `DEFER_TASKRUN` (Linux 6.1): when the ring's
    /// thread asks for them, and never by interrupting it.
    Deferred,
    /// `COOP_TASKRUN` (Linux 5.19): when the thread enters the kernel anyway.
    Cooperative,
    /// As io_uring began (Linux 5.1).
    Plain,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deferred => "single issuer, deferred completions",
            Self::Cooperative => "cooperative completions",
            Self::Plain => "plain",
        })
    }
}

/// The ring. It stays on the thread that made it.
pub struct Ring {
    ring: IoUring,
    mode: Mode,
    direction: Direction,
    /// Outlives the registration, whatever becomes of the buffers.
    slab: Arc<Slab>,
    /// What the kernel holds, by slot.
    held: Box<[Option<Transfer>]>,
    in_flight: usize,
    /// How often in a row the kernel asked to come again.
    refusals: u32,
    /// `SINGLE_ISSUER` binds the ring to its thread.
    _not_send: PhantomData<*const ()>,
}

impl Ring {
    /// A ring between `file` and the buffers of `slab`. The kernel keeps its
    /// own reference to the file.
    ///
    /// # Errors
    ///
    /// `ENOSYS` or `EPERM` where io_uring is missing or forbidden
    /// (`kernel.io_uring_disabled`, seccomp), `ENOMEM` where the limit of
    /// locked memory is too small for the buffers.
    pub fn new(direction: Direction, file: BorrowedFd<'_>, slab: &Arc<Slab>) -> io::Result<Self> {
        let (ring, mode) = set_up(u32::from(slab.count()))?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let vectors: Vec<_> = (0..slab.count())
            .map(|slot| libc::iovec {
                iov_base: slab.address(slot).cast(),
                iov_len: slab.buffer_size(),
            })
            .collect();
        // SAFETY: the memory stays mapped until the ring is closed: the ring
        // holds the slab, and fields are dropped after `ring`, or never.
        unsafe { ring.submitter().register_buffers(&vectors)? };
        Ok(Self {
            ring,
            mode,
            direction,
            held: vectors.iter().map(|_| None).collect(),
            slab: Arc::clone(slab),
            in_flight: 0,
            refusals: 0,
            _not_send: PhantomData,
        })
    }

    /// Whether this kernel lets this process use io_uring, and how.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn probe() -> io::Result<Mode> {
        set_up(1).map(|(_, mode)| mode)
    }

    /// How completions run.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// How many transfers the kernel holds.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Queues `transfer`; the kernel sees it with the next
    /// [`finished`](Self::finished).
    ///
    /// # Errors
    ///
    /// `EINVAL` for a buffer of another slab or a range outside the buffer.
    pub fn start(&mut self, transfer: Transfer) -> io::Result<()> {
        let Transfer { buffer, offset, range } = &transfer;
        let slot = buffer.slot();
        let len = u32::try_from(range.len()).unwrap_or(0);
        let inside = range.end <= self.slab.buffer_size() && len > 0;
        if !buffer.is_from(&self.slab) || !inside {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let start = self.slab.address(slot).wrapping_add(range.start);
        let file = types::Fixed(0);
        let entry = match self.direction {
            Direction::Read => {
                opcode::ReadFixed::new(file, start, len, slot).offset(*offset).build()
            }
            Direction::Write => {
                opcode::WriteFixed::new(file, start, len, slot).offset(*offset).build()
            }
        };
        let entry = entry.user_data(u64::from(slot));
        // SAFETY: the entry names registered file 0 and `range` of registered
        // buffer `slot`. That buffer is ours from here until its completion:
        // `held` owns the only `Buffer` of the slot.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        self.held[usize::from(slot)] = Some(transfer);
        self.in_flight += 1;
        Ok(())
    }

    /// Shows the kernel what was queued and appends what it gives back to
    /// `done`. With [`Wait::ForOne`] it may still return with nothing when a
    /// signal came.
    ///
    /// # Errors
    ///
    /// The ring itself is broken; the errors of transfers are in `done`.
    pub fn finished(&mut self, wait: Wait, done: &mut Vec<Finished>) -> io::Result<()> {
        let want = match wait {
            Wait::ForOne if self.in_flight > 0 => 1,
            _ => 0,
        };
        let entered = self.ring.submit_and_wait(want);
        for completion in self.ring.completion() {
            let slot = usize::try_from(completion.user_data()).ok();
            let transfer = slot.and_then(|slot| self.held.get_mut(slot)?.take());
            let Some(transfer) = transfer else { continue };
            self.in_flight -= 1;
            let result = usize::try_from(completion.result())
                .map_err(|_| io::Error::from_raw_os_error(-completion.result()));
            done.push((transfer, result));
        }
        match entered {
            Ok(_) => {
                self.refusals = 0;
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            // The kernel is short of memory for requests, or has completions
            // that were just taken: what was not accepted stays queued.
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
                    && self.refusals < PATIENCE =>
            {
                self.refusals += 1;
                std::thread::sleep(Duration::from_millis(1));
                Ok(())
            }
            Err(e) => Err(e),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight > 0 {
            if let Err(error) = self.finished(Wait::ForOne, &mut done) {
                tracing::error!(%error, transfers = self.in_flight, "cannot take memory back from the kernel; it is leaked");
                // A leaked `Transfer` holds the slab, so no byte of it is freed.
                self.held.iter_mut().filter_map(Option::take).for_each(mem::forget);
                return;
            }
            done.clear();
        }
        // The kernel tears a closed ring down in its own time. The file must
        // not stay open until then: it may be an exclusive one.
        if let Err(error) = self.ring.submitter().unregister_files() {
            tracing::warn!(%error, "a file stays open a little longer");
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring({:?}, {}, {} in flight)", self.direction, self.mode, self.in_flight)
    }
}

fn set_up(entries: u32) -> io::Result<(IoUring, Mode)> {
    let mut refused = None;
    for mode in [Mode::Deferred, Mode::Cooperative, Mode::Plain] {
        let mut builder = IoUring::builder();
        // A forked child has no business with the ring's memory.
        builder.dontfork();
        match mode {
            Mode::Deferred => builder.setup_single_issuer().setup_defer_taskrun(),
            Mode::Cooperative => builder.setup_coop_taskrun(),
            Mode::Plain => &mut builder,
        };
        match builder.build(entries.max(1)) {
            Ok(ring) => return Ok((ring, mode)),
            // The kernel does not know the flags: step down.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(refused.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, os::fd::AsFd, time::Instant};

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn all(ring: &mut Ring) -> Vec<Finished> {
        let mut done = Vec::new();
        while ring.in_flight() > 0 {
            ring.finished(Wait::ForOne, &mut done).unwrap();
        }
        done
    }

    #[test]
    #[ignore = "needs a kernel that allows io_uring"]
    fn uring_reads_fill_their_own_ranges() {
        let file = file(&(0..=255).collect::<Vec<u8>>().repeat(64));
        let (slab, buffers) = Slab::cut(4, 4096);
        let mut ring = Ring::new(Direction::Read, file.as_fd(), &slab).unwrap();
        for buffer in buffers {
            let offset = u64::from(buffer.slot()) * 4096 + 3;
            ring.start(Transfer { buffer, offset, range: 100..200 }).unwrap();
        }
        let done = all(&mut ring);
        assert_eq!(done.len(), 4);
        for (read, result) in done {
            assert_eq!(result.unwrap(), 100);
            assert_eq!(read.buffer[100..200], (3..103).collect::<Vec<u8>>());
            assert!(read.buffer[..100].iter().chain(&read.buffer[200..]).all(|&byte| byte == 0));
        }
    }

    #[test]
    #[ignore = "needs a kernel that allows io_uring"]
    fn uring_writes_come_from_their_own_ranges() {
        let file = file(&[0; 3 * 4096]);
        let (slab, buffers) = Slab::cut(3, 4096);
        let mut ring = Ring::new(Direction::Write, file.as_fd(), &slab).unwrap();
        for mut buffer in buffers {
            let slot = buffer.slot();
            buffer.fill(u8::try_from(slot).unwrap() + 1);
            ring.start(Transfer { buffer, offset: u64::from(slot) * 4096 + 1, range: 7..107 })
                .unwrap();
        }
        assert!(all(&mut ring).into_iter().all(|(_, written)| written.unwrap() == 100));
        let mut bytes = vec![0; 3 * 4096];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        for (page, byte) in bytes.chunks(4096).zip(1..) {
            assert!(page[1..101].iter().all(|found| *found == byte));
            assert!(page[..1].iter().chain(&page[101..]).all(|found| *found == 0));
        }
    }

    #[test]
    #[ignore = "needs a kernel that allows io_uring"]
    fn uring_tells_short_reads_and_errors_of_a_read() {
        let short = file(b"abc");
        let (slab, mut buffers) = Slab::cut(1, 4096);
        let mut ring = Ring::new(Direction::Read, short.as_fd(), &slab).unwrap();
        ring.start(Transfer { buffer: buffers.remove(0), offset: 1, range: 0..4096 }).unwrap();
        let (read, result) = all(&mut ring).remove(0);
        assert_eq!((result.unwrap(), &read.buffer[..2]), (2, &b"bc"[..]));

        let directory = File::open("/").unwrap();
        let mut ring = Ring::new(Direction::Read, directory.as_fd(), &slab).unwrap();
        ring.start(read).unwrap();
        let (_, result) = all(&mut ring).remove(0);
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EISDIR));
    }

    #[test]
    #[ignore = "needs a kernel that allows io_uring"]
    fn uring_refuses_what_is_not_its_own() {
        let file = file(b"abc");
        let (slab, mut own) = Slab::cut(1, 4096);
        let (_, mut foreign) = Slab::cut(1, 4096);
        let mut ring = Ring::new(Direction::Read, file.as_fd(), &slab).unwrap();
        let buffer = foreign.remove(0);
        assert!(ring.start(Transfer { buffer, offset: 0, range: 0..1 }).is_err());
        let buffer = own.remove(0);
        assert!(ring.start(Transfer { buffer, offset: 0, range: 0..4097 }).is_err());
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    #[ignore = "needs a kernel that allows io_uring"]
    fn uring_takes_everything_back_when_it_is_dropped() {
        let file = file(&vec![7; 64 << 20]);
        let (slab, buffers) = Slab::cut(64, 1 << 20);
        let memory = Arc::downgrade(&slab);
        let mut ring = Ring::new(Direction::Read, file.as_fd(), &slab).unwrap();
        drop(slab);
        for buffer in buffers {
            let offset = u64::from(buffer.slot()) << 20;
            ring.start(Transfer { buffer, offset, range: 0..1 << 20 }).unwrap();
        }
        ring.finished(Wait::No, &mut Vec::new()).unwrap();
        drop(ring);
        assert!(memory.upgrade().is_none(), "a buffer stayed behind");
    }

    #[test]
    #[ignore = "needs a kernel that allows io_uring"]
    fn uring_waits_for_a_slow_read_when_it_is_dropped() {
        let (empty, writer) = nix::unistd::pipe().unwrap();
        let (slab, mut buffers) = Slab::cut(1, 4096);
        let mut ring = Ring::new(Direction::Read, empty.as_fd(), &slab).unwrap();
        ring.start(Transfer { buffer: buffers.remove(0), offset: 0, range: 0..8 }).unwrap();
        ring.finished(Wait::No, &mut Vec::new()).unwrap();
        let late = Duration::from_millis(200);
        let begin = Instant::now();
        let writing = std::thread::spawn(move || {
            std::thread::sleep(late);
            nix::unistd::write(&writer, b"12345678").unwrap();
        });
        drop(ring);
        assert!(begin.elapsed() >= late, "the kernel still had the buffer");
        writing.join().unwrap();
    }

    #[test]
    #[ignore = "needs a kernel that allows io_uring"]
    fn uring_lets_go_of_the_file_when_it_is_dropped() {
        // A pipe's reader sees the end when the last writer is closed.
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (slab, _buffers) = Slab::cut(1, 4096);
        let ring = Ring::new(Direction::Read, writer.as_fd(), &slab).unwrap();
        drop(writer);
        drop(ring);
        nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
            .unwrap();
        assert_eq!(nix::unistd::read(&reader, &mut [0; 1]), Ok(0), "it is still open");
    }

    #[test]
    #[ignore = "needs a kernel that allows io_uring"]
    fn uring_buffers_outlive_the_ring() {
        let file = file(b"abc");
        let (slab, mut buffers) = Slab::cut(1, 4096);
        let mut ring = Ring::new(Direction::Read, file.as_fd(), &slab).unwrap();
        ring.start(Transfer { buffer: buffers.remove(0), offset: 0, range: 0..3 }).unwrap();
        let (read, _) = all(&mut ring).remove(0);
        drop((ring, slab, file));
        assert_eq!(&read.buffer[..3], b"abc");
    }
}
