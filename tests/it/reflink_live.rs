//! A guest whose volume is cloned while it works.

use std::{fs, time::Duration};

use serde_json::Value;

use crate::{
    lab::{Daemon, Guest, Mount, run, wait_for},
    lifecycle::status,
    live::{
        assert_it_writes, assert_nothing_left, assert_prefix, capture, config, object, reading,
        records, slowly, start_writer,
    },
};

/// The lab's guest on an XFS of its own.
fn boot() -> (Mount, Guest) {
    let mount = Mount::new("xfs", 6 << 30);
    let guest = Guest::boot_in(mount.at.path());
    start_writer(&guest);
    (mount, guest)
}

/// How many pieces its disk is in.
fn pieces(guest: &Guest) -> u64 {
    let disk = guest.disk();
    let told = run("filefrag", &[disk.to_str().unwrap()]);
    let count = told.rsplit(": ").next().unwrap().split(' ').next().unwrap();
    count.parse().unwrap()
}

fn logs(daemon: &Daemon, image: &Value) -> String {
    let id = image["id"].as_str().unwrap();
    daemon.json(&["work-request", "list", "--resource-id", id])["data"][0]["logs"].to_string()
}

#[test]
#[ignore = "needs root, QEMU, XFS and a minute"]
fn qemu_reflink_a_guest_is_cloned_while_it_writes_until_it_is_in_many_pieces() {
    let (_mount, guest) = boot();
    let daemon = Daemon::start(&config(&guest));
    let mut before = 0;
    for (mode, consistency) in [("freeze", "FILESYSTEM"), ("crash", "CRASH")] {
        let image = capture(&daemon, &["--consistency", mode]);
        assert_eq!(
            (&image["snapshot"], &image["consistency"]),
            (&"REFLINK".into(), &consistency.into())
        );
        let point = &image["point-in-time"];
        assert_eq!(point["frozen-filesystems"], i32::from(mode == "freeze"));
        assert_eq!(point["scratch-bytes"], 0);
        println!("{mode}: {} µs, in {} pieces then", point["window-micros"], pieces(&guest));
        let records = records(&object(&daemon, &image), mode == "crash");
        assert_prefix(&records);
        assert!(records.len() > before, "the guest wrote nothing");
        before = records.len();
        let trace =
            fs::read_to_string(object(&daemon, &image).with_file_name("trace.json")).unwrap();
        assert!(!trace.contains("blockdev-add") && !trace.contains("nbd-server-start"), "{trace}");
        assert_eq!(trace.contains("guest-fsfreeze-freeze"), mode == "freeze");
    }
    assert_nothing_left(&guest);

    // Overwritten here and there while another clone is there, it gets into
    // many pieces.
    guest.sh("head -c 150000000 /dev/urandom >/large; sync");
    let copy = guest.disk().with_file_name("copy");
    run("cp", &["--reflink=always", guest.disk().to_str().unwrap(), copy.to_str().unwrap()]);
    guest.sh("perl -e 'open(F, \"+<\", \"/large\") or die; for (0..560) { sysseek(F, $_ * 262144, 0); syswrite(F, chr(1 + $_ % 255) x 4096) or die }'; sync");
    fs::remove_file(copy).unwrap();
    assert!(pieces(&guest) > 500, "{}", pieces(&guest));
    let image = capture(&daemon, &[]);
    assert_eq!(image["snapshot"], "COPY_BEFORE_WRITE");
    let logs = logs(&daemon, &image);
    assert!(logs.contains("a clone of more than 500 takes long"), "{logs}");
    assert_prefix(&records(&object(&daemon, &image), false));

    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
    assert_nothing_left(&guest);
}

#[test]
#[ignore = "needs root, QEMU, XFS and a minute"]
fn qemu_reflink_goes_with_a_daemon_that_is_killed_and_the_guest_goes_on() {
    let (_mount, guest) = boot();
    let mut dir = Daemon::start(&config(&guest)).stop().unwrap();
    let files = || fs::read_dir(guest.disk().parent().unwrap()).unwrap().count();
    let alone = files();
    for step in ["before host snapshot 1", "after host snapshot 1", "before guest-fsfreeze-thaw 1"]
    {
        let mut dying = config(&guest);
        dying.environment = vec![("IMAGED_TEST_DIES".into(), step.into())];
        let daemon = Daemon::start_in(dir.path(), &dying);
        daemon.imagectl(&["image", "create", "--instance-id", "web-1"]);
        assert!(daemon.is_killed_at_work(), "{step} was not reached");
        drop(daemon);
        let daemon = Daemon::start_in(dir.path(), &config(&guest));
        assert_it_writes(&guest);
        assert_eq!(daemon.json(&["image", "list"])["data"].as_array().unwrap().len(), 0, "{step}");
        dir = daemon.stop().unwrap_or(dir);
    }
    // While it is read; and QEMU is not needed for that.
    let slow = slowly(config(&guest));
    let daemon = Daemon::start_in(dir.path(), &slow);
    let request = reading(&daemon, &[]);
    daemon.kill();
    let daemon = Daemon::start_in(dir.path(), &slow);
    assert_eq!(status(&daemon, &request)["errors"][0]["code"], "DAEMON_STOPPED");
    assert_it_writes(&guest);
    assert_nothing_left(&guest);
    let request = reading(&daemon, &[]);
    guest.vm("kill", &[]);
    wait_for("the image", Duration::from_secs(60), || {
        (status(&daemon, &request)["status"] == "SUCCEEDED").then_some(())
    });
    assert_eq!(daemon.json(&["image", "list"])["data"][0]["snapshot"], "REFLINK");
    // The agent's sockets and QEMU's go with it.
    assert!(files() <= alone, "a clone has a name");
}
