//! Real servers: `qemu-nbd`, and a storage daemon with a filter that a guest
//! writes through.
#![allow(clippy::cast_possible_truncation, reason = "the sizes here are small")]
#![allow(clippy::single_range_in_vec_init, reason = "a map of one range")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::{
        fs::{FileExt, OpenOptionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::sync_channel,
    },
    thread,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    Allocated, Client, Content, Context, Endpoint, Fault, Guide, Role, ScratchExport,
    SnapshotExport, Wanted, fault,
    negotiate::{Replies, negotiate},
    read_all,
    socket::Socket,
};
use crate::{
    block::{reconcile::Reconciler, tests::pattern},
    error::{Error, Reason, Result},
    model::{ByteSize, image::EXTENT_SIZE},
    port::{Pace, Piece},
    sys::{aligned::AlignedBuf, slab::Buffer},
};

const E: u64 = EXTENT_SIZE;
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that ends with the test.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(program: &str, socket: PathBuf, args: &[String]) -> Self {
        let child = Command::new(program).args(args).stdin(Stdio::null()).spawn().unwrap();
        let server = Self { child, socket };
        let start = Instant::now();
        while UnixStream::connect(&server.socket).is_err() {
            assert!(start.elapsed() < PATIENCE, "{program} does not listen");
            thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// `qemu-nbd` of one image.
    fn nbd(dir: &Path, image: &Path, format: &str, options: &[&str]) -> Self {
        let socket = dir.join("nbd.sock");
        let _ = fs::remove_file(&socket);
        let fixed = ["--persistent", "--shared=4", "--read-only", "-x", "disk", "-f", format, "-k"];
        let paths = [socket.to_str().unwrap(), image.to_str().unwrap()];
        let args: Vec<_> =
            options.iter().chain(&fixed).chain(&paths).map(ToString::to_string).collect();
        Self::start("qemu-nbd", socket, &args)
    }

    fn endpoint(&self, export: &str, role: Role) -> Endpoint {
        Endpoint { socket: self.socket.clone(), export: export.into(), role }
    }

    fn connect(&self, export: &str, role: Role, context: Context) -> Client {
        Client::connect(&self.endpoint(export, role), context, PATIENCE).unwrap()
    }

    fn disk(&self) -> Client {
        self.connect("disk", Role::Volume, Context::Content)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Data here and there in a sparse file of `size` bytes.
fn sparse(path: &Path, size: u64, seed: u64) -> Vec<u8> {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut bytes = vec![0; size as usize];
    let mut random = Random(seed);
    for _ in 0..size / E {
        let start = random.below(size);
        let end = size.min(start + 1 + random.below(E));
        let data = pattern((end - start) as usize, random.next());
        file.write_all_at(&data, start).unwrap();
        bytes[start as usize..end as usize].copy_from_slice(&data);
    }
    bytes
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Everything of an export, each extent once; and how many extents were
/// passed on as zeroes.
fn bytes_of(client: &mut Client, size: u64, depth: u16) -> Result<(Vec<u8>, u64)> {
    guided(client, Guide::Own, size, depth)
}

fn guided(client: &mut Client, guide: Guide<'_>, size: u64, depth: u16) -> Result<(Vec<u8>, u64)> {
    let (pieces, received) = sync_channel(2);
    let stop = CancellationToken::new();
    thread::scope(|scope| {
        let consumer = scope.spawn(move || {
            let (mut extents, mut zeroes) = (BTreeMap::new(), 0);
            for piece in received {
                let (first, count, bytes) = match piece {
                    Piece::Data(extent) => {
                        (extent.index, 1, Some((*extent.bytes).as_ref().to_vec()))
                    }
                    Piece::Zeroes { first, count } => (first, count, None),
                };
                zeroes += if bytes.is_none() { count } else { 0 };
                for index in first..first + count {
                    let len = (size - index * E).min(E);
                    let bytes = bytes.clone().unwrap_or_else(|| vec![0; len as usize]);
                    assert_eq!(bytes.len() as u64, len, "length of extent {index}");
                    assert!(extents.insert(index, bytes).is_none(), "extent {index} came twice");
                }
            }
            (extents, zeroes)
        });
        let result = read_all(client, guide, wanted(size, depth, &Pace::default()), &pieces, &stop);
        drop(pieces);
        let (extents, zeroes) = consumer.join().unwrap();
        result?;
        assert!(extents.keys().copied().eq(0..size.div_ceil(E)), "extents are missing");
        Ok((extents.into_values().flatten().collect(), zeroes))
    })
}

fn wanted(size: u64, depth: u16, pace: &Pace) -> Wanted<'_> {
    Wanted { size: ByteSize(size), from: 0, depth, pace }
}

#[test]
#[ignore = "needs qemu-nbd"]
fn qemu_exports_are_read_to_the_last_byte() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    for (size, depth) in [(1, 1), (511, 4), (E, 16), (17 * E + 4096 + 1, 3), (64 * E + 512, 16)] {
        let bytes = sparse(&raw, size, size);
        let server = Server::nbd(dir.path(), &raw, "raw", &[]);
        let (found, _) = bytes_of(&mut server.disk(), size, depth).unwrap();
        assert!(found == bytes, "raw of {size} bytes");
        // The next reader of the same server, and a client without depth.
        assert!(bytes_of(&mut server.disk(), size, 0).unwrap().0 == bytes);
        drop(server);
        let qcow2 = dir.path().join("disk.qcow2");
        run(
            "qemu-img",
            &["convert", "-c", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()],
        );
        let server = Server::nbd(dir.path(), &qcow2, "qcow2", &["-A"]);
        let (found, _) = bytes_of(&mut server.disk(), size, depth).unwrap();
        assert!(found == bytes, "qcow2 of {size} bytes");
    }
}

#[test]
#[ignore = "needs qemu-nbd"]
fn qemu_maps_tell_holes_zeroes_and_depth() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    let path = image.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", path, "5G"]);
    run(
        "qemu-io",
        &["-c", "write -P 7 1M 128k", "-c", "write -z 4G 1M", "-c", "write 4100M 64k", path],
    );
    let server = Server::nbd(dir.path(), &image, "qcow2", &["-A"]);
    let mut client = server.disk();
    let map: Vec<_> = client.contents(0..5 << 30).unwrap().map(|e| e.unwrap()).collect();
    let data = |start: u64, len: u64| (start << 20..(start << 20) + (len << 10), Content::Data);
    assert!(map.contains(&data(1, 128)) && map.contains(&data(4100, 64)), "{map:?}");
    assert!(map.iter().filter(|(_, content)| *content == Content::Data).count() == 2);
    assert!(map.contains(&(0..1 << 20, Content::Hole)), "{map:?}");
    let mut client = server.connect("disk", Role::Scratch, Context::Depth);
    let map = client.allocation(0..5 << 30).unwrap().map(|e| e.unwrap());
    let allocated: Vec<_> = map.filter(|(_, state)| *state == Allocated::Yes).collect();
    assert_eq!(allocated.len(), 3, "zeroes count as allocated: {allocated:?}");
    drop(server);
    // Without `-A` it does not tell, and that must not look like "none".
    let server = Server::nbd(dir.path(), &image, "qcow2", &[]);
    let error = ScratchExport::new(server.connect("disk", Role::Scratch, Context::Depth));
    assert!(error.unwrap_err().to_string().contains("does not tell what is allocated"));
}

#[test]
#[ignore = "needs qemu-nbd"]
fn qemu_that_is_not_there_or_dies_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    sparse(&raw, 64 * E, 1);
    fs::write(&raw, pattern(64 * E as usize, 3)).unwrap();
    let mut server = Server::nbd(dir.path(), &raw, "raw", &[]);
    let shown = |error: &Error| format!("{error:?}").replace(dir.path().to_str().unwrap(), "/dir");
    let absent = server.endpoint("other", Role::Volume);
    let error = Client::<Buffer>::connect(&absent, Context::Content, PATIENCE).unwrap_err();
    insta::assert_snapshot!(shown(&error), @r#"
    VOLUME_UNAVAILABLE: cannot open the NBD export "other" at /dir/nbd.sock
      0: the server declines it: it has no such export: "export 'other' not present"
    "#);
    let mut client = server.disk();
    let error = bytes_of(&mut client, 65 * E, 1).unwrap_err();
    insta::assert_snapshot!(shown(&error), @r#"
    VOLUME_UNAVAILABLE: the NBD export "disk" at /dir/nbd.sock has 64.0 MiB (67108864 bytes), its volume 65.0 MiB (68157440 bytes)
      help: do not resize a volume while it is imaged; ask again
    "#);

    let (pieces, received) = sync_channel(0);
    let error = thread::scope(|scope| {
        let client = &mut client;
        let reader = scope.spawn(move || {
            read_all(
                client,
                Guide::Own,
                wanted(64 * E, 4, &Pace::default()),
                &pieces,
                &CancellationToken::new(),
            )
        });
        received.recv().unwrap();
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        received.iter().for_each(drop);
        reader.join().unwrap().unwrap_err()
    });
    assert!(matches!(fault(&error), Some(Fault::Transport(_))), "{error:?}");
    let gone = server.endpoint("disk", Role::Volume);
    let error = Client::<Buffer>::connect(&gone, Context::Content, PATIENCE).unwrap_err();
    insta::assert_snapshot!(shown(&error), @r#"
    VOLUME_UNAVAILABLE: cannot open the NBD export "disk" at /dir/nbd.sock
      0: Connection refused (os error 111)
      help: look whether the instance's QEMU still runs, and into its log
    "#);
}

#[test]
#[ignore = "needs qemu-nbd"]
fn qemu_that_hangs_is_not_waited_for_and_a_stop_is_heard() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    fs::write(&raw, pattern(8 * E as usize, 3)).unwrap();
    let server = Server::nbd(dir.path(), &raw, "raw", &[]);
    let patience = Duration::from_millis(600);
    let endpoint = server.endpoint("disk", Role::Volume);
    let mut client: Client = Client::connect(&endpoint, Context::Content, patience).unwrap();
    let pid = nix::unistd::Pid::from_raw(server.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let start = Instant::now();
    let error = bytes_of(&mut client, 8 * E, 4).unwrap_err();
    assert!(matches!(fault(&error), Some(Fault::Silent(_))), "{error:?}");
    // The listener's queue takes the connection; nobody greets.
    let error = Client::<Buffer>::connect(&endpoint, Context::Content, patience).unwrap_err();
    assert!(matches!(fault(&error), Some(Fault::Silent(_))), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();

    let (pieces, received) = sync_channel(1);
    let stop = CancellationToken::new();
    let mut client = server.disk();
    let error = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            read_all(&mut client, Guide::Own, wanted(8 * E, 2, &Pace::default()), &pieces, &stop)
                .unwrap_err()
        });
        thread::sleep(Duration::from_millis(50));
        stop.cancel();
        reader.join().unwrap()
    });
    assert_eq!(error.reason(), Reason::Canceled);
    drop(received);
}

/// A storage daemon with a volume, a filter over it, and three exports:
/// `guest` writes through the filter, `snapshot` shows the volume as it was,
/// `scratch` is what the filter saved.
fn filtered(dir: &Path, volume: &Path, scratch: &Path, cache: &str) -> Server {
    let socket = dir.join("nbd.sock");
    let (volume, scratch) = (volume.display(), scratch.display());
    let args = [
        format!("--blockdev=driver=file,node-name=file,filename={volume},discard=unmap,{cache}"),
        "--blockdev=driver=raw,node-name=boot,file=file,discard=unmap".into(),
        format!(
            "--blockdev=driver=qcow2,node-name=scratch,file.driver=file,file.filename={scratch}"
        ),
        "--blockdev=driver=copy-before-write,node-name=filter,file=boot,target=scratch,\
         on-cbw-error=break-snapshot,cbw-timeout=4"
            .into(),
        "--blockdev=driver=snapshot-access,node-name=access,file=filter".into(),
        format!("--nbd-server=addr.type=unix,addr.path={},max-connections=0", socket.display()),
        "--export=type=nbd,id=g,node-name=filter,writable=on,name=guest".into(),
        "--export=type=nbd,id=s,node-name=scratch,name=scratch,allocation-depth=on".into(),
        "--export=type=nbd,id=a,node-name=access,name=snapshot".into(),
    ];
    Server::start("qemu-storage-daemon", socket, &args)
}

/// A guest: writes, discards and write-zeroes, one at a time.
struct Guest(Socket);

impl Guest {
    fn of(server: &Server) -> Self {
        let mut socket = Socket::connect(&server.socket, Instant::now() + PATIENCE).unwrap();
        let session = negotiate(&mut socket, "guest", Context::Content).unwrap();
        assert!(matches!(session.replies, Replies::Structured(_)));
        Self(socket)
    }

    /// `NBD_CMD_WRITE` 1, `NBD_CMD_TRIM` 4, `NBD_CMD_WRITE_ZEROES` 6.
    fn ask(&mut self, command: u8, offset: u64, len: u64, data: &[u8]) {
        use super::Stream as _;
        self.0.set_deadline(Instant::now() + PATIENCE);
        let head = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, command];
        let len = (len as u32).to_be_bytes();
        let request = [&head[..], &[0; 8], &offset.to_be_bytes(), &len, data].concat();
        self.0.write_all(&request).unwrap();
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// One random request within `size`, of any kind.
    fn anything(&mut self, random: &mut Random, size: u64) {
        let sector = 512;
        let longest = if random.below(8) == 0 { 2 << 20 } else { 96 << 10 };
        let offset = random.below(size / sector) * sector;
        let len = ((1 + random.below(longest / sector)) * sector).min(size - offset);
        match random.below(4) {
            0 => self.ask(4, offset, len, &[]),
            1 => self.ask(6, offset, len, &[]),
            _ => self.ask(1, offset, len, &pattern(len as usize, random.next())),
        }
    }
}

/// Where the volume has data, from its file: (`SEEK_DATA`).
fn data_of(file: &File, size: u64) -> Vec<std::ops::Range<u64>> {
    file.sync_all().unwrap();
    crate::block::map::data_of_file(file, 0..size).unwrap_or_else(|_| vec![0..size])
}

/// Reads `volume` past the guest, as a live capture does, on `threads` of its
/// own for direct reads.
fn past_the_guest(server: &Server, volume: &Path, size: u64, check: Check) -> Result<Captured> {
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(volume).unwrap();
    let scratch = server.connect("scratch", Role::Scratch, Context::Depth);
    let snapshot = server.connect("snapshot", Role::Snapshot, Context::Content);
    let mut reconciler =
        Reconciler::new(ScratchExport::new(scratch)?, SnapshotExport::new(snapshot));
    let mut image = vec![0; size as usize];
    let data = data_of(&file, size);
    let mut buffer = AlignedBuf::zeroed(E as usize);
    let mut holes = 0;
    for start in (0..size).step_by(E as usize) {
        let extent = start..size.min(start + E);
        let target = &mut image[extent.start as usize..extent.end as usize];
        if data.iter().any(|d| d.start < extent.end && extent.start < d.end) {
            let came = file.read_at(&mut buffer, start).unwrap();
            assert!(came >= target.len());
            target.copy_from_slice(&buffer[..target.len()]);
            if check == Check::Yes {
                reconciler.correct(start, target)?;
            }
        } else {
            holes += 1;
            for part in reconciler.overwritten(extent)? {
                let place = (part.start - start) as usize..(part.end - start) as usize;
                reconciler.read(part.start, &mut target[place])?;
            }
        }
    }
    let read_again = reconciler.finish()?.get();
    Ok(Captured { image, read_again, holes })
}

#[derive(Clone, Copy, PartialEq)]
enum Check {
    Yes,
    /// To see that the test notices.
    No,
}

struct Captured {
    image: Vec<u8>,
    read_again: u64,
    holes: u64,
}

fn seed() -> u64 {
    let seed = std::env::var("IMAGED_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 8);
    println!("IMAGED_TEST_SEED={seed}");
    seed
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// The crown: guests write, discard and zero while their volume is read
/// straight from the file; the image is the volume as it was.
#[test]
#[ignore = "needs qemu-storage-daemon"]
fn qemu_guests_write_while_their_volume_is_read_past_them() {
    let base = seed();
    let (mut again, mut holes, mut noticed, mut skipped) = (0, 0, 0, 0);
    for round in 0..8 {
        let mut random = Random(base + round);
        let dir = tempfile::tempdir().unwrap();
        let (volume, scratch) = (dir.path().join("boot.raw"), dir.path().join("scratch.qcow2"));
        // Odd sizes: a last cluster and a last extent that are cut off.
        let size = 48 * E + random.below(64) * 4096;
        let before = sparse(&volume, size, random.next());
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", scratch.to_str().unwrap(), &size.to_string()],
        );
        let cache = ["cache.direct=on", "cache.direct=off", "cache.direct=off,cache.no-flush=on"];
        let server = filtered(dir.path(), &volume, &scratch, cache[round as usize % 3]);
        let stop = AtomicBool::new(false);
        let writes = AtomicU64::new(0);
        let check = if round == 7 { Check::No } else { Check::Yes };
        let captured = thread::scope(|scope| {
            for _ in 0..2 {
                let mut random = Random(random.next());
                let (server, stop, writes) = (&server, &stop, &writes);
                // Every other round has an end that stays as it is.
                let written = if round % 2 == 0 { size - 16 * E } else { size };
                scope.spawn(move || {
                    let mut guest = Guest::of(server);
                    while !stop.load(Ordering::Relaxed) {
                        guest.anything(&mut random, written);
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            while writes.load(Ordering::Relaxed) < 20 {
                thread::yield_now();
            }
            let captured = past_the_guest(&server, &volume, size, check);
            // The same through the exports alone, all of it and by maps.
            let mut snapshot = server.connect("snapshot", Role::Snapshot, Context::Content);
            let whole = bytes_of(&mut snapshot, size, 8);
            let mut live = server.connect("guest", Role::Volume, Context::Content);
            let depths = server.connect("scratch", Role::Scratch, Context::Depth);
            let mut depths = ScratchExport::new(depths).unwrap();
            let guide = Guide::Live { live: &mut live, scratch: &mut depths };
            let by_map = guided(&mut snapshot, guide, size, 8);
            stop.store(true, Ordering::Relaxed);
            captured.map(|captured| (captured, whole, by_map))
        });
        let (captured, whole, by_map) = captured.unwrap();
        let alone = [whole.unwrap(), by_map.unwrap()];
        for (name, (bytes, _)) in ["whole", "by map"].iter().zip(&alone) {
            let difference = first_difference(bytes, &before);
            assert_eq!(difference, None, "seed {base}, round {round}, {name}");
        }
        skipped += alone[1].1;
        assert_ne!(fs::read(&volume).unwrap(), before, "the guest wrote");
        let difference = first_difference(&captured.image, &before);
        match check {
            Check::Yes => assert_eq!(difference, None, "seed {base}, round {round}"),
            Check::No => noticed = difference.map_or(0, |_| 1),
        }
        again += captured.read_again;
        holes += captured.holes;
    }
    println!("read again: {}, {holes} extents of holes, {skipped} skipped", ByteSize(again));
    assert!(again > 0 && holes > 0 && skipped > 0, "the test shows nothing");
    assert_eq!(noticed, 1, "without the second read the image should be wrong");
}

/// A scratch area that is full ends the snapshot, not the guest; no image
/// comes of it.
#[test]
#[ignore = "needs root and qemu-storage-daemon"]
fn root_a_full_scratch_area_fails_the_image_and_not_the_guest() {
    let base = seed();
    let mut failed = 0;
    for round in 0..6 {
        let mut random = Random(base + round);
        let dir = tempfile::tempdir().unwrap();
        let small = dir.path().join("small");
        fs::create_dir(&small).unwrap();
        let mounted = Mounted::tmpfs(&small, "6m");
        let (volume, scratch) = (dir.path().join("boot.raw"), small.join("scratch.qcow2"));
        let size = 48 * E;
        let before = pattern(size as usize, random.next());
        fs::write(&volume, &before).unwrap();
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", scratch.to_str().unwrap(), &size.to_string()],
        );
        let mut server = filtered(dir.path(), &volume, &scratch, "cache.direct=off");
        let stop = AtomicBool::new(false);
        let captured = thread::scope(|scope| {
            for _ in 0..2 {
                let mut random = Random(random.next());
                let (server, stop) = (&server, &stop);
                // Panics when a write fails.
                scope.spawn(move || {
                    let mut guest = Guest::of(server);
                    while !stop.load(Ordering::Relaxed) {
                        guest.anything(&mut random, size);
                    }
                });
            }
            let captured = past_the_guest(&server, &volume, size, Check::Yes);
            // Until it surely overflowed.
            thread::sleep(Duration::from_secs(1));
            stop.store(true, Ordering::Relaxed);
            captured
        });
        // QEMU itself must outlive it: it would take the VM along.
        assert_eq!(server.child.try_wait().unwrap(), None, "seed {base}, round {round}");
        match captured {
            // Read before the overflow.
            Ok(captured) => assert!(captured.image == before, "seed {base}, round {round}"),
            Err(error) => {
                assert_eq!(error.reason(), Reason::SnapshotBroken, "{error:?}");
                failed += 1;
            }
        }
        let mut snapshot = server.connect("snapshot", Role::Snapshot, Context::Content);
        let error = bytes_of(&mut snapshot, size, 8).unwrap_err();
        assert_eq!(error.reason(), Reason::SnapshotBroken, "{error:?}");
        drop(server);
        drop(mounted);
    }
    assert!(failed > 0, "no capture met the overflow");
}

/// A filesystem that is unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, size: &str) -> Self {
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", at.to_str().unwrap()],
        );
        Self(at.into())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// The filter keeps writers away from the node below, so that nothing can
/// change the volume beside it while the snapshot is attached.
#[test]
#[ignore = "needs qemu-storage-daemon"]
fn qemu_refuses_writers_beside_the_filter() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, scratch) = (dir.path().join("boot.raw"), dir.path().join("scratch.qcow2"));
    sparse(&volume, E, 1);
    run("qemu-img", &["create", "-q", "-f", "qcow2", scratch.to_str().unwrap(), "1M"]);
    let output = Command::new("timeout")
        .arg("10")
        .arg("qemu-storage-daemon")
        .arg(format!("--blockdev=driver=file,node-name=boot,filename={}", volume.display()))
        .arg(format!(
            "--blockdev=driver=qcow2,node-name=scratch,file.driver=file,file.filename={}",
            scratch.display()
        ))
        .arg("--blockdev=driver=copy-before-write,node-name=filter,file=boot,target=scratch")
        .arg("--blockdev=driver=snapshot-access,node-name=access,file=filter")
        .arg(format!("--nbd-server=addr.type=unix,addr.path={}/s", dir.path().display()))
        .arg("--export=type=nbd,id=g,node-name=boot,writable=on")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("Permission conflict on node 'boot'"), "{stderr}");
    assert!(stderr.contains("unshared by node 'filter'"), "{stderr}");
}

/// Rates in one run, against `qemu-img convert` of the same export.
#[test]
#[ignore = "needs qemu-nbd and 4 GiB of disk; measures"]
fn qemu_measure_an_export_of_4_gib() {
    let dir =
        tempfile::tempdir_in(std::env::var("IMAGED_TEST_DIR").unwrap_or("/tmp".into())).unwrap();
    let raw = dir.path().join("disk.raw");
    let size = 4096 * E;
    let file = File::create(&raw).unwrap();
    for index in 0..4096 {
        file.write_all_at(&pattern(E as usize, index + 1), index * E).unwrap();
    }
    file.sync_all().unwrap();
    let server = Server::nbd(dir.path(), &raw, "raw", &[]);
    let uri = format!("nbd+unix:///disk?socket={}", server.socket.display());
    for round in 0..3 {
        for depth in [1, 8, 16] {
            let mut client = server.disk();
            let (pieces, received) = sync_channel(4);
            let start = Instant::now();
            let count = thread::scope(|scope| {
                let consumer = scope.spawn(move || received.iter().count());
                let stop = CancellationToken::new();
                read_all(
                    &mut client,
                    Guide::Own,
                    wanted(size, depth, &Pace::default()),
                    &pieces,
                    &stop,
                )
                .unwrap();
                drop(pieces);
                consumer.join().unwrap()
            });
            assert_eq!(count, 4096);
            println!("round {round}: ours, depth {depth}: {:?}", start.elapsed());
        }
        let start = Instant::now();
        let null = ["convert", "-n", "-f", "raw", "-W", "-m", "16", "--target-image-opts", &uri];
        run("qemu-img", &[&null[..], &["driver=null-co,size=4294967296"]].concat());
        println!("round {round}: qemu-img convert: {:?}", start.elapsed());
        if Command::new("nbdcopy").arg("--version").output().is_ok() {
            let start = Instant::now();
            run("nbdcopy", &["--connections=1", &uri, "null:"]);
            println!("round {round}: nbdcopy: {:?}", start.elapsed());
        }
    }
}
