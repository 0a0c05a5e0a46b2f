//! Reads what a guest says of its iSCSI (`agent/iscsi-survey.sh`).

use std::collections::BTreeMap;

use crate::{
    hypervisor::refusal::printable,
    model::{
        ByteSize,
        iscsi::{Attachment, Device, DeviceKind, Iscsi, Portal, Record, Session, Target, Use},
    },
};

/// Most attachments, devices and mounts together: a guest may say anything,
/// and this is far beyond what one has.
const MAX_LINES: usize = 10_000;

/// Bytes of a sector in sysfs, whatever the disk's own are.
const SECTOR: u64 = 512;

/// What a guest said makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Odd {
    /// No guest has so much.
    #[error("it has more than {MAX_LINES} lines")]
    TooLong,
    /// Its end is missing.
    #[error("it was cut off")]
    CutOff,
    /// From 1.
    #[error("line {0} cannot be understood")]
    Line(usize),
}

/// What the guest has.
///
/// # Errors
///
/// [`Odd`].
pub fn read(said: &str) -> Result<Iscsi, Odd> {
    let mut survey = Survey::default();
    let mut lines = said.lines().enumerate();
    for (number, line) in &mut lines {
        if number >= MAX_LINES {
            return Err(Odd::TooLong);
        }
        if line == "end" {
            return Ok(survey.sum());
        }
        survey.line(line).ok_or(Odd::Line(number + 1))?;
    }
    Err(Odd::CutOff)
}

/// What was said so far.
#[derive(Debug, Default)]
struct Survey {
    iscsi: Iscsi,
    sessions: Vec<(Target, Session)>,
    records: BTreeMap<Target, Record>,
    /// Their numbers, beside the devices of each session.
    numbers: Vec<Vec<String>>,
}

impl Survey {
    /// `None`: it is odd.
    fn line(&mut self, line: &str) -> Option<()> {
        let fields: Vec<_> = line.split('\t').collect();
        match fields.as_slice() {
            ["tool"] => self.iscsi.has_tool = true,
            ["initiator", name] => self.iscsi.initiator = Some(printable(name)),
            ["session", id, iqn, address, port, state, user] => {
                let portal = Portal { address: printable(address), port: port.parse().ok()? };
                let session = Session {
                    id: id.parse().ok()?,
                    logged_in: *state == "LOGGED_IN",
                    has_chap: !["-", "(null)"].contains(user),
                    devices: Vec::new(),
                };
                self.sessions.push((Target { iqn: printable(iqn), portal }, session));
                self.numbers.push(Vec::new());
            }
            ["device", below, name, number, sectors, mapper, uuid, level, partition, lun] => {
                let kind = match (*below, *partition) {
                    ("-", _) => DeviceKind::Disk { lun: lun.parse().ok()? },
                    (_, "-") => kind(mapper, uuid, level),
                    (_, number) => DeviceKind::Partition { number: number.parse().ok()? },
                };
                let device = Device {
                    name: printable(name),
                    kind,
                    size: ByteSize(sectors.parse::<u64>().ok()?.checked_mul(SECTOR)?),
                    uses: Vec::new(),
                };
                let (_, session) = self.sessions.last_mut()?;
                // Two paths to it in one session.
                if session.devices.iter().all(|known| known.name != device.name) {
                    session.devices.push(device);
                    self.numbers.last_mut()?.push((*number).to_owned());
                }
            }
            ["mount", number, line] => {
                self.used(|_, of_device| of_device == *number, &mount(line)?);
            }
            ["swap", name] => self.used(|device, _| device == *name, &Use::Swap),
            ["record", path, startup, method] => {
                let record = Record {
                    at_boot: ["automatic", "onboot"].contains(startup),
                    has_chap: !["-", "None"].contains(method),
                };
                let mut parts = path.split('/');
                let (iqn, portal) = (parts.next()?, portal(parts.next()?)?);
                let known = self.records.entry(Target { iqn: printable(iqn), portal });
                // One for each interface: what any of them does counts.
                let known = known.or_insert_with(|| record.clone());
                known.at_boot |= record.at_boot;
                known.has_chap |= record.has_chap;
            }
            ["discovery", name] => self.iscsi.discoveries.push(portal(name)?),
            _ => return None,
        }
        Some(())
    }

    /// Notes a use of every device that `is_it`, by name and number.
    fn used(&mut self, is_it: impl Fn(&str, &str) -> bool, used: &Use) {
        for ((_, session), numbers) in self.sessions.iter_mut().zip(&self.numbers) {
            for (device, number) in session.devices.iter_mut().zip(numbers) {
                if is_it(&device.name, number) {
                    device.uses.push(used.clone());
                }
            }
        }
    }

    /// Sessions with their records, then the records of what has no session.
    fn sum(self) -> Iscsi {
        let Self { mut iscsi, sessions, mut records, .. } = self;
        let mut known = Vec::new();
        for (target, session) in sessions {
            let record = records.get(&target).cloned();
            known.push(target.clone());
            iscsi.attachments.push(Attachment { target, session: Some(session), record });
        }
        records.retain(|target, _| !known.contains(target));
        let only = records.into_iter();
        iscsi.attachments.extend(only.map(|(target, record)| Attachment {
            target,
            session: None,
            record: Some(record),
        }));
        iscsi
    }
}

/// `dm` says what made a device by the beginning of its UUID (libdevmapper,
/// `UUID_PREFIX`; multipath-tools, `mpath-`).
fn kind(mapper: &str, uuid: &str, level: &str) -> DeviceKind {
    match mapper {
        _ if level != "-" => DeviceKind::Raid,
        "-" => DeviceKind::Other,
        name if uuid.starts_with("LVM-") => DeviceKind::Lvm(printable(name)),
        name if uuid.starts_with("mpath-") => DeviceKind::Multipath(printable(name)),
        name => DeviceKind::Mapped(printable(name)),
    }
}

/// From a line of `/proc/self/mountinfo` (proc(5)).
fn mount(line: &str) -> Option<Use> {
    let (of_mount, of_filesystem) = line.split_once(" - ")?;
    let of_mount: Vec<_> = of_mount.split(' ').collect();
    let [_, _, _, root, at, options, ..] = of_mount.as_slice() else { return None };
    let of_filesystem: Vec<_> = of_filesystem.split(' ').collect();
    let [filesystem, _, more] = of_filesystem.as_slice() else { return None };
    // What SELinux does by itself, and mount does not take.
    let more = more.split(',').filter(|option| *option != "seclabel");
    let options: Vec<_> = options.split(',').chain(more).collect();
    let path = unescaped(at);
    let at = printable(&path);
    // btrfs says which subvolume in its options.
    let whole = *root == "/" || *filesystem == "btrfs";
    Some(Use::Mount {
        repeatable: whole && at == path,
        at,
        filesystem: printable(filesystem),
        options: printable(&options.join(",")),
    })
}

/// From the name that open-iscsi gives a directory: `ADDRESS,PORT`, and the
/// number of a portal group. An IPv6 address is not in brackets there.
fn portal(name: &str) -> Option<Portal> {
    let mut parts = name.split(',');
    let address = printable(parts.next()?);
    Some(Portal { address, port: parts.next()?.parse().ok()? })
}

/// `/proc` writes spaces, tabs, newlines and backslashes as three octal digits
/// (proc(5)).
fn unescaped(said: &str) -> String {
    let mut bytes = Vec::with_capacity(said.len());
    let mut rest = said.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.filter(|_| *first == b'\\');
        match escaped.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of a guest with two sessions, one of them with CHAP and a volume group
    /// on a partition, and a record that was never logged in.
    const SAID: &str = "tool\n\
        initiator\tiqn.1993-08.org.debian:01:demo\n\
        session\t1\tiqn.2015-12.com.oracleiaas:vol1\t10.0.2.2\t3260\tLOGGED_IN\tchapuser\n\
        device\t-\tsda\t8:0\t524288\t-\t-\t-\t-\t1\n\
        device\tsda\tsda1\t8:1\t522240\t-\t-\t-\t1\t-\n\
        device\tsda1\tdm-0\t254:0\t102400\tvg-data\tLVM-abc\t-\t-\t-\n\
        session\t2\tiqn.2015-12.com.oracleiaas:vol2\tfd00::1\t3260\tFAILED\t(null)\n\
        device\t-\tsdb\t8:16\t1048576\t-\t-\t-\t-\t2\n\
        mount\t254:0\t28 27 254:0 / /data\\040one rw,relatime shared:1 - ext4 /dev/mapper/vg-data rw\n\
        swap\tsdb\n\
        record\tiqn.2015-12.com.oracleiaas:vol1/10.0.2.2,3260,1/default\tautomatic\tCHAP\n\
        record\tiqn.2015-12.com.oracleiaas:vol3/10.0.2.2,3260\tmanual\tNone\n\
        discovery\t10.0.2.2,3260\n\
        end\n";

    #[test]
    fn what_a_guest_says_is_understood() {
        let iscsi = read(SAID).unwrap();
        assert!(iscsi.has_tool && !iscsi.is_empty());
        assert_eq!(iscsi.initiator.as_deref(), Some("iqn.1993-08.org.debian:01:demo"));
        let targets: Vec<_> =
            iscsi.attachments.iter().map(|attachment| attachment.target.to_string()).collect();
        assert_eq!(
            targets,
            [
                "iqn.2015-12.com.oracleiaas:vol1 at 10.0.2.2:3260",
                "iqn.2015-12.com.oracleiaas:vol2 at [fd00::1]:3260",
                "iqn.2015-12.com.oracleiaas:vol3 at 10.0.2.2:3260",
            ]
        );
        let [first, second, third] = iscsi.attachments.as_slice() else { panic!("{iscsi:?}") };
        assert_eq!(first.record, Some(Record { at_boot: true, has_chap: true }));
        assert!(first.has_chap() && !second.has_chap() && !third.has_chap());
        let session = first.session.as_ref().unwrap();
        assert!(session.logged_in && session.has_chap);
        let devices: Vec<_> = session.devices.iter().map(|device| &device.kind).collect();
        assert_eq!(
            devices,
            [
                &DeviceKind::Disk { lun: 1 },
                &DeviceKind::Partition { number: 1 },
                &DeviceKind::Lvm("vg-data".into()),
            ]
        );
        assert_eq!(session.devices[0].size, ByteSize::mib(256));
        assert_eq!(session.devices[2].uses[0].to_string(), "/data one (ext4)");
        let session = second.session.as_ref().unwrap();
        assert!(!session.logged_in);
        assert_eq!(session.devices[0].uses, [Use::Swap]);
        assert_eq!((&third.session, iscsi.discoveries.len()), (&None, 1));
    }

    #[test]
    fn what_is_odd_is_told() {
        assert_eq!(read("tool\n"), Err(Odd::CutOff));
        assert_eq!(read("tool\nsession\t1\nend\n"), Err(Odd::Line(2)));
        // A device of no session.
        let device = "device\t-\tsda\t8:0\t524288\t-\t-\t-\t-\t1\nend\n";
        assert_eq!(read(device), Err(Odd::Line(1)));
        assert_eq!(read(&"tool\n".repeat(MAX_LINES + 1)), Err(Odd::TooLong));
        assert_eq!(read("end\n"), Ok(Iscsi::default()));
    }

    #[test]
    fn nothing_that_a_terminal_would_obey_passes() {
        let said = "initiator\tiqn\u{1b}[2J\nend\n";
        assert_eq!(read(said).unwrap().initiator.unwrap(), "iqn [2J");
        let said = r"1 2 8:0 / /a\033b\134c\04 rw - ext4 /dev/sda rw";
        let Some(Use::Mount { at, repeatable, .. }) = mount(said) else { panic!("{said}") };
        assert_eq!((at.as_str(), repeatable), ("/a b\\c\\04", false));
    }

    proptest! {
        #[test]
        fn anything_may_be_said(said in "(tool|session|device|mount|record|[a-z0-9:/,\t\n \\\\-]){0,40}") {
            let _ = read(&said);
        }

        #[test]
        fn a_line_less_is_cut_off_or_odd(at in 0_usize..14) {
            let lines: Vec<_> = SAID.lines().take(at).collect();
            prop_assert!(read(&lines.join("\n")).is_err());
        }
    }
}
