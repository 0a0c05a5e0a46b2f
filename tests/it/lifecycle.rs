//! The daemon's life, and what is left when it ends in the middle.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    lab::{Config, Daemon, Loop, failing_start, run, scratch, sparse_file, text, wait_for},
    sources::assert_nothing_left,
};

/// A volume that takes seconds: text, to be deflated by one thread.
pub fn slow_volume(dir: &Path) -> PathBuf {
    let path = dir.join("slow.raw");
    sparse_file(&path, 2 << 30, &[(0, text(1 << 30))]);
    path
}

fn config(dir: &Path) -> Config {
    let lines = format!("boot_volume_dirs = [{:?}]", dir.display().to_string());
    Config { lines, ..Config::default() }
}

/// Begins a capture of `volume` that is still reading; its work request.
pub fn running(daemon: &Daemon, volume: &Path) -> String {
    let volume = volume.to_str().unwrap();
    let started =
        daemon.json(&["image", "create", "--boot-volume", volume, "--compression", "deflate"]);
    let request = started["opc-work-request-id"].as_str().unwrap().to_owned();
    wait_for("bytes to be stored", Duration::from_secs(30), || {
        let now = daemon.json(&["work-request", "get", "--work-request-id", &request]);
        assert_eq!(now["data"]["time-finished"], serde_json::Value::Null, "it was too fast: {now}");
        (now["data"]["progress"]["bytes-read"].as_u64().unwrap_or(0) > 30 << 20).then_some(())
    });
    request
}

pub fn status(daemon: &Daemon, request: &str) -> serde_json::Value {
    daemon.json(&["work-request", "get", "--work-request-id", request])["data"].clone()
}

#[test]
#[ignore = "needs root"]
fn root_two_daemons_share_neither_socket_nor_state() {
    let daemon = Daemon::start(&Config::default());
    let said = failing_start(daemon.dir(), &Config::default());
    assert!(said.contains("another imaged"), "{said}");
    assert!(daemon.imagectl(&["host", "get"]).status.success(), "the first one suffered");

    let mode = fs::metadata(daemon.dir().join("imaged.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o660);

    // A killed daemon leaves its socket; the next one takes it over.
    let dir = daemon.kill().unwrap();
    assert!(dir.path().join("imaged.sock").exists());
    let next = Daemon::start_in(dir.path(), &Config::default());
    assert!(next.imagectl(&["host", "get"]).status.success());
    next.stop();
    assert!(!dir.path().join("imaged.sock").exists(), "an orderly stop removes it");
}

#[test]
#[ignore = "needs root"]
fn root_wrong_configuration_names_file_key_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { lines: "max_volumes = 3".into(), ..Config::default() };
    let said = failing_start(dir.path(), &config);
    let file = dir.path().join("imaged.toml");
    assert!(said.contains(file.to_str().unwrap()), "{said}");
    assert!(said.contains("max_volumes") && said.contains("line 5"), "{said}");
}

#[test]
#[ignore = "needs root"]
fn root_a_client_that_disappears_changes_nothing() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = slow_volume(dir.path());
    let daemon = Daemon::start(&config(dir.path()));
    let mut client = daemon
        .command(&["image", "create", "--wait-for-state", "AVAILABLE", "--boot-volume"])
        .arg(&volume)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let request = wait_for("the work request", Duration::from_secs(20), || {
        let all = daemon.json(&["work-request", "list"]);
        all["data"][0]["id"].as_str().map(str::to_owned)
    });
    client.kill().unwrap();
    client.wait().unwrap();
    let watched = daemon.imagectl(&["work-request", "watch", "--work-request-id", &request]);
    assert!(watched.status.success(), "{watched:?}");
    assert_eq!(status(&daemon, &request)["status"], "SUCCEEDED");
    assert_eq!(status(&daemon, &request)["percent-complete"], 100.0);
}

#[test]
#[ignore = "needs root"]
fn root_one_image_of_a_volume_at_a_time_and_cancelling_ends_it() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    // A device, which the first capture holds against everyone else's O_EXCL:
    // the second must be refused for the right reason.
    let device = Loop::attach(&slow_volume(dir.path()), 512);
    let volume = device.device.clone();
    let daemon = Daemon::start(&config(Path::new("/dev")));
    let request = running(&daemon, &volume);

    let said = daemon.refusal(&["image", "create", "--boot-volume", volume.to_str().unwrap()]);
    assert!(said.contains("SOURCE_LOCKED"), "{said}");
    assert!(said.contains(&request), "the holder is not named: {said}");
    let images = daemon.json(&["image", "list"]);
    assert_eq!(images["data"][0]["lifecycle-state"], "PROVISIONING");
    let image = images["data"][0]["id"].as_str().unwrap();
    let said = daemon.refusal(&["image", "delete", "--force", "--image-id", image]);
    assert!(said.contains(&request), "the holder is not named: {said}");

    let start = Instant::now();
    daemon.json(&["work-request", "cancel", "--work-request-id", &request]);
    daemon.imagectl(&["work-request", "watch", "--work-request-id", &request]);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(status(&daemon, &request)["status"], "CANCELED");
    assert_nothing_left(&daemon);

    // Cancelling what has ended is success, and the volume is free.
    daemon.json(&["work-request", "cancel", "--work-request-id", &request]);
    running(&daemon, &volume);
    daemon.stop();
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_a_writer_that_comes_meanwhile_fails_the_image() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let device = Loop::attach(&slow_volume(dir.path()), 512);
    let daemon = Daemon::start(&config(Path::new("/dev")));
    let request = running(&daemon, &device.device);

    // Through a node of its own, as a QEMU in its own mount namespace has:
    // neither O_EXCL nor QEMU's lock bytes meet there.
    let node = dir.path().join("node");
    let number = run("stat", &["-c", "%Hr %Lr", device.device.to_str().unwrap()]);
    let (major, minor) = number.split_once(' ').unwrap();
    run("mknod", &[node.to_str().unwrap(), "b", major, minor]);
    let of = format!("of={}", node.display());
    run("dd", &["if=/dev/zero", &of, "bs=4096", "count=1", "oflag=direct", "conv=notrunc"]);

    let said = daemon.refusal(&["work-request", "watch", "--work-request-id", &request]);
    assert!(said.contains("was written to while it was read"), "{said}");
    assert_nothing_left(&daemon);
}

#[test]
#[ignore = "needs root"]
fn root_sigterm_in_the_middle_leaves_nothing() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = slow_volume(dir.path());
    let daemon = Daemon::start(&config(dir.path()));
    let request = running(&daemon, &volume);
    let images = daemon.images();
    let start = Instant::now();
    let kept = daemon.stop().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(fs::read_dir(&images).unwrap().count(), 0, "something is left");

    let daemon = Daemon::start_in(kept.path(), &config(dir.path()));
    let ended = status(&daemon, &request);
    assert_eq!(ended["status"], "FAILED");
    assert_eq!(ended["errors"][0]["code"], "DAEMON_STOPPED");

    // A closed terminal's signal is the same order.
    running(&daemon, &volume);
    daemon.signal("HUP");
    daemon.stop();
    assert_eq!(fs::read_dir(&images).unwrap().count(), 0, "something is left");
}

#[test]
#[ignore = "needs root"]
fn root_sigkill_in_the_middle_leaves_nothing_visible() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = slow_volume(dir.path());
    let daemon = Daemon::start(&config(dir.path()));
    let request = running(&daemon, &volume);
    let images = daemon.images();
    let kept = daemon.kill().unwrap();
    assert_eq!(fs::read_dir(&images).unwrap().count(), 1, "the upload had not begun");

    let daemon = Daemon::start_in(kept.path(), &config(dir.path()));
    let ended = status(&daemon, &request);
    assert_eq!(ended["status"], "FAILED");
    assert_eq!(ended["errors"][0]["code"], "DAEMON_STOPPED");
    assert_nothing_left(&daemon);
    // And the next capture is possible at once.
    let created = daemon.create(&volume, &[]);
    let object = images.join(created["id"].as_str().unwrap()).join("image.qcow2");
    run("qemu-img", &["check", "-q", "-f", "qcow2", object.to_str().unwrap()]);
}

#[test]
#[ignore = "needs root"]
fn root_the_catalogue_is_the_store() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = dir.path().join("small.raw");
    sparse_file(&volume, 8 << 20, &[(0, text(10_000))]);
    let store = dir.path().join("store");
    let config = || Config { store: Some(store.clone()), ..config(dir.path()) };
    let first = Daemon::start(&config());
    let id = first.create(&volume, &["--display-name", "golden"])["id"].clone();
    first.stop();
    // Another daemon, with no state at all, sees and verifies the image.
    let second = Daemon::start(&config());
    let listed = second.json(&["image", "list"]);
    assert_eq!(listed["data"][0]["id"], id);
    let verify = ["image", "verify", "--image-id", id.as_str().unwrap()];
    assert!(second.imagectl(&verify).status.success());
}
