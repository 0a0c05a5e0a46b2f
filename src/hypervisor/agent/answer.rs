//! What a guest agent answers, as far as imaged reads it. The guest decides
//! what it says: texts are bounded and free of control characters, and
//! nothing here may be taken for true without need.

use std::collections::BTreeSet;

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Deserializer};

use crate::hypervisor::refusal::printable;

fn text<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    Ok(printable(&String::deserialize(from)?))
}

fn text_if_any<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.as_deref().map(printable))
}

/// Nothing that matters.
#[derive(Debug, Deserialize)]
pub(super) struct Nothing {}

/// What an agent can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// QEMU's version that the agent belongs to.
    pub version: String,
    enabled: BTreeSet<String>,
}

impl Info {
    /// Whether the guest lets `command` be run, e.g. `guest-exec`: known to
    /// this agent, and not disabled by the guest's administrator.
    #[must_use]
    pub fn allows(&self, command: &str) -> bool {
        self.enabled.contains(command)
    }
}

impl<'de> Deserialize<'de> for Info {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(deserialize_with = "text")]
            version: String,
            supported_commands: Vec<Supported>,
        }
        #[derive(Deserialize)]
        struct Supported {
            #[serde(deserialize_with = "text")]
            name: String,
            enabled: bool,
        }
        let Raw { version, supported_commands } = Raw::deserialize(from)?;
        let enabled = supported_commands.into_iter().filter(|command| command.enabled);
        Ok(Self { version, enabled: enabled.map(|command| command.name).collect() })
    }
}

/// The agent's own view: what another program in the guest has frozen it does
/// not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FreezeStatus {
    /// Nothing is frozen.
    Thawed,
    /// Filesystems are frozen.
    Frozen,
}

/// A guest's operating system. An agent leaves out what it does not know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct OsInfo {
    /// `debian`, `ol`, `mswindows`, …
    #[serde(deserialize_with = "text_if_any")]
    pub id: Option<String>,
    /// `Debian GNU/Linux`.
    #[serde(deserialize_with = "text_if_any")]
    pub name: Option<String>,
    /// `Debian GNU/Linux 12 (bookworm)`.
    #[serde(deserialize_with = "text_if_any")]
    pub pretty_name: Option<String>,
    /// `12 (bookworm)`.
    #[serde(deserialize_with = "text_if_any")]
    pub version: Option<String>,
    /// `12`.
    #[serde(deserialize_with = "text_if_any")]
    pub version_id: Option<String>,
    /// `6.1.0-32-amd64`.
    #[serde(deserialize_with = "text_if_any")]
    pub kernel_release: Option<String>,
    /// `x86_64`.
    #[serde(deserialize_with = "text_if_any")]
    pub machine: Option<String>,
}

impl OsInfo {
    /// Whether it is Windows, whose freeze the system ends after ten seconds.
    #[must_use]
    pub fn is_windows(&self) -> bool {
        self.id.as_deref() == Some("mswindows")
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct HostName {
    #[serde(deserialize_with = "text")]
    pub(super) host_name: String,
}

/// A mounted filesystem on disks of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Filesystem {
    /// Where it is mounted.
    #[serde(deserialize_with = "text")]
    pub mountpoint: String,
    /// The device's name in the guest.
    #[serde(deserialize_with = "text")]
    pub name: String,
    /// `ext4`, `xfs`, `NTFS`, …
    #[serde(rename = "type", deserialize_with = "text")]
    pub kind: String,
    /// What it lies on; empty where the agent cannot tell.
    #[serde(default, rename = "disk")]
    pub disks: Vec<Disk>,
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Disk {
    /// `virtio`, `scsi`, `iscsi`, `nvme`, …
    #[serde(deserialize_with = "text")]
    pub bus_type: String,
    /// Its serial number.
    #[serde(default, deserialize_with = "text_if_any")]
    pub serial: Option<String>,
    /// Its device in the guest.
    #[serde(default, deserialize_with = "text_if_any")]
    pub dev: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Started {
    pub(super) pid: u32,
}

/// A program in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ExecStatus {
    /// Whether it has ended. The agent then forgets it: another question is
    /// refused.
    pub exited: bool,
    /// Its exit status.
    #[serde(rename = "exitcode")]
    pub exit_code: Option<i64>,
    /// The signal that ended it.
    pub signal: Option<i64>,
    /// What it printed, if that was wanted, in base64.
    #[serde(rename = "out-data")]
    out_data: Option<String>,
    /// The same of its errors.
    #[serde(rename = "err-data")]
    err_data: Option<String>,
}

impl ExecStatus {
    /// What it printed; `None`: that cannot be read.
    #[must_use]
    pub fn printed(&self) -> Option<Vec<u8>> {
        decoded(self.out_data.as_deref())
    }

    /// Its last words on its errors, as one line fit to be shown.
    #[must_use]
    pub fn complaint(&self) -> String {
        let said = decoded(self.err_data.as_deref()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let last = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
        last.chars().filter(|c| !c.is_control()).take(MAX_COMPLAINT).collect()
    }
}

/// Longest complaint that is told: a program of a guest may say anything.
const MAX_COMPLAINT: usize = 300;

/// An agent says nothing of a program that printed nothing.
fn decoded(data: Option<&str>) -> Option<Vec<u8>> {
    BASE64.decode(data.unwrap_or_default()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_enabled_commands_are_allowed() {
        let info: Info = serde_json::from_str(
            r#"{"version": "7.2.22", "supported_commands": [
                {"enabled": true, "name": "guest-ping", "success-response": true},
                {"enabled": false, "name": "guest-exec", "success-response": true}]}"#,
        )
        .unwrap();
        assert!(info.allows("guest-ping"));
        assert!(!info.allows("guest-exec") && !info.allows("guest-shutdown"));
    }

    #[test]
    fn filesystems_tell_their_disks() {
        let all: Vec<Filesystem> = serde_json::from_str(
            r#"[{"name": "vda1", "total-bytes": 1, "mountpoint": "/", "type": "ext4",
                 "disk": [{"bus-type": "virtio", "bus": 0, "dev": "/dev/vda1", "unit": 0,
                           "pci-controller": {"bus": 0}, "target": 0}]}]"#,
        )
        .unwrap();
        assert_eq!((all[0].kind.as_str(), all[0].disks[0].bus_type.as_str()), ("ext4", "virtio"));
    }
}
