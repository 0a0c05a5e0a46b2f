//! What of iSCSI an instance has.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::{ByteSize, instance::Machine};

/// What is done about a guest's iSCSI before it is imaged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// Nothing: it is not asked.
    #[default]
    NotAsked,
    /// It is taken, and given back once the guest runs again.
    Disconnect,
}

/// What gives a guest its iSCSI back, whoever took it. In the journal before
/// anything is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IscsiUndo {
    /// The instance's name, for messages.
    pub instance: String,
    /// What runs it.
    #[serde(flatten)]
    pub machine: Machine,
    /// Name of what the vault has of it: its records hold secrets.
    pub kept: String,
}

/// What of iSCSI a guest has, as it says itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Iscsi {
    /// Name of its initiator; `None`: it has none.
    pub initiator: Option<String>,
    /// Whether it has `iscsiadm`.
    pub has_tool: bool,
    /// The attachments, those with a session first.
    pub attachments: Vec<Attachment>,
    /// Portals whose targets it has asked for and remembers.
    pub discoveries: Vec<Portal>,
}

impl Iscsi {
    /// Whether anything of it would be in an image.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.attachments.is_empty() && self.discoveries.is_empty()
    }

    /// Attachments that are logged in.
    pub fn sessions(&self) -> impl Iterator<Item = (&Target, &Session)> {
        self.attachments
            .iter()
            .filter_map(|attachment| Some((&attachment.target, attachment.session.as_ref()?)))
    }
}

/// A target at one portal: logged in, on record, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Which.
    pub target: Target,
    /// Its session; `None`: it is not logged in.
    pub session: Option<Session>,
    /// The record that `iscsiadm` has of it; `None`: none, and it does not
    /// come back by itself.
    pub record: Option<Record>,
}

impl Attachment {
    /// Whether the initiator has to prove who it is, so that a secret lies in
    /// the guest.
    #[must_use]
    pub fn has_chap(&self) -> bool {
        let of_session = self.session.as_ref().is_some_and(|session| session.has_chap);
        of_session || self.record.as_ref().is_some_and(|record| record.has_chap)
    }
}

/// A target, and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Its iSCSI qualified name.
    pub iqn: String,
    /// Its portal.
    pub portal: Portal,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.iqn, self.portal)
    }
}

/// Where a target is reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Portal {
    /// An address of either family, or a name.
    pub address: String,
    /// TCP.
    pub port: u16,
}

impl fmt::Display for Portal {
    /// As `iscsiadm` takes it: an IPv6 address in brackets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, port } = self;
        match address.parse() {
            Ok(IpAddr::V6(_)) => write!(f, "[{address}]:{port}"),
            _ => write!(f, "{address}:{port}"),
        }
    }
}

/// A session that a guest has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The kernel's number of it.
    pub id: u32,
    /// Whether it works now: the kernel's `LOGGED_IN`.
    pub logged_in: bool,
    /// Whether it was begun with CHAP.
    pub has_chap: bool,
    /// Its disks, each followed by what lies on it.
    pub devices: Vec<Device>,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Whether the guest logs in when it boots: `automatic` or `onboot`.
    pub at_boot: bool,
    /// Whether it has CHAP's secret.
    pub has_chap: bool,
}

/// A block device of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The kernel's name, e.g. `sda`.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Its size.
    pub size: ByteSize,
    /// What it is used as.
    pub uses: Vec<Use>,
}

/// What a block device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceKind {
    /// A disk of the session.
    Disk {
        /// Its logical unit's number.
        lun: u64,
    },
    /// A partition.
    Partition {
        /// From 1.
        number: u32,
    },
    /// A logical volume, by its mapper's name.
    Lvm(String),
    /// The paths to one disk, by their mapper's name.
    Multipath(String),
    /// Another device of the mapper, by its name.
    Mapped(String),
    /// An array of md.
    Raid,
    /// Anything else on top, e.g. bcache.
    Other,
}

/// What a guest uses a block device as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Use {
    /// A filesystem that is mounted.
    Mount {
        /// Where.
        at: String,
        /// Of which kind, e.g. `ext4`.
        filesystem: String,
        /// As `mount -o` takes them.
        options: String,
        /// Whether it can be mounted again by these words: it is no part of a
        /// filesystem, and its path can be told.
        repeatable: bool,
    },
    /// Swap space that is on.
    Swap,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { at, filesystem, .. } => write!(f, "{at} ({filesystem})"),
            Self::Swap => f.write_str("swap"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portal_is_shown_as_iscsiadm_takes_it() {
        let shown = |address: &str| Portal { address: address.into(), port: 3260 }.to_string();
        assert_eq!(shown("169.254.2.2"), "169.254.2.2:3260");
        assert_eq!(shown("fd00::1"), "[fd00::1]:3260");
        assert_eq!(shown("store.example"), "store.example:3260");
    }
}
