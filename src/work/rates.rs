//! How fast work may go: limits that may change while it goes on.
//!
//! ```text
//! volume ─► Throttled ─► encoder ─► parts ─► Paced ─► store
//!              └ read limits                   └ upload limits: the request's, the daemon's
//! ```
//! A limit is shared by all who hold it. Where several hold, the lowest does.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use tokio::{
    runtime::Handle,
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize,
        image::SnapshotKind,
        upload::VolumeMark,
        work_request::{NewRates, Rates},
    },
    port::{Body, BoxStream, HeldVolume, Part, Piece, VolumeFacts},
};

/// What may be saved up while nothing is sent: so much time of the rate.
const BURST: Duration = Duration::from_millis(50);
/// Bytes that are let pass at once, so that they flow evenly.
const STEP: usize = 64 << 10;

/// Bytes a second, of all who share it.
#[derive(Debug)]
pub(super) struct Limit {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    rate: Option<u64>,
    /// When all that was let pass has been earned.
    earned: Instant,
}

impl Limit {
    fn new(rate: Option<ByteSize>) -> Self {
        let state = State { rate: rate.map(ByteSize::get), earned: Instant::now() };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    /// From now on; who waits is let know.
    fn set(&self, rate: Option<ByteSize>) {
        *self.lock() = State { rate: rate.map(ByteSize::get), earned: Instant::now() };
        self.changed.notify_waiters();
    }

    /// When `bytes` may pass that are asked for `now`; `None`: at once.
    fn reserve(&self, bytes: usize, now: Instant) -> Option<Instant> {
        let mut state = self.lock();
        let nanos = bytes as u128 * 1_000_000_000 / u128::from(state.rate?.max(1));
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let saved = now.checked_sub(BURST).unwrap_or(now);
        state.earned = state.earned.max(saved) + cost;
        Some(state.earned)
    }

    /// Waits until `bytes` may pass.
    async fn pass(&self, bytes: usize) {
        loop {
            let changed = self.changed.notified();
            let Some(at) = self.reserve(bytes, Instant::now()) else { return };
            tokio::select! {
                () = sleep_until(at) => return,
                // What was reserved is forgotten.
                () = changed => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The limits of a work request, or those of the daemon. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    read: Arc<Limit>,
    upload: Arc<Limit>,
}

impl Limits {
    pub(super) fn new(rates: Rates) -> Self {
        let limit = |rate| Arc::new(Limit::new(rate));
        Self { read: limit(rates.read), upload: limit(rates.upload) }
    }

    /// As they are.
    pub(super) fn get(&self) -> Rates {
        let of = |limit: &Limit| limit.lock().rate.map(ByteSize);
        Rates { read: of(&self.read), upload: of(&self.upload) }
    }

    /// Changes them.
    pub(super) fn set(&self, new: NewRates) {
        new.read.into_iter().for_each(|rate| self.read.set(rate));
        new.upload.into_iter().for_each(|rate| self.upload.set(rate));
    }
}

/// Limits that all hold, until the end of the work.
#[derive(Debug, Clone)]
pub(super) struct All {
    limits: [Limits; 2],
    stop: CancellationToken,
}

impl All {
    pub(super) fn new(limits: [Limits; 2], stop: CancellationToken) -> Self {
        Self { limits, stop }
    }

    /// Waits until each of `limits` lets `bytes` pass, or the work is to end.
    async fn pass(&self, which: impl Fn(&Limits) -> &Arc<Limit>, bytes: usize) {
        for limit in &self.limits {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                () = which(limit).pass(bytes) => {}
            }
        }
    }

    /// `part`, whose bytes leave no faster than they may.
    pub(super) fn paced(&self, part: Arc<Part>) -> Part {
        let Part { number, offset, size, sha256, .. } = *part;
        let body = Paced { part, all: self.clone(), runtime: Handle::current() };
        Part { number, offset, size, body: Box::new(body), sha256 }
    }

    /// `volume`, which is read no faster than it may be.
    pub(super) fn throttled(&self, volume: Box<dyn HeldVolume>) -> Box<dyn HeldVolume> {
        Box::new(Throttled { volume, all: self.clone(), runtime: Handle::current() })
    }
}

/// The body of a part.
#[derive(Debug)]
struct Paced {
    part: Arc<Part>,
    all: All,
    runtime: Handle,
}

impl Body for Paced {
    fn piece(&self, index: usize) -> Option<&[u8]> {
        self.part.body.piece(index)
    }

    fn stream(&self) -> Option<BoxStream<'static, Result<Bytes>>> {
        let whole = match self.part.body.stream() {
            Some(stream) => stream,
            None => stream::iter(in_memory(Arc::clone(&self.part))).map(Ok).boxed(),
        };
        let all = self.all.clone();
        let steps = whole.flat_map(|bytes| stream::iter(steps(bytes)));
        let paced = steps.then(move |step| {
            let all = all.clone();
            async move {
                if let Ok(bytes) = &step {
                    all.pass(|limits| &limits.upload, bytes.len()).await;
                }
                step
            }
        });
        Some(paced.boxed())
    }

    fn admit(&self, bytes: usize) {
        // In steps, so that others who share the limit wait no longer.
        for begin in (0..bytes).step_by(STEP) {
            let step = STEP.min(bytes - begin);
            self.runtime.block_on(self.all.pass(|limits| &limits.upload, step));
        }
    }
}

/// One piece of a part, which keeps the part.
struct Kept(Arc<Part>, usize);

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        self.0.body.piece(self.1).unwrap_or_default()
    }
}

fn in_memory(part: Arc<Part>) -> impl Iterator<Item = Bytes> + Send {
    let pieces = (0..).map(move |index| Bytes::from_owner(Kept(Arc::clone(&part), index)));
    pieces.take_while(|piece| !piece.is_empty())
}

/// `bytes` in steps.
fn steps(bytes: Result<Bytes>) -> impl Iterator<Item = Result<Bytes>> + Send {
    let mut left = Some(bytes);
    std::iter::from_fn(move || match left.take()? {
        Ok(mut bytes) if bytes.len() > STEP => {
            let step = bytes.split_to(STEP);
            left = Some(Ok(bytes));
            Some(Ok(step))
        }
        last => Some(last),
    })
}

/// A volume that is read no faster than it may be.
#[derive(Debug)]
struct Throttled {
    volume: Box<dyn HeldVolume>,
    all: All,
    runtime: Handle,
}

impl Throttled {
    /// Hands on what comes, at its pace. The reader waits with it: its buffers
    /// are bounded.
    fn relay(all: &All, runtime: &Handle, from: Receiver<Piece>, to: &SyncSender<Piece>) {
        for piece in from {
            if let Piece::Data(extent) = &piece {
                let len = (*extent.bytes).as_ref().len();
                runtime.block_on(all.pass(|limits| &limits.read, len));
            }
            if to.send(piece).is_err() {
                return;
            }
        }
    }
}

impl HeldVolume for Throttled {
    fn facts(&self) -> &VolumeFacts {
        self.volume.facts()
    }

    fn snapshot(&self) -> SnapshotKind {
        self.volume.snapshot()
    }

    fn mark(&self) -> Option<VolumeMark> {
        self.volume.mark()
    }

    fn begin_at(&mut self, extent: u64) {
        self.volume.begin_at(extent);
    }

    fn read(&mut self, pieces: &SyncSender<Piece>, stop: &CancellationToken) -> Result<()> {
        let Self { volume, all, runtime } = self;
        let (through, taken) = sync_channel(1);
        thread::scope(|scope| {
            let relay = || Self::relay(all, runtime, taken, pieces);
            let begun = thread::Builder::new().name("throttle".into()).spawn_scoped(scope, relay);
            begun.map_err(|cause| {
                Error::new(Reason::Internal, "the throttling thread cannot be started")
                    .because(cause)
            })?;
            let outcome = volume.read(&through, stop);
            drop(through);
            outcome
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// How long `bytes` take.
    async fn time(limits: &[&Limit], bytes: usize) -> Duration {
        let begin = Instant::now();
        for _ in 0..bytes / STEP {
            for limit in limits {
                limit.pass(STEP).await;
            }
        }
        begin.elapsed()
    }

    fn limit(mib: u64) -> Limit {
        Limit::new(Some(ByteSize::mib(mib)))
    }

    fn about(found: Duration, millis: u64) -> bool {
        let wanted = Duration::from_millis(millis);
        found <= wanted + Duration::from_millis(60) && found + Duration::from_millis(60) >= wanted
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_take_their_time_and_the_lowest_limit_holds() {
        assert!(about(time(&[&limit(8)], 40 * MIB).await, 5000));
        assert!(about(time(&[&limit(8), &limit(4)], 40 * MIB).await, 10_000));
        assert!(about(time(&[&limit(4), &limit(8)], 40 * MIB).await, 10_000));
        assert!(about(time(&[&Limit::new(None)], 4000 * MIB).await, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_shares_a_limit_shares_its_bytes() {
        let shared = limit(8);
        let begin = Instant::now();
        let one = async || time(&[&shared], 20 * MIB).await;
        let times = tokio::join!(one(), one());
        assert!(about(begin.elapsed(), 5000) && about(times.0, 5000), "{times:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_earns_little() {
        let limit = limit(8);
        tokio::time::sleep(Duration::from_secs(100)).await;
        assert!(about(time(&[&limit], 8 * MIB).await, 1000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_is_heard_at_once() {
        let limit = limit(1);
        let limits = [&limit];
        let sending = time(&limits, 100 * MIB);
        let changing = async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            limit.set(Some(ByteSize::mib(45)));
            tokio::time::sleep(Duration::from_secs(1)).await;
            limit.set(None);
        };
        let (took, ()) = tokio::join!(sending, changing);
        assert!(about(took, 11_000), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_work_ends_the_wait() {
        let stop = CancellationToken::new();
        let slow = Limits::new(Rates { read: None, upload: Some(ByteSize::mib(1)) });
        let all = All::new([slow.clone(), slow], stop.clone());
        let begin = Instant::now();
        let waiting = all.pass(|limits| &limits.upload, 100 * MIB);
        let stopping = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            stop.cancel();
        };
        tokio::join!(waiting, stopping);
        assert_eq!(begin.elapsed(), Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_paced_part_is_the_part() {
        struct Pieces(Vec<Vec<u8>>);
        impl Body for Pieces {
            fn piece(&self, index: usize) -> Option<&[u8]> {
                self.0.get(index).map(Vec::as_slice)
            }
        }
        let pieces = vec![vec![1; 3 * STEP / 2], vec![2; 10], vec![3; STEP]];
        let whole = pieces.concat();
        let size = ByteSize(whole.len() as u64);
        let sha256 = crate::model::image::ObjectDigest([0; 32]);
        let part = Part { number: 7, offset: 9, size, body: Box::new(Pieces(pieces)), sha256 };
        let limits = Limits::new(Rates { read: None, upload: Some(ByteSize::mib(1)) });
        let all = All::new([limits, Limits::new(Rates::default())], CancellationToken::new());
        let part = all.paced(Arc::new(part));
        for _ in 0..2 {
            let begin = Instant::now();
            let steps: Vec<_> = part.body.stream().unwrap().map(Result::unwrap).collect().await;
            assert!(steps.iter().all(|step| step.len() <= STEP));
            assert!(steps.concat() == whole);
            assert!(about(begin.elapsed(), 156), "{:?}", begin.elapsed());
        }
    }
}
