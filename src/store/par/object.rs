//! One object that a pre-authenticated request lets somebody write.

use std::{path::Path, sync::Arc};

use super::{ParUrl, access::Access, remains::Remains};
use crate::{
    error::{Error, Reason, Result},
    port::Part,
    store::{
        bucket::{ETag, StoredAs, UploadId},
        http::Http,
        oci::answers,
    },
};

/// The object of a pre-authenticated request with access `ObjectWrite` or
/// `ObjectReadWrite`. Calls ask once.
#[derive(Debug)]
pub struct ObjectPar {
    access: Access,
    /// Its name.
    object: String,
}

impl ObjectPar {
    /// The object behind `url`, whose certificates may be of `ca_file`, too.
    ///
    /// # Errors
    ///
    /// `INVALID_CONFIGURATION`; `STORE_DENIED` when it is not of one object.
    pub fn new(url: ParUrl, ca_file: Option<&Path>) -> Result<Self> {
        let Some(object) = url.object.clone() else {
            let context = "the pre-authenticated request is of no single object";
            return Err(Error::new(Reason::StoreDenied, context).advice(
                "make one with --access-type ObjectWrite and --object-name, or add the object's \
                 name to the URL",
            ));
        };
        let http = Http::new(&url.endpoint, ca_file)?;
        Ok(Self { access: Access::new(http, url), object })
    }

    /// Where it is, without any secret.
    #[must_use]
    pub fn location(&self) -> String {
        format!("{}/{}", self.access.location(), self.object)
    }

    /// Begins it, marked with `mark`.
    ///
    /// # Errors
    ///
    /// Those of [`Bucket`](crate::store::Bucket), here and below.
    pub async fn begin(&self, mark: &str) -> Result<UploadId> {
        let what = format!("begin the upload of {}", self.object);
        let begun = self.access.begin(&self.object, mark, false, &what).await?;
        begun.ok_or_else(|| self.access.foreign(&what))
    }

    /// The same, if there is no such object; `None`: there is one.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    pub async fn begin_new(&self, mark: &str) -> Result<Option<UploadId>> {
        let what = format!("begin the upload of {}", self.object);
        self.access.begin(&self.object, mark, true, &what).await
    }

    /// What the service calls the object, if it is there and made of these
    /// parts. Needs a request that allows reading.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    pub async fn made_of(&self, parts: &[StoredAs]) -> Result<Option<ETag>> {
        let what = format!("look at {}", self.object);
        let looked = self.access.look(&self.object, &what).await?;
        let ours = looked.filter(|answer| answers::is_made_of(answer, parts));
        Ok(ours.map(|answer| ETag(answer.header("etag").to_owned())))
    }

    /// Stores a part, in place of an earlier one of that number.
    pub async fn put_part(&self, upload: &UploadId, part: Arc<Part>) -> Result<ETag> {
        let what = format!("store part {} of {}", part.number, self.object);
        self.access.put_part(upload, part, &what).await
    }

    /// Makes the object of all parts, which are these. Answers what the
    /// service calls it.
    pub async fn complete(&self, upload: &UploadId, parts: &[StoredAs]) -> Result<ETag> {
        let what = format!("complete {}", self.object);
        let Some(answer) = self.access.complete(upload, &what).await? else {
            let context = format!("{}: it has lost the upload", self.access.cannot(&what));
            return Err(Error::new(Reason::StoreRefused, context).advice(
                "look whether the object is there: an earlier order may have been carried out",
            ));
        };
        match answers::is_made_of(&answer, parts) {
            true => Ok(ETag(answer.header("etag").to_owned())),
            false => Err(answers::not_made_of(self.access.cannot(&what), &answer)),
        }
    }

    /// What would be left of the upload.
    pub(super) fn remains(&self, upload: &UploadId) -> Result<Remains> {
        Ok(Remains {
            endpoint: self.access.url.endpoint.clone(),
            bucket: self.access.url.bucket.clone(),
            object: self.object.clone(),
            path: self.access.path_of(upload)?,
        })
    }

    /// Forgets the upload. Aborting what is not there is success.
    pub async fn abort(&self, upload: &UploadId) -> Result<()> {
        let what = format!("abort the upload of {}", self.object);
        self.access.abort(upload, &what).await
    }
}
