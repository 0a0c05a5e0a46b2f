//! One request from its head to its answer: parsing, faults, the log, and the shape of answers.

use super::content::Payload;
use super::encode::{percent_decode, uuid};
use super::fault::{Fault, FaultKind};
use super::{LoggedRequest, Shared, clock, multipart, objects, par, sign};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use std::collections::HashMap;
use std::fmt;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;

/// More than any JSON body needs: 10,000 parts with their ETags are below 1 MiB.
const JSON_LIMIT: usize = 4 << 20;

pub(super) type Answer = Result<Response<Payload>, Failure>;

/// An error answer: status, code and message.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub status: u16,
    pub code: String,
    pub message: String,
    pub retry_after: Option<u64>,
}

impl Failure {
    pub fn new(status: u16, code: impl Into<String>, message: impl Into<String>) -> Failure {
        Failure { status, code: code.into(), message: message.into(), retry_after: None }
    }

    pub fn invalid(message: impl Into<String>) -> Failure {
        Failure::new(400, "InvalidParameter", message)
    }

    /// Also the answer to whoever lacks a right, so that bucket names cannot be found by trying.
    pub fn bucket(namespace: &str, bucket: &str) -> Failure {
        let message = format!(
            "Either the bucket named '{bucket}' does not exist in the namespace '{namespace}' or \
             you are not authorized to access it"
        );
        Failure::new(404, "BucketNotFound", message)
    }

    fn method() -> Failure {
        Failure::new(405, "MethodNotAllowed", "The method is not allowed on this resource")
    }

    fn response(&self) -> Response<Payload> {
        let text = json!({"code": self.code, "message": self.message}).to_string();
        let mut response = answer(self.status, Payload::text(text));
        set(&mut response, "content-type", "application/json");
        if let Some(seconds) = self.retry_after {
            set(&mut response, "retry-after", &seconds.to_string());
        }
        response
    }
}

/// Ends the connection without an answer.
#[derive(Debug)]
pub(super) struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("closed by a fault")
    }
}

impl std::error::Error for Closed {}

/// The body of a request, with a count of what has arrived.
pub(super) struct Upload {
    body: Incoming,
    pub bytes: u64,
}

impl Upload {
    /// The next chunk; none at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|_| Failure::new(400, "IncompleteBody", "The body ended"))?;
            if let Ok(data) = frame.into_data() {
                self.bytes += data.len() as u64;
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The whole body of a JSON request, which the hash its sender signed must match.
    pub async fn json(&mut self, signed_hash: Option<&str>) -> Result<Vec<u8>, Failure> {
        let mut all = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            if all.len() + chunk.len() > JSON_LIMIT {
                return Err(Failure::invalid("The request body is too large"));
            }
            all.extend_from_slice(&chunk);
        }
        let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &all);
        if signed_hash.is_some_and(|signed| signed != super::encode::base64(sum.as_ref())) {
            return Err(sign::body_mismatch());
        }
        Ok(all)
    }

    async fn drain(&mut self, limit: u64) {
        while self.bytes < limit && matches!(self.chunk().await, Ok(Some(_))) {}
    }
}

/// What a request's target names, decoded once.
#[derive(Debug, Default)]
pub(super) struct Call {
    /// The secret of a pre-authenticated request.
    pub token: Option<String>,
    pub namespace: String,
    pub bucket: String,
    /// `o`, `u` or `p`; empty for the bucket or the namespace itself.
    pub collection: String,
    /// What follows the collection; for objects their name.
    pub object: Option<String>,
    pub query: HashMap<String, String>,
    /// The target with the secret masked.
    pub shown: String,
}

impl Call {
    fn parse(head: &Parts) -> Option<Call> {
        let mut call = Call::default();
        let mut path = head.uri.path();
        if let Some(rest) = path.strip_prefix("/p/") {
            let slash = rest.find('/')?;
            call.token = Some(rest[..slash].to_string());
            path = &rest[slash..];
            call.shown = "/p/***".into();
        }
        call.shown.push_str(path);
        if let Some(query) = head.uri.query() {
            call.shown = format!("{}?{query}", call.shown);
            for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                let plain = |text: &str| percent_decode(&text.replace('+', " "));
                call.query.insert(plain(name)?, plain(value)?);
            }
        }
        let mut segments = path.splitn(7, '/').skip(1);
        if segments.next() != Some("n") {
            return None;
        }
        call.namespace = percent_decode(segments.next().unwrap_or(""))?;
        match (segments.next(), segments.next()) {
            (None, None) => return Some(call),
            (Some("b"), Some(bucket)) => call.bucket = percent_decode(bucket)?,
            _ => return None,
        }
        call.collection = segments.next().unwrap_or("").to_string();
        let object = percent_decode(segments.next().unwrap_or(""))?;
        call.object = Some(object).filter(|name| !name.is_empty());
        Some(call)
    }

    pub fn param(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }

    pub fn object(&self) -> &str {
        self.object.as_deref().unwrap_or("")
    }
}

pub(super) fn answer(status: u16, payload: Payload) -> Response<Payload> {
    let mut response = Response::new(payload);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

pub(super) fn answer_json(value: &serde_json::Value) -> Response<Payload> {
    let mut response = answer(200, Payload::text(value.to_string()));
    set(&mut response, "content-type", "application/json");
    response
}

pub(super) fn set(response: &mut Response<Payload>, name: &str, value: &str) {
    let name: HeaderName = name.parse().unwrap();
    response.headers_mut().insert(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
}

/// Puts the request into the log when it ends, also when its connection breaks before.
struct LogEntry<'a> {
    shared: &'a Shared,
    request: LoggedRequest,
}

impl Drop for LogEntry<'_> {
    fn drop(&mut self) {
        self.shared.state().log.push(std::mem::take(&mut self.request));
    }
}

/// Answers one request.
pub(super) async fn serve(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Payload>, Closed> {
    let (head, body) = request.into_parts();
    let mut upload = Upload { body, bytes: 0 };
    let call = Call::parse(&head);
    let mut entry = LogEntry { shared: &shared, request: LoggedRequest::default() };
    entry.request.method = head.method.to_string();
    if let Some(call) = &call {
        entry.request.path = call.shown.clone();
        let part = call.param("uploadPartNum").and_then(|number| number.parse().ok());
        (entry.request.object, entry.request.part) = match par::upload_target(call) {
            Some((object, _, part)) => (Some(object.to_string()), part),
            None => (call.object.clone(), part),
        };
    }
    let fault = shared.take_fault(&entry.request);
    let mut result = match &fault {
        Some(FaultKind::Delay(time)) => {
            tokio::time::sleep(*time).await;
            route(&shared, call.as_ref(), &head, &mut upload).await
        }
        Some(FaultKind::CutAfter(bytes)) => {
            upload.drain(*bytes).await;
            entry.request.body_bytes = upload.bytes;
            return Err(Closed);
        }
        Some(FaultKind::Refuse { .. }) => Err(Fault::failure(fault.as_ref().unwrap())),
        _ => route(&shared, call.as_ref(), &head, &mut upload).await,
    };
    entry.request.executed_status =
        result.as_ref().map_or_else(|f| f.status, |r| r.status().into());
    if let Some(kind @ FaultKind::AnswerAfter { .. }) = &fault {
        result = Err(Fault::failure(kind));
    }
    let mut response = result.unwrap_or_else(|failure| {
        entry.request.code = Some(failure.code.clone());
        failure.response()
    });
    // A client that waits for "100 Continue" has not sent its body yet; any other one is still
    // writing and would lose the answer if the connection broke under it.
    if !head.headers.contains_key("expect") || upload.bytes > 0 {
        upload.drain(u64::MAX).await;
    }
    entry.request.body_bytes = upload.bytes;
    if matches!(fault, Some(FaultKind::LoseAnswer)) {
        return Err(Closed);
    }
    entry.request.status = response.status().into();
    finish(&shared, &head, &mut response);
    Ok(response)
}

/// Adds what every answer carries.
fn finish(shared: &Shared, head: &Parts, response: &mut Response<Payload>) {
    set(response, "date", &clock::http_date(shared.now(), "GMT"));
    set(response, "x-api-id", "native");
    set(response, "opc-request-id", &format!("test-1:{}", uuid()));
    if let Some(id) = head.headers.get("opc-client-request-id") {
        response.headers_mut().insert("opc-client-request-id", id.clone());
    }
    if head.method == Method::HEAD {
        // A body must not follow, yet its length is told.
        let length = hyper::body::Body::size_hint(response.body()).exact().unwrap_or(0);
        if !response.headers().contains_key("content-length") {
            set(response, "content-length", &length.to_string());
        }
        *response.body_mut() = Payload::empty();
    }
}

async fn route(
    shared: &Arc<Shared>,
    call: Option<&Call>,
    head: &Parts,
    upload: &mut Upload,
) -> Answer {
    let Some(call) = call else {
        return Err(Failure::new(404, "NotAuthorizedOrNotFound", "Unknown resource"));
    };
    let chunked = head.headers.contains_key("transfer-encoding");
    if chunked {
        return Err(Failure::new(411, "MissingContentLength", "The Content-Length is required"));
    }
    if call.token.is_some() {
        return par::route(shared, call, head, upload).await;
    }
    let signed = sign::verify(shared, call, head)?;
    let hash = signed.as_deref();
    if call.bucket.is_empty() {
        if head.method == Method::GET && call.namespace.is_empty() {
            return Ok(answer_json(&json!(shared.namespace)));
        }
        return Err(Failure::method());
    }
    drop(shared.bucket(call)?);
    let method = head.method.as_str();
    match (method, call.collection.as_str(), call.object.is_some()) {
        ("GET" | "HEAD", "", false) => objects::bucket(shared, call),
        ("GET", "o", false) => objects::list(shared, call, ""),
        ("GET" | "HEAD", "o", true) => objects::get(shared, call, head),
        ("PUT", "o", true) => objects::put(shared, call, head, upload, hash).await,
        ("DELETE", "o", true) => objects::delete(shared, call, head),
        ("POST", "u", false) => {
            let body = upload.json(hash).await?;
            multipart::create(shared, call, head, &body)
        }
        ("GET", "u", false) => multipart::list(shared, call),
        ("PUT", "u", true) => multipart::put_part(shared, call, head, upload, hash).await,
        ("GET", "u", true) => multipart::list_parts(shared, call),
        ("POST", "u", true) => {
            let body = upload.json(hash).await?;
            multipart::commit(shared, call, head, &body)
        }
        ("DELETE", "u", true) => multipart::abort(shared, call),
        ("POST", "p", false) => {
            let body = upload.json(hash).await?;
            par::create(shared, call, &body)
        }
        ("GET", "p", false) => par::list(shared, call),
        ("GET", "p", true) => par::get(shared, call),
        ("DELETE", "p", true) => par::delete(shared, call),
        _ => Err(Failure::method()),
    }
}

/// Takes connections until the runtime ends.
pub(super) async fn accept(shared: Arc<Shared>, listener: TcpListener, tls: Option<TlsAcceptor>) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        // Out of file descriptors, say: the connection waits in the backlog.
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (shared, tls) = (shared.clone(), tls.clone());
        tokio::spawn(async move {
            match tls {
                None => serve_connection(shared, stream).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        serve_connection(shared, stream).await;
                    }
                }
            }
        });
    }
}

async fn serve_connection<S>(shared: Arc<Shared>, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let service = service_fn(|request| serve(shared.clone(), request));
    // Whatever ends a connection is the client's to notice.
    let _ = http1::Builder::new()
        .max_buf_size(1 << 20)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}
