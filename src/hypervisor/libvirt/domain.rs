//! What libvirt's XML says of a domain, and what is said to it in XML.
//!
//! Pure. Names of elements and attributes are those of libvirt,
//! `formatdomain.html` and `formatbackup.html`.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use roxmltree::{Document, Node};

use crate::model::{
    CompartmentId, ImageId, InstanceId,
    instance::{Domain, Freeze, Instance, Machine, OperatingSystem},
};

/// Of imaged's element in a domain's metadata.
pub const NAMESPACE: &str = "urn:imaged:instance:1";

/// As for the instances of files.
const SHUTDOWN_SECONDS: u32 = 180;
const MOST_SHUTDOWN_SECONDS: u32 = 1200;
const MOST_FREEZE_SECONDS: u32 = 300;

/// A domain that can be no instance, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub(super) struct Odd {
    /// The domain's name, where it can be read.
    pub name: String,
    pub why: String,
}

/// A domain, as far as imaged reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Described {
    pub name: String,
    pub uuid: String,
    /// Counts its starts; none while it is shut off.
    pub id: Option<u32>,
    pub boot: Disk,
    /// User and group of its QEMU, where libvirt tells.
    pub owner: Option<(u32, u32)>,
    /// What libvirt does when the guest has shut down.
    pub on_poweroff: String,
    /// Whether the guest's agent has opened its port.
    pub agent: bool,
    settings: Settings,
}

/// The disk that a domain boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// Its name for libvirt: `vda`.
    pub target: String,
    pub source: PathBuf,
    /// `raw`, `qcow2`, …
    pub format: String,
    pub read_only: bool,
}

/// What imaged's element says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Settings {
    id: Option<InstanceId>,
    compartment: Option<CompartmentId>,
    boot_volume: Option<String>,
    freeze_seconds: Option<u32>,
    freeze_hook: bool,
    shutdown_seconds: Option<u32>,
    base_image_id: Option<ImageId>,
    shape: Option<String>,
    operating_system: Option<String>,
    operating_system_version: Option<String>,
}

impl Described {
    /// Reads one `<domain>`.
    pub fn read(xml: &str) -> Result<Self, Odd> {
        let odd = |name: &str, why: String| Odd { name: name.to_owned(), why };
        let document = Document::parse(xml);
        let document = document.map_err(|cause| odd("", format!("its XML is none: {cause}")))?;
        let root = document.root_element();
        let text = |name: &str| text(child(root, name)).to_owned();
        let (name, uuid) = (text("name"), text("uuid"));
        if name.is_empty() || uuid.is_empty() {
            return Err(odd(&name, "its XML has no name or no UUID".into()));
        }
        let metadata = child(root, "metadata");
        let element = metadata.and_then(|metadata| {
            metadata.children().find(|node| node.has_tag_name((NAMESPACE, "instance")))
        });
        let settings = element.map_or(Ok(Settings::default()), Settings::read);
        let settings = settings.map_err(|why| odd(&name, why))?;
        let boot = boot_disk(root, settings.boot_volume.as_deref());
        let boot = boot.map_err(|why| odd(&name, why))?;
        let owner = root
            .children()
            .find(|node| node.has_tag_name("seclabel") && node.attribute("model") == Some("dac"))
            .and_then(|label| owner(self::text(child(label, "label"))));
        let agent = devices(root, "channel").any(|channel| {
            child(channel, "target").is_some_and(|target| {
                target.attribute("name") == Some("org.qemu.guest_agent.0")
                    && target.attribute("state") == Some("connected")
            })
        });
        let id = root.attribute("id").and_then(|id| id.parse().ok());
        let on_poweroff = text("on_poweroff");
        Ok(Self { name, uuid, id, boot, owner, on_poweroff, agent, settings })
    }

    /// The instance that it is.
    pub fn instance(self, host: &str, compartment: &CompartmentId) -> Instance {
        let unknown = OperatingSystem::default();
        let Settings { freeze_seconds, freeze_hook, shutdown_seconds, .. } = self.settings;
        let settings = self.settings;
        Instance {
            id: settings.id.unwrap_or_else(|| InstanceId::derive(host, &self.uuid)),
            name: self.name,
            compartment_id: settings.compartment.unwrap_or_else(|| compartment.clone()),
            boot_volume: self.boot.source,
            machine: Machine::Domain(Domain { domain: self.uuid }),
            freeze: Freeze {
                limit: freeze_seconds.map(|seconds| Duration::from_secs(seconds.into())),
                hook: freeze_hook,
            },
            shutdown_seconds: shutdown_seconds.unwrap_or(SHUTDOWN_SECONDS),
            base_image_id: settings.base_image_id,
            shape: settings.shape,
            systemd_unit: None,
            os: OperatingSystem {
                name: settings.operating_system.unwrap_or(unknown.name),
                version: settings.operating_system_version.unwrap_or(unknown.version),
            },
        }
    }
}

impl Settings {
    /// Its keys are those of an instance's file; an unknown one is refused,
    /// as there.
    fn read(element: Node<'_, '_>) -> Result<Self, String> {
        let mut read = Self::default();
        for key in element.children().filter(Node::is_element) {
            let (name, value) = (key.tag_name().name(), text(Some(key)));
            if key.tag_name().namespace() != Some(NAMESPACE) {
                return Err(format!("its metadata: <{name}> is not of {NAMESPACE}"));
            }
            match name {
                "id" => read.id = Some(parsed(name, value)?),
                "compartment" => read.compartment = Some(parsed(name, value)?),
                "boot_volume" => read.boot_volume = Some(value.to_owned()),
                "freeze_seconds" => {
                    read.freeze_seconds = Some(seconds(name, value, MOST_FREEZE_SECONDS)?);
                }
                "freeze_hook" => read.freeze_hook = parsed(name, value)?,
                "shutdown_seconds" => {
                    read.shutdown_seconds = Some(seconds(name, value, MOST_SHUTDOWN_SECONDS)?);
                }
                "base_image_id" => read.base_image_id = Some(parsed(name, value)?),
                "shape" => read.shape = Some(value.to_owned()),
                "operating_system" => read.operating_system = Some(value.to_owned()),
                "operating_system_version" => {
                    read.operating_system_version = Some(value.to_owned());
                }
                _ => return Err(format!("its metadata: <{name}> is no key of an instance")),
            }
        }
        Ok(read)
    }
}

fn parsed<T: FromStr<Err: std::fmt::Display>>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|cause| format!("its metadata: <{key}>: {cause}"))
}

fn seconds(key: &str, value: &str, most: u32) -> Result<u32, String> {
    match parsed::<u32>(key, value)? {
        seconds if (1..=most).contains(&seconds) => Ok(seconds),
        _ => Err(format!("its metadata: <{key}>: it may take 1 to {most} seconds")),
    }
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn text<'a>(node: Option<Node<'a, '_>>) -> &'a str {
    node.and_then(|node| node.text()).unwrap_or_default().trim()
}

fn devices<'a, 'i: 'a>(
    root: Node<'a, 'i>,
    kind: &'static str,
) -> impl Iterator<Item = Node<'a, 'i>> {
    let devices = child(root, "devices").into_iter().flat_map(|devices| devices.children());
    devices.filter(move |device| device.has_tag_name(kind))
}

/// The disk called `wanted`; otherwise the one that is to be booted from
/// first, or comes first.
fn boot_disk(root: Node<'_, '_>, wanted: Option<&str>) -> Result<Disk, String> {
    let is_disk = |disk: &Node<'_, '_>| disk.attribute("device").unwrap_or("disk") == "disk";
    let order = |disk: &Node<'_, '_>| {
        let order = child(*disk, "boot").and_then(|boot| boot.attribute("order"));
        order.and_then(|order| order.parse().ok()).unwrap_or(u32::MAX)
    };
    let mut disks = devices(root, "disk").filter(is_disk);
    let disk = match wanted {
        Some(wanted) => disks
            .find(|disk| target(*disk) == wanted)
            .ok_or_else(|| format!("its metadata: <boot_volume>: it has no disk {wanted:?}"))?,
        None => disks.min_by_key(order).ok_or("it has no disk")?,
    };
    let named = target(disk);
    let source = child(disk, "source");
    let source = source.and_then(|source| source.attribute("file").or(source.attribute("dev")));
    let Some(source) = source.map(Path::new).filter(|source| source.is_absolute()) else {
        return Err(format!("its boot disk {named} is neither a file nor a device of this host"));
    };
    let format = child(disk, "driver").and_then(|driver| driver.attribute("type"));
    Ok(Disk {
        target: named.to_owned(),
        source: source.to_owned(),
        format: format.unwrap_or("raw").to_owned(),
        read_only: child(disk, "readonly").is_some(),
    })
}

/// A disk's name.
fn target<'a>(disk: Node<'a, '_>) -> &'a str {
    child(disk, "target").and_then(|target| target.attribute("dev")).unwrap_or_default()
}

/// From `+64055:+64055`.
fn owner(label: &str) -> Option<(u32, u32)> {
    let (user, group) = label.split_once(':')?;
    let number = |word: &str| word.strip_prefix('+').unwrap_or(word).parse().ok();
    Some((number(user)?, number(group)?))
}

/// Each `<domain>` of what `dumpxml` said of several.
pub(super) fn each(answers: &str) -> impl Iterator<Item = &str> {
    // At the beginning of a line it ends a domain, and nothing within it.
    const END: &str = "\n</domain>";
    answers.split_inclusive(END).map(str::trim).filter(|xml| xml.ends_with(END))
}

/// The order for a backup of one disk that is read over `socket`; all that is
/// overwritten meanwhile goes to `scratch`, which libvirt makes and removes.
pub(super) fn backup(target: &str, export: &str, socket: &Path, scratch: &Path) -> String {
    let (socket, scratch) =
        (escaped(&socket.display().to_string()), escaped(&scratch.display().to_string()));
    format!(
        "<domainbackup mode='pull'>\n  \
           <server transport='unix' socket='{socket}'/>\n  \
           <disks>\n    \
             <disk name='{}' backup='yes' type='file' exportname='{}'>\n      \
               <driver type='qcow2'/>\n      \
               <scratch file='{scratch}'/>\n    \
             </disk>\n  \
           </disks>\n\
         </domainbackup>\n",
        escaped(target),
        escaped(export),
    )
}

/// The names of the exports of a backup, as libvirt describes it.
pub(super) fn exports(xml: &str) -> Vec<String> {
    let Ok(document) = Document::parse(xml) else { return Vec::new() };
    let named = document.descendants().filter_map(|node| node.attribute("exportname"));
    named.map(str::to_owned).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(metadata: &str, disks: &str) -> String {
        format!(
            "<domain type='kvm' id='7'>\n  <name>web-1</name>\n  <uuid>11111111-2222-4333-8444-555555555555</uuid>\n  \
             <metadata><imaged:instance xmlns:imaged='{NAMESPACE}'>{metadata}</imaged:instance>\
             <other xmlns='urn:x'><name>no</name></other></metadata>\n  \
             <on_poweroff>destroy</on_poweroff>\n  <devices>{disks}\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>\
             </devices>\n  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+108</label></seclabel>\n</domain>\n"
        )
    }

    const DISKS: &str = "
        <disk type='file' device='cdrom'><source file='/cd.iso'/><target dev='sda'/><readonly/></disk>
        <disk type='file' device='disk'><driver type='qcow2'/><source file='/data.qcow2'/><target dev='vda'/></disk>
        <disk type='block'><source dev='/dev/vg/boot'/><target dev='vdb'/><boot order='1'/></disk>";

    #[test]
    fn a_domain_with_metadata_is_an_instance() {
        let metadata = "<imaged:compartment>prod</imaged:compartment>\
                        <imaged:shape>VM.Standard2.1</imaged:shape>\
                        <imaged:freeze_seconds>9</imaged:freeze_seconds>";
        let read = Described::read(&domain(metadata, DISKS)).unwrap();
        assert_eq!((read.id, read.owner, read.agent), (Some(7), Some((64055, 108)), true));
        assert_eq!(read.boot.target, "vdb");
        let instance = read.instance("host", &"default".parse().unwrap());
        assert_eq!(instance.boot_volume, Path::new("/dev/vg/boot"));
        assert_eq!(instance.compartment_id.as_str(), "prod");
        assert_eq!(instance.shape.as_deref(), Some("VM.Standard2.1"));
        assert_eq!(instance.freeze.limit, Some(Duration::from_secs(9)));
        assert_eq!(instance.shutdown_seconds, 180);
    }

    #[test]
    fn metadata_names_another_boot_volume() {
        let named = domain("<imaged:boot_volume>vda</imaged:boot_volume>", DISKS);
        assert_eq!(Described::read(&named).unwrap().boot.source, Path::new("/data.qcow2"));
    }

    #[test]
    fn what_is_wrong_is_told_by_name() {
        let why = |metadata: &str, disks: &str| {
            let Odd { name, why } = Described::read(&domain(metadata, disks)).unwrap_err();
            assert_eq!(name, "web-1");
            why
        };
        let wrong = [
            why("<imaged:compartement>x</imaged:compartement>", DISKS),
            why("<imaged:freeze_seconds>301</imaged:freeze_seconds>", DISKS),
            why("<imaged:freeze_hook>yes</imaged:freeze_hook>", DISKS),
            why("<imaged:boot_volume>vdz</imaged:boot_volume>", DISKS),
            why("<shape>x</shape>", DISKS),
            why("", ""),
            why(
                "",
                "<disk type='network'><source protocol='rbd' name='p/i'/><target dev='vda'/></disk>",
            ),
        ];
        insta::assert_snapshot!(wrong.join("\n"), @r#"
        its metadata: <compartement> is no key of an instance
        its metadata: <freeze_seconds>: it may take 1 to 300 seconds
        its metadata: <freeze_hook>: provided string was not `true` or `false`
        its metadata: <boot_volume>: it has no disk "vdz"
        its metadata: <shape> is not of urn:imaged:instance:1
        it has no disk
        its boot disk vda is neither a file nor a device of this host
        "#);
    }

    #[test]
    fn several_domains_are_told_apart() {
        let two = format!("{}\n{}\n", domain("", DISKS), domain("", DISKS));
        assert_eq!(each(&two).filter(|xml| Described::read(xml).is_ok()).count(), 2);
        assert_eq!(each("").count(), 0);
    }

    #[test]
    fn a_backup_is_recognised_by_its_export() {
        let xml = backup("vda", "imaged-1f", Path::new("/a&b/'nbd"), Path::new("/s"));
        assert_eq!(exports(&xml), ["imaged-1f"]);
        let document = Document::parse(&xml).unwrap();
        let server = document.descendants().find(|node| node.has_tag_name("server")).unwrap();
        assert_eq!(server.attribute("socket"), Some("/a&b/'nbd"));
    }
}
