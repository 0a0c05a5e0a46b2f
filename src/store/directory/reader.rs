//! An image's object, for reading.

use std::{
    fmt,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::{
    model::ByteSize,
    port::{ObjectReader, ReadAt},
};

/// Bytes that are read before the page cache is told to forget them: little
/// beside a host's memory, and so much that reading again what was still
/// wanted (tables, read-ahead) does not show.
const FORGET_EVERY: u64 = 32 * ByteSize::MIB;

/// Reads an object through the page cache without filling it: verifying
/// 400 GB must not evict what the host's guests have there.
pub struct DirectoryReader {
    file: File,
    len: u64,
    path: PathBuf,
    unforgotten: AtomicU64,
}

impl DirectoryReader {
    /// Reads `file`, whose path is for messages.
    pub fn new(file: File, path: PathBuf) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file, len, path, unforgotten: AtomicU64::new(0) })
    }
}

impl ReadAt for DirectoryReader {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)?;
        let read = buf.len() as u64;
        if self.unforgotten.fetch_add(read, Ordering::Relaxed) + read >= FORGET_EVERY {
            self.unforgotten.store(0, Ordering::Relaxed);
            posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        Ok(())
    }
}

impl ObjectReader for DirectoryReader {}

impl Drop for DirectoryReader {
    fn drop(&mut self) {
        // Only a wish: the kernel forgets by itself when it must.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

impl fmt::Debug for DirectoryReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirectoryReader({}, {} bytes)", self.path.display(), self.len)
    }
}
