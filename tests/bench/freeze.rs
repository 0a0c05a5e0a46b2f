//! How long a guest is frozen, for each kind of snapshot but QEMU's own,
//! which `guest` measures with what else it costs.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    ROUNDS,
    lab::{Config, Daemon, Guest, Mount, run},
    lab_host::{Host, START},
    lab_libvirt::Libvirt,
    report::{Report, median},
};

/// An imagectl: what it answers in JSON.
type Ctl<'a> = &'a dyn Fn(&[&str]) -> Value;

pub fn windows(report: &mut Report) {
    if report.wants("freeze-window-ms-reflink") {
        cloned(report);
    }
    if report.wants("freeze-window-ms-libvirt") {
        of_libvirt(report);
    }
    if report.wants("freeze-window-ms-lvm") {
        of_lvm(report);
    }
}

/// Of a guest whose file is cloned, on XFS.
fn cloned(report: &mut Report) {
    let mount = Mount::new("xfs", 6 << 30);
    let guest = Guest::boot_in(mount.at.path());
    let daemon = Daemon::start(&Config {
        instances: vec![("web-1".into(), guest.instance())],
        ..Config::default()
    });
    let image = || capture(&daemon, &[]);
    measure("reflink", "REFLINK", &|args| daemon.json(args), image, report);
}

/// Of a domain, of which libvirt begins a backup.
fn of_libvirt(report: &mut Report) {
    let libvirt = Libvirt::start("web-1");
    libvirt.boot();
    let daemon = Daemon::start(&libvirt.config());
    let image = || capture(&daemon, &[]);
    measure("libvirt", "COPY_BEFORE_WRITE", &|args| daemon.json(args), image, report);
}

/// Of a thin logical volume. The host with LVM is emulated, as all programs
/// on it are, LVM's, too. It has a whole machine but for the guest's own
/// code: a QEMU whose processor stands still has the volume, a guest's agent
/// freezes the filesystem on it, and a process writes there.
fn of_lvm(report: &mut Report) {
    let host = Host::boot_with(copy_qemu);
    host.sh(MACHINE);
    host.sh("kill $(cat /run/imaged.pid); while pgrep -x imaged; do sleep 0.1; done");
    host.sh(START);
    let mut plain = vec![];
    let image = || {
        plain.push(host.sh(PLAIN).trim().parse::<f64>().unwrap() / 1e3);
        let begun = host.ctl("image create --instance-id web-1");
        let ended = host.ended(begun["opc-work-request-id"].as_str().unwrap());
        assert_eq!(ended["status"], "SUCCEEDED", "{ended}");
        host.no_snapshot_is_left();
        let id = begun["data"]["id"].as_str().unwrap();
        host.ctl(&format!("image get --image-id {id}"))["data"].clone()
    };
    let written = || host.sh("stat -c %s /guest/shared/seen").trim().parse::<u64>().unwrap();
    let before = written();
    measure("lvm", "LVM", &|args| host.ctl(&args.join(" ")), image, report);
    let what = "ms, an lvcreate of such a snapshot there, without imaged";
    report.value("freeze-window-ms-lvm-lvcreate", median(&plain), what);
    assert!(written() > before, "nothing was written meanwhile");
}

/// Microseconds of a snapshot, as imaged has it made.
const PLAIN: &str = r"
begun=$(date +%s%N)
lvcreate -q -y --autobackup n --snapshot --setactivationskip n -p r -n plain vg0/web >/dev/null
ended=$(date +%s%N)
lvremove -q -y vg0/plain >/dev/null
echo $(((ended - begun) / 1000))
";

/// A QEMU with its libraries, whatever the host has.
fn copy_qemu(to: &Path) {
    let qemu = "/usr/bin/qemu-system-x86_64";
    let to = to.join("qemu");
    fs::create_dir(&to).unwrap();
    let libraries = run("ldd", &[qemu]);
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    let emulator = "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so";
    for file in libraries.chain([qemu, emulator]) {
        fs::copy(file, to.join(Path::new(file).file_name().unwrap())).unwrap();
    }
    // Where a processor begins: cli, hlt.
    let mut firmware = vec![0; 1 << 16];
    firmware[0xfff0..0xfff2].copy_from_slice(&[0xfa, 0xf4]);
    fs::write(to.join("firmware"), firmware).unwrap();
}

/// The guest's disk is a loop device on the volume: what is mounted from the
/// volume itself is frozen by LVM, too. Its agent sees no other filesystem
/// that could be frozen.
const MACHINE: &str = r#"
set -e
umount /vol 2>/dev/null || true
modprobe loop; modprobe overlay
losetup --direct-io=on /dev/loop0 /dev/vg0/web
mkdir /guest && mount -t tmpfs tmpfs /guest && cd /guest
mkdir up work root shared
cat >inside <<'END'
set -e
mount -t overlay -o lowerdir=/,upperdir=up,workdir=work overlay root
mount -t proc proc root/proc
mount --bind /dev root/dev
mount --bind shared root/run
mount /dev/loop0 root/vol
cat >root/writer.pl <<'PERL'
use strict; use Fcntl;
sysopen(my $file, '/vol/probe', O_RDWR | O_CREAT | 010000) or die $!;
open(my $seen, '>', '/run/seen') or die $!; $seen->autoflush;
my $at = 0;
while () {
    sysseek($file, 4096 * ($at++ % 256), 0);
    syswrite($file, chr(1 + $at % 255) x 4096) == 4096 or die $!;
    syswrite($seen, '.');
    select(undef, undef, undef, 0.02);
}
PERL
chroot root perl /writer.pl &
exec chroot root qemu-ga --method=unix-listen --path=/run/agent.sock --statedir=/run
END
setsid unshare --mount sh inside >log 2>&1 </dev/null &
QEMU_MODULE_DIR=/bins/qemu setsid /bins/qemu/ld-linux-x86-64.so.2 --library-path /bins/qemu /bins/qemu/qemu-system-x86_64 \
  -name web-1 -bios /bins/qemu/firmware -accel tcg -machine q35 -m 16 -nodefaults -no-user-config -display none \
  -blockdev driver=raw,node-name=boot,file.driver=host_device,file.filename=/dev/vg0/web \
  -device virtio-blk-pci,id=bootdisk,drive=boot \
  -qmp unix:/run/qmp.sock,server=on,wait=off >qemu.log 2>&1 </dev/null &
for try in $(seq 300); do
  [ -S /run/qmp.sock ] && [ -S shared/agent.sock ] && [ -s shared/seen ] && break; sleep 0.1
done
[ -S /run/qmp.sock ] && [ -S shared/agent.sock ] && [ -s shared/seen ] || { cat log qemu.log >&2; exit 1; }
mkdir -p /etc/imaged/instances.d
cat >/etc/imaged/instances.d/web-1.toml <<'END'
boot_volume = "/dev/vg0/web"
qmp_socket = "/run/qmp.sock"
agent_socket = "/guest/shared/agent.sock"
END
"#;

fn measure(
    kind: &str,
    snapshot: &str,
    ctl: Ctl,
    mut image: impl FnMut() -> Value,
    report: &mut Report,
) {
    let (mut windows, mut own) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let image = image();
        assert_eq!(
            (&image["snapshot"], &image["consistency"]),
            (&snapshot.into(), &"FILESYSTEM".into())
        );
        let window = image["point-in-time"]["window-micros"].as_f64().unwrap();
        let id = image["id"].as_str().unwrap();
        windows.push(window / 1e3);
        own.push((window - guests_part(ctl, id)) / 1e3);
    }
    let name = format!("freeze-window-ms-{kind}");
    report.value(&name, median(&windows), "ms, order to freeze until thawed");
    let name = format!("freeze-window-own-ms-{kind}");
    report.value(&name, median(&own), "ms of it, without the guest's own");
}

/// An image of the running `web-1`.
pub fn capture(daemon: &Daemon, more: &[&str]) -> Value {
    let create = ["image", "create", "--instance-id", "web-1", "--wait-for-state", "AVAILABLE"];
    daemon.json(&[&create[..], more].concat())["data"].clone()
}

pub fn delete(daemon: &Daemon, image: &Value) {
    let id = image["id"].as_str().unwrap();
    assert!(daemon.imagectl(&["image", "delete", "--force", "--image-id", id]).status.success());
}

/// Microseconds that the guest took to freeze and to thaw for an image: from
/// the orders to the agent's answers.
pub fn guests_part(ctl: Ctl, image: &str) -> f64 {
    let trace = Trace::of(ctl, image);
    let took = |name: &str| trace.at("ANSWER", name) - trace.at("COMMAND", name);
    took("guest-fsfreeze-freeze") + took("guest-fsfreeze-thaw")
}

/// What was said for an image.
pub struct Trace(Vec<Value>);

impl Trace {
    pub fn of(ctl: Ctl, image: &str) -> Self {
        let requests = ctl(&["work-request", "list", "--resource-id", image]);
        let id = requests["data"][0]["id"].as_str().unwrap().to_owned();
        let trace = ctl(&["work-request", "get", "--trace", "--work-request-id", &id]);
        Self(trace["data"]["entries"].as_array().unwrap().clone())
    }

    /// When something was said first, in microseconds.
    pub fn at(&self, kind: &str, name: &str) -> f64 {
        let is_it = |entry: &&Value| entry["kind"] == kind && entry["name"] == name;
        self.0.iter().find(is_it).unwrap()["at-micros"].as_f64().unwrap()
    }
}
