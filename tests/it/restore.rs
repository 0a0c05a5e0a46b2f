//! Images that become volumes again.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Output,
    time::Duration,
};

use crate::{
    lab::{Config, Daemon, Loop, Mount, noise, run, scratch, sparse_file, text, wait_for},
    proxy::{Fault, FaultPlan, FaultProxy},
    weed::Weed,
};

const MIB: u64 = 1 << 20;

/// A configuration with which volumes in `dirs` are read and written.
fn config(dirs: &[&Path], more: &str) -> Config {
    let lines = format!(
        "boot_volume_dirs = {dirs:?}\nrestore_dirs = {dirs:?}\nencode_threads = \"all\"\n{more}"
    );
    Config { lines, ..Config::default() }
}

fn daemon(dir: &Path) -> Daemon {
    Daemon::start(&config(&[Path::new("/dev"), dir], ""))
}

/// A volume with noise, text and holes, and its image.
fn imaged(daemon: &Daemon, dir: &Path, noisy: u64, tail: u64) -> (PathBuf, String) {
    let path = dir.join("original.raw");
    let size = (noisy + 30) * MIB + tail;
    let noisy = noise(usize::try_from(noisy * MIB).unwrap(), 7);
    let data = [(0, text(1 << 20)), (5 * MIB + 4096, noisy), (size - 100, text(100))];
    sparse_file(&path, size, &data);
    let image = daemon.create(&path, &[]);
    (path, image["id"].as_str().unwrap().to_owned())
}

fn restore(daemon: &Daemon, image: &str, to: &Path) -> Output {
    let to = to.to_str().unwrap();
    daemon.imagectl(&["volume", "restore", "--force", "--image-id", image, "--to", to])
}

fn restored(daemon: &Daemon, image: &str, to: &Path) {
    let output = restore(daemon, image, to);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn refused(daemon: &Daemon, image: &str, to: &Path) -> String {
    let to = to.to_str().unwrap();
    daemon.refusal(&["volume", "restore", "--force", "--image-id", image, "--to", to])
}

/// `found` is `original` and then nothing but zeroes.
fn assert_same(original: &Path, found: &Path) {
    let (original, found) = (original.to_str().unwrap(), found.to_str().unwrap());
    let len = fs::metadata(original).unwrap().len();
    run("cmp", &["--bytes", &len.to_string(), original, found]);
    let skip = format!("--ignore-initial=0:{len}");
    let rest = format!("{found} has more");
    let compared = std::process::Command::new("cmp").args([&skip, "/dev/zero", found]).output();
    let said = String::from_utf8(compared.unwrap().stderr).unwrap();
    assert!(said.contains("EOF on"), "{rest}: {said}");
}

/// A loop device over noise, `more` bytes longer than `original`.
fn used_device(dir: &Path, original: &Path, more: u64, sector_size: u32) -> Loop {
    let backing = dir.join(format!("backing-{sector_size}-{more}"));
    let len = usize::try_from(fs::metadata(original).unwrap().len() + more).unwrap();
    fs::write(&backing, noise(len, 99)).unwrap();
    Loop::attach(&backing, sector_size)
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_an_image_becomes_a_device_or_a_file_again() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let daemon = daemon(dir.path());
    let (original, image) = imaged(&daemon, dir.path(), 20, 0);
    for (more, sector_size) in [(0, 512), (0, 4096), (9 * MIB, 512), (9 * MIB, 4096)] {
        let device = used_device(dir.path(), &original, more, sector_size);
        restored(&daemon, &image, &device.device);
        assert_same(&original, &device.device);
    }
    // Holes of the image are holes of the device's file.
    let backing = fs::metadata(dir.path().join(format!("backing-512-{}", 9 * MIB))).unwrap();
    assert!(backing.blocks() * 512 < 26 * MIB, "{} blocks", backing.blocks());
}

#[test]
#[ignore = "needs root"]
fn root_files_are_made_sparse_or_written_over_to_the_last_byte() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let daemon = daemon(dir.path());
    let (original, image) = imaged(&daemon, dir.path(), 20, 12_345);
    // An image ends with a whole sector.
    let len = fs::metadata(&original).unwrap().len().next_multiple_of(512);

    let new = dir.path().join("new.raw");
    restored(&daemon, &image, &new);
    assert_same(&original, &new);
    let made = fs::metadata(&new).unwrap();
    assert_eq!((made.len(), made.mode() & 0o777), (len, 0o600));
    assert!(made.blocks() * 512 < 26 * MIB, "{} blocks", made.blocks());

    for more in [0, 1, 5 * MIB + 77] {
        let old = dir.path().join("old.raw");
        fs::write(&old, noise(usize::try_from(len + more).unwrap(), 3)).unwrap();
        restored(&daemon, &image, &old);
        assert_same(&original, &old);
        assert_eq!(fs::metadata(&old).unwrap().len(), len + more);
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_what_cannot_be_restored_is_refused_and_nothing_is_touched() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let daemon = daemon(dir.path());
    let (original, image) = imaged(&daemon, dir.path(), 2, 0);
    let small = dir.path().join("small.raw");
    fs::write(&small, noise(1 << 20, 5)).unwrap();
    let mount = Mount::new("ext4", 64 * MIB);
    let used = used_device(dir.path(), &original, 0, 512);
    let open = File::open(&used.device).unwrap();
    let reader =
        std::process::Command::new("sleep").arg("60").stdin(open).spawn().map(Reaped).unwrap();
    let mut said = Vec::new();
    let mut ask = |image: &str, to: &Path| said.push(refused(&daemon, image, to));
    ask(&image, &small);
    ask(&image, Path::new(&mount_device(&mount)));
    ask(&image, &used.device);
    ask(&image, Path::new("/etc/passwd"));
    ask(&image, Path::new("/etc/imaged-new.raw"));
    ask(&image, Path::new("/dev/vg0/wbe-1"));
    ask(&image, Path::new("/dev/wbe-1"));
    ask(&image, dir.path());
    ask("ocid1.image.imaged..nope", &small);
    let said = said.join("\n").replace(dir.path().to_str().unwrap(), "DIR");
    let said = said
        .replace(&mount_device(&mount), "/dev/loopM")
        .replace(used.device.to_str().unwrap(), "/dev/loopN")
        .replace(&format!("pid {}", reader.0.id()), "pid P")
        .replace(mount.at.path().to_str().unwrap(), "MOUNT");
    drop(reader);
    insta::assert_snapshot!(said, @"
    imagectl: the volume DIR/small.raw is smaller than the image: it has 1048576 bytes of 33554432
      at --to
      reason: VOLUME_TOO_SMALL
      help: make it larger, or name a path that does not exist for a new file

    imagectl: the volume /dev/loopM is mounted at MOUNT
      at --to
      reason: VOLUME_HELD
      retry: in 30s
      help: run: umount MOUNT

    imagectl: the volume /dev/loopN is open in sleep (pid P)
      at --to
      reason: VOLUME_HELD
      retry: in 30s
      help: shut the instance down or end sleep (pid P)

    imagectl: /etc/passwd is in none of the directories that may be restored to: /dev, DIR
      at --to
      reason: VOLUME_NOT_ALLOWED
      help: add its directory to restore_dirs in the configuration of imaged

    imagectl: /etc/imaged-new.raw is in none of the directories that may be restored to: /dev, DIR
      at --to
      reason: VOLUME_NOT_ALLOWED
      help: add its directory to restore_dirs in the configuration of imaged

    imagectl: there is no volume /dev/vg0/wbe-1
      at --to
      reason: VOLUME_NOT_FOUND
      help: look for a typing error; a logical volume must be active

    imagectl: there is no volume /dev/wbe-1
      at --to
      reason: VOLUME_NOT_FOUND
      help: look for a typing error; a logical volume must be active

    imagectl: DIR is a directory, not a volume
      at --to
      reason: VOLUME_UNUSABLE
      help: name a block device or a file with a raw disk image

    imagectl: there is no image ocid1.image.imaged..nope
      reason: IMAGE_NOT_FOUND
      help: `imagectl image list` shows the images of this host's stores
    ");
    assert_eq!(fs::read(&small).unwrap(), noise(1 << 20, 5));
    let listed = daemon.json(&["work-request", "list"]);
    let operations = listed["data"].as_array().unwrap();
    assert_eq!(operations.len(), 1, "a refused order stays no work request: {operations:?}");

    // Without --force, where nobody can be asked.
    let to = small.to_str().unwrap();
    let ask = ["volume", "restore", "--image-id", &image, "--to", to];
    let said = daemon.refusal(&ask).replace(dir.path().to_str().unwrap(), "DIR");
    insta::assert_snapshot!(said, @"
    imagectl: DIR/small.raw was not written: no terminal to ask for confirmation
      help: say --force to write over it without being asked
    ");
}

struct Reaped(std::process::Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn mount_device(mount: &Mount) -> String {
    let found =
        run("findmnt", &["--noheadings", "--output", "SOURCE", mount.at.path().to_str().unwrap()]);
    found.trim().to_owned()
}

#[test]
#[ignore = "needs root"]
fn root_a_damaged_image_is_not_restored() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let daemon = daemon(dir.path());
    let (original, image) = imaged(&daemon, dir.path(), 20, 0);
    let object = daemon.images().join(&image).join("image.qcow2");
    let file = File::options().write(true).read(true).open(&object).unwrap();
    let (at, mut byte) = (9 * MIB, [0]);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();

    let new = dir.path().join("new.raw");
    let output = restore(&daemon, &image, &new);
    assert_eq!(output.status.code(), Some(6));
    assert!(!new.exists(), "a part of it was left");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("is not what was stored") && said.contains("new.raw was not made"),
        "{said}"
    );

    let old = dir.path().join("old.raw");
    fs::copy(&original, &old).unwrap();
    let said = String::from_utf8(restore(&daemon, &image, &old).stderr).unwrap();
    assert!(said.contains("no machine boots from it"), "{said}");
    assert_begins_with_zeroes(&old);
}

fn assert_begins_with_zeroes(volume: &Path) {
    let mut start = vec![1; 1 << 20];
    File::open(volume).unwrap().read_exact_at(&mut start, 0).unwrap();
    assert!(start.iter().all(|byte| *byte == 0), "it looks like a disk");
}

/// Asks for a restore and waits until something of it is done.
fn begun(daemon: &Daemon, image: &str, to: &Path) -> String {
    let to = to.to_str().unwrap();
    let ask = ["volume", "restore", "--force", "--image-id", image, "--to", to];
    let work = daemon.json(&[&ask[..], &["--wait-for-state", "ACCEPTED"]].concat());
    let id = work["data"]["id"].as_str().unwrap().to_owned();
    wait_for("the restore to get on", Duration::from_secs(60), || {
        let now = daemon.json(&["work-request", "get", "--work-request-id", &id]);
        assert_ne!(now["data"]["status"], "SUCCEEDED", "it was too quick");
        (now["data"]["progress"]["bytes-read"].as_u64()? > 0).then_some(())
    });
    id
}

#[test]
#[ignore = "needs root"]
fn root_a_restore_that_is_broken_off_boots_nothing_and_can_be_repeated() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    let config = config(&[dir.path()], &weed.config(proxy.address(), dir.path()));
    let first = Daemon::start(&config);
    let (original, image) = imaged(&first, dir.path(), 100, 0);
    // Reads of the object take their time.
    proxy.plan(FaultPlan::rule(|request, _| match request.header("range") {
        Some(_) => Fault::Delay(Duration::from_millis(300)),
        None => Fault::None,
    }));
    let (old, new) = (dir.path().join("old.raw"), dir.path().join("new.raw"));
    fs::copy(&original, &old).unwrap();

    let canceled = begun(&first, &image, &old);
    first.json(&["work-request", "cancel", "--work-request-id", &canceled]);
    wait_for("the cancelled restore's end", Duration::from_secs(20), || {
        let now = first.json(&["work-request", "get", "--work-request-id", &canceled]);
        (now["data"]["status"] == "CANCELED").then_some(())
    });
    assert_begins_with_zeroes(&old);

    let (over, into) = (begun(&first, &image, &old), begun(&first, &image, &new));
    let home = first.kill().unwrap();
    assert!(!new.exists(), "a part of it was left");
    assert_begins_with_zeroes(&old);
    proxy.plan(FaultPlan::none());
    let second = Daemon::start_in(home.path(), &config);
    for id in [over, into] {
        let ended = second.json(&["work-request", "get", "--work-request-id", &id]);
        assert_eq!(ended["data"]["status"], "FAILED");
        let said = ended["data"]["errors"][0]["message"].as_str().unwrap();
        assert!(said.contains("no machine boots from it"), "{said}");
    }
    for volume in [old, new] {
        restored(&second, &image, &volume);
        assert_same(&original, &volume);
    }
}

#[test]
#[ignore = "needs root and mounts"]
fn root_a_full_filesystem_fails_the_restore_and_gets_its_room_back() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let mount = Mount::new("ext4", 64 * MIB);
    let daemon = Daemon::start(&config(&[dir.path(), mount.at.path()], ""));
    let (_, image) = imaged(&daemon, dir.path(), 100, 0);
    let free = || run("stat", &["--file-system", "--format=%f", mount.at.path().to_str().unwrap()]);
    let before = free();
    let said = refused(&daemon, &image, &mount.at.path().join("new.raw"));
    assert!(said.contains("No space left on device") && said.contains("make room"), "{said}");
    assert!(!mount.at.path().join("new.raw").exists());
    assert_eq!(free(), before);
}

#[test]
#[ignore = "needs root, loop devices and SeaweedFS"]
fn root_s3_an_image_is_restored_from_a_bucket() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let weed = Weed::start();
    let bucket = weed.config(weed.address(), dir.path());
    let daemon = Daemon::start(&config(&[Path::new("/dev"), dir.path()], &bucket));
    let (original, image) = imaged(&daemon, dir.path(), 60, 0);
    let device = used_device(dir.path(), &original, 0, 512);
    restored(&daemon, &image, &device.device);
    assert_same(&original, &device.device);
    println!("peak memory {} MiB", daemon.peak_memory() >> 20);
}
