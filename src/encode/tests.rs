//! The encoder against its own decoder, and against QEMU.

use std::{fs, process::Command, sync::mpsc::sync_channel};

use proptest::prelude::*;

use super::*;
use crate::{
    format::qcow2::image::{Content, Image},
    model::image::EXTENT_SIZE,
    port::{Extent, ReadAt},
};

/// What one cluster of a made-up volume holds.
#[derive(Debug, Clone, Copy)]
enum Fill {
    Zero,
    Text(u8),
    Noise(u64),
    /// A single byte at the end.
    Tail,
}

fn fill() -> impl Strategy<Value = Fill> {
    prop_oneof![
        3 => Just(Fill::Zero),
        3 => any::<u8>().prop_map(Fill::Text),
        2 => any::<u64>().prop_map(Fill::Noise),
        1 => Just(Fill::Tail),
    ]
}

fn cluster(fill: Fill) -> Vec<u8> {
    let mut bytes = vec![0; 65_536];
    match fill {
        Fill::Zero => {}
        Fill::Text(seed) => {
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = b"the quick brown fox "[(i * (1 + usize::from(seed)) / 7) % 20];
            }
        }
        Fill::Noise(seed) => {
            blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        }
        Fill::Tail => bytes[65_535] = 1,
    }
    bytes
}

/// An object in memory, as the parts make it up.
struct Object(Vec<u8>);

impl ReadAt for Object {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let end = (offset as usize).checked_add(buf.len());
        let bytes = end.and_then(|end| self.0.get(offset as usize..end));
        buf.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

fn settings(volume: &[u8], compression: Compression, threads: usize) -> Settings {
    Settings {
        volume_size: ByteSize(volume.len() as u64),
        compression,
        threads: NonZeroUsize::new(threads).unwrap(),
        spare: SpareMemory::default(),
        resumable: true,
    }
}

/// Encodes `volume`, extents in an order shuffled within eight places.
fn encode(volume: &[u8], compression: Compression, threads: usize) -> (Object, Encoded) {
    let (pieces_in, pieces) = sync_channel(4);
    let (parts_in, mut parts) = mpsc::channel(1);
    let settings = settings(volume, compression, threads);
    let (meter, stop) = (Meter::default(), CancellationToken::new());
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut pieces: Vec<Piece> = volume
                .chunks(EXTENT_SIZE as usize)
                .zip(0..)
                .map(|(bytes, index)| {
                    if bytes.iter().all(|byte| *byte == 0) {
                        Piece::Zeroes { first: index, count: 1 }
                    } else {
                        Piece::Data(Extent { index, bytes: Box::new(bytes.to_vec()) })
                    }
                })
                .collect();
            pieces.chunks_mut(8).for_each(<[_]>::reverse);
            pieces.into_iter().for_each(|piece| pieces_in.send(piece).unwrap());
        });
        let encoding = scope.spawn(|| run(&settings, pieces, parts_in, &meter, &stop));
        let mut object = Vec::new();
        let mut last = 0;
        while let Some(output) = parts.blocking_recv() {
            let Output::Part(part, _) = output else { continue };
            let mut start = part.offset as usize;
            let end = start + part.size.get() as usize;
            object.resize(object.len().max(end), 0);
            for piece in part.pieces() {
                let aligned = |number: usize| number.is_multiple_of(sys::aligned::ALIGNMENT);
                assert!(aligned(piece.as_ptr() as usize) && aligned(start));
                object[start..start + piece.len()].copy_from_slice(piece);
                start += piece.len();
            }
            assert_eq!(start, end);
            last = part.number;
        }
        assert_eq!(last, 1, "the part with the header comes last");
        let encoded = encoding.join().unwrap().unwrap();
        assert_eq!(meter.read() + meter.skipped(), volume.len() as u64);
        (Object(object), encoded)
    })
}

fn decode(object: &Object) -> Vec<u8> {
    let mut image = Image::open(object).unwrap();
    let mut bytes = vec![0xaa; image.header().virtual_size as usize];
    for (index, extent) in bytes.chunks_mut(EXTENT_SIZE as usize).enumerate() {
        if image.read_at(extent, index as u64 * EXTENT_SIZE).unwrap() == Content::Zeroes {
            assert!(extent.iter().all(|byte| *byte == 0xaa));
            extent.fill(0);
        }
    }
    bytes
}

fn check(volume: &[u8], compression: Compression, threads: usize) -> Object {
    let (object, encoded) = encode(volume, compression, threads);
    assert_eq!(object.0.len() as u64, encoded.object_size.get());
    let mut expected = volume.to_vec();
    expected.resize(volume.len().next_multiple_of(512), 0);
    assert!(decode(&object) == expected, "the bytes are not the bytes");

    let mut digests = Vec::new();
    for extent in expected.chunks(EXTENT_SIZE as usize) {
        digests.extend(blake3::hash(extent).as_bytes());
    }
    assert_eq!(encoded.extent_digests, digests);
    assert_eq!(encoded.content_digest.0, *blake3::hash(&digests).as_bytes());
    let mut parts = Sha256::new();
    let mut offset = 0;
    for part in &encoded.parts {
        let end = offset + part.size.get() as usize;
        parts.update(Sha256::digest(&object.0[offset..end]));
        offset = end;
    }
    assert_eq!(offset, object.0.len());
    assert_eq!(encoded.object_digest.0, <[u8; 32]>::from(parts.finalize()));
    object
}

fn volume(fills: &[Fill], cut: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = fills.iter().flat_map(|fill| cluster(*fill)).collect();
    bytes.truncate((bytes.len() - cut.min(bytes.len())).max(1));
    bytes
}

fn compression() -> impl Strategy<Value = Compression> {
    prop_oneof![Just(Compression::Zstd), Just(Compression::Deflate), Just(Compression::None)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_bytes_are_the_bytes(
        fills in prop::collection::vec(fill(), 1..96),
        cut in 0..70_000_usize,
        compression in compression(),
        threads in 1..4_usize,
    ) {
        check(&volume(&fills, cut), compression, threads);
    }

    #[test]
    #[ignore = "needs qemu-img"]
    fn qemu_reads_what_was_written(
        fills in prop::collection::vec(fill(), 1..96),
        cut in 0..70_000_usize,
        compression in compression(),
    ) {
        judge(&volume(&fills, cut), compression);
    }
}

#[test]
#[ignore = "needs qemu-img"]
fn qemu_reads_an_image_of_many_parts() {
    // 48 MiB of noise with text between: parts, packs and raw clusters mix.
    let mut fills: Vec<Fill> = (0..768).map(Fill::Noise).collect();
    fills.iter_mut().step_by(5).for_each(|fill| *fill = Fill::Text(3));
    for compression in [Compression::Zstd, Compression::Deflate, Compression::None] {
        judge(&volume(&fills, 1), compression);
    }
}

struct Remembered {
    bytes: Vec<u8>,
    stored: StoredPart,
    standing: Vec<u8>,
    digests: Vec<u8>,
}

/// What another process would find: each part with the checkpoint after it.
fn remembered(volume: &[u8], compression: Compression) -> Vec<Remembered> {
    let (pieces_in, pieces) = sync_channel(4);
    let (parts_in, mut parts) = mpsc::channel(1);
    let settings = settings(volume, compression, 2);
    thread::scope(|scope| {
        scope.spawn(move || send(volume, 0, &pieces_in));
        let (meter, stop) = (Meter::default(), CancellationToken::new());
        let encoding = scope.spawn(move || run(&settings, pieces, parts_in, &meter, &stop));
        let mut all = Vec::new();
        while let Some(output) = parts.blocking_recv() {
            let (part, after) = match output {
                Output::First(part, after) | Output::Part(part, Some(after)) => (part, after),
                Output::Part(_, None) => continue,
            };
            let bytes = part.pieces().collect::<Vec<_>>().concat();
            let stored = StoredPart { size: part.size, sha256: part.sha256 };
            let (standing, digests) = (after.standing().unwrap(), after.digests().unwrap());
            all.push((part.number, Remembered { bytes, stored, standing, digests }));
        }
        encoding.join().unwrap().unwrap();
        all.sort_by_key(|(number, _)| *number);
        all.into_iter().map(|(_, part)| part).collect()
    })
}

fn send(volume: &[u8], from: u64, pieces: &std::sync::mpsc::SyncSender<Piece>) {
    for (bytes, index) in volume.chunks(EXTENT_SIZE as usize).zip(0..).skip(from as usize) {
        pieces.send(Piece::Data(Extent { index, bytes: Box::new(bytes.to_vec()) })).unwrap();
    }
}

#[test]
fn encoding_goes_on_after_any_part_and_makes_the_same_object() {
    let mut fills: Vec<Fill> = (0..720).map(Fill::Noise).collect();
    fills.iter_mut().step_by(3).for_each(|fill| *fill = Fill::Text(3));
    let volume = volume(&fills, 1);
    let (whole, encoded) = encode(&volume, Compression::Zstd, 2);
    let parts = remembered(&volume, Compression::Zstd);
    assert!(parts.len() >= 3, "{} parts", parts.len());
    for last in 1..=parts.len() {
        let known = &parts[..last];
        let digests = known.iter().map(|part| &*part.digests);
        let stored = known[1..].iter().map(|part| part.stored.clone()).collect();
        let standing = &known[last - 1].standing;
        let from = Resumed::new(standing, digests, known[0].bytes.clone(), stored).unwrap();
        let (next, settings) = (from.next_extent(), settings(&volume, Compression::Zstd, 2));
        let (pieces_in, pieces) = sync_channel(4);
        let (parts_in, mut outputs) = mpsc::channel(1);
        thread::scope(|scope| {
            let volume = &volume;
            scope.spawn(move || send(volume, next, &pieces_in));
            let (meter, stop) = (Meter::default(), CancellationToken::new());
            let encoding = scope
                .spawn(move || run_from(&settings, Some(from), pieces, parts_in, &meter, &stop));
            while let Some(output) = outputs.blocking_recv() {
                let Output::Part(part, _) = output else { panic!("the first part was known") };
                assert!(part.number == 1 || part.number as usize > last);
                let (start, bytes) = (part.offset as usize, part.pieces().collect::<Vec<_>>());
                assert_eq!(whole.0[start..][..part.size.get() as usize], bytes.concat());
            }
            let again = encoding.join().unwrap().unwrap();
            assert_eq!(again.object_digest, encoded.object_digest);
            assert_eq!(again.extent_digests, encoded.extent_digests);
            assert_eq!(again.parts, encoded.parts);
        });
    }
}

#[test]
fn damaged_checkpoints_are_refused() {
    let noise = cluster(Fill::Noise(1)).repeat(16 * 12);
    let standing = remembered(&noise, Compression::Zstd).remove(0).standing;
    let refused = |bytes: &[u8]| Resumed::new(bytes, [], Vec::new(), Vec::new()).unwrap_err();
    for cut in [0, 1, standing.len() / 2, standing.len() - 1] {
        assert_eq!(refused(&standing[..cut]).reason(), Reason::JournalFailed);
    }
    refused(&zstd::bulk::compress(&9_u64.to_le_bytes(), 1).unwrap());
}

/// `qemu-img check` and `qemu-img compare` on what was written.
fn judge(volume: &[u8], compression: Compression) {
    let object = check(volume, compression, 2);
    let dir = tempfile::tempdir().unwrap();
    let (raw, qcow2) = (dir.path().join("volume.raw"), dir.path().join("image.qcow2"));
    fs::write(&raw, volume).unwrap();
    fs::write(&qcow2, &object.0).unwrap();
    let run = |args: &[&str]| {
        let output = Command::new("qemu-img").args(args).output().unwrap();
        assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let (raw, qcow2) = (raw.to_str().unwrap(), qcow2.to_str().unwrap());
    let report = run(&["check", "-f", "qcow2", qcow2]);
    assert!(report.contains("No errors were found"), "{report}");
    run(&["compare", "-f", "raw", "-F", "qcow2", raw, qcow2]);
}

#[test]
fn who_takes_no_parts_ends_the_encoding() {
    let (pieces_in, pieces) = sync_channel(1);
    let (parts_in, parts) = mpsc::channel(1);
    drop(parts);
    let noise = cluster(Fill::Noise(1)).repeat(16);
    let sender = thread::spawn(move || {
        for index in 0.. {
            let extent = Extent { index, bytes: Box::new(noise.clone()) };
            if pieces_in.send(Piece::Data(extent)).is_err() {
                return index;
            }
        }
        0
    });
    let settings = Settings {
        volume_size: ByteSize::gib(1),
        compression: Compression::None,
        threads: NonZeroUsize::MIN,
        spare: SpareMemory::default(),
        resumable: true,
    };
    let error =
        run(&settings, pieces, parts_in, &Meter::default(), &CancellationToken::new()).unwrap_err();
    assert_eq!(error.reason(), Reason::Canceled);
    assert!(sender.join().unwrap() < 64, "the reader was not stopped");
}

#[test]
fn missing_pieces_make_no_image() {
    let (pieces_in, pieces) = sync_channel(1);
    let (parts_in, _parts) = mpsc::channel(8);
    pieces_in.send(Piece::Zeroes { first: 0, count: 3 }).unwrap();
    drop(pieces_in);
    let settings = settings(&[1; 4 << 20], Compression::Zstd, 2);
    let error =
        run(&settings, pieces, parts_in, &Meter::default(), &CancellationToken::new()).unwrap_err();
    assert_eq!(error.reason(), Reason::Canceled);
}
