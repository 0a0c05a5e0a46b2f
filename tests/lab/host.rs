//! A host with LVM: the lab's guest with LVM in it, because this machine's
//! kernel may have no device-mapper. imaged runs inside.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use serde_json::Value;

use crate::lab::{run, wait_for};

/// Before imaged: a pool of 240 MiB and a thin volume of 120 MiB, which a
/// machine without a hypervisor has: what writes to it stands for the machine.
const SET_UP: &str = r#"
set -e
/lib/systemd/systemd-udevd --daemon 2>/dev/null
udevadm trigger; udevadm settle
modprobe dm_thin_pool
mkdir -p /bins /srv/images /srv/out /vol /etc/imaged
mount -o ro /dev/vdb /bins
[ -s /etc/machine-id ] || echo 0123456789abcdef0123456789abcdef >/etc/machine-id
pvcreate -q /dev/vdc && vgcreate -q vg0 /dev/vdc
lvcreate -q --type thin-pool -L 240M --poolmetadatasize 8M -n pool vg0
lvcreate -q -V 120M -T vg0/pool -n web
mkfs.ext4 -q /dev/vg0/web
mount /dev/vg0/web /vol
head -c 40000000 /dev/urandom >/vol/data
umount /vol
sha256sum </dev/vg0/web >/srv/before
cat >/etc/imaged/imaged.toml <<'END'
boot_volume_dirs = ["/dev"]
restore_dirs = ["/srv/out"]
END
"#;

/// What starts imaged, and waits until it serves.
pub const START: &str = r#"
mkdir -p /run/imaged
setsid /bins/imaged >>/srv/imaged.log 2>&1 </dev/null & echo $! >/run/imaged.pid
for try in $(seq 200); do /bins/imagectl host get >/dev/null 2>&1 && exit 0; sleep 0.1; done
cat /srv/imaged.log >&2; exit 1
"#;

/// The host, with imaged running in it.
pub struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    /// Boots it, makes its volumes and starts imaged.
    pub fn boot() -> Self {
        Self::boot_with(|_| {})
    }

    /// The same, with what `add` adds to what is in /bins.
    pub fn boot_with(add: impl FnOnce(&Path)) -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        let at = |name: &str| host.dir.path().join(name).display().to_string();
        run("cp", &["--sparse=always", &run("tests/lab/host.sh", &[]), &at("disk")]);
        let bins = host.dir.path().join("bins");
        fs::create_dir(&bins).unwrap();
        for program in [env!("CARGO_BIN_EXE_imaged"), env!("CARGO_BIN_EXE_imagectl")] {
            let name = Path::new(program).file_name().unwrap();
            run("strip", &["-o", bins.join(name).to_str().unwrap(), program]);
        }
        add(&bins);
        for (name, size) in [("bins.raw", 256_u64 << 20), ("pv.raw", 1 << 30)] {
            fs::File::create(host.dir.path().join(name)).unwrap().set_len(size).unwrap();
        }
        run("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &at("bins"), &at("bins.raw")]);
        let drive = |name: &str| format!("file={},format=raw,if=virtio", at(name));
        let (bins, pv) = (drive("bins.raw"), drive("pv.raw"));
        let disk = at("disk");
        let start = ["--disk", &disk, "--format", "raw", "--", "-drive", &bins, "-drive", &pv];
        host.vm("start", &start);
        host.vm("wait-agent", &[]);
        host.sh(SET_UP);
        host.sh(START);
        host
    }

    fn vm(&self, verb: &str, args: &[&str]) -> String {
        let dir = self.dir.path().to_str().unwrap();
        // Emulated, with what else this machine has to do.
        let patient: &[_] = if verb == "start" { &[] } else { &["--timeout", "300"] };
        run("tests/lab/vm.py", &[&[verb, "--dir", dir], patient, args].concat())
    }

    /// Runs a shell script in it, and returns what it printed.
    pub fn sh(&self, script: &str) -> String {
        self.vm("exec", &["/bin/bash", "-c", script])
    }

    /// What its imagectl answers, in JSON.
    pub fn ctl(&self, args: &str) -> Value {
        serde_json::from_str(&self.sh(&format!("/bins/imagectl {args} --output json"))).unwrap()
    }

    /// A work request.
    pub fn request(&self, id: &str) -> Value {
        self.ctl(&format!("work-request get --work-request-id {id}"))["data"].clone()
    }

    /// Begins an image that takes some seconds, and returns once it reads.
    pub fn reading(&self) -> String {
        let begun = self.ctl("image create --boot-volume /dev/vg0/web --max-read-rate 4MiB");
        let id = begun["opc-work-request-id"].as_str().unwrap().to_owned();
        wait_for("bytes to be read", std::time::Duration::from_secs(60), || {
            let now = self.request(&id);
            assert!(now["time-finished"].is_null(), "{now}");
            (now["progress"]["bytes-read"].as_u64().unwrap_or(0) > 0).then_some(())
        });
        id
    }

    /// Waits for the end of a work request, and returns it.
    pub fn ended(&self, id: &str) -> Value {
        wait_for("the end", std::time::Duration::from_secs(120), || {
            let now = self.request(id);
            (!now["time-finished"].is_null()).then_some(now)
        })
    }

    /// Snapshots by imaged that are there.
    pub fn snapshots(&self) -> usize {
        self.sh("lvs --noheadings --options lv_name vg0").matches("imaged-").count()
    }

    /// Waits until there is none.
    pub fn no_snapshot_is_left(&self) {
        wait_for("the snapshot to be removed", std::time::Duration::from_secs(20), || {
            (self.snapshots() == 0).then_some(())
        });
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.vm("kill", &[]);
    }
}
