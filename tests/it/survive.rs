//! Accidents in the middle of a capture of a running guest, all with one.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::{
    lab::{Config, Daemon, Guest, run, wait_for},
    lifecycle::status,
    live::{
        assert_it_writes, assert_nothing_left, assert_prefix, capture, config, object, reading,
        records, slowly, start_writer,
    },
};

fn ended(daemon: &Daemon, request: &str) -> String {
    wait_for("the end", Duration::from_secs(60), || {
        let now = status(daemon, request);
        (!now["time-finished"].is_null()).then(|| now["status"].as_str().unwrap().to_owned())
    })
}

#[test]
#[ignore = "needs root, QEMU and minutes"]
fn qemu_guest_survives_what_befalls_its_imaged() {
    let guest = Guest::boot();
    start_writer(&guest);
    let kept = tempfile::tempdir().unwrap();
    let dir = kept.path();
    killed_while_the_guest_is_frozen_and_never_back(&guest, dir);
    signals_as_many_as_there_are(&guest, dir);
    killed_while_it_stops(&guest, dir);
    a_clock_that_jumps(&guest, dir);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
    // Last: its state is elsewhere.
    a_full_disk_under_the_journal(&guest);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
}

/// Long before the fuse blows the guard has thawed the guest.
fn killed_while_the_guest_is_frozen_and_never_back(guest: &Guest, dir: &Path) {
    let mut config = config(guest);
    let dies = ("IMAGED_TEST_DIES".to_owned(), "after guest-fsfreeze-freeze 1".to_owned());
    config.environment = vec![dies];
    let daemon = Daemon::start_in(dir, &config);
    daemon.imagectl(&["image", "create", "--instance-id", "web-1"]);
    assert!(daemon.is_killed_at_work());
    let begun = Instant::now();
    assert_it_writes(guest);
    println!("writes again after {:.1?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    drop(daemon);
    Daemon::start_in(dir, &self::config(guest)).stop();
    assert_nothing_left(guest);
}

fn signals_as_many_as_there_are(guest: &Guest, dir: &Path) {
    let daemon = Daemon::start_in(dir, &slowly(config(guest)));
    let request = reading(&daemon, &[]);
    for signal in ["TERM", "HUP", "INT", "PIPE", "CHLD", "WINCH", "CONT"].repeat(20) {
        // It may have ended by then.
        let pid = daemon.pid().to_string();
        let _ = Command::new("kill").args(["-s", signal, &pid]).output();
    }
    daemon.stop();
    assert_nothing_left(guest);
    let daemon = Daemon::start_in(dir, &config(guest));
    assert_eq!(ended(&daemon, &request), "FAILED");
    assert_it_writes(guest);
    daemon.stop();
}

/// As a service manager does whose patience is over: the QEMU does not
/// answer while imaged wants to undo.
fn killed_while_it_stops(guest: &Guest, dir: &Path) {
    let daemon = Daemon::start_in(dir, &slowly(config(guest)));
    reading(&daemon, &[]);
    let qemu = fs::read_to_string(guest.disk().with_file_name("qemu.pid")).unwrap();
    run("kill", &["-s", "STOP", qemu.trim()]);
    daemon.signal("TERM");
    thread::sleep(Duration::from_secs(2));
    daemon.kill();
    run("kill", &["-s", "CONT", qemu.trim()]);
    assert_it_writes(guest);
    Daemon::start_in(dir, &config(guest)).stop();
    assert_nothing_left(guest);
}

/// Its wall clock alone: that of the host is not the test's.
fn a_clock_that_jumps(guest: &Guest, dir: &Path) {
    let library = run("sh", &["-c", "ls /usr/lib/*/faketime/libfaketime.so.1"]);
    let clock = dir.join("clock");
    let set = |offset: &str| fs::write(&clock, offset).unwrap();
    set("+0");
    let mut config = slowly(config(guest));
    config.environment = [
        ("LD_PRELOAD", library.as_str()),
        ("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec();
    let daemon = Daemon::start_in(dir, &config);
    let request = reading(&daemon, &[]);
    set("+400d");
    thread::sleep(Duration::from_secs(1));
    set("-400d");
    assert_eq!(ended(&daemon, &request), "SUCCEEDED");
    assert_nothing_left(guest);
    // While it freezes the guest, too.
    set("+0");
    let image = thread::scope(|scope| {
        let image = scope.spawn(|| capture(&daemon, &[]));
        for offset in ["+1d", "-1d"].repeat(10) {
            set(offset);
            thread::sleep(Duration::from_millis(50));
        }
        image.join().unwrap()
    });
    assert_eq!(image["consistency"], "FILESYSTEM");
    assert_prefix(&records(&object(&daemon, &image), false));
    assert_it_writes(guest);
    daemon.stop();
}

/// Whatever becomes of the image, the guest gets its disk back, and imaged
/// starts again once there is room.
fn a_full_disk_under_the_journal(guest: &Guest) {
    let kept = tempfile::tempdir().unwrap();
    let small = tempfile::tempdir().unwrap();
    let at = small.path().to_str().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=8M", "none", at]);
    let unmount = Unmount(at.to_owned());
    symlink(small.path(), kept.path().join("state")).unwrap();
    let images = tempfile::tempdir_in(crate::lab::scratch()).unwrap();
    let config = Config { store: Some(images.path().join("store")), ..slowly(config(guest)) };
    let daemon = Daemon::start_in(kept.path(), &config);
    let request = reading(&daemon, &[]);
    let filler = small.path().join("filler");
    let _ = Command::new("dd")
        .args(["if=/dev/zero", &format!("of={}", filler.display()), "bs=64k"])
        .output();
    assert_it_writes(guest);
    wait_for("the disk to be given back", Duration::from_secs(60), || {
        (!guest.qmp("query-named-block-nodes").contains("imaged-")).then_some(())
    });
    fs::remove_file(filler).unwrap();
    daemon.kill();
    let daemon = Daemon::start_in(kept.path(), &config);
    let ended = ended(&daemon, &request);
    let images = daemon.json(&["image", "list"])["data"].as_array().unwrap().len();
    assert_eq!(images, usize::from(ended == "SUCCEEDED"));
    assert_nothing_left(guest);
    assert_it_writes(guest);
    daemon.stop();
    drop(unmount);
}

struct Unmount(String);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy", &self.0]).status();
    }
}
