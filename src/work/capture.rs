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
    Work,
    driver::check,
    iscsi::ComingBack,
    live::Live,
    preflight::{Found, free},
    rates,
    resume::Interrupted,
    tracker::{Keeper, Tracker},
    watchdog::Watchdog,
};
use crate::{
    encode::{self, Encoded, Meter, Output, Resumed},
    error::{Context, Error, Reason, Result},
    model::{
        ByteSize,
        image::{EXTENT_SIZE, Format, Image, Manifest, ManifestSchema, Stored},
        instance::Instance,
        iscsi::Policy,
        live::Mode,
        upload::{Resume, ResumeSource},
        work_request::{Phase, Progress},
    },
    port::{HeldVolume, Sealed, Upload},
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
    /// What is done about its iSCSI.
    pub iscsi: Policy,
    /// What an earlier process left of it.
    pub interrupted: Option<Interrupted>,
}

/// What is read, and how far an earlier process came with it.
struct Begun {
    volume: Box<dyn HeldVolume>,
    live: Option<Live>,
    from: Option<Resumed>,
    /// Its iSCSI, on its way back.
    iscsi: Option<ComingBack>,
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
        rates: &rates::All,
    ) -> Result<()> {
        let store = Arc::clone(work.0.catalogue.store(&self.image.origin.store)?);
        let interrupted = self.interrupted.take();
        let (upload, found) = match &interrupted {
            None => {
                tracker.phase(Phase::Preflight).await?;
                let volume = &self.image.origin.source_volume;
                let instance = self.instance.as_ref();
                let found = work.preflight(instance, volume, self.mode, tracker.recorder()).await?;
                check(stop)?;
                let upload = watchdog.guard(|| self.store(), store.begin(&self.image.id)).await?;
                (upload, Some(found))
            }
            Some(interrupted) => {
                tracker.log("imaged was started again and goes on".into());
                let patience = work.0.settings.progress_timeout;
                let upload = interrupted.upload(&*store, patience, tracker, stop).await?;
                // The last that a dead process did may have been the seal.
                if store.get(&self.image.id).await?.is_some() {
                    return Ok(());
                }
                (upload, None)
            }
        };
        let line = Line { upload: &*upload, watchdog, stop, place, rates };
        let done = async {
            let begun = match (found, interrupted) {
                (Some(found), _) => self.begin(work, found, &*upload, tracker, stop).await?,
                (None, Some(interrupted)) => Self::go_on(work, interrupted, tracker).await?,
                (None, None) => return Err(Error::new(Reason::Internal, "nothing to be read")),
            };
            let Begun { volume, live, from, iscsi } = begun;
            self.transfer(work, (volume, live, from), line, tracker).await?;
            if let Some(coming) = iscsi {
                coming.wait(work, tracker, stop).await;
            }
            Ok(())
        };
        let Err(error) = done.await else { return Ok(()) };
        if error.reason() == Reason::Canceled && tracker.is_left_to_a_later_process() {
            return Err(error);
        }
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
        Err(error)
    }

    /// Takes the point in time, and has remembered how to go on after a
    /// restart, where that is possible. The store has answered by now: a
    /// guest's disk does not wait for it.
    async fn begin(
        &mut self,
        work: &Work,
        found: Found,
        upload: &dyn Upload,
        tracker: &mut Tracker,
        stop: &CancellationToken,
    ) -> Result<Begun> {
        let found = match (&self.instance, self.iscsi, found) {
            (Some(instance), Policy::Disconnect, Found::Running { prepared, .. }) => {
                // Its agent serves one at a time.
                drop(prepared);
                work.disconnect(instance, tracker, stop).await?;
                tracker.phase(Phase::Preflight).await?;
                let volume = &self.image.origin.source_volume;
                work.preflight(Some(instance), volume, self.mode, tracker.recorder()).await?
            }
            (_, _, found) => found,
        };
        let (volume, live) = match found {
            Found::AtRest(held, named) => (free(work, (held, named), tracker).await, None),
            Found::Running { prepared, pace, why } => {
                if let Some(why) = why {
                    tracker.log(format!("the host takes no snapshot of the volume: {why}"));
                }
                let live = Live::take((prepared, pace), tracker, stop).await?;
                self.image.origin.consistency = live.snapshot.point().consistency;
                (live.open(work).await?, Some(live))
            }
        };
        let source = match &live {
            None => volume.mark().map(ResumeSource::AtRest),
            // One that the host took goes with this process.
            Some(live) => live.snapshot.source().map(|source| ResumeSource::Live {
                point: *live.snapshot.point(),
                source: source.clone(),
                scratch: work.0.settings.scratch_size,
            }),
        };
        if let (Some(token), Some(source)) = (upload.token(), source) {
            let resume = Resume {
                image_id: self.image.id.clone(),
                record: self.image.record.clone(),
                origin: self.image.origin.clone(),
                instance: self.instance.as_ref().map(|instance| instance.name.clone()),
                token,
                source,
                time_line: tracker.time_line(),
            };
            tracker.resumable(Some(Box::new(resume))).await?;
        }
        let iscsi = tracker.owed_iscsi().map(|undo| work.comes_back(undo));
        Ok(Begun { volume, live, from: None, iscsi })
    }

    /// Finds what an earlier process was reading, and where it stood.
    async fn go_on(
        work: &Work,
        mut interrupted: Interrupted,
        tracker: &mut Tracker,
    ) -> Result<Begun> {
        let (volume, live) = interrupted.source(work, tracker).await?;
        let from = interrupted.encoder()?;
        let known = from.as_ref().map_or(0, Resumed::next_extent) * EXTENT_SIZE;
        tracker.log(format!("{} of the volume are in the store already", ByteSize(known)));
        Ok(Begun { volume, live, from, iscsi: None })
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

    /// From the point in time to the seal.
    async fn transfer(
        &mut self,
        work: &Work,
        (volume, live, from): (Box<dyn HeldVolume>, Option<Live>, Option<Resumed>),
        line: Line<'_>,
        tracker: &mut Tracker,
    ) -> Result<()> {
        let snapshot = volume.snapshot();
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
            resumable: tracker.is_left_to_a_later_process(),
        };
        let putting = AtomicUsize::new(0);
        let who = || match putting.load(Ordering::Relaxed) {
            0 => source.clone(),
            _ => self.store(),
        };
        let teller = tracker.teller();
        let pumped = pump(volume, from, settings, line, &putting, tracker);
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
            Some(_) => Some(serde_json::to_vec(&tracker.trace()).context(
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
                    snapshot: Some(snapshot),
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
    rates: &'a rates::All,
}

/// Reads, encodes and stores until everything is stored or something fails.
/// All threads have ended when it returns; when it is dropped they end as soon
/// as what they wait for lets them. `putting` tells how many parts the store
/// has and has not answered for.
async fn pump(
    volume: Box<dyn HeldVolume>,
    from: Option<Resumed>,
    settings: encode::Settings,
    line: Line<'_>,
    putting: &AtomicUsize,
    tracker: &mut Tracker,
) -> Result<Encoded> {
    let total = settings.volume_size.get();
    let stop = line.stop.child_token();
    let _ends_with_us = stop.clone().drop_guard();
    let meter = Arc::new(Meter::default());
    // What an earlier process did counts as done.
    let known = from.as_ref().map_or(0, Resumed::next_extent) * EXTENT_SIZE;
    meter.add_read(known.min(total));
    let mut stored = from.as_ref().map_or(0, Resumed::stored);
    let (reading, encoding, outputs) = start(
        line.rates.throttled(volume),
        from,
        settings,
        Arc::clone(&meter),
        &stop,
        &line.place,
    )?;

    let keeper = tracker.keeper();
    let mut show = |stored| {
        let progress =
            Progress { total, read: meter.read(), skipped: meter.skipped(), stored, per_second: 0 };
        tracker.progress(progress);
    };
    let (upload, rates) = (line.upload, line.rates);
    let putter = Putter { upload, rates, keeper: &keeper, putting, stop: &stop };
    let put = putter.put_all(outputs, |bytes| {
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
    let stopped = |error: &Error| error.reason() == Reason::Canceled;
    match (put, read, encoded) {
        (Ok(()), Ok(()), encoded) => encoded,
        (put, read, encoded) => {
            let errors = [put.err(), read.err(), encoded.err()];
            let (why, others): (Vec<_>, Vec<_>) =
                errors.into_iter().flatten().partition(|error| !stopped(error));
            let first = why.into_iter().chain(others).next();
            Err(first.unwrap_or_else(|| Error::new(Reason::Internal, "nothing failed")))
        }
    }
}

type Running<T> = oneshot::Receiver<Result<T>>;

/// Starts the reader and the encoder on threads of their own.
fn start(
    mut volume: Box<dyn HeldVolume>,
    from: Option<Resumed>,
    settings: encode::Settings,
    meter: Arc<Meter>,
    stop: &CancellationToken,
    place: &Arc<OwnedSemaphorePermit>,
) -> Result<(Running<()>, Running<Encoded>, mpsc::Receiver<Output>)> {
    volume.begin_at(from.as_ref().map_or(0, Resumed::next_extent));
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
        let outcome = encode::run_from(&settings, from, pieces, parts_in, &meter, &token);
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

/// Stores what comes of encoding.
struct Putter<'a> {
    upload: &'a dyn Upload,
    rates: &'a rates::All,
    keeper: &'a Keeper,
    /// How many parts the store has and has not answered for.
    putting: &'a AtomicUsize,
    stop: &'a CancellationToken,
}

impl Putter<'_> {
    /// Stores every part that comes, `PUTS` at once; `tick` is told what was
    /// stored, and is called now and then when nothing was. On an error no
    /// more parts are taken, which stops the encoder.
    async fn put_all(
        &self,
        mut outputs: mpsc::Receiver<Output>,
        mut tick: impl FnMut(u64),
    ) -> Result<()> {
        let mut puts = FuturesUnordered::new();
        let mut more = true;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while more || !puts.is_empty() {
            self.putting.store(puts.len(), Ordering::Relaxed);
            tokio::select! {
                output = outputs.recv(), if more && puts.len() < PUTS => match output {
                    Some(output) => puts.push(self.put(output)),
                    None => more = false,
                },
                Some(put) = puts.next() => tick(put?),
                _ = ticks.tick() => tick(0),
                // A store that is away would be waited for.
                () = self.stop.cancelled() => return check(self.stop),
            }
        }
        Ok(())
    }

    /// Stores a part and has it remembered; answers how many bytes it had.
    async fn put(&self, output: Output) -> Result<u64> {
        match output {
            Output::First(part, after) => {
                self.keeper.keep(&part, None, &after).await?;
                Ok(0)
            }
            Output::Part(part, after) => {
                let part = Arc::new(self.rates.paced(Arc::new(part)));
                let receipt = self.upload.put(Arc::clone(&part)).await?;
                if let Some(after) = after {
                    self.keeper.keep(&part, Some(receipt), &after).await?;
                }
                Ok(part.size.get())
            }
        }
    }
}
