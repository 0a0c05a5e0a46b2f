//! Talking HTTP to a store: bounded answers, bounded waits, and no secret in
//! any error.
//!
//! A request waits for as long as it gets on: bytes of its body leave, or of
//! its answer come. What goes wrong is told apart by what can be done about
//! it ([`Trouble`]); who knows the store's own words maps them to one.

use std::{
    error::Error as _,
    fmt,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context as Task, Poll, ready},
    time::{Duration, Instant, SystemTime},
};

use bytes::{Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame, SizeHint};
use reqwest::{Client, Url, redirect};
pub use reqwest::{Method, StatusCode, header::HeaderMap};

use crate::{
    error::{Context, Error, Reason, Result},
    model::ByteSize,
    port::{BoxStream, Part},
};

/// Longest time without any progress: an answer that takes longer than this
/// does not come, and a part is sent again.
const SILENCE: Duration = Duration::from_secs(60);
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Largest answer that is no object: a page of a list.
pub const MAX_ANSWER: ByteSize = ByteSize::mib(8);
/// Longest text of a store that an error shows.
const MAX_TEXT: usize = 300;
/// Clocks that differ by more make signatures invalid: five minutes for OCI,
/// fifteen for S3.
const MAX_SKEW: Duration = Duration::from_secs(240);

/// An HTTP client for one endpoint.
#[derive(Debug, Clone)]
pub struct Http {
    client: Client,
    endpoint: Url,
    silence: Duration,
}

/// What is to be sent. Headers are as they were signed.
pub struct Request {
    /// The verb.
    pub method: Method,
    /// Path and query as they are sent: encoded, beginning with `/`.
    pub target: String,
    /// Beside `host` and `content-length`.
    pub headers: Vec<(&'static str, String)>,
    /// What is sent.
    pub payload: Payload,
    /// Most bytes that the answer may have.
    pub limit: ByteSize,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Where a pre-authenticated request leads is a secret.
        write!(f, "Request({}, {:?})", self.method, self.payload)
    }
}

/// The body of a request.
#[derive(Debug, Clone)]
pub enum Payload {
    /// None.
    Nothing,
    /// A document.
    Bytes(Bytes),
    /// A part, from where it lies.
    Part(Arc<Part>),
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// The text of the header `name`, empty where there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// How much this host's clock is ahead of the store's, or behind, where
    /// that makes signatures invalid.
    pub fn skew(&self) -> Option<Duration> {
        let theirs = httpdate::parse_http_date(self.header("date")).ok()?;
        let ours = SystemTime::now();
        let skew = ours.duration_since(theirs).unwrap_or_else(|behind| behind.duration());
        Some(skew).filter(|skew| *skew > MAX_SKEW)
    }

    fn retry_after(&self) -> Option<Duration> {
        let seconds = self.header("retry-after").parse().ok()?;
        Some(Duration::from_secs(seconds))
    }
}

impl Http {
    /// A client for `endpoint`, which trusts the authorities of the system
    /// and those of `ca_file`. Nothing is sent.
    ///
    /// # Errors
    ///
    /// `INVALID_CONFIGURATION`.
    pub fn new(endpoint: &str, ca_file: Option<&Path>) -> Result<Self> {
        let advised = |context: String| {
            Error::new(Reason::InvalidConfiguration, context)
                .advice("an endpoint is like https://objects.example.com:8333")
        };
        let wrong = |why: String| advised(format!("the endpoint {endpoint:?} {why}"));
        let parsed = Url::parse(endpoint).map_err(|cause| wrong(format!("is no URL: {cause}")))?;
        if !matches!(parsed.scheme(), "http" | "https") || !parsed.has_host() {
            return Err(wrong("is no HTTP URL".into()));
        }
        if parsed.password().is_some() {
            return Err(advised("the endpoint has a password, which does not belong there".into()));
        }
        if parsed.path() != "/" || parsed.query().is_some() || !parsed.username().is_empty() {
            return Err(wrong("has more than a scheme, a host and a port".into()));
        }
        let mut builder = Client::builder()
            .user_agent(concat!("imaged/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            // A store that sends one elsewhere would get what was signed for
            // it alone.
            .redirect(redirect::Policy::none())
            .http1_only()
            .tcp_nodelay(true)
            .pool_max_idle_per_host(8)
            .pool_idle_timeout(Duration::from_secs(30));
        if let Some(file) = ca_file {
            let unusable = || format!("the CA file {} cannot be used", file.display());
            let pem = std::fs::read(file).context(Reason::InvalidConfiguration, unusable)?;
            let authorities = reqwest::Certificate::from_pem_bundle(&pem)
                .context(Reason::InvalidConfiguration, unusable)?;
            builder = builder.tls_certs_merge(authorities);
        }
        let client =
            builder.build().context(Reason::Internal, || "the HTTP client cannot be made")?;
        Ok(Self { client, endpoint: parsed, silence: SILENCE })
    }

    /// Host and port as the `host` header has them.
    pub fn host(&self) -> String {
        let host = self.endpoint.host_str().unwrap_or_default();
        match self.endpoint.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }

    /// The endpoint, for people.
    pub fn endpoint(&self) -> &str {
        self.endpoint.as_str().trim_end_matches('/')
    }

    /// Sends `request` and waits for the whole answer, whatever its status.
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE`: there is none, or it did not come whole;
    /// `STORE_REFUSED`: who answers is not trusted.
    pub async fn send(&self, request: Request) -> Result<Answer> {
        let url = format!("{}{}", self.endpoint(), request.target);
        let moved = Arc::new(Moved::default());
        let failed = Arc::new(Failed::default());
        let bodied = matches!(request.method, Method::PUT | Method::POST);
        let mut sent = self.client.request(request.method, url);
        for (name, value) in request.headers {
            sent = sent.header(name, value);
        }
        let sent = match request.payload {
            // Else nothing would tell that none is to follow.
            Payload::Nothing if bodied => sent.header("content-length", "0"),
            Payload::Nothing => sent,
            Payload::Bytes(bytes) => sent.body(bytes),
            Payload::Part(part) => {
                let (moved, failed) = (Arc::clone(&moved), Arc::clone(&failed));
                sent.body(reqwest::Body::wrap(PartBody::new(part, moved, failed)))
            }
        };
        let answer = async {
            let mut response = sent.send().await.map_err(reqwest::Error::without_url)?;
            let mut answer = Answer {
                status: response.status(),
                headers: response.headers().clone(),
                body: Bytes::new(),
            };
            moved.mark();
            let known = response.content_length().unwrap_or(0).min(request.limit.get());
            let mut body = BytesMut::with_capacity(usize::try_from(known).unwrap_or(0));
            while let Some(chunk) = response.chunk().await.map_err(reqwest::Error::without_url)? {
                moved.mark();
                body.extend_from_slice(&chunk);
                if body.len() as u64 > request.limit.get() {
                    return Ok(Err(self.endless(request.limit)));
                }
            }
            answer.body = body.freeze();
            Ok::<_, reqwest::Error>(Ok(answer))
        };
        tokio::select! {
            answer = answer => {
                // What could not be read was not refused: the answer, if there
                // is one, is about a body that is too short.
                if let Some(error) = failed.lock().take() {
                    return Err(error);
                }
                answer.map_err(|cause| self.unreachable(cause))?
            }
            () = moved.silence(self.silence) => {
                let context = format!(
                    "{} did not answer within {} s", self.endpoint(), self.silence.as_secs()
                );
                Err(Error::new(Reason::StoreUnavailable, context))
            }
        }
    }

    fn unreachable(&self, cause: reqwest::Error) -> Error {
        let mut causes = std::iter::successors(cause.source(), |&cause| cause.source());
        // rustls's own error lies behind types that nobody names.
        if causes.any(|cause| cause.to_string().contains("invalid peer certificate")) {
            let context = format!("the certificate of {} is not trusted", self.endpoint());
            return Error::new(Reason::StoreRefused, context).because(cause).advice(
                "name the authority that it is of with `ca_file` in the store's table, or look \
                 who answers there",
            );
        }
        let context = format!("{} does not answer", self.endpoint());
        Error::new(Reason::StoreUnavailable, context).because(cause)
    }

    fn endless(&self, limit: ByteSize) -> Error {
        let context = format!("{} answers with more than {limit}", self.endpoint());
        Error::new(Reason::StoreRefused, context).advice("is it the right endpoint?")
    }
}

/// When bytes last moved.
#[derive(Debug)]
struct Moved {
    since: Instant,
    millis: AtomicU64,
}

impl Default for Moved {
    fn default() -> Self {
        Self { since: Instant::now(), millis: AtomicU64::new(0) }
    }
}

impl Moved {
    fn mark(&self) {
        let millis = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.millis.store(millis, Ordering::Relaxed);
    }

    /// Returns when nothing has moved for so long.
    async fn silence(&self, patience: Duration) {
        loop {
            let moved = Duration::from_millis(self.millis.load(Ordering::Relaxed));
            let Some(left) = (moved + patience).checked_sub(self.since.elapsed()) else { return };
            tokio::time::sleep(left.max(Duration::from_millis(1))).await;
        }
    }
}

/// Why the bytes of a part did not come.
#[derive(Debug, Default)]
struct Failed(Mutex<Option<Error>>);

impl Failed {
    fn lock(&self) -> MutexGuard<'_, Option<Error>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part as a body that is read from where it lies, as often as it must be
/// sent.
struct PartBody {
    part: Arc<Part>,
    flow: Flow,
    moved: Arc<Moved>,
    failed: Arc<Failed>,
}

/// Where the bytes come from.
enum Flow {
    /// Pieces in memory: the next one, and what is left of the one before.
    Memory { index: usize, left: Option<Bytes> },
    /// They are waited for. Nobody else uses it: the lock is for `Sync`.
    Stream(Mutex<BoxStream<'static, Result<Bytes>>>),
}

/// Bytes that are handed over at once: progress is seen by them.
const CHUNK: usize = 256 << 10;

/// One piece of a part, which keeps the part.
struct Piece(Arc<Part>, usize);

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        self.0.body.piece(self.1).unwrap_or_default()
    }
}

impl PartBody {
    fn new(part: Arc<Part>, moved: Arc<Moved>, failed: Arc<Failed>) -> Self {
        let flow = match part.body.stream() {
            Some(stream) => Flow::Stream(Mutex::new(stream)),
            None => Flow::Memory { index: 0, left: None },
        };
        Self { part, flow, moved, failed }
    }
}

/// The next bytes from memory; empty at the end.
fn next_chunk(part: &Arc<Part>, index: &mut usize, left: &mut Option<Bytes>) -> Bytes {
    let piece = left.take().unwrap_or_else(|| {
        let piece = Bytes::from_owner(Piece(Arc::clone(part), *index));
        *index += 1;
        piece
    });
    let chunk = piece.slice(..piece.len().min(CHUNK));
    *left = Some(piece.slice(chunk.len()..)).filter(|left| !left.is_empty());
    chunk
}

/// A part's bytes did not come: [`Failed`] knows why.
#[derive(Debug, thiserror::Error)]
#[error("the part cannot be read")]
struct Unreadable;

impl HttpBody for PartBody {
    type Data = Bytes;
    type Error = Unreadable;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Task<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        let chunk = match &mut this.flow {
            Flow::Memory { index, left } => next_chunk(&this.part, index, left),
            Flow::Stream(stream) => {
                let stream = stream.get_mut().unwrap_or_else(PoisonError::into_inner);
                match ready!(stream.as_mut().poll_next(task)) {
                    Some(Ok(chunk)) => chunk,
                    Some(Err(error)) => {
                        *this.failed.lock() = Some(error);
                        return Poll::Ready(Some(Err(Unreadable)));
                    }
                    None => Bytes::new(),
                }
            }
        };
        this.moved.mark();
        if chunk.is_empty() {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.part.size.get())
    }
}

/// Why a store refused a request, by what can be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Ask again.
    Passing,
    /// What arrived is not what was sent: send it again.
    Damaged,
    /// Nobody knows these credentials, or their key is another.
    Credentials,
    /// They may not do this.
    Rights,
    /// There is no such bucket, or it may not be seen.
    NoBucket,
    /// There is no room.
    Full,
    /// A rule of the bucket protects the object.
    Retained,
    /// Nothing that is to be expected.
    Other,
}

/// A store's refusal in its own words.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.shown())]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// The store's code, e.g. `NoSuchBucket`; may be empty.
    pub code: String,
    /// Its words; may be empty.
    pub message: String,
    /// What the store's own people need to find the request.
    pub request_id: String,
}

impl Refusal {
    fn shown(&self) -> String {
        let mut text = self.status.to_string();
        let known = StatusCode::from_u16(self.status).ok().and_then(|s| s.canonical_reason());
        let code = if self.code.is_empty() { known.unwrap_or_default() } else { &self.code };
        for (before, word) in [(" ", code), (": ", &self.message)] {
            if !word.is_empty() {
                text.push_str(before);
                text.push_str(word);
            }
        }
        match self.request_id.as_str() {
            "" => text,
            id => format!("{text} (request {id})"),
        }
    }

    /// The error about `trouble` that `answer` tells, while doing `what`:
    /// "the store … cannot …".
    pub fn error(self, trouble: Trouble, what: String, answer: &Answer) -> Error {
        let signed = matches!(trouble, Trouble::Credentials | Trouble::Rights | Trouble::Other);
        if let Some(skew) = answer.skew().filter(|_| signed && matches!(self.status, 400..=403)) {
            let skew = humantime::format_duration(Duration::from_secs(skew.as_secs()));
            let context = format!("{what}: this host's clock and the store's differ by {skew}");
            return Error::new(Reason::StoreDenied, context)
                .because(self)
                .advice("set the clock (`timedatectl`): requests are signed with the time");
        }
        let (reason, advice) = match trouble {
            Trouble::Passing => (Reason::StoreUnavailable, ""),
            Trouble::Damaged => (
                Reason::StoreUnavailable,
                "bytes are damaged on the way: look after the network and what lies in it",
            ),
            Trouble::Credentials => (
                Reason::StoreDenied,
                "look into the store's `credentials`: the key is unknown there, or another",
            ),
            Trouble::Rights => (
                Reason::StoreDenied,
                "`imagectl store check` shows which rights the credentials lack",
            ),
            Trouble::NoBucket => (
                Reason::StoreRefused,
                "make the bucket, or correct `bucket` in the store's table; it may be there, too, \
                 and the credentials may not see it",
            ),
            Trouble::Full => (
                Reason::StoreFull,
                "delete images from it, raise its quota, or make another store the default_store",
            ),
            Trouble::Retained => (
                Reason::StoreRefused,
                "a retention rule of the bucket protects it: wait for its end, or take the rule \
                 away",
            ),
            Trouble::Other => (Reason::StoreRefused, "is it the right endpoint and bucket?"),
        };
        let error = Error::new(reason, what).because(self);
        let error = match advice {
            "" => error,
            advice => error.advice(advice),
        };
        match answer.retry_after() {
            Some(pause) => error.retry_after(pause),
            None => error,
        }
    }
}

/// Words of a store as one line that may be shown: no control characters, no
/// end.
pub fn shown(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut shown: String =
        text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(MAX_TEXT).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}

/// `text` as one part of a path or query: everything but unreserved
/// characters is encoded (RFC 3986), which is what signatures are made of.
pub fn encoded(text: &str) -> impl fmt::Display {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
    const RESERVED: &AsciiSet =
        &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
    utf8_percent_encode(text, RESERVED)
}

/// The key of an object as a path: its slashes stay.
pub fn encoded_path(key: &str) -> String {
    let segments: Vec<_> = key.split('/').map(|segment| encoded(segment).to_string()).collect();
    segments.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_hosts() {
        let host = |text: &str| Http::new(text, None).map(|http| http.host());
        assert_eq!(host("https://s3.example.com").unwrap(), "s3.example.com");
        assert_eq!(host("http://127.0.0.1:8333/").unwrap(), "127.0.0.1:8333");
        assert_eq!(host("https://s3.example.com:443").unwrap(), "s3.example.com");
        let wrong = ["s3.example.com", "ftp://a", "https://a/b", "https://a?x", "https://u:p@a"];
        let said = wrong.map(|text| host(text).unwrap_err().to_string()).join("\n");
        insta::assert_snapshot!(said, @r#"
        the endpoint "s3.example.com" is no URL: relative URL without a base
        the endpoint "ftp://a" is no HTTP URL
        the endpoint "https://a/b" has more than a scheme, a host and a port
        the endpoint "https://a?x" has more than a scheme, a host and a port
        the endpoint has a password, which does not belong there
        "#);
    }

    #[test]
    fn words_of_a_store_are_one_short_line() {
        assert_eq!(shown("a\n  b\u{1b}[31mc"), "a b\u{fffd}[31mc");
        assert_eq!(shown(&"x".repeat(1000)).chars().count(), MAX_TEXT + 1);
    }

    #[test]
    fn keys_keep_their_slashes_and_nothing_else() {
        assert_eq!(encoded_path("a b/ü+%/~x"), "a%20b/%C3%BC%2B%25/~x");
        assert_eq!(encoded("a/b").to_string(), "a%2Fb");
    }
}
