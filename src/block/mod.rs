//! The volumes of this host: found, held, mapped and read.
//!
//! ```text
//! path ──open──► checked and open ──holder, qemu_lock──► held ──map──► facts
//!                                                          └──reader, queue──► pieces
//! ```
//!
//! A volume is held in three ways at once, for each stops others: `O_EXCL`
//! the kernel (mounts, swap, device-mapper), QEMU's lock bytes every QEMU,
//! and a search of `/proc` and `/sys` finds who was there before and who
//! respects neither.

#[cfg(test)]
mod device_tests;
mod holder;
mod map;
mod open;
mod procfs;
mod qemu_lock;
mod queue;
mod reader;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use self::{
    holder::{Holder, Host, Openers},
    open::{Named, Opened},
    qemu_lock::Locked,
};
pub use self::{queue::Engine, reader::ReaderSettings};
use crate::{
    error::{Context, Error, Reason, Result},
    model::ByteSize,
    port::{BoxFuture, HeldVolume, Piece, VolumeFacts, Volumes},
    sys::{
        ioctl::{Transform, loop_status},
        ring::{Mode, ReadRing},
        stat::Identity,
    },
};

/// How long opening, flushing and mapping a volume may take. A device with
/// gigabytes of dirty cache needs a minute; one that answers nothing would
/// take for ever.
const HOLD_DEADLINE: Duration = Duration::from_secs(120);

/// The block devices and raw files in the directories that the configuration
/// allows.
#[derive(Debug)]
pub struct HostVolumes {
    allowed: Arc<[PathBuf]>,
    settings: ReaderSettings,
    host: Host,
}

impl HostVolumes {
    /// Volumes within `allowed_dirs` (the configuration's
    /// `boot_volume_dirs`), at any depth, symbolic links resolved.
    #[must_use]
    pub fn new(allowed_dirs: Vec<PathBuf>, settings: ReaderSettings) -> Self {
        Self { allowed: allowed_dirs.into(), settings, host: Host::default() }
    }
}

/// Whether this kernel lets this process use io_uring, and in which mode.
///
/// # Errors
///
/// `ENOSYS` where it is missing, `EPERM` where it is forbidden
/// (`kernel.io_uring_disabled`, seccomp).
pub fn uring_available() -> io::Result<Mode> {
    ReadRing::probe()
}

impl Volumes for HostVolumes {
    fn hold<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, Result<Box<dyn HeldVolume>>> {
        let (allowed, settings, host) =
            (Arc::clone(&self.allowed), self.settings, self.host.clone());
        let asked = path.to_owned();
        Box::pin(async move {
            let work = tokio::task::spawn_blocking(move || hold(&host, &allowed, settings, &asked));
            // A device that does not answer keeps its thread; what it opens
            // in the end is dropped at once.
            match tokio::time::timeout(HOLD_DEADLINE, work).await {
                Ok(Ok(held)) => Ok(Box::new(held?) as Box<dyn HeldVolume>),
                Ok(Err(panic)) => Err(Error::new(
                    Reason::Internal,
                    format!("the opening of {} ended early", path.display()),
                )
                .because(panic)),
                Err(_) => Err(Error::new(
                    Reason::VolumeUnavailable,
                    format!(
                        "the volume {} did not answer within {} seconds",
                        path.display(),
                        HOLD_DEADLINE.as_secs()
                    ),
                )
                .advice("look into the kernel's log")),
            }
        })
    }
}

/// A volume that nothing else writes to while this value lives.
struct Held {
    /// Open exclusively, with QEMU's locks.
    file: Arc<File>,
    facts: VolumeFacts,
    settings: ReaderSettings,
    /// The file under a loop device, with QEMU's locks.
    _backing: Option<File>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Held({}, {})", self.facts.path.display(), self.facts.size)
    }
}

impl HeldVolume for Held {
    fn facts(&self) -> &VolumeFacts {
        &self.facts
    }

    fn read(&mut self, pieces: &SyncSender<Piece>, stop: &CancellationToken) -> Result<()> {
        reader::read(&self.file, &self.facts, self.settings, pieces, stop)
    }
}

fn hold(host: &Host, allowed: &[PathBuf], settings: ReaderSettings, asked: &Path) -> Result<Held> {
    let named = Named::look_up(asked, allowed)?;
    let (path, identity) = (named.path.clone(), named.identity);
    let unknown = || format!("cannot find out who uses {}", path.display());
    let subject = host.subject(identity).context(Reason::VolumeUnavailable, unknown)?;
    let holder =
        |openers| host.holder(&subject, openers).context(Reason::VolumeUnavailable, unknown);
    let Some(Opened { file, size, sector_size }) = named.open()? else {
        let holder = holder(Openers::Everyone)?.unwrap_or(Holder::Claimed);
        return Err(held(&path, &holder));
    };
    let backing = backing_file(host, &file, identity, size);
    let backing_file = backing.as_ref().map(|backing| &backing.file);
    // First the locks, then the search: who comes between the two is stopped
    // by the ones or found by the other.
    let mut conflict = false;
    for file in [Some(&file), backing_file].into_iter().flatten() {
        let locked = qemu_lock::lock_against_writers(file)
            .context(Reason::VolumeUnavailable, || format!("cannot lock {}", path.display()))?;
        conflict |= locked == Locked::Conflict;
    }
    match holder(Openers::Writers)? {
        Some(holder) => return Err(held(&path, &holder)),
        None if conflict => return Err(held(&path, &Holder::Locked)),
        None => {}
    }
    // A loop device's own cache lies above its file's.
    open::flush(&file, &path)?;
    let data = match (identity, &backing) {
        (Identity::File { .. }, _) => map::data_of_file(&file, 0..size).ok(),
        (_, Some(Backing { file, start })) => {
            file.sync_data().and_then(|()| map::data_of_file(file, *start..*start + size)).ok()
        }
        (_, None) => None,
    };
    let facts = VolumeFacts {
        path,
        size: ByteSize(size),
        sector_size,
        // What cannot be mapped is read.
        data: data.unwrap_or_else(|| map::everything(size)),
    };
    Ok(Held {
        file: Arc::new(file),
        facts,
        settings,
        _backing: backing.map(|backing| backing.file),
    })
}

fn held(path: &Path, holder: &Holder) -> Error {
    Error::new(Reason::VolumeHeld, format!("the volume {} is {holder}", path.display()))
        .field("boot_volume")
        .advice(holder.advice())
}

/// The file under a loop device.
struct Backing {
    file: File,
    /// Where in it the device begins.
    start: u64,
}

/// The regular file that shows which bytes of the loop device `device` are
/// holes. `None` when there is no such file or any doubt.
fn backing_file(host: &Host, device: &File, identity: Identity, size: u64) -> Option<Backing> {
    let Identity::BlockDevice(number) = identity else { return None };
    // A partition of a loop device answers the ioctl for its disk, but has no
    // such file in sysfs.
    let path = host.backing_file(number)?;
    let status = loop_status(device.as_fd()).ok()?;
    let same = Identity::File { device: status.device, inode: status.inode };
    let file = open::open_same_file(&path, same).ok()??;
    let end = status.offset.checked_add(size)?;
    let whole = status.transform == Transform::None
        && (status.size_limit == 0 || size <= status.size_limit)
        && end <= file.metadata().ok()?.len();
    whole.then_some(Backing { file, start: status.offset })
}
