mod crash;
mod mounts;
mod script;

use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use futures_util::FutureExt;
use sha2::{Digest, Sha256};

use super::*;
use crate::{
    model::{
        Timestamp,
        image::{
            Compression, Consistency, ContentDigest, EXTENT_SIZE, Format, LaunchMode,
            MAX_VOLUME_SIZE, ManifestSchema, ObjectDigest, Origin, Stored, StoredPart,
        },
        instance::OperatingSystem,
    },
    port::{Body, Part, Sealed},
    store::directory::claim::CLAIM,
    sys::aligned::AlignedBuf,
};

const HOST: &str = "host-a";
const ROOM: ByteSize = ByteSize::mib(1);

pub(in crate::store) struct Bench {
    temp: tempfile::TempDir,
}

impl Bench {
    pub(in crate::store) fn new() -> Self {
        Self { temp: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.temp.path().join("images")
    }

    fn dir(&self, id: &ImageId) -> PathBuf {
        self.path().join("images").join(id.as_str())
    }

    pub(in crate::store) async fn store(&self) -> DirectoryStore {
        DirectoryStore::open("local", &self.path(), ROOM, HOST).await.unwrap()
    }

    fn report(&self, error: &Error) -> String {
        format!("{error:?}").replace(self.temp.path().to_str().unwrap(), "/srv")
    }
}

pub(in crate::store) fn id(number: u8) -> ImageId {
    format!("ocid1.image.imaged..test{number}").parse().unwrap()
}

/// Parts of these sizes, in order.
pub(in crate::store) fn parts(sizes: &[usize]) -> Vec<Arc<Part>> {
    let mut offset = 0;
    (1_u8..)
        .zip(sizes)
        .map(|(number, &size)| {
            let mut memory = AlignedBuf::zeroed(size);
            memory.fill(number);
            let part = part(number.into(), offset, InMemory { memory, len: size });
            offset += size as u64;
            part
        })
        .collect()
}

/// The part `number` at `offset` with these bytes.
pub(in crate::store) fn part(number: u32, offset: u64, body: InMemory) -> Arc<Part> {
    let bytes = body.bytes();
    let (size, sha256) = (ByteSize(bytes.len() as u64), ObjectDigest(Sha256::digest(bytes).into()));
    Arc::new(Part { number, offset, size, body: Box::new(body), sha256 })
}

/// A body of two pieces, or of one.
pub(in crate::store) struct InMemory {
    memory: AlignedBuf,
    len: usize,
}

impl InMemory {
    pub(in crate::store) fn copy_of(bytes: &[u8]) -> Self {
        let mut memory = AlignedBuf::zeroed(bytes.len());
        memory[..bytes.len()].copy_from_slice(bytes);
        Self { memory, len: bytes.len() }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl Body for InMemory {
    fn piece(&self, index: usize) -> Option<&[u8]> {
        self.bytes().chunks(4096).nth(index)
    }
}

pub(in crate::store) fn sealed(id: &ImageId, parts: &[Arc<Part>]) -> Sealed {
    let parts: Vec<_> =
        parts.iter().map(|part| StoredPart { size: part.size, sha256: part.sha256 }).collect();
    let manifest = Manifest {
        schema: ManifestSchema::V1,
        id: id.clone(),
        origin: Origin {
            time_created: Timestamp::from_millis(1_700_000_000_000),
            source_instance_id: None,
            source_volume: "/dev/vg/web".into(),
            base_image_id: None,
            os: OperatingSystem::default(),
            architecture: "UNKNOWN".into(),
            launch_mode: LaunchMode::Paravirtualized,
            create_image_allowed: true,
            compression: Compression::None,
            consistency: Consistency::Clean,
            store: "local".into(),
        },
        stored: Stored {
            format: Format::Qcow2,
            virtual_size: ByteSize(EXTENT_SIZE + 1),
            object_size: ByteSize(parts.iter().map(|part| part.size.get()).sum()),
            content_digest: ContentDigest([1; 32]),
            object_digest: ObjectDigest([2; 32]),
            parts,
            snapshot: None,
            point_in_time: None,
            expected: None,
            trace_digest: None,
            time_line: Vec::new(),
            imaged_version: "0.1.0".into(),
        },
    };
    let record = Record {
        compartment_id: "web".parse().unwrap(),
        display_name: "golden".into(),
        freeform_tags: BTreeMap::new(),
    };
    Sealed { manifest, record, extent_digests: vec![3; 64], trace: None }
}

/// Stores a small image.
async fn make(store: &DirectoryStore, id: &ImageId) {
    let upload = store.begin(id).await.unwrap();
    let parts = parts(&[8192, 8192, 100]);
    let sealed = sealed(id, &parts);
    for part in parts.into_iter().rev() {
        upload.put(part).await.unwrap();
    }
    upload.seal(Arc::new(sealed.clone())).await.unwrap();
}

async fn listed(store: &DirectoryStore) -> Vec<String> {
    let mut ids: Vec<_> =
        store.list().await.unwrap().iter().map(|(m, _)| m.id.to_string()).collect();
    ids.sort();
    ids
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_sealed_image_is_whole_and_private() {
    let bench = Bench::new();
    let store = bench.store().await;
    let id = id(1);
    let upload = store.begin(&id).await.unwrap();
    let parts = parts(&[8192, 8192, 100]);
    let bytes = parts
        .iter()
        .flat_map(|part| part.pieces().collect::<Vec<_>>().concat())
        .collect::<Vec<_>>();
    let sealed = sealed(&id, &parts);
    for part in parts.into_iter().rev() {
        assert!(listed(&store).await.is_empty());
        assert_eq!(store.get(&id).await.unwrap(), None);
        upload.put(part).await.unwrap();
    }
    upload.seal(Arc::new(sealed.clone())).await.unwrap();

    let mut wanted = (sealed.manifest, sealed.record);
    assert_eq!(store.get(&id).await.unwrap(), Some(wanted.clone()));
    wanted.0.stored.parts.clear();
    assert_eq!(store.list().await.unwrap(), [wanted]);
    assert_eq!(store.extent_digests(&id).await.unwrap(), sealed.extent_digests);
    let object = store.open(&id).await.unwrap();
    let mut read = vec![0; bytes.len()];
    object.read_at(&mut read, 0).unwrap();
    assert!(object.len() == bytes.len() as u64 && read == bytes);
    let beyond = object.read_at(&mut [0; 2], object.len() - 1).unwrap_err();
    assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);

    let dir = bench.dir(&id);
    assert_eq!(files(&dir), [EXTENTS, OBJECT, MANIFEST, RECORD]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    assert!(files(&dir).iter().all(|file| mode(&dir.join(file)) == 0o600));
    assert_eq!(store.sweep(&[]).await.unwrap(), 0);
}

#[tokio::test]
async fn an_upload_ends_once() {
    let bench = Bench::new();
    let store = bench.store().await;
    let id = id(1);
    let upload = store.begin(&id).await.unwrap();
    upload.put(parts(&[100]).remove(0)).await.unwrap();
    let whole = sealed(&id, &parts(&[100]));
    upload.seal(Arc::new(whole.clone())).await.unwrap();
    for again in [
        upload.seal(Arc::new(whole.clone())).await,
        upload.abort().await,
        upload.put(parts(&[100]).remove(0)).await.map(drop),
    ] {
        insta::allow_duplicates! {
            insta::assert_snapshot!(bench.report(&again.unwrap_err()), @"INTERNAL: the upload of image ocid1.image.imaged..test1 was sealed before");
        }
    }
    assert_eq!(listed(&store).await, [id.as_str()]);
    let twice = store.begin(&id).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&twice), @"INTERNAL: /srv/images/images/ocid1.image.imaged..test1 is there already");
}

#[tokio::test]
async fn an_aborted_upload_leaves_nothing() {
    let bench = Bench::new();
    let store = bench.store().await;
    let upload = store.begin(&id(1)).await.unwrap();
    upload.put(parts(&[8192]).remove(0)).await.unwrap();
    upload.abort().await.unwrap();
    upload.abort().await.unwrap();
    assert!(files(&bench.path().join("images")).is_empty());
    let late = upload.put(parts(&[8192]).remove(0)).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&late), @"INTERNAL: the upload of image ocid1.image.imaged..test1 was aborted before");
}

#[tokio::test]
async fn what_was_not_put_is_not_sealed() {
    let bench = Bench::new();
    let store = bench.store().await;
    let id = id(1);
    let mut told = Vec::new();
    for spoil in [
        |sealed: &mut Sealed| sealed.manifest.id = "other".parse().unwrap(),
        |sealed: &mut Sealed| sealed.manifest.stored.parts.truncate(1),
        |sealed: &mut Sealed| {
            let last = sealed.manifest.stored.parts[1].clone();
            sealed.manifest.stored.parts.push(last);
        },
        |sealed: &mut Sealed| sealed.manifest.stored.parts[1].sha256 = ObjectDigest([0; 32]),
        |sealed: &mut Sealed| sealed.manifest.stored.parts[0].size = ByteSize(4096),
        |sealed: &mut Sealed| sealed.manifest.stored.object_size = ByteSize(8192),
        |sealed: &mut Sealed| sealed.extent_digests.truncate(32),
    ] {
        let upload = store.begin(&id).await.unwrap();
        let parts = parts(&[8192, 100]);
        let mut sealed = sealed(&id, &parts);
        spoil(&mut sealed);
        for part in parts {
            upload.put(part).await.unwrap();
        }
        told.push(bench.report(&upload.seal(Arc::new(sealed.clone())).await.unwrap_err()));
        assert!(listed(&store).await.is_empty());
        upload.abort().await.unwrap();
    }
    insta::assert_snapshot!(told.join("\n"), @"
    INTERNAL: image ocid1.image.imaged..test1 is not whole: its manifest is of other
    INTERNAL: image ocid1.image.imaged..test1 is not whole: 2 parts were stored and its manifest has 1
    INTERNAL: image ocid1.image.imaged..test1 is not whole: part 3 was not stored
    INTERNAL: image ocid1.image.imaged..test1 is not whole: part 2 is not the one in the manifest
    INTERNAL: image ocid1.image.imaged..test1 is not whole: part 1 is not the one in the manifest
    INTERNAL: image ocid1.image.imaged..test1 is not whole: its parts have 8292 bytes, its object 8292, and its manifest says 8192
    INTERNAL: image ocid1.image.imaged..test1 is not whole: 32 bytes of digests are not those of 2 extents
    ");
}

#[tokio::test]
async fn an_object_of_another_length_is_not_sealed() {
    let bench = Bench::new();
    let store = bench.store().await;
    let upload = store.begin(&id(1)).await.unwrap();
    let sealed = sealed(&id(1), &parts(&[100]));
    upload.put(parts(&[100]).remove(0)).await.unwrap();
    let object = fs::OpenOptions::new().write(true).open(bench.dir(&id(1)).join(OBJECT)).unwrap();
    object.set_len(50).unwrap();
    let error = upload.seal(Arc::new(sealed.clone())).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&error), @"INTERNAL: image ocid1.image.imaged..test1 is not whole: its parts have 100 bytes, its object 50, and its manifest says 100");
}

/// What the configuration allows must not be refused by the seal, hours
/// later.
#[test]
fn the_manifest_with_the_most_parts_can_be_read() {
    let part = StoredPart { size: MAX_VOLUME_SIZE, sha256: ObjectDigest([0xff; 32]) };
    let mut manifest = sealed(&id(1), &[]).manifest;
    manifest.stored.parts = vec![part; 10_000];
    let bytes = serde_json::to_vec_pretty(&manifest).unwrap().len() as u64;
    assert!(bytes <= MAX_MANIFEST.get(), "{bytes} bytes");
}

#[tokio::test]
async fn uploads_in_parallel_do_not_meet() {
    let bench = Bench::new();
    let store = bench.store().await;
    let both = [id(1), id(2)].map(|id| {
        let store = &store;
        async move {
            let upload = store.begin(&id).await.unwrap();
            let parts = parts(&[1 << 20, 8192, 12288, 4096, 77]);
            let sealed = sealed(&id, &parts);
            let puts = parts.into_iter().rev().map(|part| upload.put(part));
            for done in futures_util::future::join_all(puts).await {
                done.unwrap();
            }
            upload.seal(Arc::new(sealed.clone())).await.unwrap();
            let mut hash = Sha256::new();
            let bytes = fs::read(bench_object(store, &id)).unwrap();
            let mut rest = &bytes[..];
            for part in &sealed.manifest.stored.parts {
                let (part_bytes, after) = rest.split_at(part.size.get().try_into().unwrap());
                assert_eq!(ObjectDigest(Sha256::digest(part_bytes).into()), part.sha256);
                hash.update(part_bytes);
                rest = after;
            }
            assert!(rest.is_empty());
        }
    });
    futures_util::future::join_all(both).await;
    assert_eq!(listed(&store).await.len(), 2);
}

fn bench_object(store: &DirectoryStore, id: &ImageId) -> PathBuf {
    Path::new(&store.location()).join("images").join(id.as_str()).join(OBJECT)
}

#[tokio::test]
async fn deleting_is_repeatable_and_spares_uploads() {
    let bench = Bench::new();
    let store = bench.store().await;
    make(&store, &id(1)).await;
    let reader = store.open(&id(1)).await.unwrap();
    assert_eq!(store.delete(&id(1)).await.unwrap(), Delete::Deleted);
    assert_eq!(store.delete(&id(1)).await.unwrap(), Delete::AlreadyDeleted);
    assert!(files(&bench.path().join("images")).is_empty());
    reader.read_at(&mut [0; 16], 0).unwrap();
    insta::assert_snapshot!(bench.report(&store.open(&id(1)).await.unwrap_err()), @r#"IMAGE_NOT_FOUND: there is no image ocid1.image.imaged..test1 in the store "local""#);

    let upload = store.begin(&id(2)).await.unwrap();
    assert_eq!(store.delete(&id(2)).await.unwrap(), Delete::AlreadyDeleted);
    upload.put(parts(&[100]).remove(0)).await.unwrap();
    upload.seal(Arc::new(sealed(&id(2), &parts(&[100])))).await.unwrap();
    let claim = fs::File::create(bench.dir(&id(2)).join(CLAIM)).unwrap();
    claim.lock().unwrap();
    let locked = store.delete(&id(2)).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&locked), @"
    IMAGE_LOCKED: image ocid1.image.imaged..test2 is being sealed by another process
      help: ask again in a moment
    ");
    assert_eq!(listed(&store).await, [id(2).as_str()]);
    drop(claim);
    assert_eq!(store.delete(&id(2)).await.unwrap(), Delete::Deleted);
}

#[tokio::test]
async fn what_is_no_image_is_left_out_and_mentioned_once() {
    let bench = Bench::new();
    let store = bench.store().await;
    for number in 1..=6 {
        make(&store, &id(number)).await;
    }
    let manifest = bench.dir(&id(2)).join(MANIFEST);
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("imaged.manifest/1", "imaged.manifest/9")).unwrap();
    fs::write(bench.dir(&id(3)).join(RECORD), "{").unwrap();
    fs::remove_file(bench.dir(&id(4)).join(RECORD)).unwrap();
    fs::rename(bench.dir(&id(5)), bench.dir(&id(7))).unwrap();
    std::os::unix::fs::symlink(id(1).as_str(), bench.dir(&id(5))).unwrap();
    let huge = fs::OpenOptions::new().write(true).open(bench.dir(&id(6)).join(MANIFEST)).unwrap();
    huge.set_len(MAX_MANIFEST.get() + 1).unwrap();
    fs::create_dir(bench.path().join("images/.hidden")).unwrap();

    assert_eq!(listed(&store).await, [id(1).as_str()]);
    let mentioned = store.store.lock_mentioned().clone();
    assert_eq!(mentioned.len(), 7);
    let mut told = Vec::new();
    for number in 2..=7 {
        told.push(bench.report(&store.get(&id(number)).await.unwrap_err()));
    }
    insta::assert_snapshot!(told.join("\n"), @"
    IMAGE_CORRUPT: /srv/images/images/ocid1.image.imaged..test2/manifest.json cannot be understood
      0: unknown variant `imaged.manifest/9`, expected `imaged.manifest/1` at line 2 column 31
      help: a newer imaged may have written it: update imaged, or restore the file
    IMAGE_CORRUPT: /srv/images/images/ocid1.image.imaged..test3/record.json cannot be understood
      0: EOF while parsing an object at line 1 column 1
      help: a newer imaged may have written it: update imaged, or restore the file
    IMAGE_CORRUPT: /srv/images/images/ocid1.image.imaged..test4/record.json is missing
    STORE_UNAVAILABLE: cannot open /srv/images/images/ocid1.image.imaged..test5
      0: Not a directory (os error 20)
      help: a directory is wanted there: move away what is in its place
    IMAGE_CORRUPT: cannot read /srv/images/images/ocid1.image.imaged..test6/manifest.json
      0: it is larger than 16.0 MiB
      help: imaged did not write this: restore the file
    IMAGE_CORRUPT: /srv/images/images/ocid1.image.imaged..test7/manifest.json is of image ocid1.image.imaged..test5
    ");

    fs::write(&manifest, text).unwrap();
    assert_eq!(listed(&store).await, [id(1).as_str(), id(2).as_str()]);
    assert_eq!(store.store.lock_mentioned().len(), 6);
}

#[tokio::test]
async fn digests_that_do_not_fit_the_volume_are_corrupt() {
    let bench = Bench::new();
    let store = bench.store().await;
    make(&store, &id(1)).await;
    fs::write(bench.dir(&id(1)).join(EXTENTS), [0; 63]).unwrap();
    let short = store.extent_digests(&id(1)).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&short), @"IMAGE_CORRUPT: /srv/images/images/ocid1.image.imaged..test1/extents.blake3 has 63 bytes where 2 extents have 64 B");
}

#[tokio::test]
async fn a_store_without_room_begins_nothing() {
    let bench = Bench::new();
    let min_free = ByteSize(1 << 60);
    let store = DirectoryStore::open("local", &bench.path(), min_free, HOST).await.unwrap();
    let full = store.begin(&id(1)).await.unwrap_err();
    assert_eq!(full.reason(), Reason::StoreFull);
    assert!(full.to_string().contains("of which 1024 PiB must stay"), "{full}");
    assert_eq!(store.space().await.unwrap().unwrap().free, ByteSize(0));
    assert!(files(&bench.path().join("images")).is_empty());
}

#[allow(dead_code, reason = "fails to compile when a call's future cannot cross threads")]
fn calls_cross_threads(store: &DirectoryStore, id: &ImageId) {
    fn is_send(_: impl Future + Send) {}
    is_send(DirectoryStore::open("local", Path::new("/"), ROOM, HOST));
    is_send(store.begin(id));
}
