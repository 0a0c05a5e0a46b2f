//! The way of an image: made, listed, verified, damaged, deleted.

use std::{fs, os::unix::fs::FileExt, path::Path};

use crate::lab::{Config, Daemon, Loop, noise, run, scratch, sparse_file, text};

const MIB: u64 = 1 << 20;

/// A daemon that may image what lies in `dir`.
pub fn daemon(dir: &Path) -> Daemon {
    let dirs = format!("boot_volume_dirs = [\"/dev\", {:?}]", dir.display().to_string());
    let lines = format!("{dirs}\nencode_threads = \"all\"");
    Daemon::start(&Config { lines, ..Config::default() })
}

/// A volume with text, noise and holes, and no round size.
fn volume(path: &Path, tail: u64) {
    let size = 70 * MIB + tail;
    let data = [
        (0, text(3 << 20)),
        (5 * MIB + 4096, noise(20 << 20, 1)),
        (64 * MIB, vec![0; 1 << 20]),
        (size - 100, text(100)),
    ];
    sparse_file(path, size, &data);
}

fn judge(object: &Path, volume: &Path) {
    let (object, volume) = (object.to_str().unwrap(), volume.to_str().unwrap());
    run("qemu-img", &["check", "-q", "-f", "qcow2", object]);
    run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", volume, object]);
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_an_image_of_a_file_is_whole_verified_and_deleted() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let path = dir.path().join("web-1.raw");
    volume(&path, 12_345);
    let daemon = daemon(dir.path());
    for compression in ["zstd", "deflate", "none"] {
        let image = daemon.create(
            &path,
            &["--display-name", "golden", "--compression", compression, "--compartment-id", "prod"],
        );
        let id = image["id"].as_str().unwrap();
        assert_eq!(image["lifecycle-state"], "AVAILABLE");
        assert_eq!(image["display-name"], "golden");
        assert_eq!(image["compartment-id"], "prod");
        assert_eq!(image["consistency"], "CLEAN");
        assert_eq!(image["snapshot"], "AT_REST");
        assert_eq!(image["size-in-mbs"], 71);

        let stored = daemon.images().join(id);
        judge(&stored.join("image.qcow2"), &path);
        let restored = dir.path().join("restored.raw");
        let script = [stored.to_str().unwrap(), restored.to_str().unwrap()];
        run("docs/verify-image.py", &script);
        assert!(daemon.imagectl(&["image", "verify", "--image-id", id]).status.success());
        let listed = daemon.json(&["image", "list", "--display-name", "golden"]);
        assert_eq!(listed["data"][0]["id"], id);

        let delete = ["image", "delete", "--force", "--image-id", id];
        assert!(daemon.imagectl(&delete).status.success());
        assert!(!stored.exists(), "something is left");
        let refusal = daemon.refusal(&["image", "get", "--image-id", id]);
        assert!(refusal.contains("there is no image"), "{refusal}");
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_loop_devices_of_both_sector_sizes_are_imaged_to_the_last_byte() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let path = dir.path().join("disk.raw");
    volume(&path, 8192);
    let daemon = daemon(dir.path());
    for sector_size in [512, 4096] {
        let device = Loop::attach(&path, sector_size);
        let image = daemon.create(&device.device, &[]);
        let object = daemon.images().join(image["id"].as_str().unwrap()).join("image.qcow2");
        judge(&object, &device.device);
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_bytes_that_only_the_page_cache_of_the_device_has_are_in_the_image() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let path = dir.path().join("disk.raw");
    sparse_file(&path, 64 * MIB, &[]);
    let device = Loop::attach(&path, 512);
    let daemon = daemon(dir.path());
    let file = fs::OpenOptions::new().write(true).open(&device.device).unwrap();
    // The file below has a hole there as long as nobody flushes.
    file.write_all_at(&text(10_000), 33 * MIB).unwrap();
    drop(file);
    let image = daemon.create(&device.device, &[]);
    let object = daemon.images().join(image["id"].as_str().unwrap()).join("image.qcow2");
    judge(&object, &device.device);
}

#[test]
#[ignore = "needs root"]
fn root_a_damaged_object_is_found_and_named() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let path = dir.path().join("web-1.raw");
    volume(&path, 0);
    let daemon = daemon(dir.path());
    let image = daemon.create(&path, &[]);
    let id = image["id"].as_str().unwrap();
    let object = daemon.images().join(id).join("image.qcow2");
    let file = fs::OpenOptions::new().write(true).read(true).open(&object).unwrap();
    let manifest = fs::read(object.with_file_name("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let second = manifest["parts"][0]["size"].as_u64().unwrap();
    let (at, mut byte) = (second + MIB, [0]);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();

    let output = daemon.imagectl(&["image", "verify", "--image-id", id]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{stderr}");
    assert!(stderr.contains(&format!("part 2, at offset {second} of the object")), "{stderr}");

    file.set_len(MIB).unwrap();
    let stderr = daemon.refusal(&["image", "verify", "--image-id", id]);
    assert!(
        stderr.contains("the object has 1.00 MiB (1048576 bytes) and was stored with"),
        "{stderr}"
    );
}

#[test]
#[ignore = "needs root"]
fn root_asking_twice_is_asking_once() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let path = dir.path().join("web-1.raw");
    volume(&path, 0);
    let daemon = daemon(dir.path());
    let path = path.to_str().unwrap();
    let create = |name: &str, token: &str| {
        let args = ["image", "create", "--boot-volume", path, "--display-name", name];
        daemon.imagectl(
            &[&args[..], &["--retry-token", token, "--wait-for-state", "AVAILABLE"]].concat(),
        )
    };
    assert!(create("golden", "t-1").status.success());
    assert!(create("golden", "t-1").status.success());
    assert_eq!(daemon.json(&["image", "list"])["data"].as_array().unwrap().len(), 1);

    let other = create("silver", "t-1");
    let stderr = String::from_utf8(other.stderr).unwrap();
    assert!(stderr.contains("the retry token was used for another request"), "{stderr}");
    assert!(create("silver", "t-2").status.success());
    assert_eq!(daemon.json(&["image", "list"])["data"].as_array().unwrap().len(), 2);
}

/// io_uring is refused to everyone until this is dropped.
struct NoUring(String);

const URING_DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";

impl NoUring {
    fn new() -> Self {
        let before = fs::read_to_string(URING_DISABLED).unwrap();
        fs::write(URING_DISABLED, "2").unwrap();
        Self(before)
    }
}

impl Drop for NoUring {
    fn drop(&mut self) {
        fs::write(URING_DISABLED, &self.0).unwrap();
    }
}

#[test]
#[ignore = "needs root and a kernel with io_uring"]
fn root_a_kernel_that_refuses_io_uring_is_told_and_served() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let path = dir.path().join("web-1.raw");
    volume(&path, 12_345);
    // Daemons of other tests that start meanwhile read by threads too.
    let _refused = NoUring::new();
    let daemon = daemon(dir.path());
    let host = daemon.json(&["host", "get"]);
    let features = host["data"]["features"].as_array().unwrap();
    let io_uring = features.iter().find(|feature| feature["name"] == "io_uring").unwrap();
    assert_eq!(io_uring["available"], false, "{io_uring}");
    assert!(io_uring["details"].as_str().unwrap().contains("io_uring_disabled"), "{io_uring}");
    let image = daemon.create(&path, &[]);
    judge(&daemon.images().join(image["id"].as_str().unwrap()).join("image.qcow2"), &path);
}
