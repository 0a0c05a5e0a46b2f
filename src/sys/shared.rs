//! Memory that another process fills and this one reads by file.
//!
//! Whoever fills it maps it; whoever reads copies out with pread(2), so that
//! no byte changes under a reader's hands, and a file that was cut off would
//! be an error and no SIGBUS. It is sealed: it cannot be cut off.

use std::{
    fmt,
    fs::File,
    io,
    ops::{Deref, DerefMut},
    os::fd::{AsRawFd, BorrowedFd},
    ptr::{self, NonNull},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

/// `len` zero bytes in memory, with no name and of a fixed length
/// (memfd_create(2), Linux 3.17).
///
/// # Errors
///
/// What the kernel says.
pub fn memory(len: u64) -> io::Result<File> {
    let memory = memfd_create(c"imaged", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let memory = File::from(memory);
    memory.set_len(len)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(memory)
}

/// A stretch of such memory, mapped, to be filled by this process alone.
pub struct Mapped {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, as a `Box<[u8]>` does.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Maps `len` bytes of `memory` from `offset` on, both multiples of a
    /// page. Nobody else may write to them while this value lives.
    ///
    /// # Errors
    ///
    /// What the kernel says; `EINVAL` beyond the end.
    pub fn new(memory: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        let size = nix::sys::stat::fstat(memory)?.st_size;
        let end = offset.checked_add(len as u64);
        if len == 0 || end.is_none_or(|end| i64::try_from(end).map_or(true, |end| end > size)) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping, placed by the kernel, touches no other memory.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?.cast();
        Ok(Self { start, len })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped for `len` bytes of a file that is as long and cannot
        // be cut off; nobody else writes to it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Mapped {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped with this length by `new`, unmapped once.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd, unix::fs::FileExt};

    use super::*;

    #[test]
    fn what_is_filled_can_be_read_and_the_length_stays() {
        let memory = memory(3 * 4096).unwrap();
        let mut mapped = Mapped::new(memory.as_fd(), 4096, 8192).unwrap();
        mapped.fill(7);
        let mut buf = [0; 2];
        memory.read_exact_at(&mut buf, 4095).unwrap();
        assert_eq!(buf, [0, 7]);
        assert!(memory.set_len(0).is_err() && memory.set_len(1 << 20).is_err());
        assert!(Mapped::new(memory.as_fd(), 4096, 3 * 4096).is_err());
        assert!(Mapped::new(memory.as_fd(), 0, 0).is_err());
    }
}
