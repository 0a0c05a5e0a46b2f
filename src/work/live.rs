//! A running instance whose point in time is held.

use std::{convert::Infallible, time::Duration};

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    Burden, Work,
    driver::canceled,
    governor::Governor,
    tracker::{Teller, Tracker},
};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize,
        live::{Held, PointInTime, Undo},
        work_request::Phase,
    },
    port::{HeldVolume, LiveSnapshot, Pace, Prepared},
};

/// How long a failed read waits for its reason.
const EXPLANATION: Duration = Duration::from_secs(1);

/// A point in time that is held. Dropped without [`release`](Self::release),
/// it is given back by who drives the work request.
#[derive(Debug)]
pub(super) struct Live {
    pub snapshot: Box<dyn LiveSnapshot>,
    pace: Pace,
}

impl Live {
    /// Takes the point in time. What will undo it is durable before. A guest
    /// that takes its time to shut down is not waited for after `stop`.
    pub(super) async fn take(
        (prepared, pace): (Box<dyn Prepared>, Pace),
        tracker: &mut Tracker,
        stop: &CancellationToken,
    ) -> Result<Self> {
        let undo = prepared.undo().clone();
        tracker.owe(Some(undo.clone())).await?;
        tracker.phase(Phase::Snapshot).await?;
        let taken = prepared.take();
        let snapshot = match undo.held.stopped {
            None => taken.await?,
            Some(_) => tokio::select! {
                biased;
                taken = taken => taken?,
                () = stop.cancelled() => return Err(canceled()),
            },
        };
        tracker.owe(Some(Undo { held: Held::NOT, ..undo })).await?;
        tracker.log(told(snapshot.point()));
        Ok(Self::new(snapshot, pace))
    }

    /// One that was taken, or regained, to be read at this pace.
    pub(super) fn new(snapshot: Box<dyn LiveSnapshot>, pace: Pace) -> Self {
        // Until it is known what its guest bears.
        pace.set(Some(0));
        Self { snapshot, pace }
    }

    /// The volume as it was then.
    pub(super) async fn open(&self, work: &Work) -> Result<Box<dyn HeldVolume>> {
        if let Some(source) = self.snapshot.source() {
            return work.0.ports.volumes.live(source, self.pace.clone()).await;
        }
        self.snapshot.volume().ok_or_else(|| {
            Error::new(Reason::Internal, "the snapshot that the host took was read before")
        })
    }

    /// The reason for a read that failed. What befell the snapshot says more
    /// than what the reader met of it, and is known a moment later.
    pub(super) async fn explained(&self, error: Error) -> Error {
        match error.reason() {
            Reason::ReadFailed | Reason::SnapshotBroken => {
                timeout(EXPLANATION, self.snapshot.lost()).await.unwrap_or(error)
            }
            _ => error,
        }
    }

    /// Gives the instance its disk back.
    pub(super) async fn release(self, tracker: &mut Tracker) -> Result<PointInTime> {
        tracker.phase(Phase::Release).await?;
        let point = *self.snapshot.point();
        let by_qemu = self.snapshot.source().is_some();
        let scratch = self.snapshot.release().await?;
        tracker.owe(None).await?;
        if by_qemu {
            tracker.log(format!("what the guest overwrote meanwhile took {scratch} of scratch"));
        }
        Ok(PointInTime { scratch, ..point })
    }

    /// Reads slower when the guest's disk gets slow, for ever.
    pub(super) async fn spare_the_guest(&self, burden: Burden, teller: &Teller) -> Infallible {
        // Who does not answer now is told of by who waits for its end.
        let mut work = self.snapshot.disk_work().await.unwrap_or_default();
        let mut governor = Governor::new(burden, work);
        let mut told = false;
        loop {
            sleep(governor.next_look()).await;
            work = self.snapshot.disk_work().await.unwrap_or(work);
            governor.look(work, teller.per_second());
            self.pace.set(governor.limit());
            // Once: it may come and go for hours.
            if let (Some(limit), true, false) = (governor.limit(), governor.stepped_back(), told) {
                told = true;
                teller.log(format!(
                    "the guest's disk got slow: reading steps back whenever it does, to {}/s now",
                    ByteSize(limit)
                ));
            }
        }
    }
}

fn told(point: &PointInTime) -> String {
    let PointInTime { consistency, window_micros, frozen, fuse, stopped, .. } = point;
    let window = Duration::from_micros(*window_micros);
    match frozen {
        _ if *stopped => format!(
            "the guest was shut down and runs again after {window:.1?}, {consistency} consistent"
        ),
        0 => format!("point in time taken in {window:.1?}, {consistency} consistent"),
        _ => format!(
            "the guest froze {frozen} filesystems for {window:.1?}, {} fuse, {consistency} \
             consistent",
            if *fuse { "with a" } else { "without a" }
        ),
    }
}
