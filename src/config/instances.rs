//! `instances.d/NAME.toml`: one file for each instance of this host.
//!
//! A file that cannot be used costs that instance alone: the daemon serves
//! the others, warns, and `imagectl host get` shows what is wrong.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use super::{
    source::Source,
    values::{absolute, absolute_if_any},
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::{
        CompartmentId, ImageId, InstanceId,
        instance::{Freeze, Instance, Machine, OperatingSystem, Sockets},
    },
};

/// Instances of a host that no file describes are told nowhere; more files
/// than this are a mistake.
const MAX_INSTANCES: usize = 10_000;

/// The instances of this host.
#[derive(Debug, Default)]
pub struct Instances {
    /// Those that can be used, by name.
    pub usable: Vec<Instance>,
    /// Names of files that cannot be used, with the reason.
    pub refused: Vec<(String, Error)>,
}

/// The keys of a file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InstanceFile {
    /// OCID. Default: derived from the host's and the instance's name.
    id: Option<InstanceId>,
    /// Default: the daemon's `default_compartment`.
    compartment: Option<CompartmentId>,
    /// The disk that the instance boots from: block device or raw file.
    /// Required.
    #[serde(deserialize_with = "absolute")]
    boot_volume: PathBuf,
    /// Socket of QEMU's machine protocol. Required: it tells whether the
    /// instance runs.
    #[serde(deserialize_with = "absolute")]
    qmp_socket: PathBuf,
    /// Socket of the guest agent. Default: the guest has none.
    #[serde(default, deserialize_with = "absolute_if_any")]
    agent_socket: Option<PathBuf>,
    /// Longest freeze, 1 to 300 seconds. Default: 30, of Windows 8.
    freeze_seconds: Option<Seconds<300>>,
    /// Whether the guest's agent runs a freeze hook (`qemu-ga -F`) that
    /// freezes its applications. Default: no.
    #[serde(default)]
    freeze_hook: bool,
    /// How long its guest may take to shut down, 1 to 1200 seconds, asked by
    /// its agent and again by its power button. Default: 180.
    shutdown_seconds: Option<Seconds<1200>>,
    /// OCID of the image that the instance was launched from.
    base_image_id: Option<ImageId>,
    /// OCI shape.
    shape: Option<String>,
    /// The unit that starts the instance.
    systemd_unit: Option<String>,
    /// Default: `UNKNOWN`.
    operating_system: Option<String>,
    /// Default: `UNKNOWN`.
    operating_system_version: Option<String>,
}

/// 1 to `MAX` seconds.
#[derive(Debug, Deserialize)]
#[serde(try_from = "u64")]
struct Seconds<const MAX: u32>(u32);

impl<const MAX: u32> TryFrom<u64> for Seconds<MAX> {
    type Error = String;
    fn try_from(seconds: u64) -> std::result::Result<Self, Self::Error> {
        match u32::try_from(seconds) {
            Ok(seconds) if (1..=MAX).contains(&seconds) => Ok(Self(seconds)),
            _ => Err(format!("it may take 1 to {MAX} seconds")),
        }
    }
}

/// More than a systemd takes that ends a service by force
/// (`DefaultTimeoutStopSec`, 90 s).
const SHUTDOWN_SECONDS: u32 = 180;

/// Reads every `*.toml` in `dir`. A directory that is missing has no
/// instances. Blocks.
///
/// # Errors
///
/// `INVALID_CONFIGURATION` when the directory cannot be read; what is wrong
/// with single files is in the answer.
pub fn load(dir: &Path, host: &str, compartment: &CompartmentId) -> Result<Instances> {
    let unreadable = || format!("the directory of instances {} cannot be read", dir.display());
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Instances::default()),
        Err(cause) => return Err(cause).context(Reason::InvalidConfiguration, unreadable),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.context(Reason::InvalidConfiguration, unreadable)?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            paths.push(path);
        }
    }
    if paths.len() > MAX_INSTANCES {
        let message = format!("{} holds more than {MAX_INSTANCES} instances", dir.display());
        return Err(Error::new(Reason::InvalidConfiguration, message));
    }
    paths.sort();

    let mut instances = Instances::default();
    for path in paths {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let read = fs::read_to_string(&path).context(Reason::InvalidConfiguration, || {
            format!("the instance file {} cannot be read", path.display())
        });
        match read.and_then(|text| parse(&text, &path, &name, host, compartment)) {
            Ok(instance) => instances.usable.push(instance),
            Err(error) => instances.refused.push((name, error)),
        }
    }
    refuse_duplicates(&mut instances, dir);
    Ok(instances)
}

/// The instance `name` that `text` describes; `origin` is named in errors.
///
/// # Errors
///
/// `INVALID_CONFIGURATION`, naming file, line and key.
pub fn parse(
    text: &str,
    origin: &Path,
    name: &str,
    host: &str,
    compartment: &CompartmentId,
) -> Result<Instance> {
    // The name goes wherever an id goes.
    name.parse::<InstanceId>().context(Reason::InvalidConfiguration, || {
        format!("the file name of {} is no name for an instance", origin.display())
    })?;
    let file: InstanceFile = Source { text, origin }.deserialize()?;
    let unknown = OperatingSystem::default();
    Ok(Instance {
        id: file.id.unwrap_or_else(|| InstanceId::derive(host, name)),
        name: name.to_owned(),
        compartment_id: file.compartment.unwrap_or_else(|| compartment.clone()),
        boot_volume: file.boot_volume,
        machine: Machine::Qemu(Sockets {
            qmp_socket: file.qmp_socket,
            agent_socket: file.agent_socket,
        }),
        freeze: Freeze {
            limit: file.freeze_seconds.map(|Seconds(limit)| Duration::from_secs(limit.into())),
            hook: file.freeze_hook,
        },
        shutdown_seconds: file.shutdown_seconds.map_or(SHUTDOWN_SECONDS, |Seconds(limit)| limit),
        base_image_id: file.base_image_id,
        shape: file.shape,
        systemd_unit: file.systemd_unit,
        os: OperatingSystem {
            name: file.operating_system.unwrap_or(unknown.name),
            version: file.operating_system_version.unwrap_or(unknown.version),
        },
    })
}

/// Refuses all of those that share what must be an instance's own: nobody can
/// tell whose it is, and imaging a disk whose other owner runs must not be
/// possible.
fn refuse_duplicates(instances: &mut Instances, dir: &Path) {
    type Key = fn(&Instance) -> String;
    let keys: [(&str, Key); 3] = [
        ("id", |instance| instance.id.to_string()),
        ("boot_volume", |instance| resolved(&instance.boot_volume)),
        ("qmp_socket", |instance| match &instance.machine {
            Machine::Qemu(sockets) => resolved(&sockets.qmp_socket),
            Machine::Domain(domain) => domain.domain.clone(),
        }),
    ];
    let file = |name: &str| dir.join(name).with_added_extension("toml");
    let mut refused: BTreeMap<String, Error> = BTreeMap::new();
    for (key, value) in keys {
        let mut owners: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for instance in &instances.usable {
            owners.entry(value(instance)).or_default().push(&instance.name);
        }
        for (value, names) in owners.iter().filter(|(_, names)| names.len() > 1) {
            for name in names {
                let others = names.iter().filter(|other| other != &name);
                let others: Vec<_> =
                    others.map(|other| file(other).display().to_string()).collect();
                let message = format!(
                    "{}: {key}: {value} is also the {key} of {}",
                    file(name).display(),
                    others.join(", ")
                );
                let error = Error::new(Reason::InvalidConfiguration, message);
                refused.entry((*name).to_owned()).or_insert(error);
            }
        }
    }
    instances.usable.retain(|instance| !refused.contains_key(&instance.name));
    instances.refused.extend(refused);
    instances.refused.sort_by(|a, b| a.0.cmp(&b.0));
}

/// Without symbolic links where it exists: `/dev/vg/web` and
/// `/dev/mapper/vg-web` are one disk.
fn resolved(path: &Path) -> String {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compartment() -> CompartmentId {
        "default".parse().unwrap()
    }

    fn refused(text: &str) -> String {
        let origin = Path::new("/etc/imaged/instances.d/web-3.toml");
        parse(text, origin, "web-3", "host-1", &compartment()).unwrap_err().report()
    }

    fn write(dir: &Path, name: &str, disk: &str, more: &str) {
        let text = format!("boot_volume = {disk:?}\nqmp_socket = \"/run/{name}\"\n{more}\n");
        fs::write(dir.join(name).with_added_extension("toml"), text).unwrap();
    }

    #[test]
    fn a_short_file_is_enough() {
        let text = "boot_volume = \"/dev/vg0/web-3\"\nqmp_socket = \"/run/qemu/web-3.qmp\"";
        let origin = Path::new("x");
        let instance = parse(text, origin, "web-3", "host-1", &compartment()).unwrap();
        assert_eq!(instance.name, "web-3");
        assert_eq!(instance.id, InstanceId::derive("host-1", "web-3"));
        assert_eq!(instance.os.name, "UNKNOWN");
        assert_eq!(instance.compartment_id, compartment());
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let reports = [
            "boot_volume = \"/a\"",
            "# mine\n\nboot_volume = \"/a\"\n\n# end\n",
            "# empty\n",
            "boot_volume = \"/a\"\nqmp_socket = \"b\"",
            "boot_volume = \"/a\"\nqmp_socket = \"/b\"\nid = \"a/b\"",
            "boot_volume = \"/a\"\nqmp_socket = \"/b\"\n\npassword = \"secret\"",
            "boot_volume = \"/a\"\nqmp_socket = \"/b\"\nagent_socket = 3",
        ]
        .map(refused);
        insta::assert_snapshot!(reports.join("\n"), @r#"
        /etc/imaged/instances.d/web-3.toml, line 1: missing key `qmp_socket`
        /etc/imaged/instances.d/web-3.toml, line 1: missing key `qmp_socket`
        /etc/imaged/instances.d/web-3.toml, line 1: missing key `boot_volume`
        /etc/imaged/instances.d/web-3.toml, line 2: qmp_socket: "b" is not an absolute path
        /etc/imaged/instances.d/web-3.toml, line 3: id: '/' is not among the letters, digits, '.', '-' and '_' that an identifier is made of
        /etc/imaged/instances.d/web-3.toml, line 4: password: unknown key, expected one of `id`, `compartment`, `boot_volume`, `qmp_socket`, `agent_socket`, `freeze_seconds`, `freeze_hook`, `shutdown_seconds`, `base_image_id`, `shape`, `systemd_unit`, `operating_system`, `operating_system_version`
        /etc/imaged/instances.d/web-3.toml, line 3: agent_socket: invalid type: integer `3`, expected a path
        "#);
    }

    #[test]
    fn one_bad_file_costs_one_instance() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a", "/disks/a", "");
        write(dir.path(), "b", "/disks/b", "color = \"red\"");
        write(dir.path(), "bad name", "/disks/c", "");
        fs::write(dir.path().join("README"), "not an instance").unwrap();
        let found = load(dir.path(), "h", &compartment()).unwrap();
        let names = |list: &[Instance]| list.iter().map(|i| i.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&found.usable), ["a"]);
        let refused: Vec<_> = found.refused.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(refused, ["b", "bad name"]);
    }

    #[test]
    fn a_shared_disk_refuses_all_that_share_it_and_names_both_files() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::write(&disk, "").unwrap();
        std::os::unix::fs::symlink(&disk, dir.path().join("link")).unwrap();
        write(dir.path(), "a", disk.to_str().unwrap(), "");
        write(dir.path(), "b", dir.path().join("link").to_str().unwrap(), "");
        write(dir.path(), "c", "/disks/c", "");
        let found = load(dir.path(), "h", &compartment()).unwrap();
        assert_eq!(found.usable.len(), 1);
        let text: Vec<_> = found.refused.iter().map(|(_, error)| error.report()).collect();
        let text = text.join("\n").replace(dir.path().to_str().unwrap(), "DIR");
        insta::assert_snapshot!(text, @"
        DIR/a.toml: boot_volume: DIR/disk is also the boot_volume of DIR/b.toml
        DIR/b.toml: boot_volume: DIR/disk is also the boot_volume of DIR/a.toml
        ");
    }

    #[test]
    fn a_shared_id_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a", "/disks/a", "id = \"ocid1.instance.x\"");
        write(dir.path(), "b", "/disks/b", "id = \"ocid1.instance.x\"");
        let found = load(dir.path(), "h", &compartment()).unwrap();
        assert_eq!((found.usable.len(), found.refused.len()), (0, 2));
    }

    #[test]
    fn no_directory_means_no_instances() {
        let found = load(Path::new("/nonexistent"), "h", &compartment()).unwrap();
        assert!(found.usable.is_empty() && found.refused.is_empty());
    }
}
