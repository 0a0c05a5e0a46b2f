//! Every command that imaged can send to QEMU. Nothing else can be encoded.

use std::{marker::PhantomData, num::NonZeroU32};

use super::{
    answer::{
        BlockDevice, BlockExport, BlockNode, DeviceStatistics, Done, IoThread, Job, Migration,
        Schema, Status,
    },
    call::{
        Address, Cache, Call, Discard, ExportEnd, NewExport, NewNode, OnError, OnShutdown,
        Property, Question,
    },
    names::{DevicePath, ExportId, FilePath, NodeName, NodeRef, SocketPath},
};
use crate::hypervisor::allowed::Allowed;

/// What imaged may send, published in `docs/qemu-commands.md`.
pub const ALLOWED: &[Allowed] = &[
    Allowed { name: "qmp_capabilities", why: "begins every session; no capability is asked for" },
    Allowed { name: "query-status", why: "whether the virtual CPUs run" },
    Allowed {
        name: "query-qmp-schema",
        why: "whether this QEMU can snapshot without endangering the guest",
    },
    Allowed { name: "query-block", why: "which device has the boot volume" },
    Allowed {
        name: "query-named-block-nodes",
        why: "the block nodes, to find what an imaged that died has left",
    },
    Allowed { name: "query-blockstats", why: "which node a device uses" },
    Allowed { name: "query-jobs", why: "whether the disk is at another job" },
    Allowed {
        name: "query-migrate",
        why: "whether the VM is being moved to another host, which an image gives way to",
    },
    Allowed {
        name: "query-iothreads",
        why: "whether a thread of its own may serve the disk, which some QEMUs do not survive",
    },
    Allowed {
        name: "query-block-exports",
        why: "the exports, to find what an imaged that died has left",
    },
    Allowed {
        name: "set-action",
        why: "only for an image for which the guest is shut down: QEMU waits then instead of ending (`shutdown=pause`), and afterwards does what its command line says",
    },
    Allowed {
        name: "system_powerdown",
        why: "the power button, of a guest that is to be shut down and whose agent does not do it",
    },
    Allowed {
        name: "stop",
        why: "the plug, of a guest that is to be shut down and does not: with `--force-stop` alone",
    },
    Allowed {
        name: "system_reset",
        why: "begins a guest anew that was shut down for its image, never one that runs",
    },
    Allowed {
        name: "cont",
        why: "lets it run, after the reset, or after a `stop` of imaged's own",
    },
    Allowed {
        name: "blockdev-add",
        why: "adds scratch file, its bound, overlay, copy-before-write filter and snapshot access, and an empty node as a mark that a guest is to be started again, all named `imaged-…`",
    },
    Allowed { name: "blockdev-del", why: "removes nodes named `imaged-…`, no others" },
    Allowed {
        name: "qom-get",
        why: "the properties `type`, `iothread` and `parent_bus` of a disk, nothing else: some write past QEMU's filters, some are served by a thread of their own",
    },
    Allowed {
        name: "qom-set",
        why: "puts the filter in front of the boot volume and takes it away: the property `drive` of a disk, nothing else, and never to the node that it has",
    },
    Allowed { name: "nbd-server-start", why: "on a Unix socket, to read the snapshot" },
    Allowed { name: "nbd-server-stop", why: "unless somebody else's exports are there" },
    Allowed { name: "block-export-add", why: "read-only, named `imaged-…`" },
    Allowed { name: "block-export-del", why: "exports named `imaged-…`, no others" },
];

/// Connections that the NBD server takes: some for the snapshot, one for the
/// scratch, and the rest for those that a dead imaged has left open.
const NBD_CONNECTIONS: u32 = 16;

/// A command, and the type of its answer.
///
/// The constructors below are all that there is; [`ALLOWED`] says the same
/// for people.
#[derive(Debug, Clone, PartialEq)]
pub struct Command<A> {
    pub(super) call: Call,
    answer: PhantomData<fn() -> A>,
}

impl<A> From<Call> for Command<A> {
    fn from(call: Call) -> Self {
        Self { call, answer: PhantomData }
    }
}

impl Command<Status> {
    /// Whether the virtual CPUs run.
    #[must_use]
    pub fn query_status() -> Self {
        Call::QueryStatus.into()
    }
}

impl Command<Schema> {
    /// What this QEMU can do.
    #[must_use]
    pub fn query_schema() -> Self {
        Call::QueryQmpSchema.into()
    }
}

impl Command<Vec<BlockDevice>> {
    /// All devices that have or could have a disk. QEMU asks the filesystem
    /// for sizes, which blocks the VM while a network filesystem hangs.
    #[must_use]
    pub fn query_block() -> Self {
        Call::QueryBlock.into()
    }
}

impl Command<Vec<BlockNode>> {
    /// All block nodes that have a name. Asks the filesystem, as
    /// `query_block` does.
    #[must_use]
    pub fn query_nodes() -> Self {
        Call::QueryNamedBlockNodes { flat: true }.into()
    }
}

impl Command<Vec<DeviceStatistics>> {
    /// Counters and latencies of all devices that have a disk, and which
    /// node each uses. Asks no filesystem.
    #[must_use]
    pub fn query_statistics() -> Self {
        Call::QueryBlockstats { query_nodes: false }.into()
    }
}

impl Command<String> {
    /// What kind of device it is, e.g. `virtio-blk-device`.
    #[must_use]
    pub fn device_type(path: DevicePath) -> Self {
        Call::QomGet { path, property: Question::Type }.into()
    }

    /// The I/O thread that serves a device; empty: none. A device that cannot
    /// have one refuses.
    #[must_use]
    pub fn device_iothread(path: DevicePath) -> Self {
        Call::QomGet { path, property: Question::Iothread }.into()
    }

    /// Path of the bus that a device is attached to.
    #[must_use]
    pub fn device_bus(path: DevicePath) -> Self {
        Call::QomGet { path, property: Question::ParentBus }.into()
    }
}

impl Command<Vec<Job>> {
    /// All jobs: imaged has none of its own.
    #[must_use]
    pub fn query_jobs() -> Self {
        Call::QueryJobs.into()
    }
}

impl Command<Migration> {
    /// Whether the VM is being moved.
    #[must_use]
    pub fn query_migration() -> Self {
        Call::QueryMigrate.into()
    }
}

impl Command<Vec<IoThread>> {
    /// The threads that serve disks beside the main one.
    #[must_use]
    pub fn query_iothreads() -> Self {
        Call::QueryIothreads.into()
    }
}

impl Command<Vec<BlockExport>> {
    /// All exports, not only imaged's.
    #[must_use]
    pub fn query_exports() -> Self {
        Call::QueryBlockExports.into()
    }
}

impl Command<Done> {
    /// What QEMU does from now on when the guest has shut down.
    #[must_use]
    pub fn set_on_shutdown(shutdown: OnShutdown) -> Self {
        Call::SetAction { shutdown }.into()
    }

    /// Presses the power button: the guest does about it what it will.
    #[must_use]
    pub fn power_button() -> Self {
        Call::SystemPowerdown.into()
    }

    /// Stops the virtual CPUs: what the guest has not written is lost, once
    /// the VM is reset.
    #[must_use]
    pub fn stop() -> Self {
        Call::Stop.into()
    }

    /// Begins to reset the VM; done when its status is `prelaunch`. Only for
    /// one whose CPUs do not run.
    #[must_use]
    pub fn reset() -> Self {
        Call::SystemReset.into()
    }

    /// Lets the virtual CPUs run.
    #[must_use]
    pub fn cont() -> Self {
        Call::Cont.into()
    }

    /// Opens the file that takes what the guest overwrites. It is worthless
    /// once QEMU ends, so nothing waits for it to reach the disk.
    #[must_use]
    pub fn add_scratch(node: NodeName, file: FilePath) -> Self {
        let cache = Cache { no_flush: true };
        let discard = Discard::Unmap;
        Call::BlockdevAdd(NewNode::File { node_name: node, filename: file, cache, discard }).into()
    }

    /// Bounds the scratch node `file`, which must be as long as `size`, a
    /// multiple of 512: QEMU has no room beyond it, whoever is alive to look.
    #[must_use]
    pub fn add_bound(node: NodeName, file: NodeName, size: u64) -> Self {
        Call::BlockdevAdd(NewNode::Raw { node_name: node, file, size }).into()
    }

    /// Takes the scratch node `file` as a qcow2. Whatever backing file its
    /// header names is not opened.
    #[must_use]
    pub fn add_overlay(node: NodeName, file: NodeName) -> Self {
        Call::BlockdevAdd(NewNode::Qcow2 { node_name: node, file, backing: None }).into()
    }

    /// Begins a snapshot of `file`: the point in time. From now on `target`
    /// takes what is overwritten *through this node*; `switch_drive` brings
    /// the guest's writes here. When copying fails or takes longer than
    /// `timeout_seconds`, the snapshot ends and the guest goes on.
    #[must_use]
    pub fn add_copy_before_write(
        node: NodeName,
        file: NodeRef,
        target: NodeName,
        timeout_seconds: NonZeroU32,
    ) -> Self {
        Call::BlockdevAdd(NewNode::CopyBeforeWrite {
            node_name: node,
            file,
            target,
            on_cbw_error: OnError::BreakSnapshot,
            cbw_timeout: timeout_seconds,
        })
        .into()
    }

    /// Shows the snapshot that `filter` keeps.
    #[must_use]
    pub fn add_snapshot_access(node: NodeName, filter: NodeName) -> Self {
        Call::BlockdevAdd(NewNode::SnapshotAccess { node_name: node, file: filter }).into()
    }

    /// Adds a node that holds nothing and that nothing uses: a mark, which
    /// stays as long as this QEMU does, or until it is deleted.
    #[must_use]
    pub fn add_mark(node: NodeName) -> Self {
        Call::BlockdevAdd(NewNode::NullCo { node_name: node }).into()
    }

    /// Removes a node that nothing uses.
    #[must_use]
    pub fn delete_node(node: NodeName) -> Self {
        Call::BlockdevDel { node_name: node }.into()
    }

    /// Starts QEMU's NBD server on a new Unix socket. A QEMU has one server:
    /// it is refused while somebody's runs.
    #[must_use]
    pub fn start_nbd_server(socket: SocketPath) -> Self {
        let addr = Address::Unix { path: socket };
        Call::NbdServerStart { addr, max_connections: NBD_CONNECTIONS }.into()
    }

    /// Exports `node` read-only under the name `id`. It is served in the
    /// thread that the node lives in, a disk's iothread included.
    #[must_use]
    pub fn add_export(id: ExportId, node: NodeName, map: AllocationMap) -> Self {
        let allocation_depth = map == AllocationMap::Told;
        Call::BlockExportAdd(NewExport::Nbd {
            name: id.clone(),
            id,
            node_name: node,
            writable: false,
            allocation_depth,
        })
        .into()
    }

    /// Begins to end an export, and closes its readers' connections. It has
    /// ended with the event `BLOCK_EXPORT_DELETED`.
    #[must_use]
    pub fn delete_export(id: ExportId) -> Self {
        Call::BlockExportDel { id, mode: ExportEnd::Hard }.into()
    }

    pub(super) fn begin_session() -> Self {
        Call::QmpCapabilities.into()
    }

    /// Only for `Qmp::switch_drive`, which has seen that `node` is not the
    /// one that the device has.
    pub(super) fn set_drive(path: DevicePath, node: NodeRef) -> Self {
        Call::QomSet { path, property: Property::Drive, value: node }.into()
    }

    /// Only for `Qmp::stop_nbd_server`, which has seen whose exports are left.
    pub(super) fn stop_nbd_server() -> Self {
        Call::NbdServerStop.into()
    }
}

/// Whether an export tells which clusters its node has allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllocationMap {
    /// As the metadata context `qemu:allocation-depth`.
    Told,
    /// Not.
    Hidden,
}

#[cfg(test)]
pub(super) mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;
    use crate::hypervisor::qmp::codec;

    fn own<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
        text.parse().unwrap()
    }

    /// One of each.
    pub fn samples() -> Vec<Call> {
        let file = FilePath::new(Path::new("/scratch/a.qcow2")).unwrap();
        let socket = SocketPath::new(Path::new("/run/nbd")).unwrap();
        let timeout = NonZeroU32::new(30).unwrap();
        vec![
            Command::begin_session().call,
            Command::query_status().call,
            Command::query_schema().call,
            Command::query_block().call,
            Command::query_nodes().call,
            Command::query_statistics().call,
            Command::query_jobs().call,
            Command::query_migration().call,
            Command::query_exports().call,
            Command::set_on_shutdown(OnShutdown::Pause).call,
            Command::set_on_shutdown(OnShutdown::Poweroff).call,
            Command::power_button().call,
            Command::stop().call,
            Command::reset().call,
            Command::cont().call,
            Command::add_scratch(own("imaged-s"), file).call,
            Command::add_bound(own("imaged-b"), own("imaged-s"), 1 << 30).call,
            Command::add_overlay(own("imaged-o"), own("imaged-s")).call,
            Command::add_copy_before_write(own("imaged-f"), own("#b1"), own("imaged-o"), timeout)
                .call,
            Command::add_snapshot_access(own("imaged-a"), own("imaged-f")).call,
            Command::add_mark(own("imaged-m")).call,
            Command::delete_node(own("imaged-a")).call,
            Command::query_iothreads().call,
            Command::device_type(own("/machine/peripheral/d")).call,
            Command::device_iothread(own("/machine/peripheral/d")).call,
            Command::device_bus(own("/machine/peripheral/d")).call,
            Command::set_drive(own("/machine/peripheral/d"), own("imaged-f")).call,
            Command::start_nbd_server(socket).call,
            Command::stop_nbd_server().call,
            Command::add_export(own("imaged-e"), own("imaged-a"), AllocationMap::Told).call,
            Command::delete_export(own("imaged-e")).call,
        ]
    }

    #[test]
    fn every_command_is_encoded_as_qemu_reads_it() {
        let lines: Vec<_> = samples()
            .iter()
            .map(|call| String::from_utf8(codec::encode(call, 1).unwrap()).unwrap())
            .collect();
        insta::assert_snapshot!(lines.concat(), @r##"
        {"execute":"qmp_capabilities","id":1}
        {"execute":"query-status","id":1}
        {"execute":"query-qmp-schema","id":1}
        {"execute":"query-block","id":1}
        {"execute":"query-named-block-nodes","arguments":{"flat":true},"id":1}
        {"execute":"query-blockstats","arguments":{"query-nodes":false},"id":1}
        {"execute":"query-jobs","id":1}
        {"execute":"query-migrate","id":1}
        {"execute":"query-block-exports","id":1}
        {"execute":"set-action","arguments":{"shutdown":"pause"},"id":1}
        {"execute":"set-action","arguments":{"shutdown":"poweroff"},"id":1}
        {"execute":"system_powerdown","id":1}
        {"execute":"stop","id":1}
        {"execute":"system_reset","id":1}
        {"execute":"cont","id":1}
        {"execute":"blockdev-add","arguments":{"driver":"file","node-name":"imaged-s","filename":"/scratch/a.qcow2","cache":{"no-flush":true},"discard":"unmap"},"id":1}
        {"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"imaged-b","file":"imaged-s","size":1073741824},"id":1}
        {"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"imaged-o","file":"imaged-s","backing":null},"id":1}
        {"execute":"blockdev-add","arguments":{"driver":"copy-before-write","node-name":"imaged-f","file":"#b1","target":"imaged-o","on-cbw-error":"break-snapshot","cbw-timeout":30},"id":1}
        {"execute":"blockdev-add","arguments":{"driver":"snapshot-access","node-name":"imaged-a","file":"imaged-f"},"id":1}
        {"execute":"blockdev-add","arguments":{"driver":"null-co","node-name":"imaged-m"},"id":1}
        {"execute":"blockdev-del","arguments":{"node-name":"imaged-a"},"id":1}
        {"execute":"query-iothreads","id":1}
        {"execute":"qom-get","arguments":{"path":"/machine/peripheral/d","property":"type"},"id":1}
        {"execute":"qom-get","arguments":{"path":"/machine/peripheral/d","property":"iothread"},"id":1}
        {"execute":"qom-get","arguments":{"path":"/machine/peripheral/d","property":"parent_bus"},"id":1}
        {"execute":"qom-set","arguments":{"path":"/machine/peripheral/d","property":"drive","value":"imaged-f"},"id":1}
        {"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"/run/nbd"}},"max-connections":16},"id":1}
        {"execute":"nbd-server-stop","id":1}
        {"execute":"block-export-add","arguments":{"type":"nbd","id":"imaged-e","name":"imaged-e","node-name":"imaged-a","writable":false,"allocation-depth":true},"id":1}
        {"execute":"block-export-del","arguments":{"id":"imaged-e","mode":"hard"},"id":1}
        "##);
    }

    #[test]
    fn the_list_has_every_command_and_no_more() {
        let sent: BTreeSet<_> = samples().iter().map(Call::name).collect();
        let listed: BTreeSet<_> = ALLOWED.iter().map(|allowed| allowed.name).collect();
        assert_eq!(sent, listed);
        for call in samples() {
            let value = serde_json::to_value(&call).unwrap();
            assert_eq!(value["execute"], call.name());
        }
    }
}
