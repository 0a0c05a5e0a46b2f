//! The way back, as far as it needs no decoding: from an object in a store to
//! the digest of its bytes. The digest of what a guest sees is recomputed
//! where hostile bytes may be parsed: see `worker`.

use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::{Meter, canceled};
use crate::{
    error::{Error, Reason, Result},
    format::qcow2::content,
    model::{
        ByteSize,
        image::{EXTENT_SIZE, Stored, StoredPart},
    },
    port::{Fault, ReadAt},
};

/// What can be told without reading the object: whether its size, the sums in
/// the manifest and `extent_digests` agree.
#[must_use]
pub fn sums(object: &dyn ReadAt, stored: &Stored, extent_digests: &[u8]) -> Option<Fault> {
    let found = ByteSize(object.len());
    if found != stored.object_size {
        return Some(Fault::Size { found, stored: stored.object_size });
    }
    // A manifest is foreign too: its sizes may be anything.
    let sizes = stored.parts.iter().try_fold(0_u64, |sum, part| sum.checked_add(part.size.get()));
    if sizes != Some(stored.object_size.get()) {
        return Some(Fault::Sum("object size"));
    }
    let mut sha256 = Sha256::new();
    stored.parts.iter().for_each(|part| sha256.update(part.sha256.0));
    if stored.object_digest.0 != <[u8; 32]>::from(sha256.finalize()) {
        return Some(Fault::Sum("object digest"));
    }
    let extents = content::extent_count(stored.virtual_size.get()) as usize;
    if extents.checked_mul(content::DIGEST_SIZE) != Some(extent_digests.len())
        || content::content_digest(extent_digests) != stored.content_digest
    {
        return Some(Fault::Sum("content digest"));
    }
    None
}

/// The parts of an object whose SHA-256 is to be recomputed, by any number of
/// threads.
pub struct Parts<'a> {
    object: &'a dyn ReadAt,
    /// Each with its offset in the object.
    parts: Vec<(u64, &'a StoredPart)>,
    next: AtomicUsize,
}

impl std::fmt::Debug for Parts<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").field("parts", &self.parts.len()).finish_non_exhaustive()
    }
}

impl<'a> Parts<'a> {
    /// The parts of `object`, whose [`sums`] agree with `stored`.
    #[must_use]
    pub fn new(object: &'a dyn ReadAt, stored: &'a Stored) -> Self {
        let mut end = 0;
        let parts = stored.parts.iter().map(|part| {
            let start = end;
            end += part.size.get();
            (start, part)
        });
        Self { object, parts: parts.collect(), next: AtomicUsize::new(0) }
    }

    /// Hashes parts, each once, until none is left or one differs. Blocks; 1
    /// MiB of memory.
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE` when the object cannot be read, `CANCELED` after
    /// `stop`.
    pub fn hash(&self, meter: &Meter, stop: &CancellationToken) -> Result<Option<Fault>> {
        let mut buf = vec![0; EXTENT_SIZE as usize];
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(&(start, part)) = self.parts.get(index) else { return Ok(None) };
            let (mut offset, end) = (start, start + part.size.get());
            let mut sha256 = Sha256::new();
            while offset < end {
                if stop.is_cancelled() {
                    return Err(canceled());
                }
                let len = (end - offset).min(EXTENT_SIZE) as usize;
                self.object
                    .read_at(&mut buf[..len], offset)
                    .map_err(|cause| unreadable(offset, cause))?;
                sha256.update(&buf[..len]);
                meter.add_read(len as u64);
                offset += len as u64;
            }
            if part.sha256.0 != <[u8; 32]>::from(sha256.finalize()) {
                return Ok(Some(Fault::Part { number: index + 1, offset: start }));
            }
        }
    }
}

/// A store that does not give the bytes at `offset`.
#[must_use]
pub fn unreadable(offset: u64, cause: std::io::Error) -> Error {
    let context = format!("the object cannot be read at offset {offset}");
    Error::new(Reason::StoreUnavailable, context).because(cause)
}
