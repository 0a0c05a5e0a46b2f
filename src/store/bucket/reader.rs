//! An image's object in a bucket, for threads that decode it.
//!
//! Readers ask for some KiB, mostly ascending; each request costs a round
//! trip, and the store the reading of all that it keeps in one. So pieces are
//! fetched whole, ahead of who reads on, and a few are kept: what is in memory
//! is bounded, whoever reads how.

use std::{
    collections::VecDeque,
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use futures_util::{FutureExt, future::Shared};
use tokio::runtime::Handle;

use super::{Bucket, Facts, Retry};
use crate::{
    error::{Error, Reason},
    port::{BoxFuture, ObjectReader, ReadAt},
};

/// Most bytes of a piece. S3 advises to ask for 8 to 16 MiB at once, and where
/// the parts begin that were uploaded (AWS, "Performance guidelines for Amazon
/// S3"); SeaweedFS keeps parts in chunks of 8 MiB.
const PIECE: u64 = 8 << 20;
/// Pieces that are kept: 64 MiB.
const KEPT: usize = 8;
/// Pieces that are fetched ahead of who reads on.
const AHEAD: usize = 3;

type Fetch = Shared<BoxFuture<'static, Result<Bytes, Arc<Error>>>>;

/// Reads an object that stays what it was when it was opened: a changed one
/// is an error.
pub struct BucketReader {
    bucket: Retry,
    key: String,
    facts: Facts,
    runtime: Handle,
    /// Where each piece begins, and the last ends.
    cuts: Vec<u64>,
    /// By index; the youngest last.
    pieces: Mutex<VecDeque<(usize, Fetch)>>,
}

impl BucketReader {
    /// Reads `key`, of which `facts` are known and that was uploaded in parts
    /// of these sizes. Fetches run on `runtime`, whose threads must not read.
    /// What an image is opened with is fetched at once: its two ends.
    pub fn new(
        bucket: Retry,
        key: String,
        facts: Facts,
        parts: impl Iterator<Item = u64>,
        runtime: Handle,
    ) -> Self {
        let cuts = cuts(parts, facts.size.get());
        let last = cuts.len().saturating_sub(2);
        let reader = Self { bucket, key, facts, runtime, cuts, pieces: Mutex::default() };
        if reader.facts.size.get() > 0 {
            _ = (reader.piece(last), reader.piece(0));
        }
        reader
    }

    /// The piece `index`, and those behind it if the one before was read.
    fn piece(&self, index: usize) -> Fetch {
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |pieces: &VecDeque<(usize, Fetch)>, index| {
            pieces.iter().position(|(there, _)| *there == index)
        };
        let ascends = index == 0 || known(&pieces, index - 1).is_some();
        let wanted = if ascends { index..index + 1 + AHEAD } else { index..index + 1 };
        let mut found = None;
        for index in wanted.take_while(|index| index + 1 < self.cuts.len()) {
            let piece = match known(&pieces, index).and_then(|at| pieces.remove(at)) {
                Some(piece) => piece,
                None => (index, self.fetch(index)),
            };
            found.get_or_insert_with(|| piece.1.clone());
            pieces.push_back(piece);
        }
        while pieces.len() > KEPT {
            pieces.pop_front();
        }
        // There is no such piece only beyond the end, which nobody asks for.
        found.unwrap_or_else(|| self.fetch(index))
    }

    /// Begins to fetch the piece `index`.
    fn fetch(&self, index: usize) -> Fetch {
        let cut = |index: usize| self.cuts.get(index).copied().unwrap_or(self.facts.size.get());
        let range = cut(index)..cut(index + 1);
        let (bucket, key, etag) = (self.bucket.clone(), self.key.clone(), self.facts.etag.clone());
        let task = self
            .runtime
            .spawn(async move { bucket.read(&key, &etag, range).await.map_err(Arc::new) });
        let fetched = async move {
            task.await.unwrap_or_else(|cause| {
                let context = "a fetch ended early";
                Err(Arc::new(Error::new(Reason::Internal, context).because(cause)))
            })
        };
        fetched.boxed().shared()
    }
}

/// Where the pieces of an object of `size` bytes begin, and its end: each part
/// begins one. The manifest's parts may have any sizes.
fn cuts(parts: impl Iterator<Item = u64>, size: u64) -> Vec<u64> {
    let mut cuts = vec![0];
    let mut start = 0_u64;
    // What the parts leave is cut alike.
    for part in parts.chain([size]) {
        let end = size.min(start.saturating_add(part));
        while start < end {
            start = end.min(start + PIECE);
            cuts.push(start);
        }
    }
    cuts
}

impl ReadAt for BucketReader {
    fn len(&self) -> u64 {
        self.facts.size.get()
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while !buf.is_empty() {
            // The first begins at 0.
            let index = self.cuts.partition_point(|cut| *cut <= offset) - 1;
            let piece = self.runtime.block_on(self.piece(index));
            let piece = piece.map_err(|error| {
                let kind = match error.reason() {
                    Reason::StoreUnavailable => io::ErrorKind::TimedOut,
                    _ => io::ErrorKind::Other,
                };
                io::Error::new(kind, error.report())
            })?;
            let from = usize::try_from(offset - self.cuts[index]).unwrap_or(usize::MAX);
            let bytes = piece.get(from..).unwrap_or_default();
            let len = bytes.len().min(buf.len());
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (now, rest) = buf.split_at_mut(len);
            now.copy_from_slice(&bytes[..len]);
            buf = rest;
            offset += len as u64;
        }
        Ok(())
    }
}

impl ObjectReader for BucketReader {}

impl fmt::Debug for BucketReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketReader({}/{}, {})", self.bucket.location(), self.key, self.facts.size)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the manifest says, the pieces are the object.
        #[test]
        fn pieces_are_the_object(
            parts in prop::collection::vec(prop_oneof![0..30_u64 << 20, any::<u64>()], 0..20),
            size in 0..400_u64 << 20,
        ) {
            let cuts = cuts(parts.iter().copied(), size);
            prop_assert_eq!((cuts[0], cuts[cuts.len() - 1]), (0, size));
            for piece in cuts.windows(2) {
                prop_assert!(piece[0] < piece[1] && piece[1] - piece[0] <= PIECE);
            }
            let mut start = 0_u64;
            for part in parts {
                prop_assert!(start >= size || cuts.contains(&start));
                start = start.saturating_add(part);
            }
        }
    }
}
