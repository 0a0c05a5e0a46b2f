//! Whether a source may be imaged, and how.

use std::{path::Path, sync::Arc};

use super::{Work, tracker::Tracker};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize,
        instance::{Instance, PowerState},
        live::Mode,
    },
    port::{HeldVolume, HostSnapshot, NamedBy, Offer, Pace, Prepared, SnapshotOrder, Writer},
    recorder::Recorder,
};

/// A source that may be imaged.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing uses it, and nothing can while this is held.
    AtRest(Box<dyn HeldVolume>, NamedBy),
    /// Its instance runs, and a snapshot can be taken.
    Running {
        prepared: Box<dyn Prepared>,
        /// How fast it may be read.
        pace: Pace,
        /// Why the host takes none itself.
        why: Option<String>,
    },
}

/// A snapshot of a volume at rest, which is let go: its instance may be
/// started while it is imaged. Where the host has none, the volume itself.
pub(super) async fn free(
    work: &Work,
    (held, named): (Box<dyn HeldVolume>, NamedBy),
    tracker: &Tracker,
) -> Box<dyn HeldVolume> {
    let (path, mark) = (held.facts().path.clone(), held.mark());
    let taken = async {
        let volumes = &work.0.ports.volumes;
        match volumes.host_snapshot(&path, named, Writer::Nobody, Pace::default()).await {
            Ok(Offer::Nothing(why)) => Err(why),
            Err(error) => Err(error.to_string()),
            Ok(Offer::Snapshot(snapshot)) => match snapshot.take().await {
                // Of another file that was put in its place.
                Ok(taken) if taken.mark() != mark => Err("it was written to, or exchanged".into()),
                taken => taken.map_err(|error| error.to_string()),
            },
        }
    };
    match taken.await {
        Ok(taken) => {
            tracker.log(format!(
                "a snapshot of the volume is read ({}), the volume itself is free",
                taken.snapshot()
            ));
            taken
        }
        Err(why) => {
            tracker.log(format!("the volume itself is read, and held meanwhile: {why}"));
            held
        }
    }
}

impl Work {
    /// Whether the source may be imaged now, and how; if it is at rest, holds
    /// it.
    pub(super) async fn preflight(
        &self,
        instance: Option<&Instance>,
        volume: &Path,
        mode: Mode,
        recorder: Arc<Recorder>,
    ) -> Result<Found> {
        if let Some(instance) = instance {
            match self.power_state(instance).await {
                PowerState::Stopped => {}
                PowerState::Running => {
                    let pace = Pace::default();
                    let (host, why) = self.of_host(volume, &pace).await;
                    let order = SnapshotOrder { mode, scratch: self.0.settings.scratch_size, host };
                    let prepared =
                        self.0.ports.hypervisor.prepare(instance, order, recorder).await?;
                    self.check_size(prepared.size(), volume)?;
                    return Ok(Found::Running { prepared, pace, why });
                }
                PowerState::Unknown(why) => {
                    let context =
                        format!("it is unknown whether instance {:?} runs", instance.name);
                    return Err(Error::new(Reason::InstanceRunning, context).because(why).advice(
                        "check that what runs it answers, and `qmp_socket` in the instance's file; imaged never guesses",
                    ));
                }
            }
        }
        let named = instance.map_or(NamedBy::Request, |_| NamedBy::Instance);
        let held = self.0.ports.volumes.hold(volume, named).await;
        let held = held.map_err(|error| match instance {
            Some(_) if error.field_name() == Some("boot_volume") => error.field("instance_id"),
            _ => error,
        })?;
        self.check_size(held.facts().size, volume)?;
        Ok(Found::AtRest(held, named))
    }

    /// The snapshot that the host can take beside a guest, or why it cannot.
    async fn of_host(
        &self,
        volume: &Path,
        pace: &Pace,
    ) -> (Option<Box<dyn HostSnapshot>>, Option<String>) {
        let volumes = &self.0.ports.volumes;
        match volumes.host_snapshot(volume, NamedBy::Instance, Writer::Guest, pace.clone()).await {
            Ok(Offer::Snapshot(snapshot)) => (Some(snapshot), None),
            Ok(Offer::Nothing(why)) => (None, Some(why)),
            Err(error) => (None, Some(error.to_string())),
        }
    }

    fn check_size(&self, size: ByteSize, volume: &Path) -> Result<()> {
        let max = self.0.settings.max_volume;
        if size > max {
            let context = format!(
                "{} is {size} and larger than the {max} that are allowed",
                volume.display()
            );
            return Err(Error::new(Reason::VolumeTooLarge, context)
                .advice("OCI takes images of at most 400 GB; `max_volume_size` sets the limit")
                .field("boot_volume"));
        }
        Ok(())
    }
}
