//! Which of a QEMU's disks is the instance's boot volume.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use crate::{
    error::{Context, Error, Reason, Result},
    hypervisor::qmp::{BlockDevice, DevicePath, DeviceStatistics, NodeRef},
    model::{ByteSize, instance::Instance},
};

/// The disk that an instance boots from, in its QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BootDisk {
    pub device: DevicePath,
    /// The node that the device uses.
    pub node: NodeRef,
    /// Whether the guest sees the volume's bytes as they are.
    pub raw: bool,
    /// What the guest sees.
    pub size: ByteSize,
}

/// What a path leads to, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identity {
    Device(u64),
    File { device: u64, inode: u64 },
}

/// Finds the boot disk of `instance` among QEMU's `devices`; `used` says
/// which node each uses. Blocks.
pub(super) fn boot_disk(
    instance: &Instance,
    devices: &[BlockDevice],
    used: &[DeviceStatistics],
) -> Result<BootDisk> {
    let volume = &instance.boot_volume;
    let wanted = identity(volume).context(Reason::VolumeUnavailable, || {
        format!("cannot find the boot volume {}", volume.display())
    })?;
    let is_it = |device: &&BlockDevice| {
        let disk = device.inserted.as_ref();
        disk.is_some_and(|disk| identity(Path::new(&disk.image.filename)).ok() == Some(wanted))
    };
    let mut found = devices.iter().filter(is_it);
    let refused = |why: &str| {
        let context = format!("no snapshot of instance {:?} can be taken: {why}", instance.name);
        Err(Error::new(Reason::SnapshotRefused, context).field("instance_id"))
    };
    let (device, disk) = match (found.next(), found.next()) {
        (Some(BlockDevice { qdev, inserted: Some(disk), .. }), None) => (qdev, disk),
        (None, _) | (Some(_), None) => {
            return refused(&format!(
                "none of its QEMU's disks is its boot volume {}",
                volume.display()
            ))
            .map_err(|error| {
                error.advice("`boot_volume` in the instance's file must be the file or device that QEMU has open")
            });
        }
        (Some(_), Some(_)) => return refused("its QEMU has its boot volume open more than once"),
    };
    let Some(device) = device else {
        return refused("no device of its QEMU uses its boot volume");
    };
    if disk.read_only {
        return refused("its QEMU has its boot volume open for reading only");
    }
    let node = used.iter().find(|used| used.qdev.as_ref() == Some(device));
    let Some(node) = node.and_then(|used| used.node_name.clone()) else {
        return refused("its QEMU does not tell which node its boot disk uses");
    };
    if disk.driver == "copy-before-write" {
        return refused(
            "its boot disk has a copy-before-write filter: a backup of it is under way",
        );
    }
    let raw = matches!(disk.driver.as_str(), "raw" | "file" | "host_device");
    let size = match raw {
        // QEMU counts whole sectors.
        true => exact_size(volume, disk.image.virtual_size)
            .context(Reason::VolumeUnavailable, || {
                format!("cannot measure the boot volume {}", volume.display())
            })?,
        false => disk.image.virtual_size,
    };
    Ok(BootDisk { device: device.clone(), node, raw, size: ByteSize(size) })
}

fn identity(path: &Path) -> io::Result<Identity> {
    let found = fs::metadata(path)?;
    Ok(match found.file_type().is_block_device() {
        true => Identity::Device(found.rdev()),
        false => Identity::File { device: found.dev(), inode: found.ino() },
    })
}

/// A file's size is exact, a device's is QEMU's.
fn exact_size(volume: &Path, qemu: u64) -> io::Result<u64> {
    let found = fs::metadata(volume)?;
    Ok(if found.is_file() { found.len() } else { qemu })
}
