//! Volumes as the work sees them: through the port.
#![allow(clippy::cast_possible_truncation, reason = "the sizes here are small")]
#![allow(clippy::single_range_in_vec_init, reason = "maps of one range")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::{fs::FileExt, net::UnixListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::sync_channel,
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

use super::{Engine, HostVolumes, ReaderSettings};
use crate::{
    error::{Error, Reason, Result},
    model::image::EXTENT_SIZE,
    port::{HeldVolume, NamedBy, Piece, Volumes},
};

pub(super) const E: u64 = EXTENT_SIZE;
pub(super) const ENGINES: [Engine; 2] = [Engine::Uring, Engine::Threads];

pub(super) fn settings(engine: Engine) -> ReaderSettings {
    ReaderSettings { engine, ..ReaderSettings::default() }
}

pub(super) fn hold_with(
    settings: ReaderSettings,
    dir: &Path,
    path: &Path,
) -> Result<Box<dyn HeldVolume>> {
    let volumes = HostVolumes::new(vec![dir.to_owned()], settings);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(volumes.hold(path, NamedBy::Request))
}

pub(super) fn hold(dir: &Path, path: &Path) -> Result<Box<dyn HeldVolume>> {
    hold_with(ReaderSettings::default(), dir, path)
}

/// Reads it all and checks that every byte comes once.
pub(super) fn bytes_of(volume: &mut dyn HeldVolume) -> Result<Vec<u8>> {
    let size = volume.facts().size.get();
    let (pieces, received) = sync_channel(4);
    let stop = CancellationToken::new();
    thread::scope(|scope| {
        let consumer = scope.spawn(move || {
            let mut extents = BTreeMap::new();
            for piece in received {
                let (first, count, bytes) = match piece {
                    Piece::Data(extent) => {
                        (extent.index, 1, Some((*extent.bytes).as_ref().to_vec()))
                    }
                    Piece::Zeroes { first, count } => (first, count, None),
                };
                for index in first..first + count {
                    let len = (size - index * E).min(E);
                    let bytes = bytes.clone().unwrap_or_else(|| vec![0; len as usize]);
                    assert_eq!(bytes.len() as u64, len, "length of extent {index}");
                    assert!(extents.insert(index, bytes).is_none(), "extent {index} came twice");
                }
            }
            extents
        });
        let result = volume.read(&pieces, &stop);
        drop(pieces);
        let extents = consumer.join().unwrap();
        result?;
        assert!(extents.keys().copied().eq(0..size.div_ceil(E)), "extents are missing");
        Ok(extents.into_values().flatten().collect())
    })
}

pub(super) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect()
}

/// A directory on a filesystem that has direct reads, if this one has.
pub(super) fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

pub(super) fn file(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = fs::canonicalize(dir).unwrap().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn shown(error: &Error, dir: &Path) -> String {
    let dir = fs::canonicalize(dir).unwrap();
    format!("{error:?}").replace(dir.to_str().unwrap(), "/volumes")
}

#[test]
fn files_of_odd_sizes_are_read_to_the_last_byte() {
    let dir = directory();
    for size in [
        1,
        511,
        4095,
        4096 * 3 + 513,
        E as usize - 1,
        E as usize,
        E as usize + 1,
        5 * E as usize + 7,
    ] {
        let bytes = pattern(size, size as u64);
        let path = file(dir.path(), "volume", &bytes);
        for engine in ENGINES {
            let mut volume = hold_with(settings(engine), dir.path(), &path).unwrap();
            assert_eq!(volume.facts().size.get(), size as u64);
            assert!(bytes_of(&mut *volume).unwrap() == bytes, "{size} bytes by {engine:?}");
        }
    }
}

#[test]
fn holes_come_as_zeroes_without_reading() {
    let dir = directory();
    let path = file(dir.path(), "volume", b"");
    let volume = File::options().write(true).open(&path).unwrap();
    volume.set_len(100 * E + 17).unwrap();
    volume.write_all_at(&pattern(4096, 1), 50 * E + 4096).unwrap();
    drop(volume);
    let mut held = hold(dir.path(), &path).unwrap();
    if held.facts().data_size().get() == 100 * E + 17 {
        return; // A filesystem without a map.
    }
    assert_eq!(held.facts().data, [50 * E + 4096..50 * E + 8192]);
    let (pieces, received) = sync_channel(8);
    held.read(&pieces, &CancellationToken::new()).unwrap();
    drop(pieces);
    let mut came: Vec<_> = received
        .iter()
        .map(|piece| match piece {
            Piece::Data(extent) => (extent.index, 0),
            Piece::Zeroes { first, count } => (first, count),
        })
        .collect();
    came.sort_unstable();
    assert_eq!(came, [(0, 50), (50, 0), (51, 50)]);
    assert!(bytes_of(&mut *held).unwrap() == fs::read(&path).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_file_comes_whole_by_either_engine(
        size in 1..6 * E,
        writes in prop::collection::vec((0..6 * E, 1..300_000_usize), 0..6),
        depth in 1..5_u16,
    ) {
        let dir = directory();
        let path = file(dir.path(), "volume", b"");
        let volume = File::options().write(true).open(&path).unwrap();
        volume.set_len(size).unwrap();
        for (offset, len) in writes.into_iter().filter(|&(offset, _)| offset < size) {
            let len = len.min((size - offset) as usize);
            volume.write_all_at(&pattern(len, offset), offset).unwrap();
        }
        drop(volume);
        let expected = fs::read(&path).unwrap();
        for engine in ENGINES {
            let mut held = hold_with(ReaderSettings { engine, depth }, dir.path(), &path).unwrap();
            prop_assert!(bytes_of(&mut *held).unwrap() == expected);
        }
    }
}

#[test]
fn a_slow_consumer_that_keeps_every_piece_gets_them_all() {
    let dir = directory();
    let bytes = pattern(40 * E as usize, 3);
    let path = file(dir.path(), "volume", &bytes);
    for engine in ENGINES {
        let mut held = hold_with(ReaderSettings { engine, depth: 3 }, dir.path(), &path).unwrap();
        // A channel without room: each piece waits for its receiver.
        let (pieces, received) = sync_channel(0);
        let count = thread::scope(|scope| {
            let consumer = scope.spawn(move || {
                let mut kept = Vec::new();
                let mut count = 0;
                for piece in received {
                    kept.push(piece);
                    count += 1;
                    if kept.len() == 3 {
                        thread::sleep(Duration::from_millis(5));
                        kept.clear();
                    }
                }
                count
            });
            held.read(&pieces, &CancellationToken::new()).unwrap();
            drop(pieces);
            consumer.join().unwrap()
        });
        assert_eq!(count, 40);
    }
}

#[test]
fn a_stop_is_heard_while_the_consumer_holds_every_buffer() {
    let dir = directory();
    let path = file(dir.path(), "volume", &pattern(20 * E as usize, 5));
    for engine in ENGINES {
        let mut held = hold_with(ReaderSettings { engine, depth: 2 }, dir.path(), &path).unwrap();
        for room in [0, 1, 64] {
            let (pieces, received) = sync_channel(room);
            let stop = CancellationToken::new();
            let (error, waited) = thread::scope(|scope| {
                let stopper = stop.clone();
                scope.spawn(move || {
                    thread::sleep(Duration::from_millis(50));
                    stopper.cancel();
                });
                let start = Instant::now();
                (held.read(&pieces, &stop).unwrap_err(), start.elapsed())
            });
            assert_eq!(error.reason(), Reason::Canceled);
            assert!(waited < Duration::from_secs(1), "{waited:?}");
            drop(received);
        }
        assert!(bytes_of(&mut *held).unwrap().len() == 20 * E as usize, "it can be read again");
    }
}

#[test]
fn a_consumer_that_goes_away_ends_the_reading() {
    let dir = directory();
    let path = file(dir.path(), "volume", &pattern(20 * E as usize, 5));
    let mut held = hold(dir.path(), &path).unwrap();
    let (pieces, received) = sync_channel(1);
    drop(received);
    let error = held.read(&pieces, &CancellationToken::new()).unwrap_err();
    assert_eq!(error.reason(), Reason::Canceled);
}

#[test]
fn pieces_outlive_their_reader() {
    let dir = directory();
    let bytes = pattern(4 * E as usize, 9);
    let path = file(dir.path(), "volume", &bytes);
    let (pieces, received) = sync_channel(8);
    hold(dir.path(), &path).unwrap().read(&pieces, &CancellationToken::new()).unwrap();
    drop(pieces);
    for piece in received {
        let Piece::Data(extent) = piece else { panic!("{piece:?}") };
        let start = (extent.index * E) as usize;
        assert!((*extent.bytes).as_ref() == &bytes[start..start + E as usize]);
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_held_is_an_error() {
    let dir = directory();
    for engine in ENGINES {
        let path = file(dir.path(), "volume", &pattern(4 * E as usize, 9));
        let mut held = hold_with(settings(engine), dir.path(), &path).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(2 * E + 5000).unwrap();
        let error = bytes_of(&mut *held).unwrap_err();
        let sentence = error.to_string();
        assert!(sentence.contains("volume has no bytes at offset"), "{sentence}");
        assert!(sentence.ends_with("within its size of 4194304"), "{sentence}");
        assert_eq!(error.reason(), Reason::ReadFailed);
    }
}

#[test]
fn what_is_no_volume_is_refused_by_its_nature() {
    let dir = directory();
    let at = |name: &str| fs::canonicalize(dir.path()).unwrap().join(name);
    let refused = |path: &Path| shown(&hold(dir.path(), path).unwrap_err(), dir.path());
    fs::create_dir(at("directory")).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    file(dir.path(), "empty", b"");
    insta::assert_snapshot!(refused(&at("directory")), @"
    VOLUME_UNUSABLE: /volumes/directory is a directory, not a volume
      help: name a block device or a file with a raw disk image
    ");
    insta::assert_snapshot!(refused(&at("missing")), @"
    VOLUME_NOT_FOUND: there is no volume /volumes/missing
      help: look for a typing error; a logical volume must be active
    ");
    insta::assert_snapshot!(refused(&at("empty")), @"
    VOLUME_EMPTY: the volume /volumes/empty is empty
      help: name a volume with bytes: a file of size 0 holds no system
    ");
    assert!(refused(&at("socket")).contains("/volumes/socket is a socket, not a volume"));
    assert!(refused(&at("pipe")).contains("/volumes/pipe is a pipe, not a volume"));
    assert!(refused(&at("empty/below")).starts_with("VOLUME_NOT_FOUND"));
    let error = hold(Path::new("/dev"), Path::new("/dev/null")).unwrap_err();
    assert_eq!(error.to_string(), "/dev/null is a character device, not a volume");
}

#[test]
fn only_what_really_lies_in_an_allowed_directory_is_opened() {
    let (dir, outside) = (directory(), directory());
    let secret = file(outside.path(), "secret", b"secret");
    let inside = file(dir.path(), "volume", b"volume");
    let at = |name: &str| fs::canonicalize(dir.path()).unwrap().join(name);
    std::os::unix::fs::symlink(&secret, at("way-out")).unwrap();
    std::os::unix::fs::symlink(&inside, outside.path().join("way-in")).unwrap();

    let refused = |path: &Path| {
        let error = hold(dir.path(), path).unwrap_err();
        shown(&error, dir.path())
            .replace(fs::canonicalize(outside.path()).unwrap().to_str().unwrap(), "/outside")
    };
    insta::assert_snapshot!(refused(&secret), @"
    VOLUME_NOT_ALLOWED: /outside/secret is in none of the directories of volumes: /volumes
      help: add its directory to boot_volume_dirs in the configuration of imaged
    ");
    insta::assert_snapshot!(refused(&at("way-out")), @"
    VOLUME_NOT_ALLOWED: /volumes/way-out leads out of the directories of volumes, or to nothing
      help: a logical volume must be active; where a link leads must be in boot_volume_dirs too
    ");
    // What is said does not depend on what is there.
    let (with, below) = (refused(&secret), refused(&at("way-out")));
    let climbing = at("../volume");
    let climbs = refused(&climbing);
    let way_in = fs::canonicalize(outside.path()).unwrap().join("way-in");
    let leads_in = refused(&way_in);
    fs::write(climbing, "x").unwrap();
    assert_eq!(refused(&at("../volume")), climbs);
    fs::remove_file(at("../volume")).unwrap();
    fs::remove_file(&secret).unwrap();
    assert_eq!(refused(&secret), with);
    assert_eq!(refused(&at("way-out")), below);
    fs::create_dir(&secret).unwrap();
    std::os::unix::fs::symlink(outside.path(), at("directory")).unwrap();
    for below in ["directory/secret", "directory/missing", "way-out/missing"] {
        assert!(refused(&at(below)).contains("leads out of the directories"), "{below}");
    }
    fs::remove_file(&way_in).unwrap();
    assert_eq!(refused(&way_in), leads_in);
    for path in ["/nonexistent/volume", "volume", ""] {
        let error = hold(dir.path(), Path::new(path)).unwrap_err();
        assert_eq!(error.reason(), Reason::VolumeNotAllowed, "{path}");
    }
    // A directory whose name begins with an allowed one's.
    let neighbour = PathBuf::from(format!("{}-2", fs::canonicalize(dir.path()).unwrap().display()));
    fs::create_dir(&neighbour).unwrap();
    let path = file(&neighbour, "volume", b"volume");
    let reason = hold(dir.path(), &path).map(|_| ()).unwrap_err().reason();
    fs::remove_dir_all(&neighbour).unwrap();
    assert_eq!(reason, Reason::VolumeNotAllowed);

    // An allowed directory may itself be a link, and a volume of its own.
    let spelled = outside.path().join("disks");
    std::os::unix::fs::symlink(at("."), &spelled).unwrap();
    assert_eq!(hold(&spelled, &spelled.join("volume")).unwrap().facts().path, inside);
    let missing = hold(&spelled, &spelled.join("missing")).unwrap_err();
    assert_eq!(missing.reason(), Reason::VolumeNotFound);
    let dangling = outside.path().join("dangling");
    std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
    assert_eq!(hold(&dangling, &dangling).unwrap_err().reason(), Reason::VolumeNotFound);

    std::os::unix::fs::symlink("volume", at("link")).unwrap();
    assert_eq!(hold(dir.path(), &at("link")).unwrap().facts().path, inside);
}

/// A program with `path` open for writing.
pub(super) fn writer(path: &Path) -> Child {
    let file = File::options().append(true).open(path).unwrap();
    Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().unwrap()
}

#[test]
fn a_file_that_a_program_may_write_is_held_by_name() {
    let dir = directory();
    let path = file(dir.path(), "volume", b"volume");
    let mut sleep = writer(&path);
    let refused = hold(dir.path(), &path).map(|_| ());
    let pid = sleep.id().to_string();
    sleep.kill().unwrap();
    sleep.wait().unwrap();
    let error = refused.unwrap_err();
    insta::assert_snapshot!(shown(&error, dir.path()).replace(&pid, "PID"), @"
    VOLUME_HELD: the volume /volumes/volume is open for writing by sleep (pid PID)
      help: shut the instance down or end sleep (pid PID)
    ");
    hold(dir.path(), &path).unwrap();
}
