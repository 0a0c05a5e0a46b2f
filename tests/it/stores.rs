//! A store that fails in the middle, or is away at the start.

use std::{fs, thread, time::Duration};

use crate::{
    lab::{Config, Daemon, Mount, noise, run, scratch, sparse_file, wait_for},
    lifecycle::{running, slow_volume},
};

const MIB: u64 = 1 << 20;

fn daemon(store: &Mount, dir: &std::path::Path) -> Daemon {
    Daemon::start(&Config {
        lines: format!("boot_volume_dirs = [{:?}]", dir.display().to_string()),
        store: Some(store.at.path().join("store")),
        ..Config::default()
    })
}

/// Free bytes of the store's filesystem.
fn free(store: &Mount) -> u64 {
    let path = store.at.path().to_str().unwrap();
    run("df", &["--output=avail", "-B1", path]).lines().last().unwrap().trim().parse().unwrap()
}

#[test]
#[ignore = "needs root, loop devices and mounts"]
fn root_a_full_store_fails_the_image_and_gives_its_room_back() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = dir.path().join("large.raw");
    sparse_file(&volume, 300 * MIB, &[(0, noise(300 << 20, 9))]);
    let store = Mount::new("ext4", 160 * MIB);
    let daemon = daemon(&store, dir.path());
    let before = free(&store);

    let said = daemon.refusal(&[
        "image",
        "create",
        "--boot-volume",
        volume.to_str().unwrap(),
        "--wait-for-state",
        "AVAILABLE",
    ]);
    assert!(said.contains("store \"test\""), "{said}");
    assert!(said.contains("help:"), "{said}");
    let left = fs::read_dir(store.at.path().join("store/images")).unwrap().count();
    assert_eq!(left, 0, "something is left");
    assert!(free(&store) + MIB > before, "{} of {before} bytes are free", free(&store));
}

#[test]
#[ignore = "needs root, loop devices and mounts"]
fn root_a_store_that_becomes_read_only_fails_the_image() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = slow_volume(dir.path());
    let store = Mount::new("ext4", 512 * MIB);
    let daemon = daemon(&store, dir.path());
    let request = running(&daemon, &volume);
    store.fail();
    let ended = wait_for("the end", Duration::from_secs(60), || {
        let request =
            daemon.json(&["work-request", "get", "--work-request-id", &request])["data"].clone();
        (request["time-finished"] != serde_json::Value::Null).then_some(request)
    });
    assert_eq!(ended["status"], "FAILED");
    let error = &ended["errors"][0];
    assert_eq!(error["code"], "STORE_UNAVAILABLE", "{error}");
    assert!(error["message"].as_str().unwrap().contains("help:"), "{error}");
}

#[test]
#[ignore = "needs root"]
fn root_a_store_that_vanishes_fails_the_image_and_is_not_filled_elsewhere() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = slow_volume(dir.path());
    let store = dir.path().join("store");
    let daemon = Daemon::start(&Config {
        lines: format!("boot_volume_dirs = [{:?}]", dir.path().display().to_string()),
        store: Some(store.clone()),
        ..Config::default()
    });
    let request = running(&daemon, &volume);
    fs::rename(&store, dir.path().join("gone")).unwrap();
    fs::create_dir(&store).unwrap();
    let output = daemon.imagectl(&["work-request", "watch", "--work-request-id", &request]);
    assert!(!output.status.success());
    let said = daemon.refusal(&["image", "list"]);
    assert!(said.contains("is it mounted?"), "{said}");
    thread::sleep(Duration::from_millis(100));
    assert_eq!(fs::read_dir(&store).unwrap().count(), 0, "the bare directory was written to");
}

fn is_empty(directory: &std::path::Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

#[test]
#[ignore = "needs root"]
fn root_a_store_that_is_away_at_the_start_keeps_nothing_else_from_working() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = dir.path().join("small.raw");
    sparse_file(&volume, 8 * MIB, &[(0, noise(1 << 20, 3))]);
    let far = dir.path().join("mount");
    let lines = format!(
        "boot_volume_dirs = [{:?}]\ndefault_store = \"near\"\n\
         [stores.near]\nkind = \"directory\"\npath = {:?}\nmin_free = \"1MiB\"\n\
         [stores.far]\nkind = \"directory\"\npath = {:?}\nmin_free = \"1MiB\"\n",
        dir.path().display().to_string(),
        dir.path().join("near").display().to_string(),
        far.join("images").display().to_string(),
    );
    let daemon = Daemon::start(&Config { lines, ..Config::default() });
    let stores = daemon.json(&["host", "get"])["data"]["stores"].clone();
    let problem = |name: &str| {
        let store = stores.as_array().unwrap().iter().find(|store| store["name"] == name);
        store.unwrap()["problem"].as_str().unwrap_or_default().to_owned()
    };
    assert!(problem("far").contains("because"), "{stores}");
    assert_eq!(problem("near"), "");

    let image = daemon.create(&volume, &[])["id"].as_str().unwrap().to_owned();
    // A list without one store's images says so.
    let listed = daemon.imagectl(&["image", "list"]);
    assert!(listed.status.success() && String::from_utf8_lossy(&listed.stdout).contains(&image));
    let said = String::from_utf8(listed.stderr).unwrap();
    assert!(said.contains("the images of store \"far\" are missing"), "{said}");
    assert!(said.contains("mount its filesystem") && said.contains("again whenever"), "{said}");
    assert_eq!(daemon.json(&["image", "get", "--image-id", &image])["data"]["store"], "near");

    fs::create_dir(&far).unwrap();
    assert_eq!(daemon.json(&["image", "list"])["data"][0]["id"], image.as_str());
}

#[test]
#[ignore = "needs root"]
fn root_what_became_of_an_image_in_a_store_that_is_away_is_not_guessed() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = slow_volume(dir.path());
    let mount = dir.path().join("mount");
    fs::create_dir(&mount).unwrap();
    let config = Config {
        lines: format!("boot_volume_dirs = [{:?}]", dir.path().display().to_string()),
        store: Some(mount.join("store")),
        ..Config::default()
    };
    let daemon = Daemon::start(&config);
    let request = running(&daemon, &volume);
    let kept = daemon.kill().unwrap();
    let away = dir.path().join("away");
    fs::rename(&mount, &away).unwrap();

    let daemon = Daemon::start_in(kept.path(), &config);
    let ended =
        daemon.json(&["work-request", "get", "--work-request-id", &request])["data"].clone();
    assert_eq!(ended["status"], "FAILED");
    let message = ended["errors"][0]["message"].as_str().unwrap();
    assert!(message.contains("it is not known whether the image was made"), "{message}");
    assert!(message.contains("store \"test\" cannot be opened"), "{message}");
    assert!(message.contains("`imagectl image list`"), "{message}");
    assert!(!is_empty(&away.join("store/images")));

    // Its first use, whatever that is, opens it and removes the remains.
    fs::rename(&away, &mount).unwrap();
    assert!(daemon.json(&["image", "list"])["data"].as_array().unwrap().is_empty());
    assert!(is_empty(&mount.join("store/images")));
}
