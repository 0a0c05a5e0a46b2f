//! Volumes on real devices: loop devices, filesystems, QEMU.
#![allow(clippy::cast_possible_truncation, reason = "the sizes here are small")]
#![allow(clippy::single_range_in_vec_init, reason = "maps of one range")]

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::sync_channel,
    thread,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    Engine,
    tests::{E, ENGINES, bytes_of, directory, file, hold, hold_with, pattern, settings, writer},
};
use crate::{
    error::{Error, Reason},
    port::{HeldVolume, Piece},
};

const DEV: &str = "/dev";

/// A loop device over a file, detached when dropped.
pub(super) struct Loop(pub(super) PathBuf);

impl Loop {
    pub(super) fn over(file: &Path, options: &[&str]) -> Self {
        let made = run(Command::new("flock")
            // One at a time: a losetup that lost the race for a free device
            // has the winner's open for a moment.
            .args(["/dev/loop-control", "losetup", "--find", "--show"])
            .args(options)
            .arg(file));
        Self(made.trim().into())
    }

    fn hold(&self, engine: Engine) -> Result<Box<dyn HeldVolume>, Error> {
        hold_with(settings(engine), Path::new(DEV), &self.0)
    }

    fn refused(&self) -> String {
        let error = self.hold(Engine::Uring).map(|_| ()).unwrap_err();
        format!("{error:?}").replace(self.0.to_str().unwrap(), "/dev/loopN")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A program that is ended and reaped when dropped.
struct Program(Child);

impl Program {
    fn pid(&self) -> String {
        format!("pid {}", self.0.id())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A volume of `size` bytes with data here and there.
fn volume(dir: &Path, size: u64) -> PathBuf {
    let path = file(dir, "backing", b"");
    let volume = File::options().write(true).open(&path).unwrap();
    volume.set_len(size).unwrap();
    for start in (0..size).step_by(5 * E as usize) {
        let len = (size - start).min(E + 4096) as usize;
        volume.write_all_at(&pattern(len, start + 1), start).unwrap();
    }
    path
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_devices_of_both_sector_sizes_are_read_whole_and_by_their_files_map() {
    let dir = directory();
    // Extents of data and of zeroes at the end, whole and cut-off sectors.
    for (sector, len, size) in [
        (512, 20 * E + 4096 + 1000, 20 * E + 4096 + 512),
        (4096, 20 * E + 4096, 20 * E + 4096),
        (4096, 20 * E + 4096 + 1000, 20 * E + 4096 + 512),
        (4096, 20 * E + 600, 20 * E + 512),
        (4096, 23 * E + 600, 23 * E + 512),
    ] {
        let path = volume(dir.path(), len);
        let expected = &fs::read(&path).unwrap()[..size as usize];
        for direct in ["on", "off"] {
            let options = [format!("--sector-size={sector}"), format!("--direct-io={direct}")];
            let device = Loop::over(&path, &[&options[0], &options[1]]);
            for engine in ENGINES {
                let mut held = device.hold(engine).unwrap();
                let facts = held.facts().clone();
                assert_eq!((facts.size.get(), facts.sector_size), (size, sector));
                assert!(facts.data_size().get() < size / 2, "no map: {facts:?}");
                assert!(bytes_of(&mut *held).unwrap() == expected, "{engine:?} {options:?}");
            }
        }
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_devices_with_an_offset_and_a_limit_have_the_map_of_their_window() {
    let dir = directory();
    let path = volume(dir.path(), 20 * E);
    let (offset, limit) = (3 * E + 512, 12 * E);
    let options = [format!("--offset={offset}"), format!("--sizelimit={limit}")];
    let device = Loop::over(&path, &[&options[0], &options[1]]);
    let mut held = device.hold(Engine::Uring).unwrap();
    assert_eq!(
        held.facts().data,
        [2 * E - 512..3 * E + 4096 - 512, 7 * E - 512..8 * E + 4096 - 512, 12 * E - 512..12 * E]
    );
    let window = offset as usize..(offset + limit) as usize;
    assert!(bytes_of(&mut *held).unwrap() == fs::read(&path).unwrap()[window]);
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_devices_show_what_was_written_through_their_cache() {
    let dir = directory();
    let path = file(dir.path(), "backing", b"");
    File::options().write(true).open(&path).unwrap().set_len(16 * E).unwrap();
    let device = Loop::over(&path, &[]);
    let written = pattern(4096, 4);
    // Buffered and not flushed: it lies in the device's cache alone. The last
    // to close a device flushes it, so another is to be there.
    let _reader = File::open(&device.0).unwrap();
    File::options().write(true).open(&device.0).unwrap().write_all_at(&written, 9 * E).unwrap();
    let mut held = device.hold(Engine::Uring).unwrap();
    assert_eq!(held.facts().data, [9 * E..9 * E + 4096]);
    let bytes = bytes_of(&mut *held).unwrap();
    assert!(bytes[9 * E as usize..][..4096] == written);
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_devices_without_their_file_are_read_whole() {
    let dir = directory();
    let path = volume(dir.path(), 8 * E);
    let expected = fs::read(&path).unwrap();
    let device = Loop::over(&path, &[]);
    // The kernel now calls it "backing (deleted)". A file that is really named
    // so is not the one under the device.
    fs::remove_file(&path).unwrap();
    let other = File::create(path.with_file_name("backing (deleted)")).unwrap();
    other.set_len(8 * E).unwrap();
    let mut held = device.hold(Engine::Uring).unwrap();
    assert_eq!(held.facts().data, [0..8 * E]);
    assert!(bytes_of(&mut *held).unwrap() == expected);
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_an_unreadable_sector_is_named_and_nothing_stays_behind() {
    let dir = directory();
    let path = volume(dir.path(), 20 * E);
    // Beyond the end of its file a loop device gives EIO.
    let device = Loop::over(&path, &["--direct-io=on"]);
    File::options().write(true).open(&path).unwrap().set_len(10 * E + 12288).unwrap();
    for engine in ENGINES {
        let mut held = device.hold(engine).unwrap();
        assert_eq!(held.facts().data, [0..20 * E], "a file in doubt is no map");
        let error = bytes_of(&mut *held).unwrap_err();
        let shown = format!("{error:?}").replace(device.0.to_str().unwrap(), "/dev/loopN");
        assert_eq!(10 * E + 12288, 10_498_048);
        insta::allow_duplicates!(insta::assert_snapshot!(shown, @"
        READ_FAILED: cannot read 512 B at offset 10498048 of /dev/loopN
          0: Input/output error (os error 5)
          help: the volume's device is failing: look into the kernel's log
        "));
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_a_mounted_device_is_refused_by_its_mount_point() {
    let dir = directory();
    let path = file(dir.path(), "backing", b"");
    File::options().write(true).open(&path).unwrap().set_len(64 * E).unwrap();
    run(Command::new("mkfs.ext4").arg("-q").arg(&path));
    let point = fs::canonicalize(dir.path()).unwrap().join("a point");
    fs::create_dir(&point).unwrap();
    let device = Loop::over(&path, &[]);
    run(Command::new("mount").arg(&device.0).arg(&point));
    let refused = device.refused();
    let backing = hold(dir.path(), &path).map(|_| ()).map_err(|error| error.to_string());
    run(Command::new("umount").arg(&point));
    insta::assert_snapshot!(refused.replace(point.to_str().unwrap(), "/mnt/a point"), @"
    VOLUME_HELD: the volume /dev/loopN is mounted at /mnt/a point
      help: run: umount /mnt/a point
    ");
    assert!(backing.unwrap_err().ends_with(&format!("is attached to {}", device.0.display())));
    device.hold(Engine::Uring).unwrap();
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_swap_is_refused() {
    let dir = directory();
    let path = file(dir.path(), "backing", b"");
    File::options().write(true).open(&path).unwrap().write_all_at(&[0; 8 << 20], 0).unwrap();
    let device = Loop::over(&path, &[]);
    run(Command::new("mkswap").arg(&device.0));
    if !Command::new("swapon").arg(&device.0).status().unwrap().success() {
        return; // A kernel without swap.
    }
    let refused = device.refused();
    run(Command::new("swapoff").arg(&device.0));
    assert!(refused.starts_with("VOLUME_HELD: the volume /dev/loopN is used as swap"), "{refused}");
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_a_disk_is_refused_while_its_partition_is_mounted_and_the_other_way_round() {
    let dir = directory();
    let path = file(dir.path(), "backing", b"");
    File::options().write(true).open(&path).unwrap().set_len(64 * E).unwrap();
    let device = Loop::over(&path, &["--partscan"]);
    // The kernel need not know any kind of partition table.
    for (number, start) in [("1", "2048"), ("2", "65536")] {
        run(Command::new("addpart").arg(&device.0).args([number, start, "61440"]));
    }
    let partition = |number| PathBuf::from(format!("{}p{number}", device.0.display()));
    run(Command::new("mkfs.ext4").arg("-q").arg(partition(1)));
    let point = fs::canonicalize(dir.path()).unwrap().join("point");
    fs::create_dir(&point).unwrap();
    run(Command::new("mount").arg(partition(1)).arg(&point));
    let mounted = device.refused();
    let neighbour = hold(Path::new(DEV), &partition(2));
    run(Command::new("umount").arg(&point));
    assert!(mounted.contains(&format!("mounted at {}", point.display())), "{mounted}");
    let neighbour = neighbour.unwrap();
    assert_eq!(neighbour.facts().size.get(), 30 * E);
    let holds_itself = device.refused();
    assert!(holds_itself.starts_with("VOLUME_HELD"), "{holds_itself}");
    drop(neighbour);
    device.hold(Engine::Uring).unwrap();
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_a_program_that_claims_or_may_write_is_refused_by_name() {
    let dir = directory();
    let path = volume(dir.path(), 8 * E);
    let device = Loop::over(&path, &[]);
    let claimed = File::options().read(true).custom_flags(libc::O_EXCL).open(&device.0).unwrap();
    let sleep = Command::new("sleep").arg("60").stdin(Stdio::from(claimed)).spawn().unwrap();
    let sleep = Program(sleep);
    let refused = device.refused();
    assert!(
        refused.contains(&format!("/dev/loopN is open in sleep ({})", sleep.pid())),
        "{refused}"
    );
    drop(sleep);
    // On the device, and on the file under it.
    for opened in [&device.0, &path] {
        let sleep = Program(writer(opened));
        let refused = device.refused();
        assert!(
            refused.contains(&format!("is open for writing by sleep ({})", sleep.pid())),
            "{refused}"
        );
    }
    device.hold(Engine::Uring).unwrap();
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_while_held_the_kernel_refuses_to_mount() {
    let dir = directory();
    let path = file(dir.path(), "backing", b"");
    File::options().write(true).open(&path).unwrap().set_len(64 * E).unwrap();
    run(Command::new("mkfs.ext4").arg("-q").arg(&path));
    let device = Loop::over(&path, &[]);
    let point = dir.path().join("point");
    fs::create_dir(&point).unwrap();
    let mount = || Command::new("mount").arg(&device.0).arg(&point).output().unwrap();
    let held = device.hold(Engine::Uring).unwrap();
    let refused = mount();
    drop(held);
    // A program that another test just started has it for a moment more.
    let allowed = (0..20).any(|_| {
        thread::sleep(Duration::from_millis(50));
        mount().status.success()
    });
    let _ = Command::new("umount").arg(&point).status();
    assert!(!refused.status.success(), "it could be mounted");
    assert!(allowed, "{:?}", mount());
}

#[test]
#[ignore = "needs root and loop devices"]
fn loop_a_stop_ends_the_reading_within_a_second_and_no_memory_stays() {
    let dir = directory();
    let path = file(dir.path(), "backing", &pattern(64 * E as usize, 8));
    let device = Loop::over(&path, &["--direct-io=on"]);
    let resident = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
    };
    let mut before = 0;
    for round in 0..40 {
        let mut held = device.hold(ENGINES[round % 2]).unwrap();
        // No room: it cannot be done before the stop.
        let (pieces, received) = sync_channel::<Piece>(1);
        let stop = CancellationToken::new();
        let (result, waited) = thread::scope(|scope| {
            let stopper = stop.clone();
            let consumer = scope.spawn(move || {
                let first = received.recv();
                stopper.cancel();
                let cancelled = Instant::now();
                drop(first);
                while received.recv().is_ok() {}
                cancelled
            });
            let result = held.read(&pieces, &stop);
            let ended = Instant::now();
            drop(pieces);
            (result, ended.saturating_duration_since(consumer.join().unwrap()))
        });
        assert_eq!(result.unwrap_err().reason(), Reason::Canceled);
        assert!(waited < Duration::from_secs(1), "{waited:?}");
        if round == 4 {
            before = resident();
        }
    }
    let grown = resident().saturating_sub(before);
    // Were those of one engine kept, it would be 280 MiB; other tests of this
    // process have some tens.
    assert!(grown < 160, "{grown} MiB stayed behind after 35 readings of 16 MiB of buffers");
}

/// A QEMU that has `path` as a disk, stopped before its first instruction.
fn qemu(path: &Path, driver: &str) -> Program {
    let blockdev = format!("driver={driver},node-name=disk,filename={}", path.display());
    let child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-blockdev", &blockdev])
        .args(["-device", "virtio-blk-pci,drive=disk"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Program(child)
}

/// Waits until `program` has `path` open.
fn wait_until_open(program: &Program, path: &Path) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", program.0.id())).unwrap();
        let mut open = descriptors.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        if open.any(|found| found == path) {
            // The locks are taken right after.
            thread::sleep(Duration::from_millis(300));
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("QEMU did not open {}", path.display());
}

#[test]
#[ignore = "needs root, loop devices and qemu-system-x86_64"]
fn qemu_that_has_the_volume_is_named() {
    let dir = directory();
    let path = volume(dir.path(), 8 * E);
    let device = Loop::over(&path, &[]);
    let program = qemu(&device.0, "host_device");
    wait_until_open(&program, &device.0);
    let refused = device.refused();
    insta::assert_snapshot!(refused.replace(&program.pid(), "pid PID"), @"
    VOLUME_HELD: the volume /dev/loopN is open for writing by qemu-system-x86 (pid PID)
      help: shut the instance down or end qemu-system-x86 (pid PID)
    ");
    drop(program);
    device.hold(Engine::Uring).unwrap();
    drop(device);
    let program = qemu(&path, "file");
    wait_until_open(&program, &path);
    let error = hold(dir.path(), &path).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("open for writing by qemu-system-x86"), "{error}");
}

#[test]
#[ignore = "needs root, loop devices and qemu-system-x86_64"]
fn qemu_gets_no_write_lock_while_the_volume_is_held() {
    let dir = directory();
    let path = volume(dir.path(), 8 * E);
    let device = Loop::over(&path, &[]);
    let from_device = device.hold(Engine::Uring).unwrap();
    for (opened, driver) in [(&device.0, "host_device"), (&path, "file")] {
        let mut program = qemu(opened, driver);
        let mut said = String::new();
        program.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(said.contains("Failed to get \"write\" lock"), "{said}");
        assert!(!program.0.wait().unwrap().success());
    }
    drop(from_device);
    drop(device);
    let from_file = hold(dir.path(), &path).unwrap();
    let write = || {
        Command::new("qemu-io")
            .args(["-f", "raw", "-c", "write 0 512"])
            .arg(&path)
            .output()
            .unwrap()
    };
    let read = || {
        Command::new("qemu-io")
            .args(["-r", "-f", "raw", "-c", "read 0 512"])
            .arg(&path)
            .output()
            .unwrap()
    };
    assert!(!write().status.success(), "qemu-io wrote to a held volume");
    assert!(read().status.success(), "qemu-io must be able to read a held volume");
    drop(from_file);
    assert!(write().status.success());
}

#[test]
#[ignore = "needs root, loop devices, fio and a release build: a measurement"]
fn loop_measure_the_reader_alone() {
    let Ok(device) = std::env::var("IMAGED_MEASURE_DEVICE") else { return };
    // One engine at a time: a disk that gives credit would favour the first.
    let engine = match std::env::var("IMAGED_MEASURE_ENGINE").as_deref() {
        Ok("threads") => Engine::Threads,
        _ => Engine::Uring,
    };
    let mut held = hold_with(settings(engine), Path::new(DEV), Path::new(&device)).unwrap();
    let size = held.facts().data_size();
    let (pieces, received) = sync_channel(64);
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || received.into_iter().for_each(drop));
        held.read(&pieces, &CancellationToken::new()).unwrap();
        drop(pieces);
    });
    println!("{engine:?}: {size} in {:.3} s", start.elapsed().as_secs_f64());
}
