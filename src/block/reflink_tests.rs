//! Clones on real filesystems.
#![allow(clippy::cast_possible_truncation, reason = "the sizes here are small")]

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use super::{
    HostVolumes, ReaderSettings,
    device_tests::{Loop, run},
    tests::{E, bytes_of, directory, file, hold, pattern},
};
use crate::{
    model::image::SnapshotKind,
    port::{HeldVolume, HostSnapshot, NamedBy, Offer, Pace, Volumes, Writer},
    sys::aligned::AlignedBuf,
};

/// A filesystem of its own.
struct Mounted {
    at: tempfile::TempDir,
    _device: Loop,
    _image: tempfile::TempDir,
}

impl Mounted {
    fn new(kind: &str, mib: u64) -> Self {
        let image = directory();
        let backing = file(image.path(), "fs", b"");
        File::options().write(true).open(&backing).unwrap().set_len(mib << 20).unwrap();
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&backing));
        let device = Loop::over(&backing, &[]);
        let at = directory();
        run(Command::new("mount").arg(&device.0).arg(at.path()));
        Self { at, _device: device, _image: image }
    }

    /// A volume of 40 MiB with data here and there.
    fn volume(&self) -> PathBuf {
        let path = file(self.at.path(), "disk.raw", b"");
        let volume = File::options().write(true).open(&path).unwrap();
        volume.set_len(40 * E + 512).unwrap();
        for start in (0..40 * E).step_by(5 * E as usize) {
            volume.write_all_at(&pattern(E as usize + 4096, start + 1), start).unwrap();
        }
        path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.at.path()).status();
    }
}

fn offered(dir: &Path, volume: &Path, writer: Writer) -> Result<Box<dyn HostSnapshot>, String> {
    let volumes = HostVolumes::new(vec![dir.to_owned()], ReaderSettings::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let offer =
        runtime.block_on(volumes.host_snapshot(volume, NamedBy::Request, writer, Pace::default()));
    match offer.unwrap() {
        Offer::Snapshot(snapshot) => Ok(snapshot),
        Offer::Nothing(why) => Err(why),
    }
}

fn take(snapshot: Box<dyn HostSnapshot>) -> Box<dyn HeldVolume> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(snapshot.settle()).unwrap();
    runtime.block_on(snapshot.take()).unwrap()
}

#[test]
#[ignore = "needs root, loop devices, XFS and btrfs"]
fn loop_clones_hold_what_their_volume_was() {
    for kind in ["xfs", "btrfs"] {
        let mounted = Mounted::new(kind, 400);
        let (dir, path) = (mounted.at.path(), mounted.volume());
        let before = fs::read(&path).unwrap();
        let held = hold(dir, &path).unwrap();
        let mut clone = take(offered(dir, &path, Writer::Nobody).unwrap());
        assert_eq!(clone.snapshot(), SnapshotKind::Reflink);
        // Shared blocks of XFS are read in larger sectors.
        assert_eq!(clone.facts().size, held.facts().size);
        assert_eq!(clone.facts().data, held.facts().data, "{kind}");
        assert!(clone.facts().data_size().get() < 12 * E, "{:?}", clone.facts());
        assert!(clone.mark().is_some());
        assert_eq!(clone.mark(), held.mark());
        drop(held);
        // Its machine starts, and is seen by whoever would read the volume.
        let guest = File::options().write(true).open(&path).unwrap();
        guest.write_all_at(&pattern(8 * E as usize, 99), 3 * E).unwrap();
        guest.sync_all().unwrap();
        assert!(hold(dir, &path).unwrap().mark() != clone.mark());
        assert!(bytes_of(&mut *clone).unwrap() == before, "{kind}");
        assert!(fs::read(&path).unwrap() != before);
        assert_eq!(fs::read_dir(dir).unwrap().count(), 1, "the clone has a name");
    }
}

#[test]
#[ignore = "needs root, loop devices and XFS"]
fn loop_clones_go_on_where_an_earlier_reading_stood() {
    let mounted = Mounted::new("xfs", 320);
    let (dir, path) = (mounted.at.path(), mounted.volume());
    let mut clone = take(offered(dir, &path, Writer::Guest).unwrap());
    assert_eq!(clone.mark(), None, "a guest writes to it all the time");
    clone.begin_at(39);
    let (pieces, received) = std::sync::mpsc::sync_channel(64);
    clone.read(&pieces, &tokio_util::sync::CancellationToken::new()).unwrap();
    drop(pieces);
    assert!(received.into_iter().count() < 3);
}

#[test]
#[ignore = "needs root, loop devices and XFS"]
fn loop_what_cannot_be_cloned_says_why() {
    let said = |dir: &Path, path: &Path, writer| {
        let said = offered(dir, path, writer).map(|_| ()).unwrap_err();
        said.replace(dir.to_str().unwrap(), "DIR")
    };
    let dir = directory();
    let path = file(dir.path(), "disk.raw", b"data");
    insta::assert_snapshot!(said(dir.path(), &path, Writer::Nobody),
        @"its filesystem is neither XFS nor btrfs, which clone files");
    let device = Loop::over(&path, &["--read-only"]);
    insta::assert_snapshot!(said(Path::new("/dev"), &device.0, Writer::Nobody),
        @"it is a device, and LVM cannot be used");

    // Every other block of 4 KiB: as many pieces.
    let mounted = Mounted::new("xfs", 320);
    let dir = mounted.at.path();
    let path = file(dir, "disk.raw", b"");
    let volume = File::options().write(true).open(&path).unwrap();
    volume.set_len(64 * E).unwrap();
    let pieces = |wanted: u64| {
        for piece in 0..wanted {
            volume.write_all_at(&pattern(4096, piece + 1), piece * 8192).unwrap();
        }
    };
    pieces(400);
    assert!(offered(dir, &path, Writer::Guest).is_ok());
    pieces(900);
    insta::assert_snapshot!(said(dir, &path, Writer::Guest),
        @"its file is in 900 pieces, and a clone of more than 500 takes long");
    assert!(offered(dir, &path, Writer::Nobody).is_ok(), "nobody waits for it");

    // More data than there is room beside it.
    volume.write_all_at(&vec![1; 150 * E as usize], 0).unwrap();
    volume.sync_all().unwrap();
    run(Command::new("fallocate").args(["-l", "40M"]).arg(dir.join("other")));
    let said = said(dir, &path, Writer::Nobody);
    assert!(said.starts_with("its filesystem has ") && said.contains("may need 1"), "{said}");
}

/// Writes records one after another, each only when the one before was
/// answered: record `n` into block `n` modulo the number of blocks.
struct Recorder {
    answered: AtomicU64,
    asked: AtomicU64,
}

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 64;

impl Recorder {
    fn write(&self, file: &File, region: u64, stop: &AtomicBool) {
        let mut block = AlignedBuf::zeroed(BLOCK as usize);
        for number in 1.. {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            block[..8].copy_from_slice(&u64::to_le_bytes(number));
            self.asked.store(number, Ordering::SeqCst);
            let offset = (region * BLOCKS + number % BLOCKS) * BLOCK;
            file.write_all_at(&block, offset).unwrap();
            self.answered.store(number, Ordering::SeqCst);
        }
    }
}

/// The last record of a region, if the region holds it and all before it.
fn last_in_order(region: &[u8]) -> u64 {
    let records: Vec<u64> = region
        .chunks(BLOCK as usize)
        .map(|block| u64::from_le_bytes(block[..8].try_into().unwrap()))
        .collect();
    let last = records.iter().copied().max().unwrap();
    for (block, record) in records.iter().enumerate() {
        let behind = (last + BLOCKS - block as u64) % BLOCKS;
        let expected = last.saturating_sub(behind);
        let never = last < behind || expected == 0;
        assert_eq!(*record, if never { 0 } else { expected }, "record {last} without one before");
    }
    last
}

#[test]
#[ignore = "needs root, loop devices, XFS and btrfs"]
fn loop_clones_beside_writers_hold_every_write_up_to_a_point_in_time() {
    for kind in ["xfs", "btrfs"] {
        let mounted = Mounted::new(kind, 400);
        let (dir, path) = (mounted.at.path(), file(mounted.at.path(), "disk.raw", b""));
        let open = |flags| File::options().write(true).custom_flags(flags).open(&path).unwrap();
        let writers = [open(0), open(libc::O_DIRECT), open(libc::O_DIRECT), open(libc::O_SYNC)];
        let regions = writers.len() as u64;
        // As a machine's disk mostly is: direct writes need no allocation, but
        // for the first after each clone.
        writers[0].write_all_at(&vec![0; (regions * BLOCKS * BLOCK) as usize], 0).unwrap();
        writers[0].sync_all().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let recorders: Vec<_> = (0..regions)
            .map(|_| Arc::new(Recorder { answered: AtomicU64::new(0), asked: AtomicU64::new(0) }))
            .collect();
        let mut clones = Vec::new();
        thread::scope(|scope| {
            for (region, file) in writers.iter().enumerate() {
                let (recorder, stop) = (&recorders[region], &stop);
                scope.spawn(move || recorder.write(file, region as u64, stop));
            }
            for _ in 0..60 {
                let snapshot = offered(dir, &path, Writer::Guest).unwrap();
                let before: Vec<_> =
                    recorders.iter().map(|r| r.answered.load(Ordering::SeqCst)).collect();
                let clone = take(snapshot);
                let after: Vec<_> =
                    recorders.iter().map(|r| r.asked.load(Ordering::SeqCst)).collect();
                clones.push((before, clone, after));
            }
            stop.store(true, Ordering::Relaxed);
        });
        let mut distinct = 0;
        for (before, mut clone, after) in clones {
            let bytes = bytes_of(&mut *clone).unwrap();
            for (region, bytes) in bytes.chunks((BLOCKS * BLOCK) as usize).enumerate() {
                let last = last_in_order(bytes);
                let (before, after) = (before[region], after[region]);
                assert!(
                    (before..=after).contains(&last),
                    "{kind}, writer {region}: {before} were answered before, {after} asked after, \
                     and the clone has {last}"
                );
                distinct += u64::from(after > before);
            }
        }
        assert!(distinct > 0, "{kind}: nobody wrote beside a clone");
        for recorder in recorders {
            assert!(recorder.answered.load(Ordering::SeqCst) > 100, "{kind}: a writer was starved");
        }
    }
}
