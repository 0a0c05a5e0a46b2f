//! Volumes that are cloned instead of held.

use std::{fs, path::Path, time::Duration};

use serde_json::Value;

use crate::{
    image::daemon,
    lab::{Config, Daemon, Mount, noise, run, scratch, sparse_file, text, wait_for},
    lifecycle::status,
    proxy::FaultProxy,
    s3::wait_for_parts,
    weed::Weed,
};

const MIB: u64 = 1 << 20;

/// Text, noise and holes on `mount`.
fn volume(mount: &Mount) -> std::path::PathBuf {
    let path = mount.at.path().join("disk.raw");
    let data = [(0, text(3 << 20)), (5 * MIB + 4096, noise(60 << 20, 1))];
    sparse_file(&path, 80 * MIB + 512, &data);
    path
}

/// What the machine does that the volume belongs to: QEMU takes its locks,
/// and writes.
fn start_its_machine(volume: &Path) {
    let volume = volume.to_str().unwrap();
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 2M", "-c", "write -P 8 40M 8M", volume]);
}

fn ended(daemon: &Daemon, request: &str) -> Value {
    wait_for("the end", Duration::from_secs(60), || {
        let now = status(daemon, request);
        (!now["time-finished"].is_null()).then_some(now)
    })
}

fn files(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
#[ignore = "needs root, loop devices, XFS, btrfs and QEMU's tools"]
fn root_reflink_a_volume_is_free_while_its_image_is_made() {
    for kind in ["xfs", "btrfs"] {
        let mount = Mount::new(kind, 400 * MIB);
        let volume = volume(&mount);
        let dir = tempfile::tempdir_in(scratch()).unwrap();
        let before = dir.path().join("before.raw");
        fs::copy(&volume, &before).unwrap();
        let daemon = daemon(mount.at.path());
        let path = volume.to_str().unwrap();
        let slow = ["image", "create", "--boot-volume", path, "--max-read-rate", "16MiB"];
        let started = daemon.json(&slow);
        let request = started["opc-work-request-id"].as_str().unwrap();
        wait_for("bytes to be read", Duration::from_secs(30), || {
            let now = status(&daemon, request);
            (now["progress"]["bytes-read"].as_u64().unwrap_or(0) > 0).then_some(())
        });
        start_its_machine(&volume);
        let now = status(&daemon, request);
        assert!(now["time-finished"].is_null(), "it was too fast: {now}");
        let ended = ended(&daemon, request);
        assert_eq!(ended["status"], "SUCCEEDED", "{ended}");
        assert!(ended["logs"].to_string().contains("is read (REFLINK)"), "{ended}");

        let image = daemon.json(&["image", "list"])["data"][0].clone();
        assert_eq!(
            (&image["snapshot"], &image["consistency"]),
            (&"REFLINK".into(), &"CLEAN".into())
        );
        let object = daemon.images().join(image["id"].as_str().unwrap());
        let (object, before) = (object.join("image.qcow2"), before.to_str().unwrap().to_owned());
        let object = object.to_str().unwrap();
        run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &before, object]);
        assert_eq!(files(mount.at.path()), 1, "{kind}: something is left beside the volume");
    }
}

/// A daemon over S3 that reads slowly, with a capture under way that has
/// stored two parts.
fn half_stored(weed: &Weed, proxy: &FaultProxy, volume: &Path) -> (Config, Daemon, String) {
    let dir = volume.parent().unwrap();
    let lines = format!("boot_volume_dirs = [{dir:?}]\n{}", weed.config(proxy.address(), dir));
    let config = Config { lines, ..Config::default() };
    let daemon = Daemon::start(&config);
    let path = volume.to_str().unwrap();
    let slow = ["image", "create", "--boot-volume", path, "--max-read-rate", "8MiB"];
    let request = daemon.json(&slow)["opc-work-request-id"].as_str().unwrap().to_owned();
    wait_for_parts(proxy, 2);
    (config, daemon, request)
}

#[test]
#[ignore = "needs root, loop devices, XFS and SeaweedFS"]
fn root_reflink_goes_with_its_daemon_and_a_volume_that_is_the_same_is_gone_on_with() {
    let mount = Mount::new("xfs", 400 * MIB);
    let volume = volume(&mount);
    let weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    let (config, daemon, request) = half_stored(&weed, &proxy, &volume);
    let beside = files(mount.at.path());
    let state = daemon.kill().unwrap();
    assert_eq!(files(mount.at.path()), beside);
    let daemon = Daemon::start_in(state.path(), &config);
    let whole = ended(&daemon, &request);
    assert_eq!(whole["status"], "SUCCEEDED", "{whole}");
    assert_eq!(daemon.json(&["image", "list"])["data"][0]["snapshot"], "REFLINK");
    let id = daemon.json(&["image", "list"])["data"][0]["id"].as_str().unwrap().to_owned();
    assert!(daemon.imagectl(&["image", "verify", "--image-id", &id]).status.success());
}

#[test]
#[ignore = "needs root, loop devices, XFS, QEMU's tools and SeaweedFS"]
fn root_reflink_of_a_volume_that_was_let_go_and_written_to_is_not_gone_on_with() {
    let mount = Mount::new("xfs", 400 * MIB);
    let volume = volume(&mount);
    let weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    let (config, daemon, request) = half_stored(&weed, &proxy, &volume);
    start_its_machine(&volume);
    let state = daemon.kill().unwrap();
    let daemon = Daemon::start_in(state.path(), &config);
    let failed = ended(&daemon, &request);
    assert_eq!(failed["status"], "FAILED", "{failed}");
    let said = failed["errors"].to_string();
    assert!(said.contains("written to, or exchanged, since its point in time"), "{said}");
    assert_eq!(weed.uploads(), 0);
    // Anew, all of it.
    assert_eq!(daemon.create(&volume, &[])["snapshot"], "REFLINK");
}
