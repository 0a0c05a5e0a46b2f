//! Who works on an image's directory: `upload.json`, locked while its writer
//! lives.
//!
//! The lock, not a process id, tells a living upload from a dead one: the
//! kernel drops it with the process, and process ids are used again. The
//! contents are for people and for telling hosts apart.

use std::{
    fs::{File, TryLockError},
    io::{self, Write},
    os::unix::fs::MetadataExt,
};

use super::files::Dir;
use crate::store::form::{MAX_SMALL, Owner};
use nix::fcntl::OFlag;

/// The claim's name in an image's directory.
pub const CLAIM: &str = "upload.json";

/// A claim that is held: dropping it leaves `upload.json` without its lock.
#[derive(Debug)]
#[must_use]
pub struct Claim {
    _locked: File,
}

/// What became of an attempt to claim.
#[derive(Debug)]
pub enum Claimed {
    /// It is held now.
    Taken(Claim),
    /// Someone else holds it, or has just finished with it.
    Held,
}

/// What a claim in a directory says.
#[derive(Debug)]
pub enum Found {
    /// There is none.
    None,
    /// One of this host's, whose writer is dead; held now.
    Dead(Claim),
    /// Another host's, or its writer lives.
    Foreign,
    /// It cannot be understood. A power failure just after it was made
    /// leaves an empty one.
    Unreadable,
}

impl Claim {
    /// Claims `dir` for `owner`, durably. A claim without a lock is taken
    /// over.
    pub fn take(dir: &Dir, owner: &Owner) -> io::Result<Claimed> {
        let mut file = dir.open(CLAIM, OFlag::O_CREAT | OFlag::O_RDWR)?;
        let Some(claim) = lock(&file)? else { return Ok(Claimed::Held) };
        file.set_len(0)?;
        file.write_all(&serde_json::to_vec_pretty(owner)?)?;
        file.sync_all()?;
        dir.sync()?;
        Ok(Claimed::Taken(claim))
    }

    /// Takes the claim that is in `dir`, if there is one, unless someone holds
    /// it. Nothing is written.
    pub fn take_over(dir: &Dir) -> io::Result<Option<Claimed>> {
        let file = match dir.open(CLAIM, OFlag::O_RDWR) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        Ok(Some(lock(&file)?.map_or(Claimed::Held, Claimed::Taken)))
    }

    /// Looks at the claim in `dir` and takes it if it is of `owner`'s host
    /// and dead.
    pub fn inherit(dir: &Dir, owner: &Owner) -> io::Result<Found> {
        let bytes = match dir.read(CLAIM, MAX_SMALL) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Found::None),
            read => read?,
        };
        let Ok(found) = serde_json::from_slice::<Owner>(&bytes) else {
            return Ok(Found::Unreadable);
        };
        if found.host_id != owner.host_id {
            return Ok(Found::Foreign);
        }
        // Writable, because NFS locks for writing on nothing less.
        let file = match dir.open(CLAIM, OFlag::O_RDWR) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Found::None),
            opened => opened?,
        };
        Ok(lock(&file)?.map_or(Found::Foreign, Found::Dead))
    }
}

/// `None`: someone else has the lock, or removed the file before it was
/// locked here.
fn lock(file: &File) -> io::Result<Option<Claim>> {
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(cause)) => return Err(cause),
    }
    if file.metadata()?.nlink() == 0 {
        return Ok(None);
    }
    Ok(Some(Claim { _locked: file.try_clone()? }))
}
