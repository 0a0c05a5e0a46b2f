//! An HTTP/1.1 proxy that does to a store's requests what networks and stores do on a bad day.
//!
//! Heads pass byte for byte, `Host` too: a client that signs for the proxy's address is
//! understood by an upstream that believes the `Host` it gets. Every request has an upstream
//! connection of its own, so that no fault is there which the plan has not asked for.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, sink},
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// What is done to a request. Places are counted in the body, from 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: it passes.
    #[default]
    None,
    /// The connection is closed; the upstream hears nothing.
    CloseBefore,
    /// The upstream gets so much of the body, then both connections are closed. A shorter body
    /// arrives whole, but its answer does not.
    CloseInBody { after_bytes: u64 },
    /// It is forwarded only after this time.
    Delay(Duration),
    /// The proxy answers, with `Retry-After` in seconds; the upstream hears nothing.
    Status { code: u16, retry_after: Option<u32>, body: String },
    /// The answer's head passes and so much of its body, then the connection is closed.
    TruncateAnswer { after_bytes: u64 },
    /// The upstream does it and answers, and the answer is thrown away.
    LoseAnswer,
    /// One bit of the request's body arrives wrong, if it is so long.
    FlipByteInRequestBody { at: u64 },
    /// One bit of the answer's body arrives wrong, if it is so long.
    FlipByteInAnswerBody { at: u64 },
    /// The request's body stops half-way for this time, or the answer's if there is none.
    Stall(Duration),
}

impl Fault {
    /// An answer as S3 words its errors.
    pub fn error(code: u16, name: &str, retry_after: Option<u32>) -> Self {
        let body = format!("<Error><Code>{name}</Code><Message>Fault.</Message></Error>");
        Self::Status { code, retry_after, body }
    }
}

/// The head of a request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The method.
    pub method: String,
    /// Path and query, as they were sent.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Request {
    /// The first header of this name, which is in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The body's length; none when it comes in chunks.
    fn body_length(&self, otherwise: u64) -> Option<u64> {
        let length = self.header("content-length").and_then(|length| length.parse().ok());
        self.header("transfer-encoding").is_none().then_some(length.unwrap_or(otherwise))
    }
}

/// The value of a target's parameter, as it was sent; empty when there is only the name.
pub fn query<'a>(target: &'a str, name: &str) -> Option<&'a str> {
    let pairs = target.split_once('?')?.1.split('&');
    pairs.map(|p| p.split_once('=').unwrap_or((p, ""))).find(|p| p.0 == name).map(|p| p.1)
}

/// What became of a request.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// The method.
    pub method: String,
    /// Path and query, as they were sent.
    pub target: String,
    /// Of the answer, also of one that was lost; none when there was none.
    pub status: Option<u16>,
    /// How much of the body the client has sent; grows while it does.
    pub body_bytes: u64,
    /// How much of the answer's body came back to the client.
    pub answer_bytes: u64,
    /// What was done to it.
    pub fault: Fault,
}

type Rule = dyn Fn(&Request, u64) -> Fault + Send + Sync;
type Shared = Arc<Mutex<(FaultPlan, Vec<Entry>)>>;

/// Says what is done to which request.
#[derive(Clone)]
pub struct FaultPlan(Arc<Rule>);

impl FaultPlan {
    /// No faults.
    pub fn none() -> Self {
        Self::rule(|_, _| Fault::None)
    }

    /// Asks `rule`, with the request and how many of its method and target came before it.
    /// The log is locked meanwhile.
    pub fn rule(rule: impl Fn(&Request, u64) -> Fault + Send + Sync + 'static) -> Self {
        Self(Arc::new(rule))
    }

    /// Some fault for so many of a thousand requests.
    ///
    /// The dice depend on the seed, the method, the target without its upload id, and how often
    /// that was asked for: not on the order in which parallel requests come. Bytes are flipped
    /// only where a checksum can tell, in the bodies of PUT and in objects, never in XML.
    pub fn random(seed: u64, per_mille: u64) -> Self {
        Self::rule(move |request, nth| {
            let id = query(&request.target, "uploadId").filter(|id| !id.is_empty()).unwrap_or("\n");
            let text = format!("{} {} {nth}", request.method, request.target.replace(id, ""));
            let mut throw = 0;
            let mut dice = |sides: u64| {
                throw += 1;
                let mut hasher = DefaultHasher::new();
                (seed, &text, throw).hash(&mut hasher);
                hasher.finish() % sides
            };
            if dice(1000) >= per_mille {
                return Fault::None;
            }
            let length = request.body_length(0).unwrap_or(1);
            match dice(11) {
                0 => Fault::CloseBefore,
                1 => Fault::CloseInBody { after_bytes: dice(length + 1) },
                2 => Fault::Delay(Duration::from_millis(dice(300))),
                3 => Fault::error(500, "InternalError", None),
                4 => Fault::error(503, "SlowDown", Some(1)),
                5 => Fault::error(429, "TooManyRequests", None),
                6 => Fault::TruncateAnswer { after_bytes: dice(200) },
                7 if request.method == "PUT" && length > 0 => {
                    Fault::FlipByteInRequestBody { at: dice(length) }
                }
                8 if request.method == "GET" && !request.target.contains('?') => {
                    Fault::FlipByteInAnswerBody { at: dice(1000) }
                }
                9 => Fault::Stall(Duration::from_millis(dice(300))),
                _ => Fault::LoseAnswer,
            }
        })
    }
}

/// The proxy. It ends, and its connections with it, when this is dropped.
pub struct FaultProxy {
    address: SocketAddr,
    state: Shared,
    /// Whether it is away. Every change cuts the connections there are; its end ends the thread.
    away: watch::Sender<bool>,
}

impl FaultProxy {
    /// A proxy on a free port of 127.0.0.1 that lets everything pass.
    pub fn start(upstream: SocketAddr) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Shared::new(Mutex::new((FaultPlan::none(), Vec::new())));
        let (away, watch) = watch::channel(false);
        let accept = accept(listener, upstream, Arc::clone(&state), watch);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        thread::spawn(move || runtime.block_on(accept));
        Self { address, state, away }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Replaces the plan, for the requests to come.
    pub fn plan(&self, plan: FaultPlan) {
        self.state.lock().unwrap().0 = plan;
    }

    /// Cuts all connections, and resets new ones until [`back`](Self::back).
    pub fn away(&self) {
        self.away.send_replace(true);
    }

    /// Takes connections again.
    pub fn back(&self) {
        self.away.send_replace(false);
    }

    /// The requests, in the order in which their heads came.
    pub fn log(&self) -> Vec<Entry> {
        self.state.lock().unwrap().1.clone()
    }

    /// Forgets the log, and how often what was asked for. No request may be under way.
    pub fn clear(&self) {
        self.state.lock().unwrap().1.clear();
    }

    /// How many requests came.
    pub fn requests(&self) -> usize {
        self.state.lock().unwrap().1.len()
    }

    /// The bytes of request bodies that came, by what `key` makes of an entry: its method and
    /// target, or the number of its part.
    pub fn body_bytes<K: Ord>(&self, key: impl Fn(&Entry) -> Option<K>) -> BTreeMap<K, u64> {
        let mut sums = BTreeMap::new();
        for entry in &self.state.lock().unwrap().1 {
            key(entry).into_iter().for_each(|k| *sums.entry(k).or_default() += entry.body_bytes);
        }
        sums
    }
}

/// Until the sender of `away` is gone; the connections end with the runtime.
async fn accept(
    listener: std::net::TcpListener,
    upstream: SocketAddr,
    state: Shared,
    mut away: watch::Receiver<bool>,
) {
    let listener = TcpListener::from_std(listener).unwrap();
    while away.has_changed().is_ok() {
        let client = tokio::select! {
            client = listener.accept() => client,
            _ = away.changed() => continue,
        };
        let Ok((client, _)) = client else { continue };
        let mut change = away.clone();
        if *change.borrow_and_update() {
            let _ = client.set_zero_linger();
            continue;
        }
        let state = Arc::clone(&state);
        // An error is a fault that was asked for, or an end that its client sees as well.
        tokio::spawn(async move {
            tokio::select! {
                _ = serve(client, upstream, state) => {}
                _ = change.changed() => {}
            }
        });
    }
}

/// Answers the requests of a connection; an error closes it.
async fn serve(mut client: TcpStream, upstream: SocketAddr, state: Shared) -> io::Result<()> {
    client.set_nodelay(true)?;
    let (reader, mut writer) = client.split();
    let mut reader = BufReader::with_capacity(1 << 16, reader);
    loop {
        let (raw, request) = read_head(&mut reader).await?;
        let length = request.body_length(0);
        // Such a client sends no body before it is told to, nor after another answer.
        let expects = request.header("expect").is_some();
        let (number, fault) = {
            let (plan, log) = &mut *state.lock().unwrap();
            let Request { method, target, .. } = request.clone();
            let same = log.iter().filter(|e| e.method == method && e.target == target).count();
            let fault = (plan.0)(&request, same as u64);
            log.push(Entry { method, target, fault: fault.clone(), ..Entry::default() });
            (log.len() - 1, fault)
        };
        let note = |change: &dyn Fn(&mut Entry)| {
            state.lock().unwrap().1.get_mut(number).into_iter().for_each(change);
        };
        let received = |bytes| note(&|entry| entry.body_bytes += bytes);

        let (mut up, mut down) = (Tamper::default(), Tamper::default());
        match fault {
            Fault::None | Fault::LoseAnswer => {}
            Fault::CloseBefore => return Err(cut()),
            Fault::CloseInBody { after_bytes } => up.cut = Some(after_bytes),
            Fault::Delay(time) => tokio::time::sleep(time).await,
            Fault::TruncateAnswer { after_bytes } => down.cut = Some(after_bytes),
            Fault::FlipByteInRequestBody { at } => up.flip = Some(at),
            Fault::FlipByteInAnswerBody { at } => down.flip = Some(at),
            Fault::Stall(time) if length == Some(0) => down.stall = Some(time),
            Fault::Stall(time) => up.stall = Some(time),
            Fault::Status { code, retry_after, ref body } => {
                if !expects {
                    copy(&mut reader, &mut sink(), length, up, received).await?;
                }
                let retry = retry_after.map_or(String::new(), |s| format!("Retry-After: {s}\r\n"));
                let close = if expects { "Connection: close\r\n" } else { "" };
                let head = format!("HTTP/1.1 {code} Fault\r\n{retry}{close}Content-Length: ");
                let body = if request.method == "HEAD" { "" } else { body };
                note(&|entry| entry.status = Some(code));
                let answer = format!("{head}{}\r\n\r\n{body}", body.len());
                writer.write_all(answer.as_bytes()).await?;
                if expects {
                    return Ok(());
                }
                continue;
            }
        }

        let mut upstream = TcpStream::connect(upstream).await?;
        upstream.set_nodelay(true)?;
        let (from_upstream, mut to_upstream) = upstream.split();
        let mut from_upstream = BufReader::with_capacity(1 << 16, from_upstream);
        to_upstream.write_all(&raw).await?;
        up.may_fail = true;
        let send = copy(&mut reader, &mut to_upstream, length, up, received);
        let answer = async {
            let mut told = false;
            loop {
                let (raw, head) = read_head(&mut from_upstream).await?;
                let status = head.target.parse().map_err(|_| cut())?;
                if (100..200).contains(&status) {
                    writer.write_all(&raw).await?;
                    told = true;
                    continue;
                }
                note(&|entry| entry.status = Some(status));
                let bodiless = request.method == "HEAD" || matches!(status, 204 | 304);
                let length = if bodiless { Some(0) } else { head.body_length(TO_END) };
                if fault == Fault::LoseAnswer {
                    copy(&mut from_upstream, &mut sink(), length, down, |_| {}).await?;
                    return Err(cut());
                }
                writer.write_all(&raw).await?;
                let sent = |bytes| note(&|entry| entry.answer_bytes += bytes);
                copy(&mut from_upstream, &mut writer, length, down, sent).await?;
                if expects && !told {
                    return Err(cut());
                }
                let close =
                    head.header("connection").is_some_and(|c| c.eq_ignore_ascii_case("close"));
                return Ok(length == Some(TO_END) || close);
            }
        };
        // All of the body is read before an end: a reset could overtake the answer.
        let ((), last) = tokio::try_join!(send, answer)?;
        if last {
            return Ok(());
        }
    }
}

fn cut() -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

/// A head as it came; of an answer's first line the status is the target.
async fn read_head(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<(Vec<u8>, Request)> {
    let mut raw = Vec::new();
    while !raw.ends_with(b"\r\n\r\n") {
        if from.take(1 << 16).read_until(b'\n', &mut raw).await? == 0 || raw.len() > 1 << 16 {
            return Err(cut());
        }
    }
    let text = String::from_utf8_lossy(&raw);
    let mut words = text.split(' ').map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Err(cut()) };
    let headers = text.lines().skip(1).filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned())).collect();
    Ok((raw, Request { method, target, headers }))
}

/// The length of a body that ends with its connection.
const TO_END: u64 = u64::MAX;

/// What is done to a body on its way.
#[derive(Clone, Copy, Default)]
struct Tamper {
    cut: Option<u64>,
    flip: Option<u64>,
    /// Half-way.
    stall: Option<Duration>,
    /// The receiver may have answered already, and read no more: the rest is thrown away.
    may_fail: bool,
}

/// Copies a body as it comes, in its chunks if it has some.
async fn copy<R: AsyncBufRead + Unpin, W: AsyncWrite + Unpin>(
    from: &mut R,
    to: &mut W,
    length: Option<u64>,
    mut tamper: Tamper,
    count: impl Fn(u64),
) -> io::Result<()> {
    let (mut at, mut left, half) = (0, length.unwrap_or(0), length.map_or(1, |length| length / 2));
    let (mut gone, mut last, mut done) = (false, false, false);
    loop {
        if tamper.cut == Some(at) {
            return Err(cut());
        }
        if let Some(time) = tamper.stall.take_if(|_| at >= half) {
            tokio::time::sleep(time).await;
        }
        let mut bytes = Vec::new();
        if left > 0 {
            let buffer = from.fill_buf().await?;
            let until = tamper.cut.map_or(left, |cut| left.min(cut - at));
            let take = buffer.len().min(usize::try_from(until).unwrap_or(usize::MAX));
            bytes.extend_from_slice(&buffer[..take]);
            from.consume(take);
            let flip = tamper.flip.and_then(|flip| usize::try_from(flip.checked_sub(at)?).ok());
            if let Some(byte) = flip.and_then(|flip| bytes.get_mut(flip)) {
                *byte ^= 1;
            }
            count(take as u64);
            at += take as u64;
            left -= take as u64;
        } else if length.is_none() && !done {
            // The end of a chunk's data, the size of the next, or, after the last, a trailer.
            from.take(1 << 16).read_until(b'\n', &mut bytes).await?;
            let line = str::from_utf8(&bytes).map_err(|_| cut())?.trim();
            if last {
                done = line.is_empty();
            } else if !line.is_empty() {
                let size = line.split(';').next().unwrap_or_default();
                left = u64::from_str_radix(size, 16).map_err(|_| cut())?;
                last = left == 0;
            }
        } else {
            return if tamper.cut.is_some() { Err(cut()) } else { Ok(()) };
        }
        // The sender has ended too early.
        if bytes.is_empty() {
            return if length == Some(TO_END) { Ok(()) } else { Err(cut()) };
        }
        if !gone && let Err(error) = to.write_all(&bytes).await {
            if !tamper.may_fail {
                return Err(error);
            }
            gone = true;
        }
    }
}
