//! What goes wrong while a running guest is imaged: the guest must not notice,
//! and nothing may be left.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use crate::{
    lab::{Daemon, Guest, Monitor, run, scratch, wait_for},
    live::{
        Proxy, assert_it_writes, assert_nothing_left, assert_prefix, capture, config,
        held_while_reading, object, records, slowly, start_writer, writes,
    },
};

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_whose_agent_is_silent_is_refused_or_imaged_as_it_stands() {
    let guest = Guest::boot();
    start_writer(&guest);
    let proxy = Proxy::losing(&guest, "");
    let daemon = Daemon::start(&proxy.config(&guest));
    let said = daemon.refusal(&["image", "create", "--instance-id", "web-1"]);
    assert!(said.contains("no guest agent answers on"), "{said}");
    assert_nothing_left(&guest);

    // Asked for, it is no downgrade.
    let image = capture(&daemon, &["--consistency", "freeze-or-crash"]);
    assert_eq!(image["consistency"], "CRASH");
    assert_prefix(&records(&object(&daemon, &image), true));
    let requests = daemon.json(&["work-request", "list"]);
    let id = requests["data"][0]["id"].as_str().unwrap().to_owned();
    let get = ["work-request", "get", "--trace", "--work-request-id", &id];
    let trace = String::from_utf8(daemon.imagectl(&get).stdout).unwrap();
    assert!(trace.contains("# not frozen: no guest agent answers on"), "{trace}");
    assert!(trace.contains("> qom-set"), "{trace}");
    assert_nothing_left(&guest);
    daemon.stop();
    assert_it_writes(&guest);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_whose_agent_answers_late_is_thawed() {
    let guest = Guest::boot();
    start_writer(&guest);
    // The freeze is done, and told of when nobody waits for it any more.
    let proxy = Proxy::holding_back(&guest, "{\"return\": 1}", Duration::from_secs(8));
    let mut config = proxy.config(&guest);
    config.instances[0].1.push_str("freeze_seconds = 3\n");
    let daemon = Daemon::start(&config);
    let create = ["image", "create", "--instance-id", "web-1", "--wait-for-state", "AVAILABLE"];
    let said = daemon.refusal(&create);
    assert!(said.contains("did not freeze the guest's filesystems within 3.0 s"), "{said}");
    assert_nothing_left(&guest);
    // And the socket is of use again.
    let image = capture(&daemon, &[]);
    assert_eq!(image["consistency"], "FILESYSTEM");
    daemon.stop();
    assert_it_writes(&guest);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_whose_agent_dies_while_it_is_frozen_thaws() {
    let guest = Guest::boot();
    start_writer(&guest);
    // In the guest: as soon as nothing is written any more, no agent is left.
    guest.sh("cat >/run/killer.sh <<'END'\n\
         while :; do\n\
           before=$(stat -c %s /records); sleep 1\n\
           [ \"$(stat -c %s /records)\" = \"$before\" ] || continue\n\
           kill -STOP 1; pkill -KILL qemu-ga; echo killed >/run/killed; exit\n\
         done\n\
         END\n\
         setsid sh /run/killer.sh </dev/null >/dev/null 2>&1 &");
    let proxy = Proxy::losing(&guest, "\"execute\":\"guest-fsfreeze-thaw\"");
    let mut config = proxy.config(&guest);
    config.instances[0].1.push_str("freeze_seconds = 10\n");
    let daemon = Daemon::start(&config);
    let started = daemon.json(&["image", "create", "--instance-id", "web-1"]);
    let request = started["opc-work-request-id"].as_str().unwrap().to_owned();
    proxy.wait_until_lost();
    // Nothing but the fuse can thaw it.
    wait_for("the freeze", Duration::from_secs(10), || {
        let before = writes(&guest);
        std::thread::sleep(Duration::from_millis(500));
        (writes(&guest) == before).then_some(())
    });
    let before = writes(&guest);
    wait_for("the fuse", Duration::from_secs(20), || (writes(&guest) > before + 5).then_some(()));
    let said = daemon.refusal(&["work-request", "watch", "--work-request-id", &request]);
    assert!(said.contains("guest agent"), "{said}");
    assert_no_nodes(&guest);
}

/// Nothing of imaged's is in its QEMU.
fn assert_no_nodes(guest: &Guest) {
    let nodes = guest.qmp("query-named-block-nodes");
    assert!(!nodes.contains("imaged-"), "{nodes}");
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_that_resets_while_it_is_read_is_imaged_as_it_was() {
    let guest = Guest::boot();
    start_writer(&guest);
    let daemon = Daemon::start(&slowly(config(&guest)));
    let request = held_while_reading(&daemon);
    Monitor::of(&guest).execute("system_reset");
    // It replays its journal, and writes what it always writes.
    guest.vm("wait-agent", &[]);
    start_writer(&guest);
    daemon.signal("CONT");
    let watch = ["work-request", "watch", "--work-request-id", &request];
    assert!(daemon.imagectl(&watch).status.success());
    let images = daemon.json(&["image", "list"]);
    let image = &images["data"][0];
    assert_eq!(image["consistency"], "FILESYSTEM");
    assert_prefix(&records(&object(&daemon, image), false));
    assert_nothing_left(&guest);
    assert_it_writes(&guest);
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_that_powers_off_while_it_is_read_ends_the_image_and_nothing_is_left() {
    let guest = Guest::boot();
    let daemon = Daemon::start(&slowly(config(&guest)));
    let request = held_while_reading(&daemon);
    guest.vm("shutdown", &[]);
    daemon.signal("CONT");
    let said = daemon.refusal(&["work-request", "watch", "--work-request-id", &request]);
    assert!(said.contains("QEMU"), "{said}");
    let scratch = guest.disk().with_file_name("scratch");
    assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
    assert_eq!(daemon.json(&["image", "list"])["data"], serde_json::json!([]));
    // At rest, it can be imaged at once.
    assert_eq!(capture(&daemon, &[])["consistency"], "CLEAN");
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_whose_snapshots_socket_is_removed_is_imaged_and_given_back() {
    let guest = Guest::boot();
    start_writer(&guest);
    let daemon = Daemon::start(&slowly(config(&guest)));
    let request = held_while_reading(&daemon);
    let scratch = guest.disk().with_file_name("scratch");
    let dir = fs::read_dir(&scratch).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(dir.join("nbd.sock")).unwrap();
    daemon.signal("CONT");
    // Its connections may have been there already: an image, or none.
    let watch = ["work-request", "watch", "--work-request-id", &request];
    let ended = daemon.imagectl(&watch);
    if !ended.status.success() {
        let said = String::from_utf8(ended.stderr).unwrap();
        assert!(said.contains("nbd.sock"), "{said}");
    }
    assert_nothing_left(&guest);
    // QEMU's one server is free again.
    assert_prefix(&records(&object(&daemon, &capture(&daemon, &[])), false));
    assert_nothing_left(&guest);
    assert_it_writes(&guest);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
}

/// A filesystem whose disk fails once some MiB of it were written.
struct Failing {
    at: tempfile::TempDir,
    backing: tempfile::TempDir,
    device: String,
}

impl Failing {
    fn new(good: &str) -> Self {
        let backing = tempfile::tempdir_in(scratch()).unwrap();
        let at = tempfile::tempdir().unwrap();
        let dir = backing.path().to_str().unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={good}"), "none", dir]);
        let file = backing.path().join("disk");
        fs::File::create(&file).unwrap().set_len(1 << 30).unwrap();
        // No journal to abort: files go on taking writes that fail.
        run(
            "mkfs.ext4",
            &["-q", "-O", "^has_journal", "-E", "lazy_itable_init=1", file.to_str().unwrap()],
        );
        let attach = ["/dev/loop-control", "losetup", "--find", "--show", file.to_str().unwrap()];
        let device = run("flock", &attach);
        run("mount", &[&device, at.path().to_str().unwrap()]);
        Self { at, backing, device }
    }

    fn dir(&self) -> PathBuf {
        self.at.path().to_owned()
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let dirs = [self.at.path(), self.backing.path()];
        let _ = Command::new("umount").arg(dirs[0]).status();
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
        let _ = Command::new("umount").arg(dirs[1]).status();
    }
}

#[test]
#[ignore = "needs root, loop devices, QEMU and a minute"]
fn qemu_guest_whose_scratch_is_on_a_failing_disk_loses_its_image_and_nothing_else() {
    // Unmounted when the guest has let go of it.
    let failing = Failing::new("24M");
    let guest = Guest::boot();
    start_writer(&guest);
    let mut config = config(&guest);
    config.lines = format!("scratch_size = \"512MiB\"\nscratch_dir = {:?}", failing.dir());
    let daemon = Daemon::start(&slowly(config));
    guest.sh("yes old | head -c 60000000 >/large; sync");
    let request = held_while_reading(&daemon);
    guest.sh("yes new | head -c 60000000 | dd bs=64k of=/large conv=notrunc,fsync 2>/dev/null");
    daemon.signal("CONT");
    let said = daemon.refusal(&["work-request", "watch", "--work-request-id", &request]);
    assert!(said.contains("did not keep what the guest had overwritten"), "{said}");
    assert_no_nodes(&guest);
    assert_eq!(fs::read_dir(failing.dir()).unwrap().count(), 1, "more than lost+found");
    assert_it_writes(&guest);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
}
