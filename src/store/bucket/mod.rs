//! What object services have in common, as a narrow trait, and a store over
//! it.
//!
//! ```text
//! BucketStore ─► Retry ─► S3Bucket | OciBucket | ParBucket ─► Http
//!  documents,    again,    words, signatures                   bytes
//!  order         for how long
//! ```

mod delivery;
mod layout;
mod reader;
mod retry;
mod store;
mod sweep;
mod upload;

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub(super) use self::{
    delivery::exists,
    retry::{BRIEF, PATIENT, again},
};
pub use self::{retry::Retry, store::BucketStore};
use super::http::Answer;
pub use crate::port::Over;
use crate::{
    error::{Error, Reason, Result},
    model::{ByteSize, image::ObjectDigest},
    port::{BoxFuture, Delete, Part},
};

/// A bucket of some object service. Adapters ask once; `Retry` asks again.
///
/// Errors, of every call: `STORE_UNAVAILABLE` when asking again may help,
/// `STORE_DENIED`, `STORE_REFUSED`, `STORE_FULL`. A call whose future is
/// dropped may have its effect, or not.
pub trait Bucket: Send + Sync + fmt::Debug {
    /// `s3`, `oci`, …
    fn kind(&self) -> &'static str;
    /// Where it is, without any secret.
    fn location(&self) -> String;

    /// Whether objects can be removed.
    fn removal(&self) -> Removal;

    /// A whole small object; `None` where there is none. An object of more
    /// than `limit` is refused.
    fn get<'a>(&'a self, key: &'a str, limit: ByteSize) -> BoxFuture<'a, Result<Option<Bytes>>>;
    /// Bytes of an object that still has this ETag.
    fn read<'a>(
        &'a self,
        key: &'a str,
        etag: &'a ETag,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes>>;
    /// What is known of an object; `None` where there is none.
    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Facts>>>;
    /// Stores a small object.
    fn put<'a>(&'a self, key: &'a str, bytes: Bytes, over: Over) -> BoxFuture<'a, Result<Put>>;
    /// Removes an object.
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Delete>>;
    /// Names of objects that begin with `prefix`, in order, from the first
    /// one on, or from where the page before ended; at most 1000.
    fn list<'a>(&'a self, prefix: &'a str, page: Option<&'a str>) -> BoxFuture<'a, Result<Page>>;

    /// Begins an object of many parts, which will carry `mark`.
    fn begin<'a>(&'a self, key: &'a str, mark: &'a str) -> BoxFuture<'a, Result<UploadId>>;
    /// Stores a part, in place of an earlier one of that number.
    fn put_part<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
        part: Arc<Part>,
    ) -> BoxFuture<'a, Result<ETag>>;
    /// The parts of an upload that the service tells of, in any order; a
    /// number may come twice. None where it cannot tell, or there is no such
    /// upload.
    fn parts<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
    ) -> BoxFuture<'a, Result<Vec<ListedPart>>> {
        let (_, _) = (key, upload);
        Box::pin(async { Ok(Vec::new()) })
    }
    /// Makes an object of these parts, numbers ascending.
    fn complete<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
        parts: &'a [StoredAs],
    ) -> BoxFuture<'a, Result<Complete>>;
    /// Forgets an upload and its parts. Aborting what is not there is
    /// success.
    fn abort<'a>(&'a self, key: &'a str, upload: &'a UploadId) -> BoxFuture<'a, Result<()>>;
    /// Uploads of objects that begin with `prefix`: at most some thousands.
    fn uploads<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<(String, UploadId)>>>;
}

/// What a service calls a version of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ETag(pub String);

/// An upload that a service knows.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadId {
    /// What the service calls it. It stands in the journal: an adapter whose
    /// service gives access by the name alone seals it.
    pub name: String,
    /// Whether it keeps a checksum of each part.
    pub checksums: Checksums,
}

impl fmt::Debug for UploadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UploadId({:?})", self.checksums)
    }
}

/// Whether a service keeps a checksum of each part of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Checksums {
    /// The parts' SHA-256s.
    Sha256,
    /// None that it told of.
    Untold,
}

/// Whether objects can be removed with the access that there is. Uploads that
/// are not completed always can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// As far as rights and rules of the bucket go.
    Possible,
    /// Never: whoever may remove them must do it.
    Impossible,
}

/// A part as the service knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAs {
    /// From 1.
    pub number: u32,
    /// Its version.
    pub etag: ETag,
    /// Its digest.
    pub sha256: ObjectDigest,
}

/// A part as a service tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedPart {
    /// From 1.
    pub number: u32,
    /// Its version.
    pub etag: ETag,
    /// Its length.
    pub size: ByteSize,
    /// Its MD5, in lower-case hexadecimal digits, where that is told.
    pub md5: Option<String>,
}

/// What is known of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its length.
    pub size: ByteSize,
    /// Its version.
    pub etag: ETag,
    /// What its upload was begun with; empty where nothing was.
    pub mark: String,
}

/// What came of storing a small object.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It is stored.
    Stored,
    /// There was one, which stays.
    Exists,
}

/// What came of completing an upload.
#[must_use]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Complete {
    /// The object is there.
    Done,
    /// There is no such upload, perhaps because it was completed before.
    NoUpload,
}

/// A page of a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// Names, whole.
    pub keys: Vec<String>,
    /// Where the next one begins; `None`: this is the last.
    pub next: Option<String>,
}

/// The body of `answer`, which must be the `len` bytes that were asked for.
///
/// # Errors
///
/// `STORE_UNAVAILABLE` when it is shorter: it was cut off.
pub fn whole(answer: Answer, len: u64, what: &str) -> Result<Bytes> {
    if answer.body.len() as u64 == len {
        return Ok(answer.body);
    }
    let found = answer.body.len();
    let context = format!("cannot {what}: {found} bytes came where {len} were asked for");
    Err(Error::new(Reason::StoreUnavailable, context))
}
