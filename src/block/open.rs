//! From a path to an open volume.
//!
//! The path is looked up once. What it led to is checked through the
//! descriptor of that look-up and then opened through it, so that nothing can
//! be put in its place between the check and the use, and nothing but a block
//! device or a regular file is ever really opened.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, open},
    sys::stat::{FileStat, Mode, SFlag, fstat},
    unistd::linkat,
};

use crate::{
    error::{Context, Error, Reason, Result},
    sys::{
        aligned::ALIGNMENT,
        ioctl,
        stat::{DirectReads, Identity, direct_reads},
    },
};

/// Sector size of regular files where the kernel does not tell: a page, which
/// is a multiple of every filesystem's and disk's on hosts with 4 KiB pages.
const FILE_SECTOR: u32 = 4096;

/// A path that leads to a volume that may be read.
#[derive(Debug)]
pub(super) struct Named {
    /// `O_PATH`: nothing has been opened yet.
    found: OwnedFd,
    purpose: Purpose,
    /// Where it really is.
    pub(super) path: PathBuf,
    pub(super) identity: Identity,
}

/// What for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To be read, while nobody else has it.
    Read,
    /// To be read beside the guest that it belongs to.
    ReadBesideGuest,
    /// To be written over, while nobody else has it.
    Overwrite,
}

impl Purpose {
    /// The key of the configuration that allows it, and what its directories
    /// are called.
    fn directories(self) -> (&'static str, &'static str) {
        match self {
            Self::Read | Self::ReadBesideGuest => {
                ("boot_volume_dirs", "the directories of volumes")
            }
            Self::Overwrite => ("restore_dirs", "the directories that may be restored to"),
        }
    }
}

/// How to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cache {
    Around,
    Through,
}

impl Named {
    /// Looks `path` up and checks that it is a volume in one of `allowed`:
    /// first its words, so that what is said of a path outside never depends
    /// on what is there, and then where it really leads.
    pub(super) fn look_up(path: &Path, allowed: &[PathBuf], purpose: Purpose) -> Result<Self> {
        let allowed_now: Vec<_> =
            allowed.iter().filter_map(|directory| fs::canonicalize(directory).ok()).collect();
        let is_below =
            |path: &Path, directories: &[PathBuf]| directories.iter().any(|d| path.starts_with(d));
        let climbs = path.components().any(|part| part == Component::ParentDir);
        let inside = is_below(path, allowed) || is_below(path, &allowed_now);
        // An instance's own volume may be written in any way.
        if (climbs || !inside) && !allowed.iter().any(|volume| volume == path) {
            return Err(not_allowed(path, allowed, purpose));
        }
        let found = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        let found = match found {
            Ok(found) => found,
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {
                let ends: Vec<_> = allowed.iter().chain(&allowed_now).collect();
                return Err(if passes_a_link(path, &ends) {
                    leads_out(path, purpose)
                } else {
                    Error::new(
                        Reason::VolumeNotFound,
                        format!("there is no volume {}", path.display()),
                    )
                    .advice("look for a typing error; a logical volume must be active")
                    .field("boot_volume")
                });
            }
            Err(error) => {
                return Err(unavailable(path, "find").because(io::Error::from(error)));
            }
        };
        let real = fs::read_link(descriptor(&found))
            .map_err(|error| unavailable(path, "find").because(error))?;
        if !is_below(&real, &allowed_now) {
            return Err(leads_out(path, purpose));
        }
        let stat = fstat(&found).map_err(|error| unavailable(&real, "find").because(error))?;
        let identity = match kind(&stat) {
            Ok(identity) => identity,
            Err(what) => {
                let sentence = format!("{} is {what}, not a volume", real.display());
                return Err(Error::new(Reason::VolumeUnusable, sentence)
                    .field("boot_volume")
                    .advice("name a block device or a file with a raw disk image"));
            }
        };
        Ok(Self { found, purpose, path: real, identity })
    }

    /// Opens it for direct reads or writes. What nobody else may have is
    /// opened exclusively if it is a block device, so that the kernel refuses
    /// to mount or stack it meanwhile; `None`: it is claimed already.
    ///
    /// A regular file on a filesystem without direct I/O (tmpfs on older
    /// kernels) goes through the page cache.
    pub(super) fn open(&self) -> Result<Option<Opened>> {
        let purpose = self.purpose;
        let error = |error| unavailable(&self.path, "open").because(error);
        let (file, size, sector_size) = match self.identity {
            Identity::BlockDevice(_) => {
                let exclusive = match purpose {
                    Purpose::Read | Purpose::Overwrite => libc::O_EXCL,
                    Purpose::ReadBesideGuest => 0,
                };
                let file = match self.reopen(libc::O_DIRECT | exclusive) {
                    Ok(file) => file,
                    Err(busy) if busy.kind() == io::ErrorKind::ResourceBusy => return Ok(None),
                    Err(other) => return Err(error(other)),
                };
                let size = ioctl::device_size(file.as_fd()).map_err(error)?;
                let sector_size = ioctl::sector_size(file.as_fd()).map_err(error)?;
                (file, size, sector_size)
            }
            Identity::File { .. } => {
                let (mut cache, mut sector_size) = (Cache::Around, FILE_SECTOR);
                let mut file = match self.reopen(libc::O_DIRECT) {
                    Ok(file) => file,
                    Err(refused) if refused.kind() == io::ErrorKind::InvalidInput => {
                        cache = Cache::Through;
                        self.reopen(0).map_err(error)?
                    }
                    Err(other) => return Err(error(other)),
                };
                match direct_reads(file.as_fd()).unwrap_or(DirectReads::Unknown) {
                    DirectReads::Aligned { offset, memory } if memory as usize <= ALIGNMENT => {
                        sector_size = offset;
                    }
                    DirectReads::Unknown => {}
                    DirectReads::Unsupported | DirectReads::Aligned { .. }
                        if cache == Cache::Around =>
                    {
                        file = self.reopen(0).map_err(error)?;
                    }
                    _ => {}
                }
                let size = file.metadata().map_err(error)?.len();
                (file, size, sector_size)
            }
        };
        if size == 0 && purpose != Purpose::Overwrite {
            let sentence = format!("the volume {} is empty", self.path.display());
            return Err(Error::new(Reason::VolumeEmpty, sentence)
                .advice("name a volume with bytes: a file of size 0 holds no system")
                .field("boot_volume"));
        }
        Ok(Some(Opened { file, size, sector_size }))
    }

    /// Opens what was found, whatever its path leads to by now.
    fn reopen(&self, flags: libc::c_int) -> io::Result<File> {
        let mut options = File::options();
        options.read(true).write(self.purpose == Purpose::Overwrite).custom_flags(flags);
        options.open(descriptor(&self.found))
    }
}

/// An open volume.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    /// Bytes; not 0 where they are to be read.
    pub(super) size: u64,
    /// Bytes.
    pub(super) sector_size: u32,
}

/// Opens the regular file at `path` for reading if it is the one that
/// `identity` says.
pub(super) fn open_same_file(path: &Path, identity: Identity) -> io::Result<Option<File>> {
    let found = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())?;
    let is_file = matches!(identity, Identity::File { .. });
    if !is_file || kind(&fstat(&found)?) != Ok(identity) {
        return Ok(None);
    }
    File::open(descriptor(&found)).map(Some)
}

/// A file that does not exist yet and may be made.
#[derive(Debug)]
pub(super) struct Missing {
    /// `O_PATH`.
    directory: OwnedFd,
    name: OsString,
    /// Where it will really be.
    pub(super) path: PathBuf,
}

impl Missing {
    /// Looks for the place of `path`, where [`Named::look_up`] found nothing.
    /// `None`: there is no directory that is allowed, or it is one of devices,
    /// where a file would take memory and be none of them.
    pub(super) fn look_up(path: &Path, allowed: &[PathBuf]) -> Option<Self> {
        let (parent, name) = (path.parent()?, path.file_name()?);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(parent, flags, Mode::empty()).ok()?;
        let real = fs::read_link(descriptor(&directory)).ok()?;
        let inside = allowed.iter().any(|place| {
            place == path || fs::canonicalize(place).is_ok_and(|p| real.starts_with(p))
        });
        let devices = ["/dev", "/proc", "/sys"].iter().any(|root| real.starts_with(root));
        (inside && !devices).then(|| Self { path: real.join(name), directory, name: name.into() })
    }

    /// A file of `size` zero bytes there, which has no name yet, and so goes
    /// with whoever opened it.
    pub(super) fn make(&self, size: u64) -> io::Result<File> {
        let open = |flags: libc::c_int| {
            let mut options = File::options();
            options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE | flags);
            options.open(descriptor(&self.directory))
        };
        let file = open(libc::O_DIRECT).or_else(|error| match error.kind() {
            io::ErrorKind::InvalidInput => open(0),
            _ => Err(error),
        })?;
        file.set_len(size)?;
        Ok(file)
    }

    /// Gives `file` its name.
    ///
    /// # Errors
    ///
    /// `AlreadyExists`, and what the kernel says.
    pub(super) fn name(&self, file: &File) -> io::Result<()> {
        let from = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(AT_FDCWD, from.as_str(), &self.directory, &*self.name, AtFlags::AT_SYMLINK_FOLLOW)?;
        // A directory that was opened for its path alone cannot be synced.
        File::open(descriptor(&self.directory))?.sync_all()
    }
}

/// Whether a symbolic link is on the way to `path` below one of `directories`.
fn passes_a_link(path: &Path, directories: &[&PathBuf]) -> bool {
    path.ancestors()
        .take_while(|ancestor| directories.iter().all(|directory| !directory.starts_with(ancestor)))
        .any(|ancestor| fs::symlink_metadata(ancestor).is_ok_and(|found| found.is_symlink()))
}

/// A path that leads to what `found` is, without a look-up.
fn descriptor(found: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", found.as_raw_fd()).into()
}

/// Which volume it is, or what it is instead.
fn kind(stat: &FileStat) -> Result<Identity, &'static str> {
    Err(match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFBLK => return Ok(Identity::BlockDevice(stat.st_rdev)),
        SFlag::S_IFREG => {
            return Ok(Identity::File { device: stat.st_dev, inode: stat.st_ino });
        }
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFCHR => "a character device",
        SFlag::S_IFIFO => "a pipe",
        SFlag::S_IFSOCK => "a socket",
        _ => "something else",
    })
}

fn not_allowed(path: &Path, allowed: &[PathBuf], purpose: Purpose) -> Error {
    let (key, directories) = purpose.directories();
    let mut sentence = format!("{} is in none of {directories}: ", path.display());
    for (number, directory) in allowed.iter().enumerate() {
        let separator = if number == 0 { "" } else { ", " };
        let _ = write!(sentence, "{separator}{}", directory.display());
    }
    if allowed.is_empty() {
        sentence.push_str("there are none");
    }
    Error::new(Reason::VolumeNotAllowed, sentence)
        .field("boot_volume")
        .advice(format!("add its directory to {key} in the configuration of imaged"))
}

/// One sentence for both, so that a link tells nothing of what is outside.
fn leads_out(path: &Path, purpose: Purpose) -> Error {
    let (key, directories) = purpose.directories();
    let sentence = format!("{} leads out of {directories}, or to nothing", path.display());
    Error::new(Reason::VolumeNotAllowed, sentence)
        .field("boot_volume")
        .advice(format!("a logical volume must be active; where a link leads must be in {key} too"))
}

fn unavailable(path: &Path, verb: &str) -> Error {
    Error::new(Reason::VolumeUnavailable, format!("cannot {verb} the volume {}", path.display()))
}

/// Makes what was written through caches part of what a direct read returns.
pub(super) fn flush(file: &File, path: &Path) -> Result<()> {
    file.sync_data().context(Reason::VolumeUnavailable, || {
        format!("cannot write the caches of {} back", path.display())
    })
}
