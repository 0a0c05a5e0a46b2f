//! Takes a volume to write an image over it.

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_util::sync::CancellationToken;

use super::{
    ReaderSettings,
    hold::{self, claim, keep_out},
    holder::{Host, Openers},
    open::{Missing, Named, Opened, Purpose},
    qemu_lock,
    writer::{Writer, zero},
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::{ByteSize, image::EXTENT_SIZE},
    port::{self, Sink},
    sys::stat::{DirectReads, Identity, direct_reads},
};

/// Sector size of a new file where the kernel does not tell: a page.
const FILE_SECTOR: u32 = 4096;

/// A volume that nobody else has, or the place of a file that is to be made.
/// Untouched as yet.
pub(super) struct Target {
    pub(super) path: PathBuf,
    /// Bytes of the image.
    size: u64,
    /// Bytes of the volume; those of the image where it is new.
    room: u64,
    settings: ReaderSettings,
    place: Place,
}

enum Place {
    There {
        opened: Opened,
        identity: Identity,
        /// The file under a loop device, with QEMU's locks.
        _backing: Option<File>,
    },
    New(Missing),
}

/// What is written, and how it becomes visible.
pub(super) struct Output {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
    /// Bytes of the image.
    pub(super) size: u64,
    /// Bytes behind which nothing is to be zeroed.
    pub(super) room: u64,
    pub(super) sector: u64,
    /// Of a file that was as long as the image, the length that it keeps.
    pub(super) cut: Option<u64>,
    /// Where a new file gets its name.
    pub(super) name: Option<Missing>,
    _backing: Option<File>,
}

/// Finds and holds the volume at `asked`, which is to take `size` bytes, or a
/// place for a new file. Changes nothing.
pub(super) fn target(
    host: &Host,
    allowed: &[PathBuf],
    settings: ReaderSettings,
    asked: &Path,
    size: ByteSize,
) -> Result<Target> {
    let size = size.get();
    let named = match Named::look_up(asked, allowed, Purpose::Overwrite) {
        Err(error) if error.reason() == Reason::VolumeNotFound => {
            let missing = Missing::look_up(asked, allowed).ok_or(error)?;
            let path = missing.path.clone();
            return Ok(Target { path, size, room: size, settings, place: Place::New(missing) });
        }
        named => named?,
    };
    let (path, identity) = (named.path.clone(), named.identity);
    let subject = hold::subject(host, &named)?;
    let opened = claim(host, &named, &subject)?;
    let backing = hold::backing_file(host, &opened.file, identity, opened.size);
    let backing = backing.map(|backing| backing.file);
    let (files, lock) = ([Some(&opened.file), backing.as_ref()], qemu_lock::lock_against_all);
    keep_out(host, &path, &subject, Openers::Others, files, lock)?;

    let sector = u64::from(opened.sector_size);
    let (room, needed) = match identity {
        // A sector is written whole.
        Identity::BlockDevice(_) => (opened.size / sector * sector, size.next_multiple_of(sector)),
        Identity::File { .. } => (opened.size, size),
    };
    if room < needed {
        // The sizes as people write them may look alike.
        let context = format!(
            "the volume {} is smaller than the image: it has {room} bytes of {needed}",
            path.display()
        );
        return Err(Error::new(Reason::VolumeTooSmall, context)
            .field("to")
            .advice("make it larger, or name a path that does not exist for a new file"));
    }
    let place = Place::There { opened, identity, _backing: backing };
    Ok(Target { path, size, room, settings, place })
}

impl port::Target for Target {
    fn path(&self) -> &Path {
        &self.path
    }

    fn is_new(&self) -> bool {
        matches!(self.place, Place::New(_))
    }

    fn room(&self) -> ByteSize {
        ByteSize(self.room)
    }

    fn begin(self: Box<Self>, stop: &CancellationToken) -> Result<Box<dyn Sink>> {
        let Self { path, size, room, settings, place } = *self;
        let output = match place {
            Place::There { opened, identity, _backing } => {
                let Opened { file, sector_size, .. } = opened;
                let sector = u64::from(sector_size);
                let is_file = matches!(identity, Identity::File { .. });
                // The last sector is written whole, and may be longer.
                let cut = (is_file && room < size.next_multiple_of(sector)).then_some(room);
                let file = Arc::new(file);
                Output { file, path, size, room, sector, cut, name: None, _backing }
            }
            Place::New(missing) => {
                let file = missing.make(size).map_err(|cause| unmade(&path, cause))?;
                let sector = match direct_reads(file.as_fd()).unwrap_or(DirectReads::Unknown) {
                    DirectReads::Aligned { offset, .. } => offset,
                    DirectReads::Unknown | DirectReads::Unsupported => FILE_SECTOR,
                };
                let (file, sector) = (Arc::new(file), u64::from(sector));
                let (cut, name, _backing) = (Some(size), Some(missing), None);
                Output { file, path, size, room, sector, cut, name, _backing }
            }
        };
        if output.name.is_none() {
            // No machine boots from what was not written to its end, and
            // nobody takes it for what it was.
            let first = 0..EXTENT_SIZE.min(output.room);
            zero(&output.file, first.clone(), stop)
                .and_then(|()| output.file.sync_all())
                .context(Reason::WriteFailed, || output.sentence(first))?;
        }
        Ok(Box::new(Writer::start(output, settings, stop.clone())?))
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Target({}, {} of {} bytes)", self.path.display(), self.size, self.room)
    }
}

impl Output {
    /// Of what could not be written.
    pub(super) fn sentence(&self, range: std::ops::Range<u64>) -> String {
        let len = ByteSize(range.end - range.start);
        format!("cannot write {len} at offset {} of {}", range.start, self.path.display())
    }
}

fn unmade(path: &Path, cause: io::Error) -> Error {
    let refused = matches!(cause.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR));
    let error = Error::new(Reason::WriteFailed, format!("cannot make the file {}", path.display()));
    let error = match refused {
        true => error.advice(
            "its filesystem has no files without names (O_TMPFILE), by which a broken-off \
             restore leaves nothing: make the file yourself, with `truncate --size`",
        ),
        false => error,
    };
    error.because(cause)
}
