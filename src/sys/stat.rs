//! statx(2): what a path leads to, and how it wants direct reads.

use std::{
    ffi::{CStr, CString},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::sys::stat::makedev;

/// What tells a file or a device from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A block device, by its number.
    BlockDevice(u64),
    /// Anything else, by its filesystem's number and its inode.
    File {
        /// Number of the filesystem.
        device: u64,
        /// Inode number there.
        inode: u64,
    },
}

/// What `path` leads to, symbolic links followed, as far as this host knows
/// without asking a file server: it never waits for a dead NFS mount.
///
/// # Errors
///
/// What the kernel says.
pub fn identity(path: &Path) -> io::Result<Identity> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let stat = statx(libc::AT_FDCWD, &path, flags, libc::STATX_TYPE | libc::STATX_INO)?;
    Ok(if u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFBLK {
        Identity::BlockDevice(makedev(stat.stx_rdev_major.into(), stat.stx_rdev_minor.into()))
    } else {
        let device = makedev(stat.stx_dev_major.into(), stat.stx_dev_minor.into());
        Identity::File { device, inode: stat.stx_ino }
    })
}

/// How a file wants direct reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectReads {
    /// The kernel does not tell (before Linux 6.1, or this filesystem).
    Unknown,
    /// Not at all.
    Unsupported,
    /// Offsets and lengths are multiples of `offset`, addresses of `memory`.
    Aligned {
        /// Bytes.
        offset: u32,
        /// Bytes.
        memory: u32,
    },
}

/// How the regular file `file` wants direct reads (`STATX_DIOALIGN`).
///
/// # Errors
///
/// What the kernel says.
pub fn direct_reads(file: BorrowedFd<'_>) -> io::Result<DirectReads> {
    let stat = statx(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN)?;
    Ok(match (stat.stx_dio_offset_align, stat.stx_dio_mem_align) {
        _ if stat.stx_mask & libc::STATX_DIOALIGN == 0 => DirectReads::Unknown,
        (0, _) | (_, 0) => DirectReads::Unsupported,
        (offset, memory) => DirectReads::Aligned { offset, memory },
    })
}

fn statx(
    directory: libc::c_int,
    path: &CStr,
    flags: libc::c_int,
    mask: libc::c_uint,
) -> io::Result<libc::statx> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: `path` ends with a null byte and `stat` takes a `struct statx`.
    match unsafe { libc::statx(directory, path.as_ptr(), flags, mask, stat.as_mut_ptr()) } {
        // SAFETY: all zeroes is a valid `statx`; the kernel wrote the rest.
        0 => Ok(unsafe { stat.assume_init() }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd, unix::fs::MetadataExt};

    use super::*;

    #[test]
    fn identity_is_what_stat_says_and_follows_links() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = file.as_file().metadata().unwrap();
        let expected = Identity::File { device: metadata.dev(), inode: metadata.ino() };
        assert_eq!(identity(file.path()).unwrap(), expected);
        let link = file.path().with_extension("link");
        std::os::unix::fs::symlink(file.path(), &link).unwrap();
        let linked = identity(&link).unwrap();
        std::fs::remove_file(&link).unwrap();
        assert_eq!(linked, expected);
        assert_eq!(identity(&link).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn alignments_are_powers_of_two_that_a_page_fits() {
        let file = tempfile::tempfile().unwrap();
        if let DirectReads::Aligned { offset, memory } = direct_reads(file.as_fd()).unwrap() {
            assert!(offset.is_power_of_two() && memory.is_power_of_two());
        }
    }
}
