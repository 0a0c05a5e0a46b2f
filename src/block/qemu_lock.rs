//! QEMU's image locks, as its `block/file-posix.c` takes them (QEMU 2.10 and
//! newer, `raw_apply_lock_bytes` and `raw_check_lock_bytes`).
//!
//! Each permission is a bit. Whoever uses a permission holds a shared lock on
//! the byte 100 + bit; whoever does not let others have it holds one on 200 +
//! bit. A conflict is found by asking whether an exclusive lock could be had.
//! Locks belong to the open file description and end when it is closed.

use std::{fs::File, io};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};

/// `RAW_LOCK_PERM_BASE`.
const USED: i64 = 100;
/// `RAW_LOCK_SHARED_BASE`.
const NOT_SHARED: i64 = 200;

/// `BLK_PERM_CONSISTENT_READ`.
const CONSISTENT_READ: i64 = 0;
/// `BLK_PERM_WRITE`.
const WRITE: i64 = 1;
/// `BLK_PERM_WRITE_UNCHANGED`.
const WRITE_UNCHANGED: i64 = 2;
/// `BLK_PERM_RESIZE`.
const RESIZE: i64 = 3;

/// What came of asking for the locks.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Locked {
    /// Until the file is closed no QEMU gets a right that is not shared.
    Yes,
    /// Another program has or denies such a right.
    Conflict,
    /// The filesystem has no such locks, so QEMU cannot have any either.
    Unsupported,
}

/// Says to every QEMU that `file` is read and must be neither written nor
/// resized, and asks whether any disagrees.
///
/// # Errors
///
/// What fcntl(2) says.
pub(super) fn lock_against_writers(file: &File) -> io::Result<Locked> {
    // Who writes what is there already changes no byte.
    lock(file, &[CONSISTENT_READ], &[WRITE, RESIZE])
}

/// Says to every QEMU that `file` is written and is nobody else's, and asks
/// whether any disagrees.
///
/// # Errors
///
/// What fcntl(2) says.
pub(super) fn lock_against_all(file: &File) -> io::Result<Locked> {
    lock(file, &[WRITE], &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE])
}

fn lock(file: &File, used: &[i64], not_shared: &[i64]) -> io::Result<Locked> {
    let bytes = |base: i64, of: &[i64]| of.iter().map(|bit| base + bit).collect::<Vec<_>>();
    for byte in [bytes(USED, used), bytes(NOT_SHARED, not_shared)].concat() {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&one_byte(byte, libc::F_RDLCK))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(Locked::Conflict),
            Err(Errno::EOPNOTSUPP | Errno::ENOLCK | Errno::EINVAL) => {
                return Ok(Locked::Unsupported);
            }
            Err(error) => return Err(error.into()),
        }
    }
    for byte in [bytes(NOT_SHARED, used), bytes(USED, not_shared)].concat() {
        let mut answer = one_byte(byte, libc::F_WRLCK);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut answer))?;
        if i32::from(answer.l_type) != libc::F_UNLCK {
            return Ok(Locked::Conflict);
        }
    }
    Ok(Locked::Yes)
}

fn one_byte(at: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: at,
        l_len: 1,
        // Must be 0 for locks of open file descriptions.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, path::Path};

    use super::*;

    fn taken(path: &Path, byte: i64) -> File {
        let file = File::options().read(true).write(true).open(path).unwrap();
        fcntl(&file, FcntlArg::F_OFD_SETLK(&one_byte(byte, libc::F_RDLCK))).unwrap();
        file
    }

    #[test]
    fn readers_agree_and_writers_conflict() {
        let volume = tempfile::NamedTempFile::new().unwrap();
        volume.as_file().write_all_at(b"x", 4096).unwrap();
        let ask = || lock_against_writers(&File::open(volume.path()).unwrap()).unwrap();
        assert_eq!(ask(), Locked::Yes);
        // Another reader, and one that writes what is there already.
        for byte in [USED + CONSISTENT_READ, USED + 2, NOT_SHARED + WRITE] {
            let _other = taken(volume.path(), byte);
            assert_eq!(ask(), Locked::Yes, "{byte}");
        }
        for byte in [USED + WRITE, USED + RESIZE, NOT_SHARED + CONSISTENT_READ] {
            let other = taken(volume.path(), byte);
            assert_eq!(ask(), Locked::Conflict, "{byte}");
            drop(other);
            assert_eq!(ask(), Locked::Yes, "{byte}");
        }
    }

    #[test]
    fn who_writes_agrees_with_nobody() {
        let volume = tempfile::NamedTempFile::new().unwrap();
        let file = || File::options().read(true).write(true).open(volume.path()).unwrap();
        let ask = || lock_against_all(&file()).unwrap();
        assert_eq!(ask(), Locked::Yes);
        for byte in [USED + CONSISTENT_READ, USED + WRITE, USED + 2, NOT_SHARED + WRITE] {
            let other = taken(volume.path(), byte);
            assert_eq!(ask(), Locked::Conflict, "{byte}");
            drop(other);
        }
        let ours = file();
        assert_eq!(lock_against_all(&ours).unwrap(), Locked::Yes);
        assert_eq!(lock_against_writers(&file()).unwrap(), Locked::Conflict);
    }

    #[test]
    fn the_locks_are_held_until_the_file_is_closed() {
        let volume = tempfile::NamedTempFile::new().unwrap();
        let ours = File::open(volume.path()).unwrap();
        assert_eq!(lock_against_writers(&ours).unwrap(), Locked::Yes);
        let writes = |expected| {
            let other = File::open(volume.path()).unwrap();
            let mut answer = one_byte(NOT_SHARED + WRITE, libc::F_WRLCK);
            fcntl(&other, FcntlArg::F_OFD_GETLK(&mut answer)).unwrap();
            assert_eq!(i32::from(answer.l_type), expected);
        };
        writes(libc::F_RDLCK);
        drop(ours);
        writes(libc::F_UNLCK);
    }
}
