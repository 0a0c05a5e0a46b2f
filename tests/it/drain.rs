//! A host that is drained, and an instance that is moved away.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::{
    lab::{Config, Daemon, Guest, Monitor, noise, scratch, sparse_file, wait_for},
    lifecycle::status,
    live::{
        assert_it_writes, assert_nothing_left, config, held_while_reading, slowly, start_writer,
    },
};

#[test]
#[ignore = "needs root"]
fn root_a_drained_host_begins_nothing_and_finishes_or_undoes_what_it_has() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volumes = ["a", "b"].map(|name| {
        let path = dir.path().join(name);
        sparse_file(&path, 64 << 20, &[(0, noise(32 << 20, 7))]);
        path
    });
    let lines = format!("boot_volume_dirs = [{:?}]", dir.path());
    let daemon = Daemon::start(&Config { lines, ..Config::default() });
    let begin = |volume: &std::path::Path, rate: &str| {
        let volume = volume.to_str().unwrap();
        let create = ["image", "create", "--boot-volume", volume, "--max-upload-rate", rate];
        daemon.json(&create)["opc-work-request-id"].as_str().unwrap().to_owned()
    };
    // Done in some seconds: it is waited for.
    let quick = begin(&volumes[0], "16MiB");
    let drained = daemon.json(&["host", "drain"]);
    assert_eq!(drained["data"]["drained"], true);
    assert_eq!(status(&daemon, &quick)["status"], "SUCCEEDED");
    let create = ["image", "create", "--boot-volume", volumes[1].to_str().unwrap()];
    insta::assert_snapshot!(daemon.refusal(&create), @"
    imagectl: this host is drained: no new work begins
      reason: HOST_DRAINED
      retry: in 30s
      help: `imagectl host resume` ends that, and so does a restart of imaged
    ");
    assert_eq!(daemon.json(&["host", "resume"])["data"]["drained"], false);

    // Half a minute's: it is undone when the time is over.
    let slow = begin(&volumes[1], "1MiB");
    let begun = Instant::now();
    daemon.json(&["host", "drain", "--finish-within", "1"]);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert_eq!(status(&daemon, &slow)["status"], "CANCELED");
    daemon.json(&["host", "resume"]);
    daemon.create(&volumes[1], &[]);
    assert_eq!(daemon.json(&["image", "list"])["data"].as_array().unwrap().len(), 2);
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_that_is_moved_away_ends_its_image() {
    let guest = Guest::boot();
    start_writer(&guest);
    let daemon = Daemon::start(&slowly(config(&guest)));
    let request = held_while_reading(&daemon);
    let mut monitor = Monitor::of(&guest);
    // Slowly, and to nowhere.
    monitor.execute_with("migrate-set-parameters", &json!({ "max-bandwidth": 1 << 20 }));
    monitor.execute_with("migrate", &json!({ "uri": "exec:cat >/dev/null" }));
    daemon.signal("CONT");
    let said = daemon.refusal(&["work-request", "watch", "--work-request-id", &request]);
    assert!(said.contains("is being moved to another host"), "{said}");
    assert_nothing_left(&guest);
    // It goes on being moved, and no image of it begins.
    let migration = monitor.execute("query-migrate");
    assert_eq!(migration["status"], "active");
    let said = daemon.refusal(&["image", "create", "--instance-id", "web-1"]);
    assert!(said.contains("it is being moved to another host"), "{said}");
    monitor.execute("migrate_cancel");
    wait_for("the end of the move", Duration::from_secs(10), || {
        (monitor.execute("query-migrate")["status"] == "cancelled").then_some(())
    });
    assert_it_writes(&guest);
}
