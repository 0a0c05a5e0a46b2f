//! Whether anything was written to a volume while it was read.
//!
//! `O_EXCL` and QEMU's locks keep out who respects them. A QEMU that sees the
//! device through a node of its own does not: its locks are another inode's
//! (seen: two nodes made by mknod(2)). What they wrote is seen here.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::holder::Host;
use crate::{
    error::{Context, Error, Reason, Result},
    model::upload::VolumeMark,
    sys::stat::Identity,
};

/// What was ever written to a volume, as the kernel counts it.
#[derive(Debug)]
pub(super) struct Writes {
    /// Which volume, where that can be told after a restart of imaged.
    volume: Option<String>,
    counters: Counters,
    before: Vec<u64>,
}

/// Where the kernel counts.
#[derive(Debug)]
enum Counters {
    /// The `stat` file of a device in sysfs.
    Device(PathBuf),
    /// A file's size and time of modification.
    File,
}

impl Writes {
    /// Remembers what was written until now. Everything that was written
    /// before must be on the device.
    pub(super) fn until_now(host: &Host, volume: Identity, file: &File) -> io::Result<Self> {
        let counters = match volume {
            Identity::BlockDevice(number) => Counters::Device(host.device_dir(number).join("stat")),
            Identity::File { .. } => Counters::File,
        };
        let before = counters.read(file)?;
        let volume = match volume {
            Identity::File { .. } => told_file(file).ok(),
            Identity::BlockDevice(number) => told_device(&host.device_dir(number)).ok(),
        };
        Ok(Self { volume, counters, before })
    }

    /// What tells a later process whether anything was written since.
    pub(super) fn mark(&self) -> Option<VolumeMark> {
        let volume = self.volume.clone()?;
        Some(VolumeMark { volume, writes: self.before.clone() })
    }

    /// Fails when something was written since.
    pub(super) fn none_since(&self, file: &File, path: &Path) -> Result<()> {
        let now = self.counters.read(file).context(Reason::VolumeUnavailable, || {
            format!("cannot find out whether {} was written to", path.display())
        })?;
        if now == self.before {
            return Ok(());
        }
        let context = format!("the volume {} was written to while it was read", path.display());
        Err(Error::new(Reason::VolumeHeld, context)
            .advice("the image would be torn: end what writes to the volume, then ask again"))
    }
}

impl Counters {
    fn read(&self, file: &File) -> io::Result<Vec<u64>> {
        match self {
            Self::Device(stat) => Ok(written(&fs::read_to_string(stat)?)),
            Self::File => {
                let metadata = file.metadata()?;
                let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
                Ok(vec![metadata.len(), seconds.cast_unsigned(), nanoseconds.cast_unsigned()])
            }
        }
    }
}

/// A file, also over a reboot.
fn told_file(file: &File) -> io::Result<String> {
    let facts = file.metadata()?;
    Ok(format!("file {} {}", facts.dev(), facts.ino()))
}

/// A device until it goes: no other has its sequence number in this boot
/// (`diskseq`, since Linux 5.15; a partition has its disk's).
fn told_device(dir: &Path) -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let number = fs::read_to_string(dir.join("dev"))?;
    let sequence = fs::read_to_string(dir.join("diskseq"))
        .or_else(|_| fs::read_to_string(dir.join("../diskseq")))?;
    Ok(format!("device {} {} {}", number.trim(), sequence.trim(), boot.trim()))
}

/// Requests and sectors that were written and discarded: fields 5, 7, 12 and
/// 14 of the kernel's Documentation/block/stat.rst. Flushes are not counted:
/// they change nothing.
fn written(stat: &str) -> Vec<u64> {
    let fields: Vec<u64> = stat.split_whitespace().map_while(|field| field.parse().ok()).collect();
    [4, 6, 11, 13].iter().filter_map(|index| fields.get(*index).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_and_discards_count_and_reads_do_not() {
        let stat = "1 2 3 4 50 6 70 8 9 10 11 120 13 140 15 16 17";
        assert_eq!(written(stat), [50, 70, 120, 140]);
        // Before Linux 4.18 there are no discards.
        assert_eq!(written("1 2 3 4 50 6 70 8 9 10 11"), [50, 70]);
    }
}
