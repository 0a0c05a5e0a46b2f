//! How commands are written, what they are for, and what of them is recorded.
//!
//! Built by the constructors of [`Command`](super::Command) alone.

use std::num::NonZeroU32;

use serde::Serialize;

use super::names::{DevicePath, ExportId, FilePath, NodeName, NodeRef, SocketPath};
use crate::{hypervisor::keep::Keep, recorder::Lane};

/// The commands as they are encoded: `execute` is the variant's name.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "execute", content = "arguments", rename_all = "kebab-case")]
#[serde(rename_all_fields = "kebab-case")]
pub(super) enum Call {
    #[serde(rename = "qmp_capabilities")]
    QmpCapabilities,
    QueryStatus,
    QueryQmpSchema,
    QueryBlock,
    QueryNamedBlockNodes {
        flat: bool,
    },
    QueryBlockstats {
        query_nodes: bool,
    },
    QueryJobs,
    QueryMigrate,
    QueryIothreads,
    QueryBlockExports,
    SetAction {
        shutdown: OnShutdown,
    },
    #[serde(rename = "system_powerdown")]
    SystemPowerdown,
    Stop,
    #[serde(rename = "system_reset")]
    SystemReset,
    Cont,
    BlockdevAdd(NewNode),
    BlockdevDel {
        node_name: NodeName,
    },
    QomGet {
        path: DevicePath,
        property: Question,
    },
    QomSet {
        path: DevicePath,
        property: Property,
        value: NodeRef,
    },
    NbdServerStart {
        addr: Address,
        max_connections: u32,
    },
    NbdServerStop,
    BlockExportAdd(NewExport),
    BlockExportDel {
        id: ExportId,
        mode: ExportEnd,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "driver", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub(super) enum NewNode {
    File {
        node_name: NodeName,
        filename: FilePath,
        cache: Cache,
        discard: Discard,
    },
    Raw {
        node_name: NodeName,
        file: NodeName,
        size: u64,
    },
    Qcow2 {
        node_name: NodeName,
        file: NodeName,
        backing: Option<NodeRef>,
    },
    CopyBeforeWrite {
        node_name: NodeName,
        file: NodeRef,
        target: NodeName,
        on_cbw_error: OnError,
        cbw_timeout: NonZeroU32,
    },
    SnapshotAccess {
        node_name: NodeName,
        file: NodeName,
    },
    NullCo {
        node_name: NodeName,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Cache {
    pub(super) no_flush: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Discard {
    Unmap,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum OnError {
    BreakSnapshot,
}

/// What is asked of a device.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Question {
    Type,
    Iothread,
    #[serde(rename = "parent_bus")]
    ParentBus,
}

/// What QEMU does when the guest has shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnShutdown {
    /// It ends.
    Poweroff,
    /// It waits for somebody to reset the VM and let it run.
    Pause,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Property {
    Drive,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub(super) enum Address {
    Unix { path: SocketPath },
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub(super) enum NewExport {
    Nbd {
        id: ExportId,
        name: ExportId,
        node_name: NodeName,
        writable: bool,
        allocation_depth: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ExportEnd {
    Hard,
}

impl Call {
    /// Its name on the wire.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::QmpCapabilities => "qmp_capabilities",
            Self::QueryStatus => "query-status",
            Self::QueryQmpSchema => "query-qmp-schema",
            Self::QueryBlock => "query-block",
            Self::QueryNamedBlockNodes { .. } => "query-named-block-nodes",
            Self::QueryBlockstats { .. } => "query-blockstats",
            Self::QueryJobs => "query-jobs",
            Self::QueryMigrate => "query-migrate",
            Self::QueryIothreads => "query-iothreads",
            Self::QueryBlockExports => "query-block-exports",
            Self::SetAction { .. } => "set-action",
            Self::SystemPowerdown => "system_powerdown",
            Self::Stop => "stop",
            Self::SystemReset => "system_reset",
            Self::Cont => "cont",
            Self::BlockdevAdd(_) => "blockdev-add",
            Self::BlockdevDel { .. } => "blockdev-del",
            Self::QomGet { .. } => "qom-get",
            Self::QomSet { .. } => "qom-set",
            Self::NbdServerStart { .. } => "nbd-server-start",
            Self::NbdServerStop => "nbd-server-stop",
            Self::BlockExportAdd(_) => "block-export-add",
            Self::BlockExportDel { .. } => "block-export-del",
        }
    }

    /// What it does, to follow "QEMU refused to".
    pub(super) fn purpose(&self) -> String {
        match self {
            Self::QmpCapabilities => "begin a session".into(),
            Self::QueryStatus => "say whether the VM runs".into(),
            Self::QueryQmpSchema => "say what it can do".into(),
            Self::QueryBlock => "list the disks".into(),
            Self::QueryNamedBlockNodes { .. } => "list the block nodes".into(),
            Self::QueryBlockstats { .. } => "tell the disks' statistics".into(),
            Self::QueryJobs => "list the jobs".into(),
            Self::QueryMigrate => "say whether the VM is being moved".into(),
            Self::QueryIothreads => "list its I/O threads".into(),
            Self::QueryBlockExports => "list the exports".into(),
            Self::SetAction { shutdown: OnShutdown::Pause } => {
                "wait when the guest has shut down".into()
            }
            Self::SetAction { shutdown: OnShutdown::Poweroff } => {
                "end when the guest has shut down".into()
            }
            Self::SystemPowerdown => "press the guest's power button".into(),
            Self::Stop => "stop the virtual CPUs".into(),
            Self::SystemReset => "reset the VM".into(),
            Self::Cont => "let the virtual CPUs run".into(),
            Self::BlockdevAdd(node) => match node {
                NewNode::File { node_name, filename, .. } => {
                    format!("open the scratch file {filename} as the node {node_name}")
                }
                NewNode::Raw { node_name, size, .. } => {
                    format!("bound the scratch to {size} bytes as the node {node_name}")
                }
                NewNode::Qcow2 { node_name, .. } => format!("add the overlay {node_name}"),
                NewNode::CopyBeforeWrite { node_name, file, .. } => {
                    format!("add the copy-before-write filter {node_name} to {file}")
                }
                NewNode::SnapshotAccess { node_name, file } => {
                    format!("show the snapshot of {file} as the node {node_name}")
                }
                NewNode::NullCo { node_name } => format!("add the mark {node_name}"),
            },
            Self::BlockdevDel { node_name } => format!("remove the node {node_name}"),
            Self::QomGet { path, property: Question::Type } => {
                format!("say what kind of device {path} is")
            }
            Self::QomGet { path, property: Question::Iothread } => {
                format!("say which thread serves the device {path}")
            }
            Self::QomGet { path, property: Question::ParentBus } => {
                format!("say what the device {path} is attached to")
            }
            Self::QomSet { path, value, .. } => format!("give the device {path} the node {value}"),
            Self::NbdServerStart { addr: Address::Unix { path }, .. } => {
                format!("serve NBD on {path}")
            }
            Self::NbdServerStop => "end its NBD server".into(),
            Self::BlockExportAdd(NewExport::Nbd { id, node_name, .. }) => {
                format!("export the node {node_name} as {id}")
            }
            Self::BlockExportDel { id, .. } => format!("end the export {id}"),
        }
    }

    /// Whether it changes anything outside of the session.
    pub(super) fn changes(&self) -> bool {
        self.lane() == Lane::Commands && *self != Self::QmpCapabilities
    }

    /// Where it and its answer are recorded.
    pub(super) fn lane(&self) -> Lane {
        let name = self.name();
        match name.starts_with("query-") || name == "qom-get" {
            true => Lane::Queries,
            false => Lane::Commands,
        }
    }

    /// What of its answer may be recorded. Names of files may hold a
    /// password: a URL's, or a `json:{…}`'s.
    pub(super) const fn keep(&self) -> Keep {
        const BLOCK: Keep = Keep::Members(&[
            "device",
            "qdev",
            "io-status",
            "inserted",
            "node-name",
            "drv",
            "ro",
            "image",
            "format",
            "virtual-size",
            "actual-size",
        ]);
        const STATISTICS: Keep = Keep::Members(&[
            "device",
            "qdev",
            "node-name",
            "stats",
            "rd_operations",
            "wr_operations",
            "flush_operations",
            "rd_bytes",
            "wr_bytes",
            "rd_total_time_ns",
            "wr_total_time_ns",
            "flush_total_time_ns",
        ]);
        match self {
            Self::QueryQmpSchema => Keep::Length,
            Self::QueryMigrate => Keep::Members(&["status"]),
            Self::QueryBlock | Self::QueryNamedBlockNodes { .. } => BLOCK,
            Self::QueryBlockstats { .. } => STATISTICS,
            _ => Keep::All,
        }
    }
}
