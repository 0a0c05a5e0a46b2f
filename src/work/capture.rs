//! The way of one image.
//!
//! ```text
//!   preflight ─► [snapshot] ─► read ───────────────────────────► [release] ─► seal
//!                               reader thread ─► encoder threads ─► put, put, …
//!                               (pieces, bounded)      (parts, bounded)
//! ```
//! Snapshot and release are those of a running instance; a volume at rest is
//! held instead.
//!
//! Whatever fails stops all three, and the upload is aborted: an image is
//! whole or absent. An instance is given back what was taken by who drives
//! the work request, when the capture has not done it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::sync_channel,
    },
    thread,
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::{MissedTickBehavior, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Work, driver::check, live::Live, preflight::Found, tracker::Tracker, watchdog::Watchdog,
};
use crate::{
    encode::{self, Encoded, Meter},
    error::{Context, Error, Reason, Result},
    model::{
        image::{Format, Image, Manifest, ManifestSchema, Stored},
        instance::Instance,
        live::Mode,
        work_request::{Phase, Progress},
    },
    port::{HeldVolume, Part, Sealed, Upload},
};

/// Pieces between the reader and the encoder. The reader's buffers are the
/// real bound; this only lets it run ahead of a busy thread.
const PIECES: usize = 4;
/// Parts that are stored at once: one on its way while the next is handed
/// over.
const PUTS: usize = 2;
/// How often progress is shown.
const TICK: Duration = Duration::from_millis(250);

/// An accepted order.
#[derive(Debug)]
pub(super) struct Capture {
    /// The image to be.
    pub image: Image,
    /// Whose boot volume it is.
    pub instance: Option<Instance>,
    /// How its point in time is taken while it runs.
    pub mode: Mode,
}

impl Capture {
    /// Makes the image. Afterwards it is whole in its store, or nothing of it
    /// is left there; only a store that does not answer keeps what it has
    /// until the next start sweeps it.
    ///
    /// `place` is held until every thread has ended.
    pub(super) async fn run(
        mut self: Box<Self>,
        work: &Work,
        tracker: &mut Tracker,
        watchdog: &Watchdog,
        stop: &CancellationToken,
        place: Arc<OwnedSemaphorePermit>,
    ) -> Result<()> {
        tracker.phase(Phase::Preflight).await?;
        let origin = &self.image.origin;
        let found = work
            .preflight(self.instance.as_ref(), &origin.source_volume, self.mode, tracker.recorder())
            .await?;
        check(stop)?;

        let store = work.0.catalogue.store(&self.image.origin.store)?;
        let upload = watchdog.guard(|| self.store(), store.begin(&self.image.id)).await?;
        let line = Line { upload: &*upload, watchdog, stop, place };
        if let Err(error) = self.transfer(work, found, line, tracker).await {
            let left = match timeout(watchdog.undoing(), upload.abort()).await {
                Ok(aborted) => aborted,
                Err(late) => {
                    let context = format!("{} did not abort the upload", self.store());
                    Err(Error::new(Reason::Stalled, context).because(late))
                }
            };
            if let Err(left) = left {
                tracker.log(format!("the next start will remove what is left: {left}"));
                tracing::error!(image = %self.image.id, "{left:?}");
            }
            return Err(error);
        }
        Ok(())
    }

    fn store(&self) -> String {
        format!("the store {:?}", self.image.origin.store)
    }

    fn tell_oddities(&self, work: &Work, volume: &dyn HeldVolume, tracker: &Tracker) {
        let facts = volume.facts();
        let limit = work.0.settings.warn_volume;
        if facts.size > limit {
            tracker.log(format!(
                "the volume is {} and OCI imports no image of more than {limit}",
                facts.size
            ));
        }
        if let [range] = facts.data.as_slice()
            && (range.start, range.end) == (0, facts.size.get())
        {
            tracker.log("the whole volume is read: it tells no map of what is in use".into());
        }
    }

    /// From the point in time to the seal. The store has answered by now: a
    /// guest's disk does not wait for it.
    async fn transfer(
        &mut self,
        work: &Work,
        found: Found,
        line: Line<'_>,
        tracker: &mut Tracker,
    ) -> Result<()> {
        let (volume, live) = match found {
            Found::AtRest(volume) => (volume, None),
            Found::Running(prepared) => {
                let live = Live::take(prepared, tracker).await?;
                self.image.origin.consistency = live.snapshot.point().consistency;
                (live.open(work).await?, Some(live))
            }
        };
        self.tell_oddities(work, &*volume, tracker);
        check(line.stop)?;
        tracker.phase(Phase::Read).await?;
        let (upload, watchdog, stop) = (line.upload, line.watchdog, line.stop);
        let source = format!("the volume {}", self.image.origin.source_volume.display());
        let settings = encode::Settings {
            volume_size: volume.facts().size,
            compression: self.image.origin.compression,
            threads: work.0.settings.encode_threads,
            spare: work.0.spare.clone(),
        };
        let putting = AtomicUsize::new(0);
        let who = || match putting.load(Ordering::Relaxed) {
            0 => source.clone(),
            _ => self.store(),
        };
        let teller = tracker.teller();
        let pumped = pump(volume, settings, line, &putting, tracker);
        let encoded = match &live {
            None => watchdog.guard(who, pumped).await?,
            Some(live) => tokio::select! {
                biased;
                encoded = watchdog.guard(who, pumped) => match encoded {
                    Ok(encoded) => encoded,
                    Err(error) => return Err(live.explained(error).await),
                },
                lost = live.snapshot.lost() => return Err(lost),
                never = live.spare_the_guest(work.0.settings.burden, &teller) => match never {},
            },
        };
        let mut point_in_time = None;
        let mut expected = None;
        if let Some(live) = live {
            point_in_time = Some(live.release(tracker).await?);
            expected = self.instance.as_ref().and_then(|instance| work.expected(instance));
        }
        check(stop)?;

        // From here on a cancellation comes too late: the image may be seen.
        tracker.phase(Phase::Seal).await?;
        let trace = match point_in_time {
            Some(_) => Some(serde_json::to_vec(&tracker.recorder().trace()).context(
                Reason::Internal,
                || "what was said to the instance cannot be written as JSON",
            )?),
            None => None,
        };
        let sealed = Sealed {
            manifest: Manifest {
                schema: ManifestSchema::V1,
                id: self.image.id.clone(),
                origin: self.image.origin.clone(),
                stored: Stored {
                    format: Format::Qcow2,
                    virtual_size: encoded.virtual_size,
                    object_size: encoded.object_size,
                    content_digest: encoded.content_digest,
                    object_digest: encoded.object_digest,
                    parts: encoded.parts,
                    point_in_time,
                    expected,
                    trace_digest: trace.as_deref().map(encode::object_digest),
                    time_line: tracker.time_line(),
                    imaged_version: env!("CARGO_PKG_VERSION").to_owned(),
                },
            },
            record: self.image.record.clone(),
            extent_digests: encoded.extent_digests,
            trace,
        };
        watchdog.guard(|| self.store(), upload.seal(Arc::new(sealed))).await
    }
}

/// What the bytes of one image pass, and who looks after it.
struct Line<'a> {
    upload: &'a dyn Upload,
    watchdog: &'a Watchdog,
    stop: &'a CancellationToken,
    place: Arc<OwnedSemaphorePermit>,
}

/// Reads, encodes and stores until everything is stored or something fails.
/// All threads have ended when it returns; when it is dropped they end as soon
/// as what they wait for lets them. `putting` tells how many parts the store
/// has and has not answered for.
async fn pump(
    volume: Box<dyn HeldVolume>,
    settings: encode::Settings,
    line: Line<'_>,
    putting: &AtomicUsize,
    tracker: &mut Tracker,
) -> Result<Encoded> {
    let total = settings.volume_size.get();
    let stop = line.stop.child_token();
    let _ends_with_us = stop.clone().drop_guard();
    let meter = Arc::new(Meter::default());
    let (reading, encoding, parts) =
        start(volume, settings, Arc::clone(&meter), &stop, &line.place)?;

    let mut stored = 0;
    let mut show = |stored| {
        let progress =
            Progress { total, read: meter.read(), skipped: meter.skipped(), stored, per_second: 0 };
        tracker.progress(progress);
    };
    let put = put_all(parts, line.upload, putting, |bytes| {
        stored += bytes;
        show(stored);
    });
    let put = put.await;
    if put.is_err() {
        stop.cancel();
    }
    let (read, encoded) = (joined(reading).await, joined(encoding).await);
    show(stored);
    // Who failed first knows why; the others only know that they were stopped.
    put?;
    match (read, encoded) {
        (Err(read), Err(encoded)) if read.reason() == Reason::Canceled => Err(encoded),
        (Err(read), _) => Err(read),
        (Ok(()), encoded) => encoded,
    }
}

type Running<T> = oneshot::Receiver<Result<T>>;

/// Starts the reader and the encoder on threads of their own.
fn start(
    mut volume: Box<dyn HeldVolume>,
    settings: encode::Settings,
    meter: Arc<Meter>,
    stop: &CancellationToken,
    place: &Arc<OwnedSemaphorePermit>,
) -> Result<(Running<()>, Running<Encoded>, mpsc::Receiver<Part>)> {
    let (pieces_in, pieces) = sync_channel(PIECES);
    let (parts_in, parts) = mpsc::channel(1);
    let (token, held) = (stop.clone(), Arc::clone(place));
    let reading = spawn("read", move || {
        let _held = held;
        let outcome = volume.read(&pieces_in, &token);
        // What was read of a failing volume makes no image.
        if outcome.is_err() {
            token.cancel();
        }
        outcome
    })?;
    let (token, held) = (stop.clone(), Arc::clone(place));
    let encoding = spawn("encode-0", move || {
        let _held = held;
        let outcome = encode::run(&settings, pieces, parts_in, &meter, &token);
        if outcome.is_err() {
            token.cancel();
        }
        outcome
    });
    if encoding.is_err() {
        stop.cancel();
    }
    Ok((reading, encoding?, parts))
}

fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<Running<T>> {
    let (done, running) = oneshot::channel();
    let body = move || {
        // Nobody waits any more: the daemon is going down.
        let _ = done.send(work());
    };
    match thread::Builder::new().name(name.to_owned()).spawn(body) {
        Ok(_detached) => Ok(running),
        Err(cause) => {
            Err(Error::new(Reason::Internal, format!("thread {name:?} cannot be started"))
                .because(cause))
        }
    }
}

async fn joined<T>(running: Running<T>) -> Result<T> {
    running.await.unwrap_or_else(|_| Err(Error::new(Reason::Internal, "a thread panicked")))
}

/// Stores every part that comes, `PUTS` at once; `tick` is told what was
/// stored, and is called now and then when nothing was. On an error no more
/// parts are taken, which stops the encoder.
async fn put_all(
    mut parts: mpsc::Receiver<Part>,
    upload: &dyn Upload,
    putting: &AtomicUsize,
    mut tick: impl FnMut(u64),
) -> Result<()> {
    let mut puts = FuturesUnordered::new();
    let mut more = true;
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while more || !puts.is_empty() {
        putting.store(puts.len(), Ordering::Relaxed);
        tokio::select! {
            part = parts.recv(), if more && puts.len() < PUTS => match part {
                Some(part) => {
                    let bytes = part.size.get();
                    puts.push(async move { upload.put(Arc::new(part)).await.map(|()| bytes) });
                }
                None => more = false,
            },
            Some(put) = puts.next() => tick(put?),
            _ = ticks.tick() => tick(0),
        }
    }
    Ok(())
}
