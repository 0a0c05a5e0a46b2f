//! Takes hold of a volume, or says who has it.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use super::{
    Held, ReaderSettings,
    holder::{Holder, Host, Openers, Subject},
    map,
    open::{self, Named, Opened, Purpose},
    qemu_lock::{self, Locked},
    reader::Source,
    writes::Writes,
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::ByteSize,
    port::VolumeFacts,
    sys::{
        aligned::{ALIGNMENT, AlignedBuf},
        ioctl::{Transform, loop_status},
        stat::Identity,
    },
};

/// How often a device is tried again that something claims and nobody shows:
/// the kernel claims a disk while it looks for partitions.
const CLAIM_TRIES: u32 = 10;
/// How often a program is looked for again: one that was just started holds
/// what its parent had open for a moment, and losetup opens more than it gets.
const PROGRAM_TRIES: u32 = 2;
/// Between two tries: half a second in all.
const PAUSE: Duration = Duration::from_millis(50);

/// Opens, locks, searches for holders, flushes and maps; in that order.
pub(super) fn hold(
    host: &Host,
    allowed: &[PathBuf],
    settings: ReaderSettings,
    asked: &Path,
) -> Result<Held> {
    let named = Named::look_up(asked, allowed, Purpose::Read)?;
    let (path, identity) = (named.path.clone(), named.identity);
    let subject = subject(host, &named)?;
    let Opened { file, size, sector_size } = claim(host, &named, &subject)?;
    let backing = backing_file(host, &file, identity, size);
    let backing_file = backing.as_ref().map(|backing| &backing.file);
    let lock = qemu_lock::lock_against_writers;
    let files = [Some(&file), backing_file];
    keep_out(host, &path, &subject, Openers::Writers, files, lock)?;
    // A loop device's own cache lies above its file's.
    open::flush(&file, &path)?;
    let writes = Writes::until_now(host, identity, &file)
        .context(Reason::VolumeUnavailable, || format!("cannot measure {}", path.display()))?;
    let opened = Opened { file, size, sector_size };
    let source = measured(named.path, identity, opened, backing.as_ref())?;
    Ok(Held { source, settings, _backing: backing.map(|backing| backing.file), writes, from: 0 })
}

/// Opens what nobody else has.
pub(super) fn claim(host: &Host, named: &Named, subject: &Subject) -> Result<Opened> {
    let mut tries = 0;
    loop {
        if let Some(opened) = named.open()? {
            return Ok(opened);
        }
        match user(host, subject, Openers::Everyone, &named.path)? {
            // The end of a capture takes a moment, too.
            None | Some(Holder::Ourselves) if tries < CLAIM_TRIES => thread::sleep(PAUSE),
            Some(Holder::Process { .. }) if tries < PROGRAM_TRIES => thread::sleep(PAUSE),
            holder => return Err(held(&named.path, &holder.unwrap_or(Holder::Claimed))),
        }
        tries += 1;
    }
}

/// Locks `files`, then looks for `openers`: who comes between the two is
/// stopped by the one or found by the other.
pub(super) fn keep_out(
    host: &Host,
    path: &Path,
    subject: &Subject,
    openers: Openers,
    files: [Option<&File>; 2],
    lock: impl Fn(&File) -> io::Result<Locked>,
) -> Result<()> {
    let mut conflict = false;
    for file in files.into_iter().flatten() {
        let locked = lock(file)
            .context(Reason::VolumeUnavailable, || format!("cannot lock {}", path.display()))?;
        conflict |= locked == Locked::Conflict;
    }
    let mut tries = 0;
    loop {
        match user(host, subject, openers, path)? {
            Some(Holder::Process { .. }) if tries < PROGRAM_TRIES => thread::sleep(PAUSE),
            Some(holder) => return Err(held(path, &holder)),
            None if conflict => return Err(held(path, &Holder::Locked)),
            None => return Ok(()),
        }
        tries += 1;
    }
}

/// Opens a volume that its guest writes to, for reads beside it, and maps it.
/// The point in time must have been taken before: what the map calls a hole
/// was one then, unless the guest has overwritten it since. Nobody but the
/// guest's `qemu` may write to it: it sees what others write as old.
pub(super) fn beside(
    host: &Host,
    allowed: &[PathBuf],
    asked: &Path,
    qemu: Option<u32>,
) -> Result<Source> {
    let named = Named::look_up(asked, allowed, Purpose::ReadBesideGuest)?;
    // A QEMU in another namespace cannot be told from others.
    if let Some(qemu) = qemu {
        let subject = subject(host, &named)?;
        if let Some(other) = user(host, &subject, Openers::WritersBut(qemu), &named.path)? {
            return Err(held(&named.path, &other));
        }
    }
    let Some(opened) = named.open()? else {
        return Err(held(&named.path, &Holder::Claimed));
    };
    let backing = backing_file(host, &opened.file, named.identity, opened.size);
    open::flush(&opened.file, &named.path)?;
    measured(named.path, named.identity, opened, backing.as_ref())
}

/// Maps an open volume whose caches were written back.
pub(super) fn measured(
    path: PathBuf,
    identity: Identity,
    opened: Opened,
    backing: Option<&Backing>,
) -> Result<Source> {
    let Opened { file, size, sector_size } = opened;
    let tail = cut_off_tail(&path, identity, size, sector_size, backing)?;
    refuse_other_formats(&file, &path)?;
    let data = match (identity, backing) {
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
    Ok(Source { file: Arc::new(file), facts, tail })
}

pub(super) fn subject(host: &Host, named: &Named) -> Result<Subject> {
    host.subject(named.identity).context(Reason::VolumeUnavailable, || unknown(&named.path))
}

/// Who uses the volume at `path`.
fn user(host: &Host, subject: &Subject, openers: Openers, path: &Path) -> Result<Option<Holder>> {
    let found = host.holder(subject, openers);
    found.context(Reason::VolumeUnavailable, || unknown(path)).map_err(|error| {
        error.advice(
            "give imaged CAP_SYS_PTRACE and the host's /proc, and look whether AppArmor or \
             SELinux forbids it",
        )
    })
}

fn unknown(path: &Path) -> String {
    format!("cannot find out who uses {}", path.display())
}

/// A disk image in another format, taken for a raw disk, would make an image
/// that verifies and does not boot. Nothing of it is parsed.
fn refuse_other_formats(file: &File, path: &Path) -> Result<()> {
    const FORMATS: [(&[u8], &str); 3] =
        [(b"QFI\xfb", "qcow2"), (b"KDMV", "VMDK"), (b"conectix", "VHD")];
    let mut start = AlignedBuf::zeroed(ALIGNMENT);
    // What cannot be read is told by who reads everything.
    let len = file.read_at(&mut start, 0).unwrap_or_default();
    match FORMATS.iter().find(|(magic, _)| start[..len].starts_with(magic)) {
        None => Ok(()),
        Some((_, format)) => {
            let context = format!("the volume {} holds a {format} image", path.display());
            Err(Error::new(Reason::VolumeUnusable, context)
                .field("boot_volume")
                .advice("this version reads raw disks: `qemu-img convert -O raw` makes one"))
        }
    }
}

/// The bytes behind the last whole sector of a device. Only a loop device
/// ends within a sector (seen on Linux 6.18: 4096-byte sectors over a file
/// that is no multiple), and nothing but its file can give them.
fn cut_off_tail(
    path: &Path,
    identity: Identity,
    size: u64,
    sector_size: u32,
    backing: Option<&Backing>,
) -> Result<Vec<u8>> {
    let len = match identity {
        Identity::BlockDevice(_) => size % u64::from(sector_size),
        // A file's tail is read like the rest.
        Identity::File { .. } => 0,
    };
    let mut tail = vec![0; usize::try_from(len).unwrap_or_default()];
    let cut_off =
        || format!("the last {len} bytes of {} are in a sector that is cut off", path.display());
    match backing {
        _ if tail.is_empty() => {}
        Some(Backing { file, start }) => file
            .read_exact_at(&mut tail, start + size - len)
            .context(Reason::VolumeUnavailable, cut_off)?,
        None => {
            return Err(Error::new(Reason::VolumeUnusable, cut_off()).field("boot_volume").advice(
                "attach its file with a sector size that divides its length, or image the file",
            ));
        }
    }
    Ok(tail)
}

fn held(path: &Path, holder: &Holder) -> Error {
    Error::new(Reason::VolumeHeld, format!("the volume {} is {holder}", path.display()))
        .field("boot_volume")
        .advice(holder.advice())
}

/// The file under a loop device.
pub(super) struct Backing {
    pub(super) file: File,
    /// Where in it the device begins.
    start: u64,
}

/// The regular file that shows which bytes of the loop device `device` are
/// holes. `None` when there is no such file or any doubt.
pub(super) fn backing_file(
    host: &Host,
    device: &File,
    identity: Identity,
    size: u64,
) -> Option<Backing> {
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
