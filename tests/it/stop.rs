//! Images for which the guest is shut down, and comes back.

use std::{fs, thread, time::Duration};

use serde_json::Value;

use crate::{
    lab::{Config, Daemon, Guest, wait_for},
    lifecycle::status,
    live::{
        assert_it_writes, assert_nothing_left, assert_prefix, capture, config, object, records,
        start_writer,
    },
};

/// A guest that takes this long to shut down, and is given a little more.
const SLOW: u64 = 6;

fn stopping(guest: &Guest) -> Config {
    let mut config = config(guest);
    config.instances[0].1.push_str(&format!("shutdown_seconds = {}\n", SLOW * 3));
    config
}

/// Which boot it is.
fn boot_id(guest: &Guest) -> String {
    guest.vm("wait-agent", &[]);
    guest.sh("cat /proc/sys/kernel/random/boot_id")
}

/// What the agent calls for a shutdown does this instead.
fn replace_shutdown(guest: &Guest, script: &str) {
    guest.sh(&format!(
        "mv /sbin/shutdown /sbin/shutdown.real && cat >/sbin/shutdown <<'END'\n\
         #!/bin/sh\n{script}\nEND\n\
         chmod 755 /sbin/shutdown"
    ));
}

/// The next shutdown takes its time.
fn slow_down(guest: &Guest) {
    replace_shutdown(guest, &format!("mv -f $0.real $0; sleep {SLOW}; exec $0 \"$@\""));
}

fn begin(daemon: &Daemon, more: &[&str]) -> String {
    let create = ["image", "create", "--instance-id", "web-1", "--consistency", "stop"];
    let started = daemon.json(&[&create[..], more].concat());
    started["opc-work-request-id"].as_str().unwrap().to_owned()
}

/// Waits until the guest was told to shut down.
fn told_to_shut_down(daemon: &Daemon, request: &str) {
    wait_for("the order", Duration::from_secs(30), || {
        (status(daemon, request)["phase"] == "snapshot").then_some(())
    });
    thread::sleep(Duration::from_secs(SLOW / 2));
}

/// QEMU ends with its guest again: it does as its command line says.
fn assert_a_shutdown_ends_it(guest: &Guest) {
    guest.vm("shutdown", &[]);
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_that_is_shut_down_for_its_image_is_clean_and_runs_again() {
    let guest = Guest::boot();
    start_writer(&guest);
    let before = boot_id(&guest);
    let daemon = Daemon::start(&stopping(&guest));
    let image = capture(&daemon, &["--consistency", "stop"]);
    assert_eq!(image["consistency"], "CLEAN");
    let point = &image["point-in-time"];
    assert_eq!((&point["stopped"], &point["fuse"]), (&Value::Bool(true), &Value::Bool(false)));
    assert_ne!(boot_id(&guest), before, "it was not shut down");
    // Without a replay: the filesystem was unmounted.
    let imaged = records(&object(&daemon, &image), false);
    assert_prefix(&imaged);
    start_writer(&guest);
    assert_it_writes(&guest);
    assert_nothing_left(&guest);

    // By the power button, of a guest whose agent nobody knows.
    guest.sh("modprobe button; modprobe evdev; sleep 1\n\
         for event in /dev/input/event*; do\n\
           setsid sh -c \"head -c 24 $event >/dev/null; /sbin/shutdown -h +0\" \\\n\
             </dev/null >/dev/null 2>&1 &\n\
         done\n\
         until [ $(ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c /dev/input/event) = \\\n\
           $(ls /dev/input/event* | wc -l) ]; do sleep 0.1; done");
    let mut without = stopping(&guest);
    let lines: Vec<_> = without.instances[0].1.lines().map(str::to_owned).collect();
    let lines = lines.iter().filter(|line| !line.starts_with("agent_socket"));
    without.instances[0].1 = lines.map(|line| format!("{line}\n")).collect();
    daemon.stop();
    let daemon = Daemon::start(&without);
    let image = capture(&daemon, &["--consistency", "stop"]);
    assert_eq!(image["consistency"], "CLEAN");
    boot_id(&guest);
    assert_nothing_left(&guest);
    assert_a_shutdown_ends_it(&guest);
    // One that was stopped before stays so.
    let image = capture(&daemon, &["--consistency", "stop"]);
    assert_eq!((&image["consistency"], &image["point-in-time"]), (&"CLEAN".into(), &Value::Null));
    assert!(guest.vm_fails("hostname"), "it was started");
}

#[test]
#[ignore = "needs root, QEMU and minutes"]
fn qemu_guest_that_shuts_down_while_imaged_dies_is_started_by_the_guard() {
    let guest = Guest::boot();
    let running = Daemon::start(&stopping(&guest));
    let before = boot_id(&guest);
    slow_down(&guest);
    let request = begin(&running, &[]);
    told_to_shut_down(&running, &request);
    let kept = running.kill().unwrap();
    // No imaged is there, and the guest comes back.
    wait_for("the guest", Duration::from_secs(90), || {
        (!guest.vm_fails("hostname") && boot_id(&guest) != before).then_some(())
    });
    let running = Daemon::start_in(kept.path(), &stopping(&guest));
    assert_eq!(status(&running, &request)["status"], "FAILED");
    assert_nothing_left(&guest);

    // With an imaged that comes back at once.
    let before = boot_id(&guest);
    slow_down(&guest);
    let request = begin(&running, &[]);
    told_to_shut_down(&running, &request);
    running.kill();
    let running = Daemon::start_in(kept.path(), &stopping(&guest));
    assert_eq!(status(&running, &request)["status"], "FAILED");
    assert_ne!(boot_id(&guest), before);
    assert_nothing_left(&guest);

    // Cancelled while it shuts down.
    let before = boot_id(&guest);
    slow_down(&guest);
    let request = begin(&running, &[]);
    told_to_shut_down(&running, &request);
    running.json(&["work-request", "cancel", "--work-request-id", &request]);
    wait_for("the end", Duration::from_secs(SLOW * 5), || {
        (status(&running, &request)["status"] == "CANCELED").then_some(())
    });
    assert_ne!(boot_id(&guest), before);
    assert_nothing_left(&guest);
    assert_a_shutdown_ends_it(&guest);
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_that_does_not_shut_down_is_left_alone_or_loses_its_plug() {
    let guest = Guest::boot();
    start_writer(&guest);
    let mut config = stopping(&guest);
    let seconds = format!("shutdown_seconds = {}", SLOW * 3);
    config.instances[0].1 = config.instances[0].1.replace(&seconds, "shutdown_seconds = 3");
    let daemon = Daemon::start(&config);
    replace_shutdown(&guest, "exit 0");
    let before = boot_id(&guest);
    let create = ["image", "create", "--instance-id", "web-1", "--consistency", "stop"];
    let said = daemon.refusal(&[&create[..], &["--wait-for-state", "AVAILABLE"]].concat());
    assert!(said.contains("\"web-1\" did not shut down within 3 s"), "{said}");
    assert!(said.contains("ask with --force-stop"), "{said}");
    assert_eq!(boot_id(&guest), before);
    assert_it_writes(&guest);
    assert_nothing_left(&guest);

    let image = capture(&daemon, &["--consistency", "stop", "--force-stop"]);
    // What its plug left, never better.
    assert_eq!(image["consistency"], "CRASH");
    assert_ne!(boot_id(&guest), before);
    assert_prefix(&records(&object(&daemon, &image), true));
    assert_nothing_left(&guest);
    guest.sh("mv -f /sbin/shutdown.real /sbin/shutdown; sync");
    assert_a_shutdown_ends_it(&guest);
    let said = daemon.refusal(&["image", "create", "--instance-id", "web-1", "--force-stop"]);
    assert!(said.contains("--consistency"), "{said}");
    assert!(fs::read_dir(daemon.images()).unwrap().count() == 1);
}
