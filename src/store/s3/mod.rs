//! S3: AWS, Ceph, SeaweedFS, OCI's S3 face. Path style, Signature Version 4,
//! no chunked signatures.

mod answers;
mod sign;

use std::{ops::Range, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use md5::Md5;
use sha2::{Digest, Sha256};

use self::answers::{Document, refusal};
pub use self::sign::Credentials;
use super::{
    bucket::{
        Bucket, Checksums, Complete, ETag, Facts, ListedPart, Over, Page, Put, Removal, StoredAs,
        UploadId,
    },
    http::{
        Answer, Http, MAX_ANSWER, Method, Payload, Refusal, Request, StatusCode, Trouble,
        encoded_path,
    },
};
use crate::{
    error::{Error, Reason, Result},
    model::ByteSize,
    port::{BoxFuture, Clock, Delete, Part},
};

/// How a service tells that it knows checksums.
const ALGORITHM: &str = "x-amz-checksum-algorithm";
/// User metadata that an upload is marked with.
const MARK: &str = "x-amz-meta-imaged-upload";

/// A bucket of a service that speaks S3.
#[derive(Debug)]
pub struct S3Bucket {
    http: Http,
    region: String,
    bucket: String,
    credentials: Credentials,
    clock: Arc<dyn Clock>,
}

/// A request, not signed yet.
struct Ask<'a> {
    method: Method,
    /// Empty: the bucket itself.
    key: &'a str,
    query: Vec<(&'static str, String)>,
    headers: Vec<(&'static str, String)>,
    payload: Payload,
    limit: ByteSize,
    /// What is being done, as "the store cannot …".
    what: &'a str,
}

impl<'a> Ask<'a> {
    fn new(method: Method, key: &'a str, what: &'a str) -> Self {
        Self {
            method,
            key,
            query: Vec::new(),
            headers: Vec::new(),
            payload: Payload::Nothing,
            limit: MAX_ANSWER,
            what,
        }
    }

    fn query(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.query.push((name, value.into()));
        self
    }

    fn upload(self, upload: &UploadId) -> Self {
        self.query("uploadId", &upload.name)
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn body(mut self, bytes: Bytes) -> Self {
        self.payload = Payload::Bytes(bytes);
        self
    }
}

impl S3Bucket {
    /// The bucket `bucket` at the endpoint of `http`.
    #[must_use]
    pub fn new(
        http: Http,
        region: String,
        bucket: String,
        credentials: Credentials,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { http, region, bucket, credentials, clock }
    }

    /// The answer to a signed request, whatever it is.
    async fn ask(&self, ask: Ask<'_>) -> Result<Answer> {
        let path = match ask.key {
            "" => format!("/{}", encoded_path(&self.bucket)),
            key => format!("/{}/{}", encoded_path(&self.bucket), encoded_path(key)),
        };
        let content_sha256 = match &ask.payload {
            Payload::Nothing => sign::hex(&Sha256::digest(b"")),
            Payload::Bytes(bytes) => sign::hex(&Sha256::digest(bytes)),
            Payload::Part(part) => part.sha256.to_string(),
        };
        let unsigned = sign::Unsigned {
            method: ask.method.as_str(),
            path: &path,
            query: &ask.query,
            host: &self.http.host(),
            headers: &ask.headers,
            content_sha256,
        };
        let headers = sign::sign(&unsigned, &self.credentials, &self.region, self.clock.now());
        let target = match sign::canonical_query(&ask.query) {
            query if query.is_empty() => path,
            query => format!("{path}?{query}"),
        };
        let request =
            Request { method: ask.method, target, headers, payload: ask.payload, limit: ask.limit };
        self.http.send(request).await
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

    /// As [`succeed`](Self::succeed); `None` when there is no such object or
    /// upload.
    async fn find(&self, ask: Ask<'_>, absent: &str) -> Result<Option<Answer>> {
        let what = ask.what.to_owned();
        let answer = self.ask(ask).await?;
        if answer.status.is_success() {
            return Ok(Some(answer));
        }
        let refusal = refusal(&answer);
        // The answer to HEAD has no words.
        let gone = refusal.code == absent || refusal.code.is_empty();
        match answer.status == StatusCode::NOT_FOUND && gone {
            true => Ok(None),
            false => Err(self.refused(&what, &answer)),
        }
    }

    fn refused(&self, what: &str, answer: &Answer) -> Error {
        let refusal = refusal(answer);
        let trouble = trouble(&refusal, answer);
        refusal.error(trouble, format!("{} cannot {what}", self.location()), answer)
    }

    fn document(&self, what: &str, answer: &Answer) -> Result<Document> {
        Document::parse(&answer.body).map_err(|why| {
            let context = format!("{} cannot {what}: its answer is not S3's", self.location());
            Error::new(Reason::StoreRefused, context)
                .because(why)
                .advice("is it the right endpoint?")
        })
    }

    fn etag(&self, what: &str, answer: &Answer) -> Result<ETag> {
        match answer.header("etag") {
            "" => {
                let context = format!("{} cannot {what}: it tells no ETag", self.location());
                Err(Error::new(Reason::StoreRefused, context).advice("is it the right endpoint?"))
            }
            etag => Ok(ETag(etag.to_owned())),
        }
    }
}

/// Whether `etag` is the MD5 of `body`, as it mostly is of small objects.
fn is_md5_of(etag: &str, body: &[u8]) -> bool {
    etag.trim_matches('"') == sign::hex(&Md5::digest(body))
}

/// What is to be done about a refusal. Codes: Amazon S3 API Reference, "Error
/// responses".
fn trouble(refusal: &Refusal, answer: &Answer) -> Trouble {
    match refusal.code.as_str() {
        "BadDigest"
        | "XAmzContentSHA256Mismatch"
        | "XAmzContentChecksumMismatch"
        | "InvalidDigest"
        | "IncompleteBody" => Trouble::Damaged,
        "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "RequestTimeTooSkewed"
        | "ExpiredToken"
        | "InvalidToken"
        | "AuthorizationHeaderMalformed" => Trouble::Credentials,
        "NoSuchBucket" => Trouble::NoBucket,
        "QuotaExceeded" | "InsufficientStorage" | "XMinioStorageFull" => Trouble::Full,
        "ObjectLocked" | "InvalidObjectState" => Trouble::Retained,
        "RequestTimeout" | "SlowDown" | "OperationAborted" => Trouble::Passing,
        _ => match answer.status.as_u16() {
            507 => Trouble::Full,
            408 | 429 | 500 | 502..=504 => Trouble::Passing,
            401 | 403 => Trouble::Rights,
            _ => Trouble::Other,
        },
    }
}

impl Bucket for S3Bucket {
    fn kind(&self) -> &'static str {
        "s3"
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
            let ask = || Ask { limit, ..Ask::new(Method::GET, key, &what) };
            let Some(answer) = self.find(ask(), "NoSuchKey").await? else { return Ok(None) };
            if is_md5_of(answer.header("etag"), &answer.body) {
                return Ok(Some(answer.body));
            }
            // Bytes were damaged on the way, or the ETag is no MD5, as that of
            // an object that the service encrypts: then they are the same again.
            let again = self.find(ask(), "NoSuchKey").await?.map(|again| again.body);
            if again.as_ref().is_some_and(|again| *again != answer.body) {
                let context = format!("{} cannot {what}: it differs each time", self.location());
                return Err(Error::new(Reason::StoreUnavailable, context));
            }
            Ok(again)
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
            let ask = Ask { limit: ByteSize(len), ..Ask::new(Method::GET, key, &what) }
                .header("range", format!("bytes={}-{}", range.start, range.end - 1))
                .header("if-match", etag.0.clone());
            let answer = self.succeed(ask).await?;
            super::bucket::whole(answer, len, &what)
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Facts>>> {
        Box::pin(async move {
            let what = format!("look at {key}");
            let ask = Ask::new(Method::HEAD, key, &what);
            let Some(answer) = self.find(ask, "NoSuchKey").await? else { return Ok(None) };
            let size = ByteSize(answer.header("content-length").parse().unwrap_or(0));
            let mark = answer.header(MARK).to_owned();
            Ok(Some(Facts { size, etag: self.etag(&what, &answer)?, mark }))
        })
    }

    fn put<'a>(&'a self, key: &'a str, bytes: Bytes, over: Over) -> BoxFuture<'a, Result<Put>> {
        Box::pin(async move {
            let what = format!("store {key}");
            let md5 = STANDARD.encode(Md5::digest(&bytes));
            let mut ask = Ask::new(Method::PUT, key, &what).header("content-md5", md5).body(bytes);
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
            let found = self.find(Ask::new(Method::DELETE, key, &what), "NoSuchKey").await?;
            Ok(match found {
                None => Delete::AlreadyDeleted,
                Some(answer) if answer.header("x-amz-delete-marker") == "true" => Delete::Hidden,
                Some(_) => Delete::Deleted,
            })
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, page: Option<&'a str>) -> BoxFuture<'a, Result<Page>> {
        Box::pin(async move {
            let what = format!("list {prefix}");
            let mut ask =
                Ask::new(Method::GET, "", &what).query("list-type", "2").query("prefix", prefix);
            if let Some(page) = page {
                ask = ask.query("continuation-token", page);
            }
            let answer = self.succeed(ask).await?;
            let document = self.document(&what, &answer)?;
            let more = document.text("IsTruncated") == Some("true".into());
            Ok(Page {
                keys: document.each("Contents", &["Key"]).map(|[key]| key).collect(),
                next: document.text("NextContinuationToken").filter(|_| more),
            })
        })
    }

    fn begin<'a>(&'a self, key: &'a str, mark: &'a str) -> BoxFuture<'a, Result<UploadId>> {
        Box::pin(async move {
            let what = format!("begin the upload of {key}");
            let ask = || Ask::new(Method::POST, key, &what).query("uploads", "").header(MARK, mark);
            let mut answer = self.ask(ask().header(ALGORITHM, "SHA256")).await?;
            // Who does not know it ignores it, or refuses.
            if matches!(answer.status, StatusCode::BAD_REQUEST | StatusCode::NOT_IMPLEMENTED) {
                answer = self.ask(ask()).await?;
            }
            if !answer.status.is_success() {
                return Err(self.refused(&what, &answer));
            }
            let checksums = match answer.header(ALGORITHM) {
                "SHA256" => Checksums::Sha256,
                _ => Checksums::Untold,
            };
            let document = self.document(&what, &answer)?;
            let upload = document.text("UploadId").map(|name| UploadId { name, checksums });
            upload.ok_or_else(|| {
                let context = format!("{} cannot {what}: it names no upload", self.location());
                Error::new(Reason::StoreRefused, context).advice("is it the right endpoint?")
            })
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
            let mut ask = Ask::new(Method::PUT, key, &what)
                .query("partNumber", part.number.to_string())
                .upload(upload);
            if upload.checksums == Checksums::Sha256 {
                ask = ask.header("x-amz-checksum-sha256", STANDARD.encode(part.sha256.0));
            }
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
            let (mut parts, mut marker) = (Vec::new(), None);
            // Bounded: a page has 1000 parts, and an object 10,000.
            for _ in 0..20 {
                let mut ask = Ask::new(Method::GET, key, &what).upload(upload);
                if let Some(marker) = marker {
                    ask = ask.query("part-number-marker", marker);
                }
                let Some(answer) = self.find(ask, "NoSuchUpload").await? else { break };
                let document = self.document(&what, &answer)?;
                let listed = document.each("Part", &["PartNumber", "ETag", "Size"]);
                parts.extend(listed.filter_map(|[number, etag, size]| {
                    let md5 = Some(etag.trim_matches('"').to_owned());
                    let md5 = md5.filter(|md5| md5.len() == 32);
                    let (number, size) = (number.parse().ok()?, ByteSize(size.parse().ok()?));
                    Some(ListedPart { number, etag: ETag(etag), size, md5 })
                }));
                marker = document.text("NextPartNumberMarker");
                if document.text("IsTruncated") != Some("true".into()) {
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
            let ask = Ask::new(Method::POST, key, &what)
                .upload(upload)
                .header("content-type", "application/xml")
                .body(answers::completion(parts, upload.checksums).into());
            let Some(answer) = self.find(ask, "NoSuchUpload").await? else {
                return Ok(Complete::NoUpload);
            };
            // A completion that fails late has answered 200 before.
            let document = self.document(&what, &answer)?;
            match document.is_error() {
                true => Err(self.refused(&what, &answer)),
                false => Ok(Complete::Done),
            }
        })
    }

    fn abort<'a>(&'a self, key: &'a str, upload: &'a UploadId) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let what = format!("abort the upload of {key}");
            let ask = Ask::new(Method::DELETE, key, &what).upload(upload);
            self.find(ask, "NoSuchUpload").await.map(drop)
        })
    }

    fn uploads<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<(String, UploadId)>>> {
        Box::pin(async move {
            let what = format!("list the uploads of {prefix}");
            let mut found = Vec::new();
            let mut markers = [String::new(), String::new()];
            // Bounded: 20 pages of 1000 uploads are more than any host begins.
            for _ in 0..20 {
                let mut ask =
                    Ask::new(Method::GET, "", &what).query("uploads", "").query("prefix", prefix);
                // SeaweedFS tells one of them, and takes no other.
                for (name, marker) in ["key-marker", "upload-id-marker"].into_iter().zip(&markers) {
                    if !marker.is_empty() {
                        ask = ask.query(name, &**marker);
                    }
                }
                let answer = self.succeed(ask).await?;
                let document = self.document(&what, &answer)?;
                let uploads = document.each("Upload", &["Key", "UploadId"]);
                found.extend(
                    uploads
                        .map(|[key, name]| (key, UploadId { name, checksums: Checksums::Untold })),
                );
                if document.text("IsTruncated") != Some("true".into()) {
                    break;
                }
                markers = ["NextKeyMarker", "NextUploadIdMarker"]
                    .map(|name| document.text(name).unwrap_or_default());
            }
            Ok(found)
        })
    }
}
