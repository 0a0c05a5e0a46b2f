//! Files of a store, reached from open directories and never through a
//! symbolic link; what their failures mean to an operator.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, renameat},
    sys::{
        stat::{Mode, mkdirat},
        statvfs::fstatvfs,
    },
    unistd::{UnlinkatFlags, unlinkat},
};

use crate::{
    error::{Error, Reason, Result},
    model::{ByteSize, host::Space},
};

/// Ending of a file that is being written and does not count yet.
pub const TEMPORARY: &str = ".tmp";

/// An open directory, and its path for messages.
#[derive(Debug)]
pub struct Dir {
    handle: File,
    path: PathBuf,
}

/// What removing a file changed.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    Removed,
    WasNotThere,
}

impl Dir {
    /// Opens the directory at `path`; here alone symbolic links are followed,
    /// for the operator wrote the path.
    pub fn at(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let handle = nix::fcntl::open(path, flags, Mode::empty())?;
        Ok(Self { handle: handle.into(), path: path.to_owned() })
    }

    /// Opens the directory `name` in this one.
    pub fn dir(&self, name: &str) -> io::Result<Self> {
        let handle = self.open(name, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
        Ok(Self { handle, path: self.path_of(name) })
    }

    /// Makes the directory `name` in this one, for its owner alone.
    pub fn make_dir(&self, name: &str) -> io::Result<()> {
        Ok(mkdirat(&self.handle, name, Mode::S_IRWXU)?)
    }

    /// Opens `name`. A pipe does not block.
    pub fn open(&self, name: &str, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        Ok(openat(&self.handle, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into())
    }

    /// Makes the file `name`, which must not be there.
    pub fn create(&self, name: &str) -> io::Result<File> {
        self.open(name, OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR)
    }

    /// Opens the regular file `name` for reading.
    pub fn open_regular(&self, name: &str) -> io::Result<File> {
        let file = self.open(name, OFlag::O_RDONLY)?;
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, "it is no regular file"))
        }
    }

    /// All of the regular file `name`, refused over `limit`.
    pub fn read(&self, name: &str, limit: ByteSize) -> io::Result<Vec<u8>> {
        let file = self.open_regular(name)?;
        let mut bytes = Vec::new();
        file.take(limit.get() + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit.get() {
            let why = format!("it is larger than {limit}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(bytes)
    }

    /// Whether `name` is there, whatever it is.
    pub fn has(&self, name: &str) -> io::Result<bool> {
        let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
        match nix::sys::stat::fstatat(&self.handle, name, flags) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes `name` appear with `bytes` in it, whole and durable.
    pub fn publish(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.prepare(name, bytes)?;
        self.reveal(name)
    }

    /// The first half of [`publish`](Self::publish): durable, not to be seen.
    pub fn prepare(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let flags = OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_WRONLY;
        let mut file = self.open(&format!("{name}{TEMPORARY}"), flags)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    /// The second half. After an error it may be there or not.
    pub fn reveal(&self, name: &str) -> io::Result<()> {
        self.rename(&format!("{name}{TEMPORARY}"), name)
    }

    /// Gives the file `from` another name, durably. It takes no new blocks:
    /// it works on a full filesystem.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        renameat(&self.handle, from, &self.handle, to)?;
        self.sync()
    }

    /// Removes the file `name`.
    pub fn remove(&self, name: &str) -> io::Result<Removed> {
        self.unlink(name, UnlinkatFlags::NoRemoveDir)
    }

    /// Removes the empty directory `name`.
    pub fn remove_dir(&self, name: &str) -> io::Result<Removed> {
        self.unlink(name, UnlinkatFlags::RemoveDir)
    }

    fn unlink(&self, name: &str, flags: UnlinkatFlags) -> io::Result<Removed> {
        match unlinkat(&self.handle, name, flags) {
            Ok(()) => Ok(Removed::Removed),
            Err(Errno::ENOENT) => Ok(Removed::WasNotThere),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes the directory's entries durable.
    pub fn sync(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    /// The directory as a file, for its times.
    pub fn handle(&self) -> &File {
        &self.handle
    }

    /// Its path when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of `name` in it.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// Room in the filesystem that holds `file`; free is what a user without
/// privileges could take.
pub fn room(file: &File) -> io::Result<Space> {
    let stat = fstatvfs(file)?;
    let bytes = |blocks: u64| ByteSize(blocks.saturating_mul(stat.fragment_size()));
    Ok(Space { free: bytes(stat.blocks_available()), total: bytes(stat.blocks()) })
}

/// Says what was being done when a file of a store failed, and from the
/// cause what an operator can do.
pub trait During<T> {
    /// `context` is only made when there is an error.
    fn during(self, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| {
            let (reason, advice) = meaning(&cause);
            Error::new(reason, context()).because(cause).advice(advice)
        })
    }
}

fn meaning(cause: &io::Error) -> (Reason, &'static str) {
    if cause.kind() == io::ErrorKind::InvalidData {
        return (Reason::ImageCorrupt, "imaged did not write this: restore the file");
    }
    let advice = match cause.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC) => {
            return (Reason::StoreFull, "delete images from the store, or name another store");
        }
        Some(Errno::EDQUOT) => {
            return (
                Reason::StoreFull,
                "delete images from the store, raise the quota, or name another store",
            );
        }
        Some(Errno::EROFS) => {
            "the filesystem is read-only: look into the kernel's log for why, and mount it writable"
        }
        Some(Errno::EIO) => "the disk or server under the store fails: look into the kernel's log",
        Some(Errno::ESTALE) => {
            "the NFS server no longer knows the directory: unmount it and mount it again"
        }
        Some(Errno::EACCES | Errno::EPERM) => {
            "let imaged's user own the directory, and look whether AppArmor or SELinux forbids it"
        }
        Some(Errno::ENOENT) => {
            "something removed it: look whether the store's filesystem is mounted"
        }
        Some(Errno::ENOTDIR) => "a directory is wanted there: move away what is in its place",
        Some(Errno::ENOLCK | Errno::EOPNOTSUPP) => {
            "the filesystem has no locks, which uploads need: on NFS, mount it with locking"
        }
        _ => "look into the kernel's log, and at the filesystem that holds the store",
    };
    (Reason::StoreUnavailable, advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_gets_a_reason_and_advice() {
        let told = [
            Errno::ENOSPC,
            Errno::EDQUOT,
            Errno::EROFS,
            Errno::EIO,
            Errno::ESTALE,
            Errno::EACCES,
            Errno::ENOENT,
            Errno::ENOLCK,
            Errno::ENAMETOOLONG,
        ]
        .map(|errno| {
            let failed: io::Result<()> = Err(errno.into());
            let error = failed.during(|| "cannot write /srv/images/x".into()).unwrap_err();
            format!("{error:?}")
        });
        insta::assert_snapshot!(told.join("\n"), @"
        STORE_FULL: cannot write /srv/images/x
          0: No space left on device (os error 28)
          help: delete images from the store, or name another store
        STORE_FULL: cannot write /srv/images/x
          0: Disk quota exceeded (os error 122)
          help: delete images from the store, raise the quota, or name another store
        STORE_UNAVAILABLE: cannot write /srv/images/x
          0: Read-only file system (os error 30)
          help: the filesystem is read-only: look into the kernel's log for why, and mount it writable
        STORE_UNAVAILABLE: cannot write /srv/images/x
          0: Input/output error (os error 5)
          help: the disk or server under the store fails: look into the kernel's log
        STORE_UNAVAILABLE: cannot write /srv/images/x
          0: Stale file handle (os error 116)
          help: the NFS server no longer knows the directory: unmount it and mount it again
        STORE_UNAVAILABLE: cannot write /srv/images/x
          0: Permission denied (os error 13)
          help: let imaged's user own the directory, and look whether AppArmor or SELinux forbids it
        STORE_UNAVAILABLE: cannot write /srv/images/x
          0: No such file or directory (os error 2)
          help: something removed it: look whether the store's filesystem is mounted
        STORE_UNAVAILABLE: cannot write /srv/images/x
          0: No locks available (os error 37)
          help: the filesystem has no locks, which uploads need: on NFS, mount it with locking
        STORE_UNAVAILABLE: cannot write /srv/images/x
          0: File name too long (os error 36)
          help: look into the kernel's log, and at the filesystem that holds the store
        ");
    }

    #[test]
    fn nothing_is_reached_through_a_link_or_read_beyond_its_limit() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("file"), [7; 100]).unwrap();
        std::os::unix::fs::symlink("file", temp.path().join("link")).unwrap();
        std::os::unix::fs::symlink(".", temp.path().join("around")).unwrap();
        nix::unistd::mkfifo(&temp.path().join("pipe"), Mode::S_IRWXU).unwrap();
        let dir = Dir::at(temp.path()).unwrap();
        assert_eq!(dir.read("file", ByteSize(100)).unwrap(), [7; 100]);
        assert_eq!(
            dir.read("file", ByteSize(99)).unwrap_err().to_string(),
            "it is larger than 99 B"
        );
        assert_eq!(dir.read("link", ByteSize(100)).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert_eq!(dir.dir("around").unwrap_err().raw_os_error(), Some(libc::ENOTDIR));
        assert_eq!(dir.read("pipe", ByteSize(1)).unwrap_err().to_string(), "it is no regular file");
    }
}
