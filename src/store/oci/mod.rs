//! OCI Object Storage by its own API: what its S3 face lacks are checksums of
//! parts, and API keys that every tenancy has.

pub mod answers;
mod ask;
pub mod key;
pub mod sign;

use std::{ops::Range, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use tokio::sync::OnceCell;

pub use self::sign::Credentials;
use self::{
    answers::{ALGORITHM, Begun, CONTENT_SHA256, Listed, Listing, MARK},
    ask::{About, Ask},
};
use super::{
    bucket::{
        Bucket, Checksums, Complete, ETag, Facts, ListedPart, Over, Page, Put, Removal, StoredAs,
        UploadId, whole,
    },
    http::{Answer, Http, Method, Payload, Request, StatusCode},
};
use crate::{
    error::{Error, Reason, Result},
    model::ByteSize,
    port::{BoxFuture, Clock, Delete, Part},
};

/// Pages of uploads, or of parts, that are asked for: 20 of 1000 are more than
/// any host begins, and than any upload has.
const UPLOAD_PAGES: usize = 20;

/// A bucket of OCI Object Storage.
#[derive(Debug)]
pub struct OciBucket {
    http: Http,
    /// Asked for when it is needed first, unless it was configured.
    namespace: OnceCell<String>,
    bucket: String,
    credentials: Credentials,
    clock: Arc<dyn Clock>,
}

/// What a refusal may say is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Absent {
    Object,
    Upload,
}

impl OciBucket {
    /// The bucket `bucket` of `namespace` at the endpoint of `http`.
    #[must_use]
    pub fn new(
        http: Http,
        namespace: Option<String>,
        bucket: String,
        credentials: Credentials,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { http, namespace: OnceCell::new_with(namespace), bucket, credentials, clock }
    }

    /// The namespace of the tenancy, which is asked for once.
    async fn namespace(&self) -> Result<&str> {
        let asked = async || {
            let what = "tell its namespace";
            let answer = self.send(Ask::new(Method::GET, About::Namespace, what), "/n").await?;
            if !answer.status.is_success() {
                return Err(self.refused(what, &answer));
            }
            let namespace = answers::parse::<String>(&answer).filter(|name| !name.is_empty());
            namespace.ok_or_else(|| self.foreign(what))
        };
        self.namespace.get_or_try_init(asked).await.map(String::as_str)
    }

    /// The answer to a signed request, whatever it is.
    async fn ask(&self, ask: Ask<'_>) -> Result<Answer> {
        let target = ask.target(self.namespace().await?, &self.bucket);
        self.send(ask, &target).await
    }

    async fn send(&self, ask: Ask<'_>, target: &str) -> Result<Answer> {
        let document = match &ask.payload {
            Payload::Bytes(bytes) if ask.method == Method::POST => Some(&bytes[..]),
            _ => None,
        };
        let unsigned = sign::Unsigned {
            method: ask.method.as_str(),
            target,
            host: &self.http.host(),
            document,
        };
        let mut headers = sign::sign(&unsigned, &self.credentials, self.clock.now())?;
        headers.extend(ask.headers);
        let (method, payload, limit) = (ask.method, ask.payload, ask.limit);
        self.http.send(Request { method, target: target.into(), headers, payload, limit }).await
    }

    /// The answer to a signed request, which must be a success.
    async fn succeed(&self, ask: Ask<'_>) -> Result<Answer> {
        let what = ask.what.to_owned();
        let answer = self.ask(ask).await?;
        match answer.status.is_success() {
            true => Ok(answer),
            false => Err(self.refused(&what, &answer)),
        }
    }

    /// As [`succeed`](Self::succeed); `None` when `absent` is not there.
    async fn find(&self, ask: Ask<'_>, absent: Absent) -> Result<Option<Answer>> {
        let (what, wordless) = (ask.what.to_owned(), ask.method == Method::HEAD);
        let answer = self.ask(ask).await?;
        if answer.status.is_success() {
            return Ok(Some(answer));
        }
        let code = answers::refusal(&answer).code;
        let gone = match absent {
            Absent::Object => code == "ObjectNotFound" || wordless,
            Absent::Upload => code == "NoSuchUpload" || code == "ObjectNotFound",
        };
        match answer.status == StatusCode::NOT_FOUND && gone {
            true => Ok(None),
            false => Err(self.refused(&what, &answer)),
        }
    }

    fn cannot(&self, what: &str) -> String {
        format!("{} cannot {what}", self.location())
    }

    fn refused(&self, what: &str, answer: &Answer) -> Error {
        let refusal = answers::refusal(answer);
        if answers::blames_clock(&refusal) && answer.skew().is_none() {
            let context = format!("{}: it finds this host's clock wrong", self.cannot(what));
            return Error::new(Reason::StoreDenied, context)
                .because(refusal)
                .advice("set the clock (`timedatectl`): requests are signed with the time");
        }
        let trouble = answers::trouble(&refusal);
        refusal.error(trouble, self.cannot(what), answer)
    }

    /// The error about an answer that no OCI gives.
    fn foreign(&self, what: &str) -> Error {
        let context = format!("{}: its answer is not OCI's", self.cannot(what));
        Error::new(Reason::StoreRefused, context).advice("is it the right endpoint?")
    }

    fn etag(&self, what: &str, answer: &Answer) -> Result<ETag> {
        match answer.header("etag") {
            "" => Err(self.foreign(what)),
            etag => Ok(ETag(etag.to_owned())),
        }
    }
}

impl Bucket for OciBucket {
    fn kind(&self) -> &'static str {
        "oci"
    }

    fn location(&self) -> String {
        format!("{}/{}", self.http.endpoint(), self.bucket)
    }

    fn removal(&self) -> Removal {
        Removal::Possible
    }

    fn get<'a>(&'a self, key: &'a str, limit: ByteSize) -> BoxFuture<'a, Result<Option<Bytes>>> {
        Box::pin(async move {
            let what = format!("read {key}");
            let ask = Ask { limit, ..Ask::new(Method::GET, About::Object(key), &what) };
            let Some(answer) = self.find(ask, Absent::Object).await? else { return Ok(None) };
            answers::intact(answer, || self.cannot(&what)).map(Some)
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
            let ask = Ask::new(Method::GET, About::Object(key), &what)
                .header("range", format!("bytes={}-{}", range.start, range.end - 1))
                .header("if-match", etag.0.clone());
            let answer = self.succeed(Ask { limit: ByteSize(len), ..ask }).await?;
            whole(answer, len, &what)
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Facts>>> {
        Box::pin(async move {
            let what = format!("look at {key}");
            let ask = Ask::new(Method::HEAD, About::Object(key), &what);
            let Some(answer) = self.find(ask, Absent::Object).await? else { return Ok(None) };
            let size = ByteSize(answer.header("content-length").parse().unwrap_or(0));
            let mark = answer.header(MARK).to_owned();
            Ok(Some(Facts { size, etag: self.etag(&what, &answer)?, mark }))
        })
    }

    fn put<'a>(&'a self, key: &'a str, bytes: Bytes, over: Over) -> BoxFuture<'a, Result<Put>> {
        Box::pin(async move {
            let what = format!("store {key}");
            let mut ask = Ask::new(Method::PUT, About::Object(key), &what)
                .header("content-md5", answers::md5(&bytes))
                .body(bytes);
            if over == Over::Nothing {
                ask = ask.header("if-none-match", "*");
            }
            let answer = self.ask(ask).await?;
            match answer.status {
                status if status.is_success() => Ok(Put::Stored),
                StatusCode::PRECONDITION_FAILED if over == Over::Nothing => Ok(Put::Exists),
                _ => Err(self.refused(&what, &answer)),
            }
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Delete>> {
        Box::pin(async move {
            let what = format!("delete {key}");
            let ask = Ask::new(Method::DELETE, About::Object(key), &what);
            let found = self.find(ask, Absent::Object).await?;
            Ok(match found {
                None => Delete::AlreadyDeleted,
                // Of the marker that hides it, where versioning is on.
                Some(answer) if !answer.header("version-id").is_empty() => Delete::Hidden,
                Some(_) => Delete::Deleted,
            })
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, page: Option<&'a str>) -> BoxFuture<'a, Result<Page>> {
        Box::pin(async move {
            let what = format!("list {prefix}");
            let ask = Ask::new(Method::GET, About::Objects, &what).query("prefix", prefix);
            let ask = match page {
                Some(first) => ask.query("start", first),
                None => ask,
            };
            let answer = self.succeed(ask).await?;
            let listing: Listing = answers::parse(&answer).ok_or_else(|| self.foreign(&what))?;
            Ok(listing.into())
        })
    }

    fn begin<'a>(&'a self, key: &'a str, mark: &'a str) -> BoxFuture<'a, Result<UploadId>> {
        Box::pin(async move {
            let what = format!("begin the upload of {key}");
            let ask = Ask::new(Method::POST, About::Uploads, &what)
                .header(ALGORITHM, "SHA256")
                .body(answers::beginning(key, mark)?);
            let answer = self.succeed(ask).await?;
            let begun: Begun = answers::parse(&answer).ok_or_else(|| self.foreign(&what))?;
            Ok(UploadId { name: begun.upload_id, checksums: Checksums::Sha256 })
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
            let ask = Ask::new(Method::PUT, About::Upload(key), &what)
                .upload(upload)
                .query("uploadPartNum", part.number.to_string())
                .header(ALGORITHM, "SHA256")
                .header(CONTENT_SHA256, STANDARD.encode(part.sha256.0));
            let answer = self.succeed(Ask { payload: Payload::Part(part), ..ask }).await?;
            self.etag(&what, &answer)
        })
    }

    fn parts<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
    ) -> BoxFuture<'a, Result<Vec<ListedPart>>> {
        Box::pin(async move {
            let what = format!("list the parts of {key}");
            let (mut parts, mut page) = (Vec::new(), String::new());
            for _ in 0..UPLOAD_PAGES {
                let mut ask = Ask::new(Method::GET, About::Upload(key), &what).upload(upload);
                if !page.is_empty() {
                    ask = ask.query("page", &*page);
                }
                let Some(answer) = self.find(ask, Absent::Upload).await? else { break };
                let listed: Vec<Listed> =
                    answers::parse(&answer).ok_or_else(|| self.foreign(&what))?;
                parts.extend(listed.into_iter().map(ListedPart::from));
                page = answer.header("opc-next-page").to_owned();
                if page.is_empty() {
                    break;
                }
            }
            Ok(parts)
        })
    }

    fn complete<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
        parts: &'a [StoredAs],
    ) -> BoxFuture<'a, Result<Complete>> {
        Box::pin(async move {
            let what = format!("complete {key}");
            let ask = Ask::new(Method::POST, About::Upload(key), &what)
                .upload(upload)
                .body(answers::completion(parts)?);
            let (answer, outcome) = match self.find(ask, Absent::Upload).await? {
                Some(answer) => (answer, Complete::Done),
                // Perhaps an earlier try did it, and its answer was lost.
                None => {
                    let ask = Ask::new(Method::HEAD, About::Object(key), &what);
                    match self.find(ask, Absent::Object).await? {
                        Some(answer) => (answer, Complete::NoUpload),
                        None => return Ok(Complete::NoUpload),
                    }
                }
            };
            match answers::is_made_of(&answer, parts) {
                true => Ok(outcome),
                false => Err(answers::not_made_of(self.cannot(&what), &answer)),
            }
        })
    }

    fn abort<'a>(&'a self, key: &'a str, upload: &'a UploadId) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let what = format!("abort the upload of {key}");
            let ask = Ask::new(Method::DELETE, About::Upload(key), &what).upload(upload);
            self.find(ask, Absent::Upload).await.map(drop)
        })
    }

    fn uploads<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<(String, UploadId)>>> {
        Box::pin(async move {
            let what = format!("list the uploads of {prefix}");
            let mut found = Vec::new();
            let mut page = String::new();
            for _ in 0..UPLOAD_PAGES {
                let mut ask = Ask::new(Method::GET, About::Uploads, &what);
                if !page.is_empty() {
                    ask = ask.query("page", &*page);
                }
                let answer = self.succeed(ask).await?;
                let uploads: Vec<Begun> =
                    answers::parse(&answer).ok_or_else(|| self.foreign(&what))?;
                let ours = uploads.into_iter().filter(|upload| upload.object.starts_with(prefix));
                found.extend(ours.map(|Begun { object, upload_id: name, .. }| {
                    (object, UploadId { name, checksums: Checksums::Sha256 })
                }));
                page = answer.header("opc-next-page").to_owned();
                if page.is_empty() {
                    break;
                }
            }
            Ok(found)
        })
    }
}
