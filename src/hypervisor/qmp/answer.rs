//! What QEMU answers, as far as imaged reads it. Members that a QEMU does not
//! have are `None`; those that imaged does not know are passed over.

use serde::{Deserialize, Deserializer};

use super::names::{DevicePath, NodeRef};

/// It was done; there is nothing else to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Done {}

/// Whether the virtual CPUs run.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Whether they do.
    pub running: bool,
    /// Why or why not: `running`, `paused`, `prelaunch`, `io-error`,
    /// `shutdown`, `guest-panicked`, …
    pub status: String,
}

/// A device that has or could have a disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockDevice {
    /// The device; none for what no device uses.
    #[serde(default, deserialize_with = "device")]
    pub qdev: Option<DevicePath>,
    /// `ok`, `failed`, `nospace`, where the device tells.
    #[serde(rename = "io-status")]
    pub io_status: Option<String>,
    /// Its disk; none for an empty drive.
    pub inserted: Option<BlockNode>,
}

/// A block node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockNode {
    /// Its name.
    #[serde(rename = "node-name")]
    pub node_name: Option<NodeRef>,
    /// `raw`, `qcow2`, `file`, `host_device`, `copy-before-write`, …
    #[serde(rename = "drv")]
    pub driver: String,
    /// Whether it is read-only.
    #[serde(rename = "ro")]
    pub read_only: bool,
    /// Whether writes go past the host's cache.
    pub cache: Option<Cache>,
    /// What is known of the image.
    pub image: Image,
}

/// How a node uses the host's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Cache {
    /// With `O_DIRECT`.
    pub direct: bool,
    /// Whether the guest is told of a volatile cache.
    pub writeback: bool,
    /// Whether its flushes are ignored.
    #[serde(rename = "no-flush")]
    pub no_flush: bool,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Image {
    /// Name of the file or device; with options, a URL or `json:{…}`, which
    /// may have a password in it: never to be shown.
    pub filename: String,
    /// The node's driver.
    pub format: String,
    /// Bytes that the guest sees.
    #[serde(rename = "virtual-size")]
    pub virtual_size: u64,
    /// Bytes on the host's disk, where they can be told.
    #[serde(rename = "actual-size")]
    pub actual_size: Option<u64>,
}

/// Counters of a device since QEMU began.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DeviceStatistics {
    /// The device.
    #[serde(default, deserialize_with = "device")]
    pub qdev: Option<DevicePath>,
    /// The node that it uses now.
    #[serde(rename = "node-name")]
    pub node_name: Option<NodeRef>,
    /// The counters.
    pub stats: Counters,
}

/// Operations of the guest, and how long they took together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Reads.
    pub rd_operations: u64,
    /// Writes.
    pub wr_operations: u64,
    /// Flushes.
    pub flush_operations: u64,
    /// Discards.
    pub unmap_operations: u64,
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
    /// Nanoseconds in reads.
    pub rd_total_time_ns: u64,
    /// Nanoseconds in writes.
    pub wr_total_time_ns: u64,
    /// Nanoseconds in flushes.
    pub flush_total_time_ns: u64,
    /// Reads that failed.
    pub failed_rd_operations: u64,
    /// Writes that failed.
    pub failed_wr_operations: u64,
}

/// A thread of QEMU that serves disks.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct IoThread {
    /// Its id.
    pub id: String,
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Job {
    /// Its id: of imaged's own or not.
    pub id: String,
    /// `backup`, `mirror`, `commit`, `stream`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// `running`, `paused`, `concluded`, …
    pub status: String,
    /// Why it failed; also that it was cancelled.
    pub error: Option<String>,
}

/// A move of the VM to another host, or none.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Migration {
    /// `setup`, `active`, `completed`, …; none: there was never one.
    pub status: Option<String>,
}

impl Migration {
    /// Whether it is under way (QEMU, `MigrationStatus`). What is not known is.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        let over = ["none", "completed", "failed", "cancelled"];
        self.status.as_deref().is_some_and(|status| !over.contains(&status))
    }
}

/// An export.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockExport {
    /// Its id: of imaged's own or not.
    pub id: String,
    /// `nbd`, `vhost-user-blk`, `fuse`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it shows.
    #[serde(rename = "node-name")]
    pub node_name: NodeRef,
    /// Whether it is about to end.
    #[serde(rename = "shutting-down")]
    pub shutting_down: bool,
}

/// A device by its id or path. What has neither, or an odd one, is none of
/// those that imaged can switch.
fn device<'de, D: Deserializer<'de>>(from: D) -> Result<Option<DevicePath>, D::Error> {
    let qdev = Option::<String>::deserialize(from)?;
    Ok(qdev.filter(|qdev| !qdev.is_empty()).and_then(|qdev| DevicePath::from_qdev(&qdev).ok()))
}

/// What a QEMU can do, as its schema says (QEMU, "QAPI introspection").
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Schema {
    commands: std::collections::BTreeSet<String>,
    drivers: std::collections::BTreeMap<String, Vec<String>>,
}

impl Schema {
    /// Whether it knows the command `name`.
    #[must_use]
    pub fn has_command(&self, name: &str) -> bool {
        self.commands.contains(name)
    }

    /// Whether `blockdev-add` knows `driver`.
    #[must_use]
    pub fn has_driver(&self, driver: &str) -> bool {
        self.drivers.contains_key(driver)
    }

    /// Whether `blockdev-add` knows `option` of `driver`.
    #[must_use]
    pub fn has_option(&self, driver: &str, option: &str) -> bool {
        self.drivers.get(driver).is_some_and(|options| options.iter().any(|known| known == option))
    }

    /// Whether a snapshot can be taken that ends, rather than hurt the guest,
    /// when copying fails or takes long (QEMU 7.1).
    #[must_use]
    pub fn has_breakable_snapshots(&self) -> bool {
        self.has_driver("snapshot-access")
            && self.has_option("copy-before-write", "on-cbw-error")
            && self.has_option("copy-before-write", "cbw-timeout")
    }
}

/// One type of the schema.
#[derive(Deserialize)]
struct Entity {
    name: String,
    #[serde(rename = "meta-type")]
    meta: String,
    #[serde(rename = "arg-type")]
    arguments: Option<String>,
    #[serde(default)]
    members: Vec<Member>,
    #[serde(default)]
    variants: Vec<Variant>,
}

#[derive(Deserialize)]
struct Member {
    // An alternate's members have a type only.
    name: Option<String>,
}

#[derive(Deserialize)]
struct Variant {
    case: String,
    #[serde(rename = "type")]
    of: String,
}

impl<'de> Deserialize<'de> for Schema {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let entities = Vec::<Entity>::deserialize(from)?;
        let named = |name: &str| entities.iter().find(|entity| entity.name == name);
        let commands: std::collections::BTreeSet<_> = entities
            .iter()
            .filter(|entity| entity.meta == "command")
            .map(|entity| entity.name.clone())
            .collect();
        let add = named("blockdev-add").and_then(|add| named(add.arguments.as_deref()?));
        let variants = add.map(|options| options.variants.as_slice()).unwrap_or_default();
        let drivers = variants.iter().map(|variant| {
            let members = named(&variant.of).map(|of| of.members.as_slice()).unwrap_or_default();
            let options = members.iter().filter_map(|member| member.name.clone()).collect();
            (variant.case.clone(), options)
        });
        Ok(Self { commands, drivers: drivers.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_tells_drivers_and_their_options() {
        let schema: Schema = serde_json::from_str(
            r#"[{"name": "blockdev-add", "meta-type": "command", "arg-type": "7", "ret-type": "0"},
                {"name": "7", "meta-type": "object", "tag": "driver",
                 "members": [{"name": "driver", "type": "8"}],
                 "variants": [{"case": "copy-before-write", "type": "9"}, {"case": "raw", "type": "10"}]},
                {"name": "9", "meta-type": "object", "members": [{"name": "target", "type": "11"}]},
                {"name": "12", "meta-type": "alternate", "members": [{"type": "13"}]}]"#,
        )
        .unwrap();
        assert!(schema.has_command("blockdev-add") && !schema.has_command("7"));
        assert!(schema.has_driver("raw") && !schema.has_driver("snapshot-access"));
        assert!(schema.has_option("copy-before-write", "target"));
        assert!(!schema.has_breakable_snapshots(), "QEMU 6.2 has no on-cbw-error");
    }

    #[test]
    fn statistics_name_the_device_by_id_or_path() {
        let of = |qdev: &str| {
            let text = format!(
                r##"{{"device": "d0", {qdev} "node-name": "#block1", "stats": {{"rd_operations": 3}}}}"##
            );
            serde_json::from_str::<DeviceStatistics>(&text).unwrap()
        };
        assert_eq!(of(r#""qdev": "sd","#).qdev.unwrap().as_str(), "/machine/peripheral/sd");
        assert_eq!(of(r#""qdev": "","#).qdev, None);
        assert_eq!(of("").stats.rd_operations, 3);
    }
}
