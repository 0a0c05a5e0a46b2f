//! What QEMU tells without being asked.

use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use crate::hypervisor::refusal::printable;

macro_rules! events {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)+) => {
        /// Events that matter to a capture (QEMU, "QMP reference: events").
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum EventKind {
            $($(#[$doc])* $kind,)+
            /// Any other, by name.
            Other(String),
        }

        impl EventKind {
            fn of(name: &str) -> Self {
                match name {
                    $($name => Self::$kind,)+
                    other => Self::Other(printable(other)),
                }
            }

            /// Its name on the wire.
            #[must_use]
            pub fn name(&self) -> &str {
                match self {
                    $(Self::$kind => $name,)+
                    Self::Other(name) => name,
                }
            }
        }
    };
}

events! {
    /// QEMU ends, or the guest has shut down; `reason` says who wanted it.
    Shutdown = "SHUTDOWN",
    /// The guest was asked to shut down.
    Powerdown = "POWERDOWN",
    /// The guest began anew.
    Reset = "RESET",
    /// The virtual CPUs were stopped, by whomever.
    Stop = "STOP",
    /// They run again.
    Resume = "RESUME",
    /// The guest sleeps, in memory.
    Suspend = "SUSPEND",
    /// The guest saved itself to disk.
    SuspendDisk = "SUSPEND_DISK",
    /// The guest is awake again.
    Wakeup = "WAKEUP",
    /// The guest's system failed.
    GuestPanicked = "GUEST_PANICKED",
    /// The guest's system failed and began another kernel.
    GuestCrashloaded = "GUEST_CRASHLOADED",
    /// The guest's watchdog went off.
    Watchdog = "WATCHDOG",
    /// A disk failed the guest; `action` says whether the VM was stopped.
    BlockIoError = "BLOCK_IO_ERROR",
    /// A disk image is damaged.
    BlockImageCorrupted = "BLOCK_IMAGE_CORRUPTED",
    /// A node has more data than its threshold.
    BlockWriteThreshold = "BLOCK_WRITE_THRESHOLD",
    /// A disk was taken out of the VM.
    DeviceDeleted = "DEVICE_DELETED",
    /// The guest refused to give a device back.
    DeviceUnplugGuestError = "DEVICE_UNPLUG_GUEST_ERROR",
    /// An export has ended.
    BlockExportDeleted = "BLOCK_EXPORT_DELETED",
    /// A block job is done; `error` when it failed.
    BlockJobCompleted = "BLOCK_JOB_COMPLETED",
    /// A block job was cancelled.
    BlockJobCancelled = "BLOCK_JOB_CANCELLED",
    /// A block job met an I/O error; `action` says whether it paused.
    BlockJobError = "BLOCK_JOB_ERROR",
    /// A job's `status` is another one now.
    JobStatusChange = "JOB_STATUS_CHANGE",
    /// An agent in the guest opened or closed its port.
    VserportChange = "VSERPORT_CHANGE",
}

/// Something that happened in QEMU or in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// To what, and why.
    pub details: Details,
}

/// The members of an event's data that matter. Which of them an event has,
/// QEMU's reference says; texts are bounded and free of control characters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Details {
    /// A job, an export, a port.
    #[serde(deserialize_with = "text")]
    pub id: Option<String>,
    /// A device, or the job of a block job's event.
    #[serde(deserialize_with = "text")]
    pub device: Option<String>,
    /// A device's path in QEMU's object tree.
    #[serde(deserialize_with = "text")]
    pub path: Option<String>,
    /// A block node.
    #[serde(deserialize_with = "text")]
    pub node_name: Option<String>,
    /// Why.
    #[serde(deserialize_with = "text")]
    pub reason: Option<String>,
    /// What QEMU did about it.
    #[serde(deserialize_with = "text")]
    pub action: Option<String>,
    /// The operation that failed: `read` or `write`.
    #[serde(deserialize_with = "text")]
    pub operation: Option<String>,
    /// The new state.
    #[serde(deserialize_with = "text")]
    pub status: Option<String>,
    /// What went wrong.
    #[serde(deserialize_with = "text")]
    pub error: Option<String>,
    /// Whether the guest caused it.
    pub guest: Option<bool>,
    /// Whether the disk is full.
    pub nospace: Option<bool>,
    /// Whether a port is open in the guest.
    pub open: Option<bool>,
}

fn text<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.as_deref().map(printable))
}

impl Event {
    /// From its name and data. Data of an unexpected form is left out: that
    /// it happened counts.
    pub(super) fn read(name: &str, data: Option<&RawValue>) -> Self {
        let kind = EventKind::of(name);
        let details = match (&kind, data) {
            (EventKind::Other(_), _) | (_, None) => None,
            (_, Some(data)) => serde_json::from_str(data.get()).ok(),
        };
        Self { kind, details: details.unwrap_or_default() }
    }

    /// Its details as they are recorded.
    pub(super) fn recorded(&self) -> Option<Value> {
        let Ok(Value::Object(mut details)) = serde_json::to_value(&self.details) else {
            return None;
        };
        details.retain(|_, value| !value.is_null());
        (!details.is_empty()).then_some(Value::Object(details))
    }
}
