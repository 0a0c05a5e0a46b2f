//! The object's file while it is written.
//!
//! Direct writes where the filesystem takes them: on ext4 they
//! cost a seventh of the processor time of buffered ones (0.28 s against
//! 1.9 s for 4 GiB) and leave the page cache to the host. Buffered writes
//! are flushed and dropped in short steps: without that the kernel lets dirty
//! pages pile up and then stops the writer, six times slower in all (13 s
//! against 2 s). Space is not allocated ahead: `fallocate` made nothing
//! faster, and what it allocates beyond the end stays.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise},
};

use super::files::{self, Dir};
use crate::{
    model::{ByteSize, host::Space},
    sys::aligned::ALIGNMENT,
};

/// Buffered bytes that may wait for the disk: enough to keep it busy, little
/// enough to be flushed in well under a second by a disk of 100 MB/s.
const MAX_UNFLUSHED: u64 = 64 * ByteSize::MIB;

/// An object that is being written. Writes come concurrently.
#[derive(Debug)]
pub struct ObjectFile {
    buffered: File,
    direct: Option<File>,
    direct_works: AtomicBool,
    unflushed: AtomicU64,
}

impl ObjectFile {
    /// Makes the file `name` in `dir`.
    pub fn create(dir: &Dir, name: &str) -> io::Result<Self> {
        let buffered = dir.create(name)?;
        let direct = dir.open(name, OFlag::O_WRONLY | OFlag::O_DIRECT).ok();
        Ok(Self {
            buffered,
            direct,
            direct_works: AtomicBool::new(true),
            unflushed: AtomicU64::new(0),
        })
    }

    /// Writes `bytes` at `offset`. Blocks.
    pub fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let written = self.write_direct(bytes, offset)?;
        let rest = &bytes[written..];
        if rest.is_empty() {
            return Ok(());
        }
        self.buffered.write_all_at(rest, offset + written as u64)?;
        let unflushed = self.unflushed.fetch_add(rest.len() as u64, Ordering::Relaxed);
        if unflushed + rest.len() as u64 >= MAX_UNFLUSHED {
            self.unflushed.store(0, Ordering::Relaxed);
            self.buffered.sync_data()?;
            posix_fadvise(&self.buffered, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        Ok(())
    }

    /// Writes directly what can be, and says how much that was: a whole
    /// number of blocks from the start, or nothing.
    fn write_direct(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let Some(direct) = &self.direct else { return Ok(0) };
        let aligned = bytes.as_ptr().addr().is_multiple_of(ALIGNMENT)
            && offset.is_multiple_of(ALIGNMENT as u64)
            && self.direct_works.load(Ordering::Relaxed);
        let len = bytes.len() - bytes.len() % ALIGNMENT;
        if !aligned || len == 0 {
            return Ok(0);
        }
        match direct.write_all_at(&bytes[..len], offset) {
            // Some filesystems open for direct writes and then refuse them.
            Err(cause) if cause.raw_os_error() == Some(Errno::EINVAL as i32) => {
                self.direct_works.store(false, Ordering::Relaxed);
                tracing::debug!("the store's filesystem refuses direct writes");
                Ok(0)
            }
            Err(cause) => Err(cause),
            Ok(()) => Ok(len),
        }
    }

    /// Its length, and an error if its name was taken from it.
    pub fn len(&self) -> io::Result<u64> {
        let facts = self.buffered.metadata()?;
        if facts.nlink() == 0 {
            return Err(Errno::ENOENT.into());
        }
        Ok(facts.len())
    }

    /// Room in its filesystem.
    pub fn room(&self) -> io::Result<Space> {
        files::room(&self.buffered)
    }

    /// Makes it durable. Blocks.
    pub fn sync(&self) -> io::Result<()> {
        self.buffered.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sys::aligned::AlignedBuf;

    /// Bytes that differ at every offset within a part.
    fn body(number: usize, len: usize) -> AlignedBuf {
        let mut body = AlignedBuf::zeroed(len);
        for (at, byte) in body.iter_mut().enumerate() {
            *byte = u8::try_from((at / 8 + at + 31 * number) % 251).unwrap();
        }
        body
    }

    #[test]
    fn only_what_is_aligned_is_written_directly() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::at(temp.path()).unwrap();
        let file = ObjectFile::create(&dir, "object").unwrap();
        if file.direct.is_none() {
            return;
        }
        let body = body(1, 12288);
        assert_eq!(file.write_direct(&body, 4096).unwrap(), 12288);
        assert_eq!(file.write_direct(&body[..8292], 4096).unwrap(), 8192);
        assert_eq!(file.write_direct(&body[8..], 4096).unwrap(), 0);
        assert_eq!(file.write_direct(&body, 512).unwrap(), 0);
        assert_eq!(file.write_direct(&body[..4095], 0).unwrap(), 0);
        file.direct_works.store(false, Ordering::Relaxed);
        assert_eq!(file.write_direct(&body, 0).unwrap(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn parts_of_any_size_alignment_and_order_make_the_bytes(
            sizes in prop::collection::vec((1_usize..40_000, 0_usize..3, 0_usize..5000), 1..12),
            seed in any::<u64>(),
        ) {
            let temp = tempfile::tempdir().unwrap();
            let dir = Dir::at(temp.path()).unwrap();
            let file = ObjectFile::create(&dir, "object").unwrap();
            let mut offset = 0;
            let mut parts = Vec::new();
            let mut wanted = Vec::new();
            for (number, (size, rounding, skew)) in sizes.into_iter().enumerate() {
                let len = match rounding {
                    0 => size,
                    _ => size.next_multiple_of(ALIGNMENT),
                };
                let skew = if rounding == 2 { skew } else { 0 };
                let body = body(number, len + skew);
                wanted.extend_from_slice(&body[skew..][..len]);
                parts.push((body, skew, len, offset));
                offset += len as u64;
            }
            let turn = usize::try_from(seed % parts.len() as u64).unwrap();
            parts.rotate_left(turn);
            std::thread::scope(|scope| {
                for half in parts.chunks(parts.len().div_ceil(2)) {
                    scope.spawn(|| {
                        for (body, skew, len, offset) in half.iter().rev() {
                            file.write(&body[*skew..][..*len], *offset).unwrap();
                        }
                    });
                }
            });
            file.sync().unwrap();
            prop_assert_eq!(file.len().unwrap(), offset);
            prop_assert!(std::fs::read(temp.path().join("object")).unwrap() == wanted);
        }
    }
}
