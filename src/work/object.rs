//! An image's object on its way out of its store, part by part.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures_util::StreamExt;
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize,
        image::{ObjectDigest, Stored, StoredPart},
        work_request::Progress,
    },
    port::{Body, BoxStream, ObjectReader, Part},
};

/// Bytes that are read and handed on at once.
const CHUNK: u64 = 256 << 10;
/// Chunks of a part that wait for who sends them.
const WAITING: usize = 4;
/// How often a part is read that is not what was stored: bytes may be damaged
/// on their way from a store.
const READS: u32 = 3;

/// An object whose parts are read whenever they are sent, and checked against
/// the manifest each time: the last bytes of a part that is another are not
/// handed on.
#[derive(Debug, Clone)]
pub(super) struct Object(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    reader: Arc<dyn ObjectReader>,
    parts: Vec<StoredPart>,
    /// Bytes that were handed on.
    read: AtomicU64,
    /// Those of them that had to be read again.
    again: AtomicU64,
    /// Bytes that are where they go.
    stored: AtomicU64,
    /// Held until every thread that reads has ended.
    _place: Arc<OwnedSemaphorePermit>,
}

impl Object {
    /// The object that `stored` describes.
    ///
    /// # Errors
    ///
    /// `IMAGE_CORRUPT`: it is not as long as that.
    pub(super) fn new(
        reader: Arc<dyn ObjectReader>,
        stored: &Stored,
        place: Arc<OwnedSemaphorePermit>,
    ) -> Result<Self> {
        let (found, wanted) = (ByteSize(reader.len()), stored.object_size);
        let sum = stored.parts.iter().map(|part| part.size.get()).sum();
        if found != wanted || ByteSize(sum) != wanted {
            let context = format!("the object has {found:#} and was stored with {wanted:#}");
            return Err(corrupt(context));
        }
        Ok(Self(Arc::new(Inner {
            reader,
            parts: stored.parts.clone(),
            read: AtomicU64::new(0),
            again: AtomicU64::new(0),
            stored: AtomicU64::new(0),
            _place: place,
        })))
    }

    /// Its parts, in order.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + Send + use<> {
        let object = self.clone();
        let mut offset = 0;
        (0..self.0.parts.len()).zip(1..).filter_map(move |(index, number)| {
            let StoredPart { size, sha256 } = object.0.parts.get(index)?.clone();
            let body = StoredBody {
                object: object.clone(),
                span: Span { number, offset, size: size.get(), sha256 },
                wrong: Arc::default(),
                counted: Arc::default(),
            };
            let part = Part { number, offset, size, body: Box::new(body), sha256 };
            offset += size.get();
            Some(part)
        })
    }

    /// Its length.
    pub(super) fn size(&self) -> ByteSize {
        ByteSize(self.0.reader.len())
    }

    /// So many more bytes are where they go.
    pub(super) fn add_stored(&self, size: ByteSize) {
        self.0.stored.fetch_add(size.get(), Ordering::Relaxed);
    }

    /// How far it is; `total` is its size.
    pub(super) fn progress(&self, total: u64) -> Progress {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let read = of(&self.0.read).saturating_sub(of(&self.0.again)).min(total);
        Progress { total, read, stored: of(&self.0.stored), ..Progress::default() }
    }
}

/// Where a part lies.
#[derive(Debug, Clone, Copy)]
struct Span {
    number: u32,
    offset: u64,
    size: u64,
    sha256: ObjectDigest,
}

/// The bytes of one part.
#[derive(Debug, Clone)]
struct StoredBody {
    object: Object,
    span: Span,
    /// How often it was not what was stored.
    wrong: Arc<AtomicU32>,
    /// Bytes of it that were handed on, by the last who asked for them.
    counted: Arc<Mutex<u64>>,
}

impl Body for StoredBody {
    fn piece(&self, _: usize) -> Option<&[u8]> {
        None
    }

    fn stream(&self) -> Option<BoxStream<'static, Result<Bytes>>> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let body = self.clone();
        // What was handed on of it before was in vain.
        let before = std::mem::take(&mut *body.lock());
        body.object.0.again.fetch_add(before, Ordering::Relaxed);
        // It ends when nobody receives any more; a store that does not answer
        // keeps it, and the place with it.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = body.read(&sender) {
                let _ = sender.blocking_send(Err(error));
            }
        });
        Some(ReceiverStream::new(receiver).boxed())
    }
}

impl StoredBody {
    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads all of it to `sender`, but for the end of what is not what was
    /// stored. Blocks.
    fn read(&self, sender: &mpsc::Sender<Result<Bytes>>) -> Result<()> {
        let Span { number, offset, size, sha256 } = self.span;
        let (mut at, mut hash) = (0, Sha256::new());
        while at < size {
            let len = CHUNK.min(size - at);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            self.object.0.reader.read_at(&mut bytes, offset + at).map_err(|cause| {
                let place = offset + at;
                let context =
                    format!("part {number} of the image's object cannot be read, at {place}");
                let reason = match cause.kind() {
                    io::ErrorKind::TimedOut => Reason::StoreUnavailable,
                    _ => Reason::StoreRefused,
                };
                Error::new(reason, context)
                    .because(cause)
                    .advice("look after the store that the image is in, then ask again")
            })?;
            hash.update(&bytes);
            at += len;
            if at == size && hash.finalize_reset()[..] != sha256.0 {
                return Err(self.differs());
            }
            if sender.blocking_send(Ok(bytes.into())).is_err() {
                return Ok(());
            }
            self.object.0.read.fetch_add(len, Ordering::Relaxed);
            *self.lock() += len;
        }
        Ok(())
    }

    /// What is said of a part that is another. It is worth reading again, for
    /// a while.
    fn differs(&self) -> Error {
        let Span { number, offset, .. } = self.span;
        let context =
            format!("part {number}, at offset {offset} of the object, has another SHA-256");
        match self.wrong.fetch_add(1, Ordering::Relaxed) + 1 {
            READS.. => corrupt(context),
            _ => Error::new(Reason::StoreUnavailable, context),
        }
    }
}

fn corrupt(why: String) -> Error {
    Error::new(Reason::ImageCorrupt, "the image's object is not what was stored")
        .because(Error::new(Reason::ImageCorrupt, why))
        .advice(
            "make the image again, and look after the store's disks; nothing of it was exported",
        )
}
