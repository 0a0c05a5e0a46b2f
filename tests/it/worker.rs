//! Images decoded by real workers: good ones, damaged ones, and workers that
//! end in the middle.

use std::{
    fs, io,
    num::NonZeroUsize,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::sync_channel,
    },
    thread,
    time::{Duration, Instant},
};

use imaged::{
    encode::{self, Output, Settings, SpareMemory},
    error::{Error, Reason},
    model::{
        ByteSize,
        image::{Compression, Format, ObjectDigest, Stored},
    },
    port::{Extent, Fault, Inspector, Meter, Piece, ReadAt},
    worker::{Attempt, Workers},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use crate::lab::{noise, run, text};

const MIB: usize = 1 << 20;

/// Tests here look at the workers of this process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn workers() -> Workers {
    Workers::of(env!("CARGO_BIN_EXE_imaged").into())
}

/// Pids of the workers of this process, the dead that nobody reaped included.
fn alive() -> Vec<u32> {
    let ours = std::process::id();
    let of = |stat: String| {
        let (name, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ').skip(1);
        let (pid, name) = name.split_once(" (")?;
        let worker =
            ["imaged-worker", "worker"].contains(&name) && fields.next()? == ours.to_string();
        worker.then(|| pid.parse().ok())?
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok().and_then(of))
        .collect()
}

fn the_worker() -> Pid {
    let found = alive();
    assert_eq!(found.len(), 1, "workers: {found:?}");
    Pid::from_raw(i32::try_from(found[0]).unwrap())
}

/// An object in memory, with something to do before each read of it as an
/// image.
struct Object<F = fn(usize) -> io::Result<()>> {
    bytes: Vec<u8>,
    reads: AtomicUsize,
    before: F,
}

fn nothing(_: usize) -> io::Result<()> {
    Ok(())
}

impl<F: Fn(usize) -> io::Result<()> + Send + Sync> ReadAt for Object<F> {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (self.before)(self.reads.fetch_add(1, Ordering::SeqCst))?;
        let start = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        Ok(())
    }
}

#[derive(Clone)]
struct Image {
    object: Vec<u8>,
    stored: Stored,
    digests: Vec<u8>,
}

/// 40 MiB of text, noise and holes, encoded.
fn image(compression: Compression) -> Image {
    let mut volume = vec![0; 40 * MIB + 512];
    volume[..3 * MIB].copy_from_slice(&text(3 * MIB));
    volume[5 * MIB + 4096..15 * MIB + 4096].copy_from_slice(&noise(10 * MIB, 1));
    volume[39 * MIB..40 * MIB].copy_from_slice(&text(MIB));
    volume[40 * MIB + 511] = 7;

    let (pieces_in, pieces) = sync_channel(4);
    let (parts_in, mut parts) = tokio::sync::mpsc::channel(1);
    let volume_size = ByteSize(volume.len() as u64);
    let settings = Settings {
        volume_size,
        compression,
        threads: NonZeroUsize::MIN,
        spare: SpareMemory::default(),
        resumable: false,
    };
    let (meter, stop) = (Meter::default(), CancellationToken::new());
    thread::scope(|scope| {
        scope.spawn(move || {
            for (bytes, index) in volume.chunks(MIB).zip(0..) {
                let piece = match bytes.iter().all(|byte| *byte == 0) {
                    true => Piece::Zeroes { first: index, count: 1 },
                    false => Piece::Data(Extent { index, bytes: Box::new(bytes.to_vec()) }),
                };
                pieces_in.send(piece).unwrap();
            }
        });
        let encoding = scope.spawn(|| encode::run(&settings, pieces, parts_in, &meter, &stop));
        let mut object = Vec::new();
        while let Some(Output::Part(part, _)) = parts.blocking_recv() {
            let start = usize::try_from(part.offset).unwrap();
            let bytes = part.pieces().collect::<Vec<_>>().concat();
            object.resize(object.len().max(start + bytes.len()), 0);
            object[start..start + bytes.len()].copy_from_slice(&bytes);
        }
        let encoded = encoding.join().unwrap().unwrap();
        let stored = Stored {
            format: Format::Qcow2,
            virtual_size: encoded.virtual_size,
            object_size: encoded.object_size,
            content_digest: encoded.content_digest,
            object_digest: encoded.object_digest,
            parts: encoded.parts,
            snapshot: None,
            point_in_time: None,
            expected: None,
            trace_digest: None,
            time_line: Vec::new(),
            imaged_version: String::new(),
        };
        Image { object, stored, digests: encoded.extent_digests }
    })
}

impl Image {
    /// Makes the manifest say that the object is what was stored: an attacker
    /// who can write to a store can do that.
    fn forge(&mut self) {
        let (mut offset, mut sums) = (0, Sha256::new());
        for part in &mut self.stored.parts {
            let end = offset + usize::try_from(part.size.get()).unwrap();
            part.sha256 = ObjectDigest(Sha256::digest(&self.object[offset..end]).into());
            sums.update(part.sha256.0);
            offset = end;
        }
        self.stored.object_digest = ObjectDigest(sums.finalize().into());
    }

    fn verify(&self) -> Result<Option<Fault>, Error> {
        self.verify_with(&workers(), 2, nothing, &CancellationToken::new())
    }

    fn verify_with(
        &self,
        workers: &Workers,
        threads: usize,
        before: impl Fn(usize) -> io::Result<()> + Send + Sync,
        stop: &CancellationToken,
    ) -> Result<Option<Fault>, Error> {
        let object = Object { bytes: self.object.clone(), reads: AtomicUsize::new(0), before };
        let threads = NonZeroUsize::new(threads).unwrap();
        let meter = Meter::default();
        let outcome = workers.verify(&object, &self.stored, &self.digests, threads, &meter, stop);
        assert!(alive().is_empty(), "a worker was left behind");
        if matches!(outcome, Ok(None)) {
            let both = self.stored.object_size.get() + self.stored.virtual_size.get();
            assert_eq!(meter.read() + meter.skipped(), both);
        }
        outcome
    }

    /// Reads of the object before its worker begins: each is at most 1 MiB.
    fn hashing(&self) -> usize {
        let parts = self.stored.parts.iter();
        parts.map(|part| usize::try_from(part.size.get()).unwrap().div_ceil(MIB)).sum()
    }

    fn find(&self, bytes: &[u8]) -> usize {
        self.object.windows(bytes.len()).position(|window| window == bytes).unwrap()
    }
}

#[test]
fn good_images_are_verified() {
    let _alone = alone();
    for compression in [Compression::Zstd, Compression::Deflate, Compression::None] {
        for threads in [1, 3] {
            let stop = CancellationToken::new();
            let found = image(compression).verify_with(&workers(), threads, nothing, &stop);
            assert!(matches!(found, Ok(None)), "{compression} on {threads}: {found:?}");
        }
    }
}

#[test]
fn a_changed_part_is_found() {
    let _alone = alone();
    let mut image = image(Compression::Zstd);
    let at = image.find(&noise(64, 1));
    image.object[at] ^= 1;
    let found = image.verify().unwrap().unwrap();
    assert!(matches!(found, Fault::Part { number: 1, offset: 0 }), "{found:?}");
}

#[test]
fn a_changed_extent_is_found_though_the_manifest_was_forged() {
    let _alone = alone();
    let mut image = image(Compression::Zstd);
    let at = image.find(&noise(64, 1));
    image.object[at] ^= 1;
    image.forge();
    let found = image.verify().unwrap().unwrap();
    let place = 5 * MIB as u64;
    assert!(matches!(found, Fault::Extent { offset } if offset == place), "{found:?}");
}

#[test]
fn what_cannot_be_decoded_is_a_fault() {
    let _alone = alone();
    let whole = image(Compression::Zstd);
    let broken = |at: usize, bytes: &[u8]| {
        let mut image = whole.clone();
        image.object[at..at + bytes.len()].copy_from_slice(bytes);
        image.forge();
        let fault = image.verify().unwrap().unwrap();
        Error::new(Reason::ImageCorrupt, "the image is not what was stored").because(fault).report()
    };
    // The magic number of a zstd frame.
    let frame = whole.find(&[0x28, 0xb5, 0x2f, 0xfd]);
    let reports = [
        broken(0, b"not a qcow2"),
        broken(8, &[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 11]),
        broken(24, &[0, 0, 0, 0, 2, 0, 0, 0]),
        broken(frame, &[0; 4]),
    ];
    insta::assert_snapshot!(reports.join("\n"), @"
    the image is not what was stored
      0: the object cannot be decoded
      1: not a qcow2 image
    the image is not what was stored
      0: the object cannot be decoded
      1: the image names a backing file, which is never opened
    the image is not what was stored
      0: the virtual size in the manifest is not that of its parts
    the image is not what was stored
      0: the object cannot be decoded
      1: the cluster at guest offset 0 is damaged: its zstd frame is broken
    ");
}

#[test]
fn a_store_that_fails_is_not_the_images_fault() {
    let _alone = alone();
    let image = image(Compression::Zstd);
    let last = image.hashing() + 3;
    let fail = |read| match read < last {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(nix::libc::EIO)),
    };
    let error = image.verify_with(&workers(), 1, fail, &CancellationToken::new()).unwrap_err();
    assert_eq!(error.reason(), Reason::StoreUnavailable);
    assert!(error.report().contains("Input/output error"), "{error:?}");
}

/// What is said when something happens to the worker in the middle.
fn interrupted(workers: &Workers, what: impl Fn(Pid) + Send + Sync) -> String {
    let image = image(Compression::Zstd);
    let at = image.hashing() + 2;
    let before = |read| {
        if read == at {
            what(the_worker());
        }
        Ok(())
    };
    let error = image.verify_with(workers, 1, before, &CancellationToken::new()).unwrap_err();
    assert_eq!(error.reason(), Reason::ImageUnreadable);
    error.report()
}

#[test]
fn a_worker_that_is_killed_is_told_of() {
    let _alone = alone();
    let said = interrupted(&workers(), |worker| kill(worker, Signal::SIGKILL).unwrap());
    insta::assert_snapshot!(said, @"
    the image cannot be decoded
      0: its worker was ended by SIGKILL
      help: see what ended it: `journalctl -k`; then ask again
    ");
}

#[test]
fn a_worker_that_hangs_is_given_up() {
    let _alone = alone();
    let start = Instant::now();
    let patient = workers().with_patience(Duration::from_millis(700));
    let said = interrupted(&patient, |worker| kill(worker, Signal::SIGSTOP).unwrap());
    assert!(start.elapsed() > Duration::from_millis(700));
    insta::assert_snapshot!(said, @"
    the image cannot be decoded
      0: its worker produced nothing for too long and was stopped
      help: take the image for hostile or damaged: make it again
    ");
}

#[test]
fn stopping_ends_the_worker() {
    let _alone = alone();
    let image = image(Compression::Zstd);
    let (stop, at) = (CancellationToken::new(), image.hashing() + 1);
    let before = |read| {
        if read == at {
            stop.cancel();
        }
        Ok(())
    };
    let start = Instant::now();
    let error = image.verify_with(&workers(), 2, before, &stop).unwrap_err();
    assert_eq!(error.reason(), Reason::Canceled);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // At whatever read it is stopped, nothing is said of the image.
    for at in image.hashing() + 1..image.hashing() + 30 {
        let stop = CancellationToken::new();
        let before = |read| {
            if read == at {
                stop.cancel();
            }
            Ok(())
        };
        match image.verify_with(&workers(), 2, before, &stop) {
            Ok(None) => {}
            Ok(Some(fault)) => panic!("{at}: {fault}"),
            Err(error) => assert_eq!(error.reason(), Reason::Canceled, "{at}: {error:?}"),
        }
    }
}

#[test]
fn a_working_worker_has_nothing() {
    let _alone = alone();
    let image = image(Compression::Zstd);
    let at = image.hashing() + 2;
    let seen = Mutex::new(None);
    let before = |read| {
        if read == at {
            let worker = the_worker();
            let status = fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
            let limits = fs::read_to_string(format!("/proc/{worker}/limits"));
            let files = fs::read_dir(format!("/proc/{worker}/fd")).map(Iterator::count);
            let environment = fs::read(format!("/proc/{worker}/environ"));
            *seen.lock().unwrap() = Some((status, limits, files, environment));
        }
        Ok(())
    };
    let found = image.verify_with(&workers(), 2, before, &CancellationToken::new());
    assert!(matches!(found, Ok(None)), "{found:?}");
    let (status, limits, files, environment) = seen.into_inner().unwrap().unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for name in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(name), "0000000000000000", "{name}");
    }
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".to_owned(), "2".to_owned()));
    assert_eq!(field("Threads"), "2");
    // Not to be traced nor looked at by its own user: only root sees more.
    if geteuid().is_root() {
        assert_eq!(field("Uid"), "65534 65534 65534 65534");
        assert_eq!(field("Gid"), "65534 65534 65534 65534");
        assert_eq!(field("Groups"), "");
        assert_eq!(field("CapBnd"), "0000000000000000");
        // Its stdin, as control and once more, /dev/null, stderr, two lanes.
        assert_eq!(files.unwrap(), 6);
        assert_eq!(environment.unwrap(), b"");
        let limits = limits.unwrap();
        for (name, value) in [
            ("Max address space", (192 + 2 * 20) << 20),
            ("Max cpu time", 120),
            ("Max open files", 0),
            ("Max processes", 0),
            ("Max file size", 0),
            ("Max core file size", 0),
        ] {
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            assert_eq!(line.split_whitespace().next(), Some(&*value.to_string()), "{name}");
        }
    } else {
        assert!(files.is_err() && environment.is_err(), "it can be looked at");
    }
}

#[test]
fn what_a_worker_must_not_do_it_cannot() {
    let _alone = alone();
    let nothing = workers().attempt(Attempt::Nothing).unwrap();
    assert!(nothing.is_refused(), "it did not even start: {nothing}");
    assert!(nothing.how.ends_with("no capabilities, landlock, seccomp"), "{}", nothing.how);
    for attempt in Attempt::ALL {
        let tried = workers().attempt(*attempt).unwrap();
        assert!(tried.is_refused(), "{attempt}: {tried}");
    }
    let memory = workers().attempt(Attempt::Memory).unwrap();
    assert_eq!(memory.to_string(), "its worker used up its 192 MiB of address space");
    assert!(alive().is_empty());
}

#[test]
fn an_operator_can_see_that_the_confinement_holds() {
    let said = run(env!("CARGO_BIN_EXE_imaged"), &["--check-confinement"]);
    assert!(said.contains("open a file             refused"), "{said}");
    assert!(!said.contains("POSSIBLE"), "{said}");
}

#[test]
fn a_worker_without_a_daemon_does_nothing() {
    let mut worker = std::process::Command::new(env!("CARGO_BIN_EXE_imaged"));
    let output = worker.arg("worker").stdin(std::process::Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    insta::assert_snapshot!(String::from_utf8(output.stderr).unwrap(), @"
    no job came over stdin
      0: Socket operation on non-socket (os error 88)
      help: workers are started by imaged itself
    ");
}

/// A program that is no worker, but a script.
fn script(dir: &Path, body: &str) -> Workers {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join("worker");
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Workers::of(path).with_patience(Duration::from_millis(500))
}

#[test]
fn whatever_is_started_nothing_is_believed() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let image = image(Compression::Zstd);
    let said = |workers: &Workers| {
        let error = image
            .verify_with(workers, 1, nothing, &CancellationToken::new())
            .expect_err("it was believed");
        assert_eq!(error.reason(), Reason::ConfinementUnavailable);
        error.report()
    };
    let reports = [
        said(&script(dir.path(), "exit 0")),
        said(&script(dir.path(), "echo all is well >&2; exit 7")),
        said(&script(dir.path(), "printf 'all is well' >&0; read line")),
        said(&script(dir.path(), "read line; read line")),
    ];
    insta::assert_snapshot!(reports.join("\n\n"), @"
    this host cannot confine the process that reads foreign bytes
      0: its worker gave up
      help: see `imaged --check-confinement`; imaged never decodes an image unconfined

    this host cannot confine the process that reads foreign bytes
      0: its worker gave up
      1: it said: all is well
      help: see `imaged --check-confinement`; imaged never decodes an image unconfined

    this host cannot confine the process that reads foreign bytes
      0: its worker was stopped: it sent a frame of no kind
      help: see `imaged --check-confinement`; imaged never decodes an image unconfined

    this host cannot confine the process that reads foreign bytes
      0: its worker produced nothing for too long and was stopped
      help: see `imaged --check-confinement`; imaged never decodes an image unconfined
    ");
}
