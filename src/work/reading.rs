//! An image's object for a client, who has the rights to put it somewhere.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::{
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;

use super::{Work, object::Object};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize, ImageId,
        image::{ImageState, ObjectDigest},
    },
    port::{BoxStream, Part},
};

/// Clients that read at once: each has a thread and a few MiB of memory, and
/// an object store's reader some tens.
const READERS: usize = 4;
/// Chunks that wait for a client.
const WAITING: usize = 2;

/// An object that is being read.
pub struct Reading {
    /// Its length.
    pub size: ByteSize,
    /// SHA-256 over the SHA-256s of its parts.
    pub digest: ObjectDigest,
    /// Its bytes, in order. Ends after an error.
    pub chunks: BoxStream<'static, Result<Chunk>>,
}

/// Some bytes of an object.
#[derive(Debug)]
pub struct Chunk {
    /// They; at most 256 KiB.
    pub bytes: Bytes,
    /// Whether a part ends with them. All of it was checked by then.
    pub ends_part: bool,
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reading({})", self.size)
    }
}

/// Who reads which image.
#[derive(Debug)]
pub(super) struct Readers {
    places: Arc<Semaphore>,
    images: Arc<Mutex<BTreeMap<ImageId, usize>>>,
}

impl Default for Readers {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(READERS)), images: Arc::default() }
    }
}

impl Readers {
    /// Fails while a client reads `image`.
    pub(super) fn check_unused(&self, image: &ImageId) -> Result<()> {
        match lock(&self.images).contains_key(image) {
            false => Ok(()),
            true => {
                let context = format!("a client of imaged reads image {image}");
                Err(Error::new(Reason::ImageLocked, context).advice("wait for its end"))
            }
        }
    }

    /// Takes note that `image` is read, as long as the answer is held.
    fn note(&self, image: ImageId) -> Noted {
        *lock(&self.images).entry(image.clone()).or_default() += 1;
        Noted { images: Arc::clone(&self.images), image }
    }
}

/// An image that is read.
struct Noted {
    images: Arc<Mutex<BTreeMap<ImageId, usize>>>,
    image: ImageId,
}

impl Drop for Noted {
    fn drop(&mut self) {
        let mut images = lock(&self.images);
        if let Some(count) = images.get_mut(&self.image) {
            *count -= 1;
            if *count == 0 {
                images.remove(&self.image);
            }
        }
    }
}

fn lock<T>(images: &Mutex<T>) -> MutexGuard<'_, T> {
    images.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Work {
    /// Begins to read an image's object. It ends with an error when its reader
    /// takes nothing for as long as work may take without progress.
    ///
    /// # Errors
    ///
    /// `IMAGE_NOT_FOUND`, `IMAGE_CORRUPT`, `TOO_MANY_REQUESTS`,
    /// `STORE_UNAVAILABLE`; in the stream also `DAEMON_STOPPED`.
    pub async fn read_object(&self, id: &ImageId) -> Result<Reading> {
        let place = Arc::clone(&self.0.readers.places).try_acquire_owned().map_err(|_| {
            let context = format!("{READERS} images are being read already");
            Error::new(Reason::TooManyRequests, context).advice("ask again later")
        })?;
        let noted = self.0.readers.note(id.clone());
        let found = self.whole(id).await?;
        let (ImageState::Available(stored) | ImageState::Exporting(stored)) = found.image.state
        else {
            return Err(Error::new(Reason::ImageNotFound, format!("image {id} is not whole")));
        };
        let reader = found.store.open(id).await?;
        let object = Object::new(reader.into(), &stored, Arc::new(place))?;
        let (chunks, receiver) = mpsc::channel(WAITING);
        let (closing, patience) = (self.0.closing.clone(), self.0.settings.progress_timeout);
        tokio::spawn(async move {
            let _noted = noted;
            let client = Client { chunks, patience };
            tokio::select! {
                biased;
                () = closing.cancelled() => {
                    let stopped = Error::new(Reason::DaemonStopped, "imaged is being stopped");
                    let _ = client.chunks.try_send(Err(stopped));
                }
                () = client.read(&object) => {}
            }
        });
        let chunks = ReceiverStream::new(receiver).boxed();
        Ok(Reading { size: stored.object_size, digest: stored.object_digest, chunks })
    }
}

/// Who takes the bytes.
struct Client {
    chunks: mpsc::Sender<Result<Chunk>>,
    /// How long it may take nothing.
    patience: Duration,
}

impl Client {
    /// Whether it took it.
    async fn take(&self, chunk: Result<Chunk>) -> bool {
        matches!(timeout(self.patience, self.chunks.send(chunk)).await, Ok(Ok(())))
    }

    /// Gets the whole object, or an error.
    async fn read(&self, object: &Object) {
        for part in object.parts() {
            match self.pass_on(&part).await {
                Ok(Passed::Whole) => {}
                Ok(Passed::NotTaken) => return,
                Err(error) => {
                    self.take(Err(error)).await;
                    return;
                }
            }
        }
    }

    async fn pass_on(&self, part: &Part) -> Result<Passed> {
        let mut left = part.size.get();
        let Some(mut bytes) = part.body.stream() else { return Ok(Passed::Whole) };
        while let Some(chunk) = bytes.next().await {
            let bytes = match chunk {
                Ok(bytes) => bytes,
                Err(error) => return Err(verdict(part, error).await),
            };
            left = left.saturating_sub(bytes.len() as u64);
            if !self.take(Ok(Chunk { bytes, ends_part: left == 0 })).await {
                return Ok(Passed::NotTaken);
            }
        }
        Ok(Passed::Whole)
    }
}

/// What became of a part.
enum Passed {
    Whole,
    NotTaken,
}

/// What is said of `part`, which was not what was stored when it was read.
/// What was handed on cannot be taken back, so this only finds out whether it
/// is worth asking again.
async fn verdict(part: &Part, mut error: Error) -> Error {
    while error.reason() == Reason::StoreUnavailable {
        let Some(mut bytes) = part.body.stream() else { return error };
        let mut again = None;
        while let Some(chunk) = bytes.next().await {
            again = chunk.err();
        }
        match again {
            Some(further) => error = further,
            None => return error.advice("bytes were damaged on their way: ask again"),
        }
    }
    error
}
