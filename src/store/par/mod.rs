//! OCI buckets by pre-authenticated requests: a URL that somebody made, who
//! need not give anything else away.

mod access;
mod object;
mod outlet;
mod remains;
mod seal;
mod url;

use std::{ops::Range, sync::Arc};

use bytes::Bytes;

use self::access::{Access, Ask, Need};
pub use self::{object::ObjectPar, outlet::ParOutlets, url::ParUrl};
use super::{
    bucket::{Bucket, Complete, ETag, Facts, Over, Page, Put, Removal, StoredAs, UploadId, whole},
    http::{Http, Method, StatusCode, encoded},
    oci::answers::{self, Listing, MARK},
};
use crate::{
    error::{Error, Reason, Result},
    model::ByteSize,
    port::{BoxFuture, Delete, Part},
};

/// The objects that a pre-authenticated request gives access to: it may allow
/// reading and listing, or not; it never allows to remove any.
#[derive(Debug)]
pub struct ParBucket {
    access: Access,
}

impl ParBucket {
    /// The objects behind `url`, whose certificates may be of `ca_file`, too.
    ///
    /// # Errors
    ///
    /// `INVALID_CONFIGURATION`; `STORE_DENIED` when it is of one object.
    pub fn new(url: ParUrl, ca_file: Option<&std::path::Path>) -> Result<Self> {
        if let Some(object) = &url.object {
            let context = format!("the pre-authenticated request is of one object, {object:?}");
            return Err(Error::new(Reason::StoreDenied, context).advice(
                "make one for the bucket, with --access-type AnyObjectReadWrite; `prefix` in the \
                 store's table is for what the names must begin with",
            ));
        }
        let http = Http::new(&url.endpoint, ca_file)?;
        Ok(Self { access: Access::new(http, url) })
    }

    /// Whether the object is there, for who may not look.
    async fn exists(&self, key: &str, what: &str) -> Result<bool> {
        match self.access.begin(key, "", true, what).await? {
            None => Ok(true),
            Some(new) => self.access.abort(&new, what).await.map(|()| false),
        }
    }

    async fn completed(
        &self,
        key: &str,
        upload: &UploadId,
        parts: &[StoredAs],
    ) -> Result<Complete> {
        let what = format!("complete {key}");
        let (answer, outcome) = match self.access.complete(upload, &what).await? {
            Some(answer) => (answer, Complete::Done),
            // Perhaps an earlier try did it, and its answer was lost.
            None => match self.access.look(key, &what).await {
                Ok(Some(answer)) => (answer, Complete::NoUpload),
                Ok(None) => return Ok(Complete::NoUpload),
                Err(error) if error.reason() == Reason::StoreDenied => {
                    return Ok(match self.exists(key, &what).await? {
                        true => Complete::Done,
                        false => Complete::NoUpload,
                    });
                }
                Err(error) => return Err(error),
            },
        };
        match answers::is_made_of(&answer, parts) {
            true => Ok(outcome),
            false => Err(answers::not_made_of(self.access.cannot(&what), &answer)),
        }
    }
}

impl Bucket for ParBucket {
    fn kind(&self) -> &'static str {
        "par"
    }

    fn location(&self) -> String {
        self.access.location()
    }

    fn removal(&self) -> Removal {
        Removal::Impossible
    }

    fn get<'a>(&'a self, key: &'a str, limit: ByteSize) -> BoxFuture<'a, Result<Option<Bytes>>> {
        Box::pin(async move {
            let what = format!("read {key}");
            let ask = Ask::new(Method::GET, self.access.object(key), Need::Reading, &what);
            let Some(answer) = self.access.find(Ask { limit, ..ask }).await? else {
                return Ok(None);
            };
            answers::intact(answer, || self.access.cannot(&what)).map(Some)
        })
    }

    fn read<'a>(
        &'a self,
        key: &'a str,
        etag: &'a ETag,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes>> {
        Box::pin(async move {
            let what = format!("read {key}");
            let len = range.end - range.start;
            let ask = Ask::new(Method::GET, self.access.object(key), Need::Reading, &what)
                .header("range", format!("bytes={}-{}", range.start, range.end - 1))
                .header("if-match", etag.0.clone());
            let answer = self.access.succeed(Ask { limit: ByteSize(len), ..ask }).await?;
            whole(answer, len, &what)
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Facts>>> {
        Box::pin(async move {
            let what = format!("look at {key}");
            let Some(answer) = self.access.look(key, &what).await? else { return Ok(None) };
            let size = ByteSize(answer.header("content-length").parse().unwrap_or(0));
            let etag = ETag(answer.header("etag").to_owned());
            Ok(Some(Facts { size, etag, mark: answer.header(MARK).to_owned() }))
        })
    }

    fn put<'a>(&'a self, key: &'a str, bytes: Bytes, over: Over) -> BoxFuture<'a, Result<Put>> {
        Box::pin(async move {
            let what = format!("store {key}");
            let mut ask = Ask::new(Method::PUT, self.access.object(key), Need::Writing, &what)
                .header("content-md5", answers::md5(&bytes))
                .body(bytes);
            if over == Over::Nothing {
                ask = ask.header("if-none-match", "*");
            }
            let answer = self.access.send(ask).await?;
            match answer.status {
                status if status.is_success() => Ok(Put::Stored),
                StatusCode::PRECONDITION_FAILED if over == Over::Nothing => Ok(Put::Exists),
                _ => Err(self.access.refused(&what, Need::Writing, &answer)),
            }
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Delete>> {
        Box::pin(async move {
            let (what, bucket) = (format!("delete {key}"), &self.access.url.bucket);
            let prefix = key.rsplit_once('/').map_or(key, |(directory, _)| directory);
            let cannot = self.access.cannot(&what);
            let context = format!("{cannot}: a pre-authenticated request can remove nothing");
            Err(Error::new(Reason::StoreDenied, context).advice(format!(
                "remove it with rights of your own: `oci os object bulk-delete --bucket-name \
                 {bucket} --prefix {prefix}`"
            )))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, page: Option<&'a str>) -> BoxFuture<'a, Result<Page>> {
        Box::pin(async move {
            let what = format!("list {prefix}");
            let start = page.map_or(String::new(), |first| format!("&start={}", encoded(first)));
            let target = format!("{}?prefix={}{start}", self.access.object(""), encoded(prefix));
            let ask = Ask::new(Method::GET, target, Need::Listing, &what);
            let answer = self.access.succeed(ask).await?;
            let listing: Listing =
                answers::parse(&answer).ok_or_else(|| self.access.foreign(&what))?;
            Ok(listing.into())
        })
    }

    fn begin<'a>(&'a self, key: &'a str, mark: &'a str) -> BoxFuture<'a, Result<UploadId>> {
        Box::pin(async move {
            let what = format!("begin the upload of {key}");
            let begun = self.access.begin(key, mark, false, &what).await?;
            begun.ok_or_else(|| self.access.foreign(&what))
        })
    }

    fn put_part<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
        part: Arc<Part>,
    ) -> BoxFuture<'a, Result<ETag>> {
        Box::pin(async move {
            let what = format!("store part {} of {key}", part.number);
            self.access.put_part(upload, part, &what).await
        })
    }

    fn complete<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
        parts: &'a [StoredAs],
    ) -> BoxFuture<'a, Result<Complete>> {
        Box::pin(self.completed(key, upload, parts))
    }

    fn abort<'a>(&'a self, key: &'a str, upload: &'a UploadId) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let what = format!("abort the upload of {key}");
            self.access.abort(upload, &what).await
        })
    }

    fn uploads<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<(String, UploadId)>>> {
        Box::pin(async move {
            let cannot = self.access.cannot(&format!("list the uploads of {prefix}"));
            let context = format!("{cannot}: a pre-authenticated request allows it never");
            Err(Error::new(Reason::StoreDenied, context))
        })
    }
}
