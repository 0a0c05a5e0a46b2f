//! Snapshots by LVM.

use crate::lab_host::{Host, START};

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn host_lvm_takes_the_snapshot_where_it_can() {
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
    for step in ["after host snapshot", "before host snapshot removed"] {
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
        assert_eq!(host.snapshots(), 1, "{step}");
        host.sh(START);
        assert_eq!(host.snapshots(), 0, "{step}");
        assert_eq!(host.request(request)["errors"][0]["code"], "DAEMON_STOPPED", "{step}");
    }

    // What it cannot take a snapshot of is held, and the log says why.
    let image = |volume: &str| {
        let begun = host.ctl(&format!("image create --boot-volume {volume}"));
        let ended = host.ended(begun["opc-work-request-id"].as_str().unwrap());
        assert_eq!(ended["status"], "SUCCEEDED", "{ended}");
        assert_eq!(host.snapshots(), 0);
        let newest = host.ctl("image list")["data"][0].clone();
        assert_eq!(newest["snapshot"], "AT_REST");
        ended["logs"].to_string()
    };
    host.sh("lvcreate -q -y -L 20M -n thick vg0 && mkfs.ext4 -q /dev/vg0/thick");
    let said = image("/dev/vg0/thick");
    assert!(said.contains("its logical volume is linear"), "{said}");
    // Another volume takes the pool's room.
    host.sh("lvcreate -q -V 200M -T vg0/pool -n other 2>/dev/null && \
         dd if=/dev/zero of=/dev/vg0/other bs=1M count=130 oflag=direct status=none");
    let said = image("/dev/vg0/web");
    assert!(said.contains("its pool vg0/pool has") && said.contains("may need"), "{said}");
}
