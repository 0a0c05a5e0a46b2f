//! Virtual machines of this host.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{CompartmentId, ImageId, InstanceId};

/// An instance, as its file in `instances.d` or its hypervisor describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Given, or derived from the host's and the instance's name.
    pub id: InstanceId,
    /// Name of the file without `.toml`, or the domain's; unique on the host.
    pub name: String,
    /// Where it belongs, and its images unless asked otherwise.
    pub compartment_id: CompartmentId,
    /// The disk it boots from: a block device or a file.
    pub boot_volume: PathBuf,
    /// What runs it.
    pub machine: Machine,
    /// How it is frozen.
    pub freeze: Freeze,
    /// How long its guest may take to shut down.
    pub shutdown_seconds: u32,
    /// Image it was launched from.
    pub base_image_id: Option<ImageId>,
    /// OCI shape, e.g. `VM.Standard2.1`.
    pub shape: Option<String>,
    /// The unit that starts it.
    pub systemd_unit: Option<String>,
    /// Its operating system, as its owner says.
    pub os: OperatingSystem,
}

/// What runs an instance, and how it is spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Machine {
    /// A QEMU process with sockets for imaged alone.
    Qemu(Sockets),
    /// A domain of libvirt's `qemu:///system`.
    Domain(Domain),
}

impl Machine {
    /// The sockets of a QEMU that is no domain.
    #[must_use]
    pub const fn sockets(&self) -> Option<&Sockets> {
        match self {
            Self::Qemu(sockets) => Some(sockets),
            Self::Domain(_) => None,
        }
    }
}

/// Where a QEMU and its guest listen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sockets {
    /// QEMU's machine protocol.
    pub qmp_socket: PathBuf,
    /// The guest's agent, where it has one.
    pub agent_socket: Option<PathBuf>,
}

/// A domain of libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Domain {
    /// Its UUID, which it keeps when it is renamed.
    pub domain: String,
}

/// How a guest is frozen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freeze {
    /// Longest freeze; none: 30 s, of Windows 8 s.
    pub limit: Option<Duration>,
    /// Whether its agent runs a hook that freezes the applications, too. It
    /// cannot be asked.
    pub hook: bool,
}

/// Name and version as OCI writes them (`Oracle Linux`, `7.2`). What nobody
/// said is `UNKNOWN`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OperatingSystem {
    /// The distribution.
    #[serde(rename = "operatingSystem")]
    pub name: String,
    /// Its version.
    #[serde(rename = "operatingSystemVersion")]
    pub version: String,
}

impl Default for OperatingSystem {
    fn default() -> Self {
        Self { name: "UNKNOWN".into(), version: "UNKNOWN".into() }
    }
}

/// Whether the instance runs, as far as the host can see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PowerState {
    /// It does.
    Running,
    /// It does not.
    Stopped,
    /// It could not be determined, and why.
    Unknown(String),
}
