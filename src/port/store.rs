//! Where images are kept, and where they are sent.

use std::{fmt, sync::Arc};

use bytes::Bytes;

use super::{BoxFuture, BoxStream, Secret};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize, ImageId,
        host::{Space, Traffic},
        image::{Manifest, ObjectDigest, Record},
        upload::{KeptPart, Receipt, UploadToken},
    },
};

/// A place where images are kept.
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// Its name in the configuration.
    fn name(&self) -> &str;
    /// `directory`, `s3`, …
    fn kind(&self) -> &'static str;
    /// Where it is, without any secret.
    fn location(&self) -> String;
    /// What was counted of it: nothing by itself, see
    /// [`Metered`](crate::store::Metered).
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
    /// Room, where the store can tell. An error: the store does not answer.
    fn space(&self) -> BoxFuture<'_, Result<Option<Space>>>;

    /// Begins the upload of one image. Nothing is visible before
    /// [`Upload::seal`].
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE`, `STORE_FULL`.
    fn begin<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn Upload>>>;
    /// Goes on with the upload of an image, which has these parts, after its
    /// process died: see [`Upload::token`].
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin); `STORE_REFUSED` when there is nothing to go
    /// on with.
    fn resume<'a>(
        &'a self,
        id: &'a ImageId,
        token: &'a UploadToken,
        parts: Vec<KeptPart>,
    ) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        let (_, _) = (token, parts);
        let context = format!("the store cannot go on with the upload of image {id}");
        Box::pin(async { Err(Error::new(Reason::StoreRefused, context)) })
    }
    /// Removes what dead uploads of this host left, but for those of the
    /// images in `keep`, which are gone on with. To be called before any
    /// upload begins. Returns how many there were.
    fn sweep<'a>(&'a self, keep: &'a [ImageId]) -> BoxFuture<'a, Result<usize>>;

    /// Every whole image, in no order, without its parts: there are up to
    /// 51,200 of each, and a list shows none. An image whose manifest cannot
    /// be understood is left out with a warning.
    fn list(&self) -> BoxFuture<'_, Result<Vec<(Manifest, Record)>>>;
    /// One whole image; `None` when there is none.
    fn get<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Option<(Manifest, Record)>>>;
    /// Opens an image's object.
    fn open<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn ObjectReader>>>;
    /// The digests of an image's extents, 32 bytes each, in order.
    fn extent_digests<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Vec<u8>>>;
    /// Removes an image: first from sight, then its bytes. Removing what is
    /// not there is success.
    fn delete<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Delete>>;

    /// The place of an object called `name` beside the images: no image's, and
    /// nothing that this store looks at again.
    ///
    /// # Errors
    ///
    /// `INVALID_PARAMETER`: it cannot have this name; `OBJECT_EXISTS`;
    /// `STORE_REFUSED` where there are no objects, or nobody can look whether
    /// there is one; `STORE_UNAVAILABLE`.
    fn outlet<'a>(&'a self, name: &'a str, over: Over) -> BoxFuture<'a, Result<Box<dyn Outlet>>> {
        let (_, _) = (name, over);
        let context =
            format!("the store {:?} is a {}: it has no objects", self.name(), self.kind());
        Box::pin(async {
            Err(Error::new(Reason::StoreRefused, context)
                .advice("name a store in a bucket, or use `imagectl image export to-file`"))
        })
    }
    /// Aborts a delivery of a process that has ended: see [`Delivery::token`].
    /// Repeating it is success.
    fn abandon<'a>(&'a self, token: &'a UploadToken) -> BoxFuture<'a, Result<()>> {
        let _ = token;
        Box::pin(async { Ok(()) })
    }
}

/// What a new object may replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// Anything.
    Anything,
    /// Nothing: there must be none.
    Nothing,
}

/// Finds the places that URLs name.
pub trait Outlets: Send + Sync + fmt::Debug {
    /// The place of the object that `uri` gives access to. Asks nobody.
    ///
    /// # Errors
    ///
    /// `INVALID_PARAMETER`, without a word of the URL.
    fn by_uri(&self, uri: &Secret, over: Over) -> Result<Box<dyn Outlet>>;
    /// Aborts a delivery of a process that has ended: see [`Delivery::token`].
    /// Repeating it is success. Keeps what it needs until
    /// [`sweep`](Self::sweep).
    ///
    /// # Errors
    ///
    /// Those of [`Outlet::begin`]; after `STORE_DENIED` it is of no use any
    /// more. `JOURNAL_FAILED`.
    fn abandon<'a>(&'a self, token: &'a UploadToken) -> BoxFuture<'a, Result<()>>;
    /// Wipes what is kept for deliveries other than these. Answers for how
    /// many.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`.
    fn sweep<'a>(&'a self, keep: &'a [UploadToken]) -> BoxFuture<'a, Result<usize>>;
}

/// The place of one object, outside of what is imaged's own.
pub trait Outlet: Send + Sync + fmt::Debug {
    /// Where the object will be, without any secret.
    fn location(&self) -> String;
    /// Begins to deliver it. Nothing is visible before
    /// [`Delivery::complete`].
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE`, `STORE_DENIED`, `STORE_REFUSED`; `OBJECT_EXISTS`.
    fn begin(&self) -> BoxFuture<'_, Result<Box<dyn Delivery>>>;
}

/// An object on its way to its place.
pub trait Delivery: Send + Sync + fmt::Debug {
    /// What aborts it in a later process. Where that takes a secret it is kept
    /// from here on, sealed, until the delivery ends.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`: a later process could not.
    fn token(&self) -> BoxFuture<'_, Result<UploadToken>>;
    /// Stores one part. Parts come concurrently and in any order, each once.
    ///
    /// # Errors
    ///
    /// Those of [`Outlet::begin`], `STORE_FULL`, and those of the part's body.
    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<()>>;
    /// Makes the object exist, of all parts. Answers what its service calls
    /// this version of it, where it tells.
    ///
    /// # Errors
    ///
    /// As [`put`](Self::put); `OBJECT_EXISTS` when one came meanwhile.
    fn complete(&self) -> BoxFuture<'_, Result<Option<String>>>;
    /// Removes everything. Aborting twice is success.
    fn abort(&self) -> BoxFuture<'_, Result<()>>;
}

/// What a deletion changed.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delete {
    /// The image was there and is gone.
    Deleted,
    /// It is gone from sight, and the store keeps its bytes as old versions.
    Hidden,
    /// There was none.
    AlreadyDeleted,
}

/// An upload under way. Dropping it without [`seal`](Upload::seal) or
/// [`abort`](Upload::abort) leaves the cleaning to the next
/// [`ObjectStore::sweep`].
pub trait Upload: Send + Sync + fmt::Debug {
    /// What the store needs to go on with it; `None` where it cannot.
    fn token(&self) -> Option<UploadToken>;
    /// Stores one part. Parts come concurrently and in any order, each once;
    /// one that the store has already is not sent again.
    ///
    /// # Errors
    ///
    /// `STORE_FULL`, `STORE_UNAVAILABLE`.
    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<Receipt>>;
    /// Makes the image exist: everything durable, then the manifest, last.
    /// All parts must have been put. After an error nothing is visible, and
    /// the upload is to be aborted.
    fn seal(&self, sealed: Arc<Sealed>) -> BoxFuture<'_, Result<()>>;
    /// Removes everything. Aborting twice is success.
    fn abort(&self) -> BoxFuture<'_, Result<()>>;
}

/// Everything that turns stored parts into an image: 14 MB for 400 GiB.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// Immutable.
    pub manifest: Manifest,
    /// Mutable.
    pub record: Record,
    /// 32 bytes for each extent.
    pub extent_digests: Vec<u8>,
    /// What was said to a running instance, in JSON; the manifest has its
    /// digest.
    pub trace: Option<Vec<u8>>,
}

/// A part of an object on its way to a store.
pub struct Part {
    /// From 1, without gaps.
    pub number: u32,
    /// Offset of its first byte in the object.
    pub offset: u64,
    /// Its length.
    pub size: ByteSize,
    /// Its bytes. Dropping them gives the memory back to the encoder.
    pub body: Box<dyn Body>,
    /// SHA-256 of the body.
    pub sha256: ObjectDigest,
}

/// Bytes in memory, in pieces, or on their way.
pub trait Body: Send + Sync {
    /// Piece `index`, from 0; `None` behind the last. None is empty. Aligned
    /// for direct writes, each and its length, but for the last piece's
    /// length: see [`crate::sys::aligned`].
    fn piece(&self, index: usize) -> Option<&[u8]>;

    /// All bytes from the first one on, for who sends them, where they must be
    /// waited for; they may be asked for again. `None`: the pieces are there.
    fn stream(&self) -> Option<BoxStream<'static, Result<Bytes>>> {
        None
    }

    /// Waits until so many bytes may be stored, for who takes the pieces.
    /// Blocks; [`stream`](Self::stream) has waited already.
    fn admit(&self, bytes: usize) {
        let _ = bytes;
    }
}

/// The pieces of `body`, in order.
pub fn pieces(body: &dyn Body) -> impl Iterator<Item = &[u8]> {
    (0..).map_while(|index| body.piece(index))
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({}, {} at {})", self.number, self.size, self.offset)
    }
}

impl Part {
    /// The bytes of the part, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        pieces(&*self.body)
    }
}

/// Random access to bytes, for decoders and parsers. Blocks.
pub trait ReadAt: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> u64;
    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` beyond the end, and what the device says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()>;
}

/// An object in a store.
pub trait ObjectReader: ReadAt + fmt::Debug {}
