//! What a guest is told to take its iSCSI away, and to give it back: pure.

use std::{
    collections::BTreeSet,
    fmt::{self, Write},
};

use serde::{Deserialize, Serialize};

use crate::model::iscsi::{Attachment, Device, DeviceKind, Iscsi, Session, Target, Use};

/// Where a guest's own system lies.
const OWN: [&str; 6] = ["/", "/boot", "/boot/efi", "/etc", "/usr", "/var"];

/// The lines of each step (`agent/iscsi-step.sh`). With the records, all that
/// gives the guest back what it had: a secret, because they hold CHAP's.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    pub unmount: String,
    pub logout: String,
    pub login: String,
    pub mount: String,
    /// A tar archive, in base64.
    pub records: String,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Plan")
    }
}

/// Why a guest's iSCSI is not taken away.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unplanned {
    #[error("it has no iscsiadm, so nothing in it can log out")]
    NoTool,
    #[error("it runs from {0} itself: {1} lies there")]
    Runs(Target, String),
    #[error("its session to {0} is lost, and {1} lies there: what was written may be lost, too")]
    Lost(Target, String),
    #[error("{1} of {0} is used as something that imaged cannot give back: {2}")]
    Strange(Target, String, String),
    #[error("{1} of {0} is mounted in a way that imaged cannot repeat")]
    Mount(Target, String),
}

impl Unplanned {
    /// What to do.
    pub(super) const fn advice(&self) -> &'static str {
        match self {
            Self::NoTool => "install open-iscsi (iscsi-initiator-utils) in the guest",
            Self::Runs(..) => {
                "such a volume stays: an instance that boots from iSCSI is not \
                               imaged by taking it away"
            }
            Self::Lost(..) => "bring the target back, or unmount it in the guest by hand",
            Self::Strange(..) | Self::Mount(..) => "close and unmount it in the guest by hand",
        }
    }
}

impl Plan {
    /// Everything that `iscsi` says, but for the records.
    ///
    /// # Errors
    ///
    /// [`Unplanned`]: something stands against it.
    pub fn of(iscsi: &Iscsi) -> Result<Self, Unplanned> {
        if !iscsi.has_tool && iscsi.sessions().next().is_some() {
            return Err(Unplanned::NoTool);
        }
        let mut taken = Taken::default();
        let mut plan = Self::default();
        for Attachment { target, session, .. } in &iscsi.attachments {
            let Some(session) = session else { continue };
            taken.session(target, session)?;
            let Target { iqn, portal } = target;
            // Writing to a String cannot fail, here and below.
            let _ = writeln!(plan.logout, "session\t{}", session.id);
            let _ = writeln!(plan.login, "target\t{iqn}\t{}\t{}", portal.address, portal.port);
        }
        (plan.unmount, plan.mount) = taken.lines();
        Ok(plan)
    }
}

/// What is to be unmounted, each once: paths share what lies on them.
#[derive(Debug, Default)]
struct Taken {
    /// Where, its name, and the line that mounts it.
    mounts: BTreeSet<(String, String, String)>,
    /// Name, and the line that turns it on.
    swaps: BTreeSet<(String, String)>,
    volumes: BTreeSet<String>,
    multipaths: BTreeSet<String>,
    disks: BTreeSet<String>,
}

impl Taken {
    fn session(&mut self, target: &Target, session: &Session) -> Result<(), Unplanned> {
        let Target { iqn, portal } = target;
        let mut disk = None;
        for device in &session.devices {
            let name = device.name.clone();
            let strange =
                |what: &str| Unplanned::Strange(target.clone(), name.clone(), what.to_owned());
            let of_disk = |lun: u64, part: &str| {
                format!("{iqn}\t{}\t{}\t{lun}\t{part}", portal.address, portal.port)
            };
            let source = match &device.kind {
                DeviceKind::Disk { lun } => {
                    disk = Some(*lun);
                    // One that is lost would be waited for.
                    if session.logged_in {
                        self.disks.insert(name.clone());
                    }
                    of_disk(*lun, "-")
                }
                DeviceKind::Partition { number } => {
                    of_disk(disk.unwrap_or_default(), &number.to_string())
                }
                DeviceKind::Lvm(mapper) => {
                    let volume = logical_volume(mapper).ok_or_else(|| strange(mapper))?;
                    self.volumes.insert(volume);
                    format!("/dev/mapper/{mapper}")
                }
                DeviceKind::Multipath(mapper) => {
                    self.multipaths.insert(mapper.clone());
                    format!("/dev/mapper/{mapper}")
                }
                DeviceKind::Mapped(mapper) => return Err(strange(mapper)),
                DeviceKind::Raid => return Err(strange("an array")),
                DeviceKind::Other => return Err(strange("a device of an unknown kind")),
            };
            self.uses(target, session, device, &source)?;
        }
        Ok(())
    }

    fn uses(
        &mut self,
        target: &Target,
        session: &Session,
        device: &Device,
        source: &str,
    ) -> Result<(), Unplanned> {
        for used in &device.uses {
            if !session.logged_in {
                return Err(Unplanned::Lost(target.clone(), used.to_string()));
            }
            match used {
                Use::Swap => {
                    self.swaps.insert((device.name.clone(), format!("swapon\t{source}")));
                }
                Use::Mount { at, filesystem, options, repeatable } => {
                    if OWN.contains(&at.as_str()) {
                        return Err(Unplanned::Runs(target.clone(), at.clone()));
                    }
                    if !repeatable {
                        return Err(Unplanned::Mount(target.clone(), at.clone()));
                    }
                    let line = format!("mount\t{at}\t{filesystem}\t{options}\t{source}");
                    self.mounts.insert((at.clone(), device.name.clone(), line));
                }
            }
        }
        Ok(())
    }

    /// What takes it away, and what gives it back.
    fn lines(self) -> (String, String) {
        let Self { mounts, swaps, volumes, multipaths, disks } = self;
        let (mut down, mut up) = (String::new(), String::new());
        // What lies below a mount is sorted after it.
        for (at, ..) in mounts.iter().rev() {
            let _ = writeln!(down, "umount\t{at}");
        }
        for (name, _) in &swaps {
            let _ = writeln!(down, "swapoff\t{name}");
        }
        for volume in &volumes {
            let _ = writeln!(down, "deactivate\t{volume}");
            let _ = writeln!(up, "activate\t{volume}");
        }
        for name in &multipaths {
            let _ = writeln!(down, "unmap\t{name}");
        }
        for name in &disks {
            let _ = writeln!(down, "flush\t{name}");
        }
        for (_, line) in &swaps {
            let _ = writeln!(up, "{line}");
        }
        for (_, _, line) in &mounts {
            let _ = writeln!(up, "{line}");
        }
        (down, up)
    }
}

/// `VG/LV` from a mapper's name: one hyphen parts them, two are one of theirs
/// (libdevmapper, `dm_build_dm_name`).
fn logical_volume(mapper: &str) -> Option<String> {
    let hidden = mapper.replace("--", "\0");
    let (group, volume) = hidden.split_once('-')?;
    // The third part is of a hidden volume.
    let plain = !group.is_empty() && !volume.is_empty() && !volume.contains('-');
    plain.then(|| format!("{group}/{volume}").replace('\0', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::iscsi::read;

    fn plan(lines: &[&str]) -> Result<Plan, Unplanned> {
        Plan::of(&read(&format!("tool\n{}\nend\n", lines.join("\n"))).unwrap())
    }

    const SESSION: &str = "session\t1\tiqn.2015-12.test:1\t10.0.2.2\t3260\tLOGGED_IN\t(null)";
    const DISK: &str = "device\t-\tsda\t8:0\t524288\t-\t-\t-\t-\t1";

    #[test]
    fn what_is_on_top_goes_first_and_comes_last() {
        let plan = plan(&[
            SESSION,
            DISK,
            "device\tsda\tsda2\t8:2\t522240\t-\t-\t-\t2\t-",
            "device\tsda2\tdm-0\t254:0\t102400\tmy--vg-data\tLVM-abc\t-\t-\t-",
            "session\t2\tiqn.2015-12.test:2\tfd00::1\t3260\tLOGGED_IN\tme",
            "device\t-\tsdb\t8:16\t524288\t-\t-\t-\t-\t3",
            "mount\t254:0\t28 27 254:0 / /data rw,relatime - ext4 /dev/mapper/x rw,seclabel",
            "mount\t8:16\t29 28 8:16 / /data/more\\040of\\040it ro - xfs /dev/sdb ro,noquota",
            "swap\tsda2",
        ])
        .unwrap();
        insta::assert_snapshot!(plan.unmount.replace('\t', " "), @r"
        umount /data/more of it
        umount /data
        swapoff sda2
        deactivate my-vg/data
        flush sda
        flush sdb
        ");
        insta::assert_snapshot!(plan.mount.replace('\t', " "), @r"
        activate my-vg/data
        swapon iqn.2015-12.test:1 10.0.2.2 3260 1 2
        mount /data ext4 rw,relatime,rw /dev/mapper/my--vg-data
        mount /data/more of it xfs ro,ro,noquota iqn.2015-12.test:2 fd00::1 3260 3 -
        ");
        insta::assert_snapshot!(plan.login.replace('\t', " "), @r"
        target iqn.2015-12.test:1 10.0.2.2 3260
        target iqn.2015-12.test:2 fd00::1 3260
        ");
        insta::assert_snapshot!(plan.logout.replace('\t', " "), @r"
        session 1
        session 2
        ");
    }

    #[test]
    fn what_cannot_be_given_back_is_not_taken() {
        let why = |lines: &[&str]| plan(lines).unwrap_err().to_string();
        let lost = SESSION.replace("LOGGED_IN", "FAILED");
        let root = "mount\t8:0\t28 27 8:0 / / rw - ext4 /dev/sda rw";
        let data = "mount\t8:0\t28 27 8:0 / /data rw - ext4 /dev/sda rw";
        let part = "mount\t8:0\t28 27 8:0 /a /data rw - ext4 /dev/sda rw";
        let crypt = "device\tsda\tdm-1\t254:1\t1024\tsafe\tCRYPT-LUKS2-x\t-\t-\t-";
        insta::assert_snapshot!(
            [
                why(&[SESSION, DISK, root]),
                why(&[&lost, DISK, data]),
                why(&[SESSION, DISK, part]),
                why(&[SESSION, DISK, crypt]),
            ]
            .join("\n"),
            @r"
        it runs from iqn.2015-12.test:1 at 10.0.2.2:3260 itself: / lies there
        its session to iqn.2015-12.test:1 at 10.0.2.2:3260 is lost, and /data (ext4) lies there: what was written may be lost, too
        /data of iqn.2015-12.test:1 at 10.0.2.2:3260 is mounted in a way that imaged cannot repeat
        dm-1 of iqn.2015-12.test:1 at 10.0.2.2:3260 is used as something that imaged cannot give back: safe
        "
        );
        // A lost session that nothing uses is logged out of.
        assert!(plan(&[&lost, DISK]).is_ok());
        let said = format!("{SESSION}\nend\n");
        assert_eq!(Plan::of(&read(&said).unwrap()), Err(Unplanned::NoTool));
    }

    #[test]
    fn logical_volumes_are_told_from_their_hidden_parts() {
        assert_eq!(logical_volume("vg-lv").as_deref(), Some("vg/lv"));
        assert_eq!(logical_volume("my--vg-my--lv").as_deref(), Some("my-vg/my-lv"));
        assert_eq!(logical_volume("vg-pool-tpool"), None);
        assert_eq!(logical_volume("vg"), None);
    }
}
