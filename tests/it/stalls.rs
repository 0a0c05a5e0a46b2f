//! Devices and stores that stop answering.

use std::{path::Path, time::Duration};

use crate::{
    lab::{Config, Daemon, Frozen, Loop, Mount, Stuck, run, scratch, sparse_file, text, wait_for},
    lifecycle::{running, slow_volume, status},
    sources::assert_nothing_left,
};

fn config(dirs: &[&Path], store: Option<&Path>) -> Config {
    let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    Config {
        lines: format!("boot_volume_dirs = {dirs:?}\nprogress_timeout_seconds = 2"),
        store: store.map(Path::to_owned),
        ..Config::default()
    }
}

fn ended(daemon: &Daemon, request: &str) -> serde_json::Value {
    // Encoders run when nothing else wants to: on a busy host what was read
    // before takes its time.
    wait_for("the work request to end", Duration::from_secs(120), || {
        let now = status(daemon, request);
        (!now["time-finished"].is_null()).then_some(now)
    })
}

#[test]
#[ignore = "needs root, loop devices and the blkio controller"]
fn root_a_volume_that_stops_answering_holds_nothing_else_up() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let device = Loop::attach(&slow_volume(dir.path()), 512);
    let other = dir.path().join("other.raw");
    sparse_file(&other, 8 << 20, &[(0, text(1 << 20))]);
    let daemon = Daemon::start(&config(&[Path::new("/dev"), dir.path()], None));
    let request = running(&daemon, &device.device);
    let stuck = Stuck::reads(daemon.pid(), &device.device);

    let end = ended(&daemon, &request);
    assert_eq!(end["status"], "FAILED");
    assert_eq!(end["errors"][0]["code"], "STALLED");
    let message = end["errors"][0]["message"].as_str().unwrap();
    let volume = device.device.to_str().unwrap();
    assert!(message.contains(&format!("the volume {volume} did not answer")), "{message}");
    assert_nothing_left(&daemon);

    // Its reads are still in the kernel; another volume is imaged beside them.
    daemon.create(&other, &[]);
    let said = daemon.refusal(&["image", "create", "--boot-volume", volume]);
    assert!(said.contains("still being read by imaged: it does not answer"), "{said}");

    stuck.heal();
    let request = wait_for("the volume to be let go", Duration::from_secs(30), || {
        let args = ["image", "create", "--boot-volume", volume, "--output", "json"];
        let output = daemon.imagectl(&args);
        let started: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        Some(started["opc-work-request-id"].as_str()?.to_owned())
    });
    daemon.json(&["work-request", "cancel", "--work-request-id", &request]);
    assert_eq!(ended(&daemon, &request)["status"], "CANCELED");
}

#[test]
#[ignore = "needs root, loop devices and the blkio controller"]
fn root_a_queue_behind_dead_devices_says_so() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let device = Loop::attach(&slow_volume(dir.path()), 512);
    let other = dir.path().join("other.raw");
    sparse_file(&other, 8 << 20, &[(0, text(1 << 20))]);
    let mut config = config(&[Path::new("/dev"), dir.path()], None);
    config.lines += "\nmax_captures = 1";
    let daemon = Daemon::start(&config);
    let request = running(&daemon, &device.device);
    let stuck = Stuck::reads(daemon.pid(), &device.device);
    assert_eq!(ended(&daemon, &request)["errors"][0]["code"], "STALLED");

    let create = ["image", "create", "--boot-volume", other.to_str().unwrap()];
    let said = daemon.refusal(&[&create[..], &["--wait-for-state", "AVAILABLE"]].concat());
    assert!(said.contains("no work can begin"), "{said}");
    stuck.heal();
    wait_for("the place to be free", Duration::from_secs(30), || {
        let created = daemon.imagectl(&[&create[..], &["--wait-for-state", "AVAILABLE"]].concat());
        created.status.success().then_some(())
    });
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_a_store_that_stops_answering_is_swept_when_it_is_back() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = slow_volume(dir.path());
    let ext4 = Mount::new("ext4", 2 << 30);
    let store = ext4.at.path().join("store");
    let config = || config(&[dir.path()], Some(&store));
    let daemon = Daemon::start(&config());
    let request = running(&daemon, &volume);
    let frozen = ext4.freeze();

    let end = ended(&daemon, &request);
    assert_eq!(end["status"], "FAILED");
    assert_eq!(end["errors"][0]["code"], "STALLED");
    let message = end["errors"][0]["message"].as_str().unwrap();
    assert!(message.contains("the store \"test\" did not answer"), "{message}");
    let log = end["logs"].to_string();
    assert!(log.contains("the next start will remove what is left"), "{log}");

    drop(frozen);
    let kept = daemon.stop().unwrap();
    let daemon = Daemon::start_in(kept.path(), &config());
    assert_eq!(run("find", &[store.to_str().unwrap(), "-name", "*.qcow2"]), "");
    daemon.create(&volume, &[]);
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_cancelling_ends_also_what_does_not_answer() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = slow_volume(dir.path());
    let ext4 = Mount::new("ext4", 2 << 30);
    let mut config = config(&[dir.path()], Some(&ext4.at.path().join("store")));
    config.lines = config.lines.replace("_seconds = 2", "_seconds = 5");
    let daemon = Daemon::start(&config);
    let request = running(&daemon, &volume);
    let frozen = ext4.freeze();
    daemon.json(&["work-request", "cancel", "--work-request-id", &request]);
    let end = ended(&daemon, &request);
    assert_eq!(end["status"], "CANCELED");
    // Whether a part was on its way or not, it is told who did not answer.
    let log = end["logs"].to_string();
    assert!(log.contains("the store \\\"test\\\" did not"), "{log}");
    drop(frozen);
}

/// A capture that a user canceled while its store answers nobody, so that it
/// cannot end.
fn canceling(dir: &Path, ext4: &Mount) -> (Daemon, Config, String, Frozen) {
    let volume = slow_volume(dir);
    let mut config = config(&[dir], Some(&ext4.at.path().join("store")));
    config.lines = config.lines.replace("_seconds = 2", "_seconds = 60");
    let daemon = Daemon::start(&config);
    let request = running(&daemon, &volume);
    let frozen = ext4.freeze();
    let canceled = daemon.json(&["work-request", "cancel", "--work-request-id", &request]);
    assert_eq!(canceled["data"]["status"], "CANCELING");
    (daemon, config, request, frozen)
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_what_a_user_canceled_is_canceled_also_when_the_daemon_is_killed() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let ext4 = Mount::new("ext4", 2 << 30);
    let (daemon, config, request, frozen) = canceling(dir.path(), &ext4);
    // The cancellation is answered before it is noted.
    std::thread::sleep(Duration::from_millis(500));
    daemon.signal("KILL");
    drop(frozen);
    let kept = daemon.kill().unwrap();
    let daemon = Daemon::start_in(kept.path(), &config);
    assert_eq!(status(&daemon, &request)["status"], "CANCELED");
    let store = ext4.at.path().to_str().unwrap();
    assert_eq!(run("find", &[store, "-name", "*.qcow2"]), "");
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_what_a_user_canceled_is_canceled_also_when_the_daemon_stops() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let ext4 = Mount::new("ext4", 2 << 30);
    let (daemon, config, request, frozen) = canceling(dir.path(), &ext4);
    daemon.signal("TERM");
    std::thread::sleep(Duration::from_millis(500));
    drop(frozen);
    let kept = daemon.stop().unwrap();
    let daemon = Daemon::start_in(kept.path(), &config);
    assert_eq!(status(&daemon, &request)["status"], "CANCELED");
    let store = ext4.at.path().to_str().unwrap();
    assert_eq!(run("find", &[store, "-name", "*.qcow2"]), "");
}
