//! Virtual machines of this host.

use std::{path::PathBuf, time::Duration};

use super::{CompartmentId, ImageId, InstanceId};

/// An instance as its file in `instances.d` describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Given, or derived from the host's and the instance's name.
    pub id: InstanceId,
    /// Name of the file without `.toml`; unique on the host.
    pub name: String,
    /// Where it belongs, and its images unless asked otherwise.
    pub compartment_id: CompartmentId,
    /// The disk it boots from: a block device or a file.
    pub boot_volume: PathBuf,
    /// QEMU's machine protocol socket.
    pub qmp_socket: PathBuf,
    /// The guest agent's socket, where the guest has an agent.
    pub agent_socket: Option<PathBuf>,
    /// How it is frozen.
    pub freeze: Freeze,
    /// Image it was launched from.
    pub base_image_id: Option<ImageId>,
    /// OCI shape, e.g. `VM.Standard2.1`.
    pub shape: Option<String>,
    /// The unit that starts it.
    pub systemd_unit: Option<String>,
    /// Its operating system, as its owner says.
    pub os: OperatingSystem,
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
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
    /// Something answers on its QMP socket.
    Running,
    /// Nothing answers there.
    Stopped,
    /// It could not be determined, and why.
    Unknown(String),
}
