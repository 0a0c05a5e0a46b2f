//! Snapshots by LVM. This machine's kernel may have no device-mapper: the
//! host is the lab's guest with LVM in it, and imaged runs inside.

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
const START: &str = r#"
mkdir -p /run/imaged
setsid /bins/imaged >>/srv/imaged.log 2>&1 </dev/null & echo $! >/run/imaged.pid
for try in $(seq 200); do /bins/imagectl host get >/dev/null 2>&1 && exit 0; sleep 0.1; done
cat /srv/imaged.log >&2; exit 1
"#;

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn boot() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        let at = |name: &str| host.dir.path().join(name).display().to_string();
        run("cp", &["--sparse=always", &run("tests/lab/host.sh", &[]), &at("disk")]);
        let bins = host.dir.path().join("bins");
        fs::create_dir(&bins).unwrap();
        for program in [env!("CARGO_BIN_EXE_imaged"), env!("CARGO_BIN_EXE_imagectl")] {
            let name = Path::new(program).file_name().unwrap();
            run("strip", &["-o", bins.join(name).to_str().unwrap(), program]);
        }
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

    fn sh(&self, script: &str) -> String {
        self.vm("exec", &["/bin/bash", "-c", script])
    }

    fn ctl(&self, args: &str) -> Value {
        serde_json::from_str(&self.sh(&format!("/bins/imagectl {args} --output json"))).unwrap()
    }

    fn request(&self, id: &str) -> Value {
        self.ctl(&format!("work-request get --work-request-id {id}"))["data"].clone()
    }

    /// Begins an image that takes some seconds, and returns once it reads.
    fn reading(&self) -> String {
        let begun = self.ctl("image create --boot-volume /dev/vg0/web --max-read-rate 4MiB");
        let id = begun["opc-work-request-id"].as_str().unwrap().to_owned();
        wait_for("bytes to be read", std::time::Duration::from_secs(60), || {
            let now = self.request(&id);
            assert!(now["time-finished"].is_null(), "{now}");
            (now["progress"]["bytes-read"].as_u64().unwrap_or(0) > 0).then_some(())
        });
        id
    }

    fn ended(&self, id: &str) -> Value {
        wait_for("the end", std::time::Duration::from_secs(120), || {
            let now = self.request(id);
            (!now["time-finished"].is_null()).then_some(now)
        })
    }

    /// Snapshots by imaged that are there.
    fn snapshots(&self) -> usize {
        self.sh("lvs --noheadings --options lv_name vg0").matches("imaged-").count()
    }

    fn no_snapshot_is_left(&self) {
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

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn host_lvm_a_thin_volume_is_free_while_its_image_is_made() {
    let host = Host::boot();
    let features = host.ctl("host get")["data"]["features"].to_string();
    assert!(features.contains("thin logical volumes are snapshotted"), "{features}");

    let request = host.reading();
    assert_eq!(host.snapshots(), 1);
    // Its machine starts, and writes.
    host.sh("mount /dev/vg0/web /vol && head -c 20000000 /dev/zero >/vol/more && sync");
    let ended = host.ended(&request);
    assert_eq!(ended["status"], "SUCCEEDED", "{ended}");
    assert!(ended["logs"].to_string().contains("is read (LVM)"), "{ended}");
    let image = host.ctl("image list")["data"][0].clone();
    assert_eq!((&image["snapshot"], &image["consistency"]), (&"LVM".into(), &"CLEAN".into()));
    let id = image["id"].as_str().unwrap();
    host.sh(&format!("/bins/imagectl volume restore --image-id {id} --to /srv/out/web.raw"));
    host.sh("sha256sum </srv/out/web.raw | cmp - /srv/before");
    host.no_snapshot_is_left();

    // It goes on when its daemon is killed, and the next one removes what is
    // left.
    host.sh("umount /vol");
    let request = host.reading();
    host.sh("kill -KILL $(cat /run/imaged.pid); mount /dev/vg0/web /vol; echo new >/vol/new");
    assert_eq!(host.snapshots(), 1);
    host.sh(START);
    assert_eq!(host.snapshots(), 0);
    assert_eq!(host.request(&request)["errors"][0]["code"], "DAEMON_STOPPED");
    host.sh("echo newer >/vol/new && sync && umount /vol");

    // Killed at each step that it has for LVM.
    for step in ["before host snapshot", "after host snapshot", "before host snapshot removed"] {
        host.sh(&format!(
            "kill $(cat /run/imaged.pid); while kill -0 $(cat /run/imaged.pid) 2>/dev/null; do \
             sleep 0.1; done; export IMAGED_TEST_DIES='{step} 1'; {START}"
        ));
        let begun = host.ctl("image create --boot-volume /dev/vg0/web");
        let request = begun["opc-work-request-id"].as_str().unwrap();
        host.sh("for try in $(seq 300); do kill -0 $(cat /run/imaged.pid) 2>/dev/null || exit 0; \
             sleep 0.1; done; echo it lives >&2; exit 1");
        // Whoever writes does not wait for the next imaged.
        host.sh("mount /dev/vg0/web /vol && date >/vol/new && sync && umount /vol");
        assert_eq!(host.snapshots(), usize::from(step != "before host snapshot"), "{step}");
        host.sh(START);
        assert_eq!(host.snapshots(), 0, "{step}");
        assert_eq!(host.request(request)["errors"][0]["code"], "DAEMON_STOPPED", "{step}");
    }
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn host_lvm_what_cannot_be_snapshotted_is_held_and_the_log_says_why() {
    let host = Host::boot();
    let image = |volume: &str| {
        let begun = host.ctl(&format!("image create --boot-volume {volume}"));
        let ended = host.ended(begun["opc-work-request-id"].as_str().unwrap());
        assert_eq!(ended["status"], "SUCCEEDED", "{ended}");
        assert_eq!(host.snapshots(), 0);
        ended["logs"].to_string()
    };
    host.sh("lvcreate -q -y -L 20M -n thick vg0 && mkfs.ext4 -q /dev/vg0/thick");
    let said = image("/dev/vg0/thick");
    assert!(said.contains("its logical volume is linear"), "{said}");
    // Another volume takes the pool's room.
    host.sh("lvcreate -q -V 200M -T vg0/pool -n other 2>/dev/null && \
         dd if=/dev/zero of=/dev/vg0/other bs=1M count=170 oflag=direct status=none");
    let said = image("/dev/vg0/web");
    assert!(said.contains("its pool vg0/pool has") && said.contains("may need"), "{said}");
    let images = host.ctl("image list")["data"].clone();
    assert!(images.as_array().unwrap().iter().all(|image| image["snapshot"] == "AT_REST"));
}
