//! Disks that a thread of their own serves, and QEMUs that die of it.
//!
//! Before 8.2.1 an NBD client that goes away from the export of such a disk
//! is told of in that disk's thread, and QEMU aborts:
//! `nbd_blockdev_client_closed: Assertion qemu_in_main_thread() && nbd_server
//! failed` (seen with 7.2.22; the assertion came with the fix of
//! CVE-2024-7409, and older ones change their lists in the wrong thread). An
//! imaged that is killed goes away, so nothing that imaged does could make it
//! safe. Mended by QEMU's f816310d0c32, "nbd/server: only traverse
//! NBDExport->clients from main loop thread", in 8.2.1 and 9.0.

use super::{COMMAND, within};
use crate::{
    error::{Error, Reason, Result},
    hypervisor::qmp::{Command, DevicePath, Qmp, Version},
    model::instance::Instance,
};

const MENDED: Version = Version { major: 8, minor: 2, micro: 1 };

/// Fails if reading a snapshot of `device` could end the QEMU.
pub(super) async fn check(qmp: &Qmp, instance: &Instance, device: &DevicePath) -> Result<()> {
    let version = qmp.version();
    if *version >= MENDED || !has_its_own(qmp, device).await? {
        return Ok(());
    }
    let context = format!(
        "no snapshot of instance {:?} can be taken: an I/O thread serves its boot disk, and QEMU \
         {version} may die when the reader of such a disk's snapshot goes away",
        instance.name
    );
    Err(Error::new(Reason::SnapshotRefused, context)
        .advice(
            "run it by QEMU 8.2.1 or newer, or give its boot disk no `iothread`; or shut it down: \
             a stopped instance is imaged at rest",
        )
        .field("instance_id"))
}

/// Whether a thread of its own serves `device`. What cannot be told counts
/// as one.
async fn has_its_own(qmp: &Qmp, device: &DevicePath) -> Result<bool> {
    if qmp.execute(Command::query_iothreads(), within(COMMAND)).await?.is_empty() {
        return Ok(false);
    }
    if let Some(thread) = asked(qmp, Command::device_iothread(device.clone())).await? {
        return Ok(!thread.is_empty());
    }
    // A SCSI disk is served as its controller is, which has the bus below it.
    let bus = asked(qmp, Command::device_bus(device.clone())).await?;
    let controller = bus.as_deref().and_then(|bus| bus.rsplit_once('/')?.0.parse().ok());
    let Some(controller) = controller else { return Ok(true) };
    let thread = asked(qmp, Command::device_iothread(controller)).await?;
    Ok(thread.is_none_or(|thread| !thread.is_empty()))
}

/// `None`: the device has no such property.
async fn asked(qmp: &Qmp, question: Command<String>) -> Result<Option<String>> {
    match qmp.execute(question, within(COMMAND)).await {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.reason() == Reason::HypervisorRefused => Ok(None),
        Err(error) => Err(error),
    }
}
