//! What an image of a running instance would cost, tried out: everything but
//! reading and storing.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{Work, driver::check, live::Live, preflight::Found, tracker::Tracker};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize,
        instance::Instance,
        live::{Expected, Mode, Rehearsal},
        work_request::{Operation, Phase, Progress, Status, WorkRequest},
    },
};

/// How long the guest is watched: long enough for what it does every minute.
const SAMPLE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// What the last look back covers: growth beyond the sample goes on like it.
const TAIL: Duration = Duration::from_secs(20);

/// Without a capture to learn from: a slow disk, and data that does not
/// compress.
const ASSUMED: Experience =
    Experience { bytes_per_second: 100 << 20, stored: 1, read: 1, from_experience: false };

/// An accepted rehearsal.
#[derive(Debug)]
pub(super) struct Rehearse {
    /// Whose boot volume would be imaged.
    pub instance: Instance,
    /// How its point in time would be taken.
    pub mode: Mode,
}

impl Rehearse {
    /// Takes a point in time, watches how scratch grows, gives it back.
    pub(super) async fn run(
        self: Box<Self>,
        work: &Work,
        tracker: &mut Tracker,
        stop: &CancellationToken,
    ) -> Result<()> {
        tracker.phase(Phase::Preflight).await?;
        let volume = &self.instance.boot_volume;
        let recorder = tracker.recorder();
        let found = work.preflight(Some(&self.instance), volume, self.mode, recorder).await?;
        let Found::Running { prepared, pace, .. } = found else {
            return Err(at_rest(&self.instance));
        };
        check(stop)?;
        let live = Live::take((prepared, pace), tracker, stop).await?;
        let data = live.open(work).await?.facts().data_size();
        tracker.phase(Phase::Sample).await?;
        let sampled = tokio::select! {
            biased;
            () = stop.cancelled() => check(stop).map(|()| Sampled::default()),
            lost = live.snapshot.lost() => Err(lost),
            sampled = sample(&live) => sampled,
        }?;
        let point = live.release(tracker).await?;
        let experience = Experience::of(&work.work_requests(), &self.instance);
        let rehearsal = Rehearsal {
            point,
            sampled_seconds: SAMPLE.as_secs(),
            written: sampled.written,
            expected: expect(point.window_micros, data, &sampled.scratch, experience),
        };
        tracker.rehearsed(rehearsal);
        Ok(())
    }
}

/// A stopped guest needs none: nothing is done to it.
pub(super) fn at_rest(instance: &Instance) -> Error {
    let context =
        format!("instance {:?} does not run: there is nothing to rehearse", instance.name);
    Error::new(Reason::InvalidParameter, context)
        .advice("make the image: its volume is at rest, and a guest cannot be held by it")
        .field("instance_id")
}

/// What was seen of a guest.
#[derive(Debug, Default)]
struct Sampled {
    written: ByteSize,
    /// Scratch that was taken by then.
    scratch: Vec<(Duration, ByteSize)>,
}

async fn sample(live: &Live) -> Result<Sampled> {
    let begun = Instant::now();
    let before = live.snapshot.disk_work().await?.written;
    let mut scratch = Vec::new();
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let after = begun.elapsed();
        scratch.push((after, live.snapshot.scratch().await?));
        if after >= SAMPLE {
            break;
        }
    }
    let written = live.snapshot.disk_work().await?.written;
    Ok(Sampled { written: ByteSize(written.get().saturating_sub(before.get())), scratch })
}

/// What the captures of this host were like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Experience {
    /// Bytes of the volume that were read.
    bytes_per_second: u64,
    /// Bytes of objects for each of `read`.
    stored: u64,
    read: u64,
    from_experience: bool,
}

impl Experience {
    /// Of the newest image of this instance, else of the newest of any.
    fn of(requests: &[WorkRequest], instance: &Instance) -> Self {
        let told = requests.iter().filter_map(|request| {
            let millis = request.time_finished?.since(request.time_started?).as_millis();
            let Progress { read, stored, .. } = request.progress;
            let image = request.operation == Operation::CreateImage
                && request.status == Status::Succeeded
                && read > 0;
            let bytes_per_second = u64::try_from(u128::from(read) * 1000 / millis.max(1)).ok()?;
            let experience = Self { bytes_per_second, stored, read, from_experience: true };
            image.then_some((is_of(request, instance), experience))
        });
        let told: Vec<_> = told.collect();
        let its = told.iter().find(|(its, _)| *its).or_else(|| told.first());
        its.map_or(ASSUMED, |(_, experience)| *experience)
    }
}

/// Whether `request` is about `instance`.
fn is_of(request: &WorkRequest, instance: &Instance) -> bool {
    request.resources.iter().any(|resource| resource.identifier == instance.id.as_str())
}

impl Work {
    /// What the last rehearsal of `instance` expected of this capture.
    pub(super) fn expected(&self, instance: &Instance) -> Option<Expected> {
        let requests = self.work_requests();
        let of = |request: &&WorkRequest| request.rehearsal.is_some() && is_of(request, instance);
        requests.iter().find(of)?.rehearsal.map(|rehearsal| rehearsal.expected)
    }
}

/// What a capture of `data` bytes will cost. Scratch grows as it was seen to,
/// and after the sample as at its end.
fn expect(
    window_micros: u64,
    data: ByteSize,
    scratch: &[(Duration, ByteSize)],
    experience: Experience,
) -> Expected {
    let Experience { bytes_per_second, stored, read, from_experience } = experience;
    let seconds = data.get().div_ceil(bytes_per_second.max(1)).max(1);
    let bytes = u128::from(data.get()) * u128::from(stored) / u128::from(read.max(1));
    let end = Duration::from_secs(seconds);
    let seen = scratch.iter().find(|(after, _)| *after >= end).map(|(_, used)| used.get());
    let expected = seen.unwrap_or_else(|| {
        let Some((last, used)) = scratch.last() else { return 0 };
        let from = scratch.iter().rev().find(|(after, _)| *last - *after >= TAIL);
        let (begun, before) = from.unwrap_or(&(Duration::ZERO, ByteSize(0)));
        let grown = u128::from(used.get().saturating_sub(before.get()));
        let over = (*last - *begun).as_millis().max(1);
        let rest = end.saturating_sub(*last).as_millis();
        let more = u64::try_from(grown * rest / over).unwrap_or(u64::MAX);
        used.get().saturating_add(more)
    });
    Expected {
        window_micros,
        scratch: ByteSize(expected),
        seconds,
        bytes: ByteSize(u64::try_from(bytes).unwrap_or(u64::MAX)),
        from_experience,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A MiB at once and another each second.
    fn samples() -> Vec<(Duration, ByteSize)> {
        (0..=60).map(|s| (Duration::from_secs(s), ByteSize::mib(s + 1))).collect()
    }

    #[test]
    fn scratch_is_what_was_seen_and_then_goes_on_so() {
        let rate = |bytes_per_second| Experience { bytes_per_second, ..ASSUMED };
        let data = ByteSize::gib(1);
        let expected = expect(7, data, &samples(), rate(100 << 20));
        assert_eq!((expected.window_micros, expected.seconds), (7, 11));
        assert_eq!((expected.scratch, expected.bytes), (ByteSize::mib(12), data));
        let expected = expect(7, data, &samples(), rate(1 << 20));
        assert_eq!((expected.seconds, expected.scratch), (1024, ByteSize::mib(1025)));
        // A guest that wrote only at first.
        let flat: Vec<_> = samples().iter().map(|(s, _)| (*s, ByteSize::mib(3))).collect();
        assert_eq!(expect(7, data, &flat, rate(1 << 20)).scratch, ByteSize::mib(3));
        assert_eq!(expect(7, ByteSize(0), &[], ASSUMED).scratch, ByteSize(0));
    }

    #[test]
    fn a_dense_capture_promises_a_dense_image() {
        let learned =
            Experience { bytes_per_second: 1 << 30, stored: 1, read: 3, from_experience: true };
        let expected = expect(0, ByteSize::gib(6), &samples(), learned);
        assert_eq!((expected.seconds, expected.bytes), (6, ByteSize::gib(2)));
        assert!(expected.from_experience);
    }
}
