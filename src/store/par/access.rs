//! What a pre-authenticated request can do: read, write and list, never
//! remove an object.
//!
//! An upload gets a URL of its own from the service, as secret as the first.
//! Nothing is signed, so no clock matters.

use std::sync::Arc;

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;

use super::{ParUrl, seal};
use crate::{
    error::{Error, Reason, Result},
    model::ByteSize,
    port::Part,
    store::{
        bucket::{Checksums, ETag, UploadId},
        http::{
            Answer, Http, MAX_ANSWER, Method, Payload, Refusal, Request, StatusCode, Trouble,
            encoded_path,
        },
        oci::answers::{self, ALGORITHM, Begun, CONTENT_SHA256, MARK},
    },
};

/// What a request must be allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Reading,
    Writing,
    Listing,
}

/// A pre-authenticated request, and the way to its service.
#[derive(Debug)]
pub struct Access {
    http: Http,
    pub url: ParUrl,
}

/// A request.
pub struct Ask<'a> {
    pub method: Method,
    /// A secret.
    pub target: String,
    pub headers: Vec<(&'static str, String)>,
    pub payload: Payload,
    pub limit: ByteSize,
    pub need: Need,
    /// What is being done, as "the store cannot …".
    pub what: &'a str,
}

impl<'a> Ask<'a> {
    pub fn new(method: Method, target: String, need: Need, what: &'a str) -> Self {
        let (headers, payload, limit) = (Vec::new(), Payload::Nothing, MAX_ANSWER);
        Self { method, target, headers, payload, limit, need, what }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn body(mut self, bytes: Bytes) -> Self {
        self.payload = Payload::Bytes(bytes);
        self
    }
}

impl Access {
    /// The way to `url` is `http`, whose endpoint is that of `url`.
    pub fn new(http: Http, url: ParUrl) -> Self {
        Self { http, url }
    }

    /// Where it leads, without any secret.
    pub fn location(&self) -> String {
        format!("{}/{}", self.http.endpoint(), self.url.bucket)
    }

    /// Path of the object `key`, for requests. A secret.
    pub fn object(&self, key: &str) -> String {
        self.url.target(&encoded_path(key))
    }

    /// The answer, whatever it is.
    pub async fn send(&self, ask: Ask<'_>) -> Result<Answer> {
        let Ask { method, target, headers, payload, limit, .. } = ask;
        let mut answer = self.http.send(Request { method, target, headers, payload, limit }).await;
        if let Ok(answer) = &mut answer {
            // Who is asked without a signature does not mind the clock.
            answer.headers.remove("date");
        }
        answer
    }

    /// The answer, which must be a success; `None` for 404 in words other
    /// than those for what is not allowed.
    pub async fn find(&self, ask: Ask<'_>) -> Result<Option<Answer>> {
        let (what, need) = (ask.what.to_owned(), ask.need);
        let answer = self.send(ask).await?;
        match answer.status {
            status if status.is_success() => Ok(Some(answer)),
            StatusCode::NOT_FOUND if is_absence(&answer) => Ok(None),
            _ => Err(self.refused(&what, need, &answer)),
        }
    }

    /// The answer, which must be a success.
    pub async fn succeed(&self, ask: Ask<'_>) -> Result<Answer> {
        let (what, need) = (ask.what.to_owned(), ask.need);
        let answer = self.send(ask).await?;
        match answer.status.is_success() {
            true => Ok(answer),
            false => Err(self.refused(&what, need, &answer)),
        }
    }

    pub fn cannot(&self, what: &str) -> String {
        format!("{} cannot {what}", self.location())
    }

    /// The error about an answer that no OCI gives.
    pub fn foreign(&self, what: &str) -> Error {
        let context = format!("{}: its answer is not OCI's", self.cannot(what));
        Error::new(Reason::StoreRefused, context)
            .advice("is it the whole URL of the pre-authenticated request?")
    }

    /// The error that `answer` tells.
    pub fn refused(&self, what: &str, need: Need, answer: &Answer) -> Error {
        let mut refusal = answers::refusal(answer);
        for words in [&mut refusal.code, &mut refusal.message, &mut refusal.request_id] {
            *words = self.url.without_token(words);
        }
        match answers::trouble(&refusal) {
            Trouble::NoBucket | Trouble::Credentials | Trouble::Rights => {
                self.denied(what, need, refusal)
            }
            trouble => refusal.error(trouble, self.cannot(what), answer),
        }
    }

    /// The service does not tell which it is.
    fn denied(&self, what: &str, need: Need, refusal: Refusal) -> Error {
        let need = match need {
            Need::Reading => "reading",
            Need::Writing => "writing",
            Need::Listing => "listing",
        };
        let context = format!(
            "{}: the pre-authenticated request does not allow {need}, has expired or was deleted",
            self.cannot(what)
        );
        let advice = match self.url.object {
            None => {
                "make a new one for the bucket with --access-type AnyObjectReadWrite and \
                 --bucket-listing-action ListObjects, and put its URL into the file that the \
                 store's `credentials` names; then restart imaged"
            }
            Some(_) => {
                "make a new one for the object with --access-type ObjectWrite, and ask again with \
                 its URL"
            }
        };
        Error::new(Reason::StoreDenied, context).because(refusal).advice(advice)
    }

    /// What is known of an object, as it is answered; `None` where there is
    /// none.
    pub async fn look(&self, key: &str, what: &str) -> Result<Option<Answer>> {
        let target = self.object(key);
        let answer = self.send(Ask::new(Method::HEAD, target, Need::Reading, what)).await?;
        match answer.status {
            status if status.is_success() => Ok(Some(answer)),
            // It has no words: GET is asked for them.
            StatusCode::NOT_FOUND => {
                let target = self.object(key);
                let ask = Ask::new(Method::GET, target, Need::Reading, what);
                let ask = Ask { limit: ByteSize::mib(1), ..ask }.header("range", "bytes=0-0");
                match self.find(ask).await? {
                    None => Ok(None),
                    Some(_) => {
                        let context = format!("{}: it came meanwhile", self.cannot(what));
                        Err(Error::new(Reason::StoreUnavailable, context))
                    }
                }
            }
            _ => Err(self.refused(what, Need::Reading, &answer)),
        }
    }

    /// Begins an object of many parts; `None` when `only_new` and there is
    /// one.
    pub async fn begin(
        &self,
        key: &str,
        mark: &str,
        only_new: bool,
        what: &str,
    ) -> Result<Option<UploadId>> {
        let ask = |checksums| {
            let mut ask = Ask::new(Method::PUT, self.object(key), Need::Writing, what)
                .header("opc-multipart", "true")
                .header(MARK, mark);
            if checksums == Checksums::Sha256 {
                ask = ask.header(ALGORITHM, "SHA256");
            }
            if only_new {
                ask = ask.header("if-none-match", "*");
            }
            ask
        };
        let mut checksums = Checksums::Sha256;
        let mut answer = self.send(ask(checksums)).await?;
        // That checksums are understood here, too, is nowhere said.
        if matches!(answer.status, StatusCode::BAD_REQUEST | StatusCode::NOT_IMPLEMENTED) {
            checksums = Checksums::Untold;
            answer = self.send(ask(checksums)).await?;
        }
        match answer.status {
            status if status.is_success() => {}
            StatusCode::PRECONDITION_FAILED if only_new => return Ok(None),
            _ => return Err(self.refused(what, Need::Writing, &answer)),
        }
        let uri = answers::parse::<Begun>(&answer).and_then(|begun| begun.access_uri);
        let name = uri.filter(|uri| is_access_uri(uri)).ok_or_else(|| self.foreign(what))?;
        let name = seal::seal(self.url.secret(), &name)?;
        Ok(Some(UploadId { name, checksums }))
    }

    /// Path of an upload. A secret, and so sealed in its name, which stands in
    /// the journal.
    pub fn path_of(&self, upload: &UploadId) -> Result<String> {
        seal::open(self.url.secret(), &upload.name)
    }

    /// Stores a part, in place of an earlier one of that number.
    pub async fn put_part(&self, upload: &UploadId, part: Arc<Part>, what: &str) -> Result<ETag> {
        let target = format!("{}{}", self.path_of(upload)?, part.number);
        let mut ask = Ask::new(Method::PUT, target, Need::Writing, what);
        let sha256 = STANDARD.encode(part.sha256.0);
        if upload.checksums == Checksums::Sha256 {
            ask = ask.header(ALGORITHM, "SHA256").header(CONTENT_SHA256, &*sha256);
        }
        let answer = self.succeed(Ask { payload: Payload::Part(part), ..ask }).await?;
        let told = answer.header(CONTENT_SHA256);
        if !told.is_empty() && told != sha256 {
            let context = format!("{}: something else arrived", self.cannot(what));
            return Err(Error::new(Reason::StoreUnavailable, context));
        }
        Ok(ETag(answer.header("etag").to_owned()))
    }

    /// Makes an object of all parts that were stored; `None` when the upload
    /// is not there, whatever the reason.
    pub async fn complete(&self, upload: &UploadId, what: &str) -> Result<Option<Answer>> {
        let ask = Ask::new(Method::POST, self.path_of(upload)?, Need::Writing, what);
        let answer = self.send(ask).await?;
        match answer.status {
            status if status.is_success() => Ok(Some(answer)),
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(self.refused(what, Need::Writing, &answer)),
        }
    }

    /// Forgets an upload and its parts.
    pub async fn abort(&self, upload: &UploadId, what: &str) -> Result<()> {
        self.abort_at(self.path_of(upload)?, what).await
    }

    /// The same of the upload at `path`.
    pub async fn abort_at(&self, path: String, what: &str) -> Result<()> {
        self.find(Ask::new(Method::DELETE, path, Need::Writing, what)).await.map(drop)
    }
}

/// Whether something is not there, as the service words it for those who may
/// ask.
fn is_absence(answer: &Answer) -> bool {
    matches!(&*answers::refusal(answer).code, "ObjectNotFound" | "NoSuchUpload")
}

/// Whether `text` is a path on the same host that a number can be appended to.
fn is_access_uri(text: &str) -> bool {
    let plain = text.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#\\".contains(&byte));
    plain && text.starts_with("/p/") && text.ends_with('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_of_uploads_are_followed() {
        assert!(is_access_uri("/p/x/n/ns/b/b/u/disk%201/id/1/"));
        let foreign =
            ["", "/", "@evil.example/p/", "//evil/p/", "/p/x", "/p/x?/", "/p/a b/", "/p/\u{e4}/"];
        assert_eq!(foreign.map(is_access_uri), [false; 8]);
    }
}
