//! Snapshots of thin logical volumes.
//!
//! ```text
//! lvs ─► lvcreate --snapshot --addtag ─► held and read ─► lvremove
//!                                └ a dead daemon's: found by its tag, removed
//! ```
//! LVM's metadata is the journal: the tag is written by the step that makes
//! the snapshot. LVM suspends the volume for it, so that each write lies
//! wholly before or wholly after.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, mpsc::SyncSender},
    thread,
    time::Duration,
};

use nix::sys::stat::{major, minor};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::{
    Held, Openings, ReaderSettings, Wanted,
    hold::hold,
    holder::Host,
    open::Named,
    program::Program,
    reader::{self, AsItIs, Past},
    writes::Writes,
};
use crate::{
    error::{Context, Reason, Result},
    model::{ByteSize, image::SnapshotKind, upload::VolumeMark},
    port::{BoxFuture, HeldVolume, HostSnapshot, Pace, Piece, VolumeFacts, Writer},
    steps,
    sys::stat::Identity,
};

/// Fullest metadata of a pool that gets a snapshot. Its guest takes more of
/// it with each block that it no longer shares, and stands still when there
/// is none.
const METADATA_PERCENT: f64 = 70.0;

/// How often a snapshot that is in use is tried to be removed again.
const REMOVALS: u32 = 20;
/// Between two tries: the end of a reading takes a moment.
const PAUSE: Duration = Duration::from_millis(250);

/// LVM's programs on this host, which snapshot thin logical volumes.
#[derive(Debug, Clone)]
pub struct Lvm {
    lvs: Program,
    lvcreate: Program,
    lvremove: Program,
    /// Tells this daemon's snapshots from all others.
    tag: String,
}

impl Lvm {
    /// Finds them, and tries whether this process may use them. `owner` tells
    /// this daemon from others on any host. Blocks, a minute at most.
    ///
    /// # Errors
    ///
    /// Why there are no snapshots here, for people.
    pub fn find(owner: &str) -> std::result::Result<Self, String> {
        let found = |name| Program::find(name).ok_or_else(|| format!("{name} is not installed"));
        let tag = format!("imaged-{owner}");
        let (lvs, lvcreate, lvremove) = (found("lvs")?, found("lvcreate")?, found("lvremove")?);
        let lvm = Self { lvs, lvcreate, lvremove, tag };
        lvm.left().map_err(|error| match error.causes().next() {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        })?;
        Ok(lvm)
    }

    /// The logical volumes that `select` chooses (lvmreport(7)).
    fn select(&self, select: &str) -> Result<Vec<LogicalVolume>> {
        const FIELDS: &str = "vg_name,lv_name,segtype,pool_lv,lv_size,data_percent,\
                              metadata_percent";
        let report = ["--reportformat", "json", "--units", "b", "--nosuffix", "--options", FIELDS];
        let told = self.lvs.run(&[&report[..], &["--select", select]].concat())?;
        let told: Report = serde_json::from_slice(&told)
            .context(Reason::VolumeUnavailable, || "lvs speaks in other words than was expected")?;
        Ok(told.report.into_iter().flat_map(|group| group.lv).collect())
    }

    /// Snapshots of this daemon.
    fn left(&self) -> Result<Vec<LogicalVolume>> {
        self.select(&format!("lv_tags={}", self.tag))
    }

    /// Removes what a dead daemon left: how many there were. Blocks.
    pub(super) fn sweep(&self) -> Result<usize> {
        let left = self.left()?;
        for snapshot in &left {
            self.remove(&snapshot.name())?;
        }
        Ok(left.len())
    }

    /// Removes a snapshot. One that is gone is removed.
    fn remove(&self, name: &str) -> Result<()> {
        let mut tries = 0;
        loop {
            let removed = self.lvremove.run(&["--yes", "--autobackup", "n", name]);
            match removed {
                Ok(_) => return Ok(()),
                Err(error) if tries == REMOVALS => return Err(error),
                Err(_) if self.left()?.iter().all(|left| left.name() != name) => return Ok(()),
                Err(_) => thread::sleep(PAUSE),
            }
            tries += 1;
        }
    }
}

#[derive(Deserialize)]
struct Report {
    report: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    lv: Vec<LogicalVolume>,
}

/// As lvs tells of one: every value is a string.
#[derive(Debug, Deserialize)]
struct LogicalVolume {
    vg_name: String,
    lv_name: String,
    segtype: String,
    pool_lv: String,
    lv_size: String,
    data_percent: String,
    metadata_percent: String,
}

impl LogicalVolume {
    fn name(&self) -> String {
        format!("{}/{}", self.vg_name, self.lv_name)
    }

    /// Bytes that its data takes, or is taken of it.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a percentage with two digits is rounded by more"
    )]
    fn used(&self) -> Option<u64> {
        let (size, percent) = (self.lv_size.parse::<u64>().ok()?, self.data_percent.parse::<f64>());
        Some((size as f64 * (percent.ok()? / 100.0)).ceil() as u64)
    }
}

/// A thin volume, and room for a snapshot of it.
#[derive(Debug)]
pub(super) struct Thin {
    lvm: Arc<Lvm>,
    host: Host,
    /// Of the volume.
    identity: Identity,
    name: String,
    group: String,
    writer: Writer,
    pace: Pace,
    settings: ReaderSettings,
}

/// Looks whether there can be a snapshot of the device `named`, and why not.
/// Blocks.
pub(super) fn offer(
    lvm: &Arc<Lvm>,
    host: &Host,
    named: &Named,
    wanted: Wanted,
) -> Result<std::result::Result<Thin, String>> {
    let identity = named.identity;
    let Identity::BlockDevice(number) = identity else { return Ok(Err("it is a file".into())) };
    let uuid = fs::read_to_string(host.device_dir(number).join("dm/uuid")).unwrap_or_default();
    if !uuid.starts_with("LVM-") {
        return Ok(Err("it is a device, and no logical volume".into()));
    }
    let select = format!("lv_kernel_major={} && lv_kernel_minor={}", major(number), minor(number));
    let Some(volume) = lvm.select(&select)?.into_iter().next() else {
        return Ok(Err("lvs does not know it".into()));
    };
    if volume.segtype != "thin" {
        // Its snapshots slow the guest down, and break when they are full.
        return Ok(Err(format!(
            "its logical volume is {}, and only thin ones are snapshotted",
            volume.segtype
        )));
    }
    let select = format!("vg_name={} && lv_name={}", volume.vg_name, volume.pool_lv);
    let Some(pool) = lvm.select(&select)?.into_iter().next() else {
        return Ok(Err("lvs does not know its pool".into()));
    };
    if let Some(why) = lacks(&volume, &pool) {
        return Ok(Err(why));
    }
    let Wanted { writer, pace, settings } = wanted;
    Ok(Ok(Thin {
        lvm: Arc::clone(lvm),
        host: host.clone(),
        identity,
        name: volume.name(),
        group: volume.vg_name,
        writer,
        pace,
        settings,
    }))
}

/// What `pool` lacks for a snapshot of `volume`. A full pool stops every
/// guest that is on it. With room for all that the volume has, it does not get
/// full for the snapshot's sake.
fn lacks(volume: &LogicalVolume, pool: &LogicalVolume) -> Option<String> {
    let size = pool.lv_size.parse::<u64>().ok();
    let (Some(used), Some(taken), Some(size)) = (volume.used(), pool.used(), size) else {
        return Some(format!("it is not known how full its pool {} is", pool.name()));
    };
    let free = size.saturating_sub(taken);
    if free < used {
        return Some(format!(
            "its pool {} has {} left, and may need {} beside a snapshot",
            pool.name(),
            ByteSize(free),
            ByteSize(used)
        ));
    }
    match pool.metadata_percent.parse::<f64>() {
        Ok(percent) if percent <= METADATA_PERCENT => None,
        _ => Some(format!(
            "the metadata of its pool {} is {} % full, and {METADATA_PERCENT} are allowed",
            pool.name(),
            pool.metadata_percent
        )),
    }
}

impl Thin {
    /// The point in time.
    fn take(self) -> Result<ThinSnapshot> {
        let Self { lvm, host, identity, name, group, writer, pace, settings } = self;
        let random =
            getrandom::u64().context(Reason::Internal, || "the kernel gives no random numbers")?;
        let own = format!("imaged-{random:016x}");
        let named = ["--name", &own, "--addtag", &lvm.tag, &name];
        // Active at once, and of no use to anyone who writes.
        let how = ["--snapshot", "--setactivationskip", "n", "--permission", "r"];
        let quiet = ["--yes", "--autobackup", "n"];
        lvm.lvcreate.run(&[&quiet[..], &how, &named].concat())?;
        // A guest may be frozen: nobody is asked where it is (lvm(8), "LV path").
        let path = PathBuf::from(format!("/dev/{group}/{own}"));
        let removal = Removal { lvm, name: format!("{group}/{own}") };
        let mark = match (writer, identity) {
            (Writer::Guest, _) => None,
            (Writer::Nobody, identity) => marked(&host, identity)?,
        };
        let held = hold(&host, std::slice::from_ref(&path), settings, &path)?;
        Ok(ThinSnapshot { held, pace, mark, _removal: removal })
    }
}

/// What was written to the device until now.
fn marked(host: &Host, identity: Identity) -> Result<Option<VolumeMark>> {
    let of = fs::File::open("/dev/null").and_then(|any| Writes::until_now(host, identity, &any));
    Ok(of.context(Reason::VolumeUnavailable, || "cannot measure the volume")?.mark())
}

/// A [`Thin`] with the threads that it may take.
#[derive(Debug)]
pub(super) struct Ready {
    pub thin: Thin,
    pub openings: Openings,
}

impl HostSnapshot for Ready {
    fn kind(&self) -> SnapshotKind {
        SnapshotKind::Lvm
    }

    /// What is dirty is in the guest, or in the page cache of whoever has the
    /// volume: LVM writes it back while it suspends.
    fn settle(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn take(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn HeldVolume>>> {
        Box::pin(async move {
            let Self { thin, openings } = *self;
            let path = PathBuf::from(&thin.name);
            let taken = openings.run(&path, move || thin.take());
            let taken = steps::effect("host snapshot", taken).await?;
            Ok(Box::new(taken) as Box<dyn HeldVolume>)
        })
    }
}

/// A snapshot that is read.
#[derive(Debug)]
struct ThinSnapshot {
    /// Let go before it is removed.
    held: Held,
    pace: Pace,
    /// The volume's, when it was taken.
    mark: Option<VolumeMark>,
    _removal: Removal,
}

impl HeldVolume for ThinSnapshot {
    fn facts(&self) -> &VolumeFacts {
        self.held.facts()
    }

    fn snapshot(&self) -> SnapshotKind {
        SnapshotKind::Lvm
    }

    fn mark(&self) -> Option<VolumeMark> {
        self.mark.clone()
    }

    fn begin_at(&mut self, extent: u64) {
        self.held.begin_at(extent);
    }

    fn read(&mut self, pieces: &SyncSender<Piece>, stop: &CancellationToken) -> Result<()> {
        let Held { source, settings, from, .. } = &self.held;
        let guest: (&mut dyn Past, &Pace) = (&mut AsItIs, &self.pace);
        reader::read(source, *settings, *from, Some(guest), pieces, stop)
    }
}

/// Removes a snapshot when it is dropped, on a thread of its own; what cannot
/// be removed is left to the next start.
#[derive(Debug)]
struct Removal {
    lvm: Arc<Lvm>,
    name: String,
}

impl Drop for Removal {
    fn drop(&mut self) {
        let (lvm, name) = (Arc::clone(&self.lvm), self.name.clone());
        let removing = thread::Builder::new().name("lvremove".into()).spawn(move || {
            steps::reached("before", "host snapshot removed");
            if let Err(error) = lvm.remove(&name) {
                tracing::error!(snapshot = name, "left to the next start: {error:?}");
            }
            steps::reached("after", "host snapshot removed");
        });
        if let Err(error) = removing {
            tracing::error!(snapshot = self.name, "left to the next start: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(json: &str) -> LogicalVolume {
        serde_json::from_str(json).unwrap()
    }

    fn pool(data: &str, metadata: &str) -> LogicalVolume {
        told(&format!(
            r#"{{"vg_name":"vg0","lv_name":"pool","segtype":"thin-pool",
                "pool_lv":"","lv_size":"10737418240","data_percent":"{data}",
                "metadata_percent":"{metadata}"}}"#
        ))
    }

    #[test]
    fn a_pool_that_could_get_full_is_told_with_its_numbers() {
        let volume = told(
            r#"{"vg_name":"vg0","lv_name":"web","segtype":"thin",
                "pool_lv":"pool","lv_size":"8589934592","data_percent":"50.00",
                "metadata_percent":""}"#,
        );
        assert_eq!(lacks(&volume, &pool("40.00", "12.50")), None);
        assert_eq!(lacks(&volume, &pool("60.00", "70.00")), None);
        insta::assert_snapshot!(lacks(&volume, &pool("60.01", "12.50")).unwrap(),
            @"its pool vg0/pool has 4.00 GiB left, and may need 4.00 GiB beside a snapshot");
        insta::assert_snapshot!(lacks(&volume, &pool("40.00", "70.01")).unwrap(),
            @"the metadata of its pool vg0/pool is 70.01 % full, and 70 are allowed");
        insta::assert_snapshot!(lacks(&volume, &pool("", "")).unwrap(),
            @"it is not known how full its pool vg0/pool is");
    }
}
