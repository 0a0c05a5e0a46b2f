//! Removing images and what dead uploads left.
//!
//! One rule: a directory with a manifest is an image, whatever else is in
//! it; one without belongs to its claim, and without a claim to nobody here.
//! Only files that a store makes are removed, by name.
//!
//! A deletion begins with a rename of the manifest: the image is gone from
//! sight, what is left says so to every sweep, and nothing is written, for a
//! full store is when images must be deleted.

use std::{
    io,
    time::{Duration, SystemTime},
};

use nix::errno::Errno;

use super::{
    Store,
    claim::{CLAIM, Claim, Claimed, Found},
    files::{Dir, During, Removed, TEMPORARY},
};
use crate::{
    error::{Error, Reason, Result},
    model::ImageId,
    port::Delete,
    store::form::{EXTENTS, MANIFEST, OBJECT, RECORD, TOMBSTONE, TRACE},
};

/// Age from which leftovers without an owner are removed: far beyond the
/// moments for which a living host leaves a directory without a claim, and
/// beyond any difference of two hosts' clocks.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// Removes everything of the image in `dir`, the manifest first and what
/// says that the rest may be removed last, each durably. What is not there is
/// no error, so that any number may do this at once.
pub fn clear(images: &Dir, dir: &Dir, name: &str) -> Result<()> {
    let path = dir.path().display();
    let remove = |file: &str| dir.remove(file).during(|| format!("cannot remove {path}/{file}"));
    let sync = |dir: &Dir| dir.sync().during(|| format!("cannot remove {path} durably"));
    if remove(MANIFEST)? == Removed::Removed {
        sync(dir)?;
    }
    for file in [OBJECT, EXTENTS, TRACE, RECORD] {
        let _ = remove(file)?;
    }
    for file in [MANIFEST, EXTENTS, TRACE, RECORD] {
        let _ = remove(&format!("{file}{TEMPORARY}"))?;
    }
    sync(dir)?;
    for file in [CLAIM, TOMBSTONE] {
        let _ = remove(file)?;
    }
    match images.remove_dir(name) {
        Err(cause) if cause.raw_os_error() == Some(Errno::ENOTEMPTY as i32) => {
            // NFS keeps a file that someone has open under another name.
            tracing::warn!(%path, "something else is in a removed image's directory");
        }
        removed => drop(removed.during(|| format!("cannot remove {path}"))?),
    }
    sync(images)
}

/// Deletes a whole image.
pub fn delete(store: &Store, id: &ImageId) -> Result<Delete> {
    let images = store.root.images()?;
    let path = images.path_of(id.as_str());
    let context = || format!("cannot delete {}", path.display());
    let dir = match images.dir(id.as_str()) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Delete::AlreadyDeleted),
        opened => opened.during(context)?,
    };
    // An upload under way has no manifest: it is not touched. One that has
    // just sealed still holds its claim.
    let claimed = match dir.has(MANIFEST).during(context)? {
        true => Claim::take_over(&dir).during(context)?,
        false => return Ok(Delete::AlreadyDeleted),
    };
    if let Some(Claimed::Held) = claimed {
        return Err(Error::new(
            Reason::ImageLocked,
            format!("image {id} is being sealed by another process"),
        )
        .advice("ask again in a moment"));
    }
    match dir.rename(MANIFEST, TOMBSTONE) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Delete::AlreadyDeleted),
        // A btrfs that is really full has room for removals alone (seen on
        // Linux 6.18). What a crash left from here on would be nobody's, so
        // it is claimed if the removal made room.
        Err(cause) if cause.raw_os_error() == Some(Errno::ENOSPC as i32) => {
            let _ = dir.remove(MANIFEST).during(context)?;
            dir.sync().during(context)?;
            let claimed = Claim::take(&dir, &store.owner);
            tracing::debug!(%id, ?claimed, "the store is too full for a rename");
        }
        renamed => renamed.during(context)?,
    }
    clear(&images, &dir, id.as_str())?;
    Ok(Delete::Deleted)
}

/// Removes what dead uploads and deletions of this host left; answers how
/// many there were. What cannot be removed is a warning.
pub fn sweep(store: &Store) -> Result<usize> {
    let images = store.root.images()?;
    let mut swept = 0;
    for name in super::names(&images)? {
        let done = images
            .dir(&name)
            .during(|| format!("cannot open {}", images.path_of(&name).display()))
            .and_then(|dir| sweep_one(store, &images, &dir, &name));
        match done {
            Ok(Swept::Leftover) => swept += 1,
            Ok(Swept::Nothing) => {}
            Err(error) => tracing::warn!(%name, ?error, "an image's directory was not swept"),
        }
    }
    Ok(swept)
}

enum Swept {
    Leftover,
    Nothing,
}

fn sweep_one(store: &Store, images: &Dir, dir: &Dir, name: &str) -> Result<Swept> {
    let path = dir.path().display();
    let context = || format!("cannot look into {path}");
    // Whoever deletes it, on whatever host, does no more than this.
    if dir.has(TOMBSTONE).during(context)? && !dir.has(MANIFEST).during(context)? {
        clear(images, dir, name)?;
        tracing::info!(name, "finished a deletion");
        return Ok(Swept::Leftover);
    }
    // First the claim: its holder may seal until it is ours.
    let found = Claim::inherit(dir, &store.owner).during(context)?;
    let whole = dir.has(MANIFEST).during(context)?;
    match (found, whole) {
        (Found::Dead(_claim), false) => {
            clear(images, dir, name)?;
            tracing::info!(name, "removed what a dead upload left");
            return Ok(Swept::Leftover);
        }
        (Found::Dead(_claim), true) => {
            let _ = dir.remove(CLAIM).during(context)?;
        }
        (Found::None, true) if is_abandoned(dir).during(context)? => {
            for file in [MANIFEST, EXTENTS, RECORD] {
                let _ = dir.remove(&format!("{file}{TEMPORARY}")).during(context)?;
            }
        }
        // A crash between the first steps of an upload. Anything with an
        // object in it may be a copy that an operator is making.
        (Found::None | Found::Unreadable, false) if is_abandoned(dir).during(context)? => {
            if dir.has(OBJECT).during(context)? {
                tracing::warn!(%path, "neither an image nor an upload of any host: left alone");
            } else {
                clear(images, dir, name)?;
                return Ok(Swept::Leftover);
            }
        }
        (Found::None | Found::Foreign | Found::Unreadable, _) => {}
    }
    Ok(Swept::Nothing)
}

fn is_abandoned(dir: &Dir) -> io::Result<bool> {
    let changed = dir.handle().metadata()?.modified()?;
    Ok(SystemTime::now().duration_since(changed).is_ok_and(|age| age > ABANDONED))
}
