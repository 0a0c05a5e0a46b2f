//! Faults of real filesystems.

use std::process::Command;

use super::*;

/// A filesystem of its own at the store's path, unmounted at the end.
struct Mounted<'a>(&'a Bench);

impl<'a> Mounted<'a> {
    fn new(bench: &'a Bench, arguments: &[&str]) -> Self {
        fs::create_dir(bench.path()).unwrap();
        // One loop device at a time: who loses the race for a free one has the
        // winner's open for a moment.
        let mut mount = Command::new("flock");
        run(mount.args(["/dev/loop-control", "mount"]).args(arguments).arg(bench.path()));
        Self(bench)
    }

    fn ext4(bench: &'a Bench) -> Self {
        Self::made(bench, &["mkfs.ext4", "-q", "-m", "0"], 64, "loop,errors=remount-ro")
    }

    /// Made by the program and arguments of `mkfs`, of so many MiB.
    fn made(bench: &'a Bench, mkfs: &[&str], mib: u64, options: &str) -> Self {
        let image = bench.temp.path().join("filesystem");
        fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image));
        Self::new(bench, &["-o", options, image.to_str().unwrap()])
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        // Lazy and unchecked: a failed test may have it open, or gone.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Puts parts of 4 MiB until one fails.
async fn fill(upload: &dyn Upload) -> Error {
    for part in parts(&[4 << 20; 32]) {
        if let Err(error) = upload.put(part).await {
            return error;
        }
    }
    panic!("128 MiB went into a filesystem of 64 MiB");
}

fn without_free_size(report: &str) -> String {
    let (before, rest) = report.split_once(" has ").unwrap();
    let (_, after) = rest.split_once(" free ").unwrap();
    format!("{before} has [SIZE] free {after}")
}

#[tokio::test]
#[ignore = "needs root"]
async fn root_a_full_store_says_so_and_gets_its_space_back() {
    for with in [&["-t", "tmpfs", "-o", "size=64m", "tmpfs"][..], &[]] {
        let bench = Bench::new();
        let _mounted =
            if with.is_empty() { Mounted::ext4(&bench) } else { Mounted::new(&bench, with) };
        let kept = ByteSize::mib(8);
        let store = DirectoryStore::open("local", &bench.path(), kept, HOST).await.unwrap();
        let free = store.space().await.unwrap().unwrap().free;
        let upload = store.begin(&id(1)).await.unwrap();
        let full = bench.report(&fill(&*upload).await);
        insta::allow_duplicates! {
            insta::assert_snapshot!(without_free_size(&renumbered(&full)), @r#"
            STORE_FULL: part [N] of image ocid1.image.imaged..test1 needs 4.00 MiB, and the store "local" has [SIZE] free of which 8.00 MiB must stay
              help: delete images from it, lower its min_free, or make another store the default_store
            "#);
        }
        assert!(store.space().await.unwrap().unwrap().free < ByteSize::mib(4));
        upload.abort().await.unwrap();
        assert!(files(&bench.path().join("images")).is_empty());
        let back = store.space().await.unwrap().unwrap().free;
        assert!(back.get() + (64 << 10) >= free.get(), "{back:#} of {free:#}");

        // Without a reserve the filesystem itself refuses.
        let store = DirectoryStore::open("local", &bench.path(), ByteSize(0), HOST).await.unwrap();
        let upload = store.begin(&id(1)).await.unwrap();
        let error = fill(&*upload).await;
        assert!(error.causes().any(|cause| cause.contains("No space left")), "{error:?}");
        assert_eq!(error.reason(), Reason::StoreFull);
        upload.abort().await.unwrap();
    }
}

/// The number of the part that failed depends on the filesystem's overhead.
fn renumbered(report: &str) -> String {
    report
        .split(' ')
        .map(|word| if word.parse::<u32>().is_ok() { "[N]" } else { word })
        .collect::<Vec<_>>()
        .join(" ")
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn root_a_filesystem_that_turns_read_only_is_unavailable() {
    let bench = Bench::new();
    let _mounted = Mounted::ext4(&bench);
    let store = bench.store().await;
    make(&store, &id(1)).await;
    let upload = store.begin(&id(2)).await.unwrap();
    upload.put(parts(&[8192, 8192]).remove(0)).await.unwrap();
    // What ext4 does when the disk under it fails.
    let device = Command::new("findmnt").args(["-no", "SOURCE"]).arg(bench.path()).output();
    let device = String::from_utf8(device.unwrap().stdout).unwrap();
    let name = device.trim().trim_start_matches("/dev/");
    fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "1").unwrap();

    let put = upload.put(parts(&[8192, 8192]).remove(1)).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&put), @"
    STORE_UNAVAILABLE: cannot write part 2 of /srv/images/images/ocid1.image.imaged..test2/image.qcow2
      0: Read-only file system (os error 30)
      help: the filesystem is read-only: look into the kernel's log for why, and mount it writable
    ");
    let begin = store.begin(&id(3)).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&begin), @"
    STORE_UNAVAILABLE: cannot make /srv/images/images/ocid1.image.imaged..test3
      0: Read-only file system (os error 30)
      help: the filesystem is read-only: look into the kernel's log for why, and mount it writable
    ");
    let abort = upload.abort().await.unwrap_err();
    insta::assert_snapshot!(bench.report(&abort), @"
    STORE_UNAVAILABLE: cannot remove /srv/images/images/ocid1.image.imaged..test2/image.qcow2
      0: Read-only file system (os error 30)
      help: the filesystem is read-only: look into the kernel's log for why, and mount it writable
    ");
    // What is whole can be read, by a new daemon too.
    assert_eq!(listed(&bench.store().await).await, [id(1).as_str()]);
    store.open(&id(1)).await.unwrap();
}

#[tokio::test]
#[ignore = "needs root"]
async fn root_a_store_that_is_unmounted_is_not_written_to() {
    let bench = Bench::new();
    let mounted = Mounted::new(&bench, &["-t", "tmpfs", "-o", "size=64m", "tmpfs"]);
    let store = bench.store().await;
    let upload = store.begin(&id(1)).await.unwrap();
    drop(mounted);
    let put = upload.put(parts(&[8192]).remove(0)).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&put), @"
    STORE_UNAVAILABLE: the store's directory /srv/images vanished
      0: imaged-store.json is not there
      help: is it mounted? mount it, or restart imaged to begin a new store there
    ");
    assert_eq!(store.begin(&id(2)).await.unwrap_err().reason(), Reason::StoreUnavailable);
    upload.abort().await.unwrap();
    assert!(files(&bench.path()).is_empty());
}

/// Fills a filesystem to its last block and its last inode: with writes that
/// get smaller, and with empty files.
fn fill_up(path: &Path) {
    use std::io::Write;
    let mut large = fs::File::create(path.join("large")).unwrap();
    for size in [1 << 20, 4096, 512, 1] {
        while large.write_all(&vec![1; size]).and_then(|()| large.sync_all()).is_ok() {}
    }
    for number in 0.. {
        let Ok(mut small) = fs::File::create(path.join(format!("small-{number}"))) else { break };
        if number < 100 {
            let _ = small.write_all(b"x").and_then(|()| small.sync_all());
        }
    }
    let refused = fs::write(path.join("one-more"), "x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC));
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn root_images_are_deleted_from_a_store_that_is_full() {
    for (mkfs, mib) in [
        (&["mkfs.ext4", "-q", "-m", "0"][..], 64),
        (&["mkfs.xfs", "-q"], 320),
        (&["mkfs.btrfs", "-q", "--mixed"], 200),
    ] {
        let bench = Bench::new();
        let _mounted = Mounted::made(&bench, mkfs, mib, "loop");
        let store = DirectoryStore::open("local", &bench.path(), ByteSize(0), HOST).await.unwrap();
        for number in 1..=3 {
            make(&store, &id(number)).await;
        }
        fill_up(&bench.path());
        for number in 1..=3 {
            let deleted = store.delete(&id(number)).await;
            assert_eq!(deleted.unwrap(), Delete::Deleted, "{mkfs:?}, image {number}");
        }
        assert!(files(&bench.path().join("images")).is_empty());
        assert!(store.space().await.unwrap().unwrap().free > ByteSize(0));
    }
}
