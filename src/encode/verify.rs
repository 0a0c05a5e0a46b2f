//! The way back: from an object in a store to both digests.

use std::{
    num::NonZeroUsize,
    sync::atomic::{AtomicU64, Ordering},
};

use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::{Meter, canceled, in_parallel};
use crate::{
    error::{Error, Reason, Result},
    format::qcow2::{
        content,
        image::{Content, Image, ReadError},
    },
    model::{
        ByteSize,
        image::{EXTENT_SIZE, Stored},
    },
    port::ReadAt,
};

/// Where an image differs from what was stored: the first place found.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The object's length.
    #[error("the object has {found} and was stored with {stored}")]
    Size {
        /// What is there.
        found: ByteSize,
        /// What should be.
        stored: ByteSize,
    },
    /// Bytes of the object.
    #[error("part {number}, at offset {offset} of the object, has another SHA-256")]
    Part {
        /// From 1.
        number: usize,
        /// Of its first byte.
        offset: u64,
    },
    /// What the guest would see.
    #[error("what a guest reads at offset {offset} has another BLAKE3")]
    Extent {
        /// Offset in the volume.
        offset: u64,
    },
    /// The manifest's own sums.
    #[error("the {0} in the manifest is not that of its parts")]
    Sum(&'static str),
    /// The object is no image any more.
    #[error("the object cannot be decoded")]
    Undecodable(#[source] ReadError),
}

/// Recomputes the digests of `object` and compares them with what was
/// `stored` and with the digests of the extents. `None`: all is well.
///
/// Blocks; reads the object twice, once as bytes and once as an image, on
/// `threads` threads at `SCHED_IDLE`. At most 2 MiB a thread.
///
/// # Errors
///
/// `STORE_UNAVAILABLE` when the object cannot be read, `CANCELED` after
/// `stop`.
pub fn recompute(
    object: &dyn ReadAt,
    stored: &Stored,
    extent_digests: &[u8],
    threads: NonZeroUsize,
    meter: &Meter,
    stop: &CancellationToken,
) -> Result<Option<Fault>> {
    if let Some(fault) = sums(object, stored, extent_digests) {
        return Ok(Some(fault));
    }
    let check = Check {
        object,
        stored,
        extent_digests,
        meter,
        stop,
        next_part: AtomicU64::new(0),
        next_extent: AtomicU64::new(0),
    };
    let outcomes = in_parallel(threads, "verify", || check.work());
    // A fault is worth more than the error of another thread, and one of the
    // object's bytes more than what follows from it.
    let mut error = None;
    let mut found = None;
    for outcome in outcomes {
        match outcome {
            Ok(None) => {}
            Ok(Some(fault)) => {
                if found.is_none() || matches!(fault, Fault::Part { .. }) {
                    found = Some(fault);
                }
            }
            Err(failed) => error = Some(failed),
        }
    }
    match (found, error) {
        (None, Some(error)) => Err(error),
        (found, _) => Ok(found),
    }
}

/// What can be told without reading the object.
fn sums(object: &dyn ReadAt, stored: &Stored, extent_digests: &[u8]) -> Option<Fault> {
    let found = ByteSize(object.len());
    if found != stored.object_size {
        return Some(Fault::Size { found, stored: stored.object_size });
    }
    let sizes: u64 = stored.parts.iter().map(|part| part.size.get()).sum();
    if sizes != stored.object_size.get() {
        return Some(Fault::Sum("object size"));
    }
    let mut sha256 = Sha256::new();
    stored.parts.iter().for_each(|part| sha256.update(part.sha256.0));
    if stored.object_digest.0 != <[u8; 32]>::from(sha256.finalize()) {
        return Some(Fault::Sum("object digest"));
    }
    let extents = content::extent_count(stored.virtual_size.get()) as usize;
    if extent_digests.len() != extents * content::DIGEST_SIZE
        || content::content_digest(extent_digests) != stored.content_digest
    {
        return Some(Fault::Sum("content digest"));
    }
    None
}

struct Check<'a> {
    object: &'a dyn ReadAt,
    stored: &'a Stored,
    extent_digests: &'a [u8],
    meter: &'a Meter,
    stop: &'a CancellationToken,
    next_part: AtomicU64,
    next_extent: AtomicU64,
}

impl Check<'_> {
    fn work(&self) -> Result<Option<Fault>> {
        let found = self.parts().and_then(|fault| match fault {
            Some(fault) => Ok(Some(fault)),
            None => self.extents(),
        });
        if !matches!(found, Ok(None)) {
            // The others need not go on.
            self.next_part.store(u64::MAX / 2, Ordering::Relaxed);
            self.next_extent.store(u64::MAX / 2, Ordering::Relaxed);
        }
        found
    }

    /// Hashes parts until none is left.
    fn parts(&self) -> Result<Option<Fault>> {
        let mut buf = vec![0; EXTENT_SIZE as usize];
        loop {
            let index = self.next_part.fetch_add(1, Ordering::Relaxed) as usize;
            let Some(part) = self.stored.parts.get(index) else { return Ok(None) };
            let start: u64 = self.stored.parts[..index].iter().map(|part| part.size.get()).sum();
            let (mut offset, end) = (start, start + part.size.get());
            let mut sha256 = Sha256::new();
            while offset < end {
                self.check()?;
                let len = (end - offset).min(EXTENT_SIZE) as usize;
                self.object.read_at(&mut buf[..len], offset).map_err(|cause| {
                    Error::new(
                        Reason::StoreUnavailable,
                        format!("the object cannot be read at offset {offset}"),
                    )
                    .because(cause)
                })?;
                sha256.update(&buf[..len]);
                offset += len as u64;
            }
            if part.sha256.0 != <[u8; 32]>::from(sha256.finalize()) {
                return Ok(Some(Fault::Part { number: index + 1, offset: start }));
            }
        }
    }

    /// Decodes extents until none is left.
    fn extents(&self) -> Result<Option<Fault>> {
        let size = self.stored.virtual_size.get();
        let mut image = match Image::open(self.object) {
            Ok(image) => image,
            Err(error) => return undecodable(error),
        };
        if image.header().virtual_size != size {
            return Ok(Some(Fault::Sum("virtual size")));
        }
        let mut buf = vec![0; EXTENT_SIZE as usize];
        loop {
            self.check()?;
            let index = self.next_extent.fetch_add(1, Ordering::Relaxed);
            if index >= content::extent_count(size) {
                return Ok(None);
            }
            let (offset, len) = (index * EXTENT_SIZE, content::extent_len(size, index));
            let digest = match image.read_at(&mut buf[..len], offset) {
                Ok(Content::Zeroes) => {
                    self.meter.skipped.fetch_add(len as u64, Ordering::Relaxed);
                    content::zeroes_digest(len)
                }
                Ok(Content::Data) => {
                    self.meter.read.fetch_add(len as u64, Ordering::Relaxed);
                    content::extent_digest(&buf[..len])
                }
                Err(error) => return undecodable(error),
            };
            let at = index as usize * content::DIGEST_SIZE;
            if self.extent_digests.get(at..at + content::DIGEST_SIZE) != Some(&digest[..]) {
                return Ok(Some(Fault::Extent { offset }));
            }
        }
    }

    fn check(&self) -> Result<()> {
        if self.stop.is_cancelled() { Err(canceled()) } else { Ok(()) }
    }
}

/// A damaged image is a finding, an object that cannot be read an error.
fn undecodable(error: ReadError) -> Result<Option<Fault>> {
    match error {
        ReadError::Format(_) => Ok(Some(Fault::Undecodable(error))),
        ReadError::Io { offset, source } => {
            let context = format!("the object cannot be read at offset {offset}");
            Err(Error::new(Reason::StoreUnavailable, context).because(source))
        }
    }
}
