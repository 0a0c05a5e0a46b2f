//! An image's object in a bucket, for threads that decode it.
//!
//! Readers ask for some KiB, mostly ascending; each request costs a round
//! trip. So blocks are fetched whole, ahead of who reads on, and a few are
//! kept: what is in memory is bounded, whoever reads how.

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

/// Bytes of a block: its transfer takes longer than a round trip.
const BLOCK: u64 = 2 << 20;
/// Blocks that are kept: 32 MiB.
const KEPT: usize = 16;
/// Blocks that are fetched ahead of who reads on.
const AHEAD: u64 = 2;

type Fetch = Shared<BoxFuture<'static, Result<Bytes, Arc<Error>>>>;

/// Reads an object that stays what it was when it was opened: a changed one
/// is an error.
pub struct BucketReader {
    bucket: Retry,
    key: String,
    facts: Facts,
    runtime: Handle,
    /// By index; the youngest last.
    blocks: Mutex<VecDeque<(u64, Fetch)>>,
}

impl BucketReader {
    /// Reads `key`, of which `facts` are known. Fetches run on `runtime`,
    /// whose threads must not read.
    pub fn new(bucket: Retry, key: String, facts: Facts, runtime: Handle) -> Self {
        Self { bucket, key, facts, runtime, blocks: Mutex::default() }
    }

    /// The block `index`, and those behind it if the one before was read.
    fn block(&self, index: u64) -> Fetch {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |blocks: &VecDeque<(u64, Fetch)>, index| {
            blocks.iter().position(|(there, _)| *there == index)
        };
        let ascends = index == 0 || known(&blocks, index - 1).is_some();
        let wanted = if ascends { index..index + 1 + AHEAD } else { index..index + 1 };
        let last = self.facts.size.get().div_ceil(BLOCK);
        let mut found = None;
        for index in wanted.take_while(|index| *index < last) {
            let block = match known(&blocks, index).and_then(|at| blocks.remove(at)) {
                Some(block) => block,
                None => (index, self.fetch(index)),
            };
            found.get_or_insert_with(|| block.1.clone());
            blocks.push_back(block);
        }
        while blocks.len() > KEPT {
            blocks.pop_front();
        }
        // There is no such block only beyond the end, which nobody asks for.
        found.unwrap_or_else(|| self.fetch(index))
    }

    /// Begins to fetch the block `index`.
    fn fetch(&self, index: u64) -> Fetch {
        let begin = index * BLOCK;
        let range = begin..(begin + BLOCK).min(self.facts.size.get());
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
            let block = self.runtime.block_on(self.block(offset / BLOCK));
            let block = block.map_err(|error| {
                let kind = match error.reason() {
                    Reason::StoreUnavailable => io::ErrorKind::TimedOut,
                    _ => io::ErrorKind::Other,
                };
                io::Error::new(kind, error.report())
            })?;
            let from = usize::try_from(offset % BLOCK).unwrap_or(usize::MAX);
            let bytes = block.get(from..).unwrap_or_default();
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
