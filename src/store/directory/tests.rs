use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use futures_util::FutureExt;
use sha2::{Digest, Sha256};

use super::*;
use crate::{
    model::{
        Timestamp,
        image::{
            Compression, Consistency, ContentDigest, Format, LaunchMode, ManifestSchema,
            ObjectDigest, Origin, Stored, StoredPart,
        },
        instance::OperatingSystem,
    },
    port::{Part, Sealed},
    sys::aligned::AlignedBuf,
};

const HOST: &str = "host-a";
const ROOM: ByteSize = ByteSize::mib(1);

struct Bench {
    temp: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { temp: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.temp.path().join("images")
    }

    fn dir(&self, id: &ImageId) -> PathBuf {
        self.path().join("images").join(id.as_str())
    }

    async fn store(&self) -> DirectoryStore {
        DirectoryStore::open("local", &self.path(), ROOM, HOST).await.unwrap()
    }

    fn report(&self, error: &Error) -> String {
        format!("{error:?}").replace(self.temp.path().to_str().unwrap(), "/srv")
    }
}

fn id(number: u8) -> ImageId {
    format!("ocid1.image.imaged..test{number}").parse().unwrap()
}

/// Parts of these sizes, in order.
fn parts(sizes: &[usize]) -> Vec<Part> {
    let mut offset = 0;
    (1_u8..)
        .zip(sizes)
        .map(|(number, &size)| {
            let mut body = AlignedBuf::zeroed(size);
            body.fill(number);
            let body: Box<dyn AsRef<[u8]> + Send + Sync> = match size % 4096 {
                0 => Box::new(Body(body)),
                _ => Box::new(body[..size].to_vec()),
            };
            let sha256 = ObjectDigest(Sha256::digest((*body).as_ref()).into());
            let part = Part { number: number.into(), offset, body, sha256 };
            offset += size as u64;
            part
        })
        .collect()
}

struct Body(AlignedBuf);

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn sealed(id: &ImageId, parts: &[Part]) -> Sealed {
    let parts: Vec<_> = parts
        .iter()
        .map(|part| StoredPart { size: ByteSize(part.bytes().len() as u64), sha256: part.sha256 })
        .collect();
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
            time_line: Vec::new(),
            imaged_version: "0.1.0".into(),
        },
    };
    let record = Record {
        compartment_id: "web".parse().unwrap(),
        display_name: "golden".into(),
        freeform_tags: BTreeMap::new(),
    };
    Sealed { manifest, record, extent_digests: vec![3; 64] }
}

/// Stores a small image.
async fn make(store: &DirectoryStore, id: &ImageId) {
    let upload = store.begin(id).await.unwrap();
    let parts = parts(&[8192, 8192, 100]);
    let sealed = sealed(id, &parts);
    for part in parts.into_iter().rev() {
        upload.put(part).await.unwrap();
    }
    upload.seal(&sealed).await.unwrap();
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

fn make_old(dir: &Path) {
    let old = SystemTime::now() - Duration::from_secs(25 * 3600);
    fs::File::open(dir).unwrap().set_modified(old).unwrap();
}

#[tokio::test]
async fn a_sealed_image_is_whole_and_private() {
    let bench = Bench::new();
    let store = bench.store().await;
    let id = id(1);
    let upload = store.begin(&id).await.unwrap();
    let parts = parts(&[8192, 8192, 100]);
    let bytes = parts.iter().flat_map(|part| part.bytes().to_vec()).collect::<Vec<_>>();
    let sealed = sealed(&id, &parts);
    for part in parts.into_iter().rev() {
        assert!(listed(&store).await.is_empty());
        assert_eq!(store.get(&id).await.unwrap(), None);
        upload.put(part).await.unwrap();
    }
    upload.seal(&sealed).await.unwrap();

    let wanted = (sealed.manifest, sealed.record);
    assert_eq!(store.list().await.unwrap(), std::slice::from_ref(&wanted));
    assert_eq!(store.get(&id).await.unwrap(), Some(wanted));
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
    assert_eq!(store.sweep().await.unwrap(), 0);
}

#[tokio::test]
async fn an_upload_ends_once() {
    let bench = Bench::new();
    let store = bench.store().await;
    let id = id(1);
    let upload = store.begin(&id).await.unwrap();
    upload.put(parts(&[100]).remove(0)).await.unwrap();
    let whole = sealed(&id, &parts(&[100]));
    upload.seal(&whole).await.unwrap();
    for again in
        [upload.seal(&whole).await, upload.abort().await, upload.put(parts(&[100]).remove(0)).await]
    {
        insta::allow_duplicates! {
            insta::assert_snapshot!(bench.report(&again.unwrap_err()), @"
            INTERNAL: the upload of image ocid1.image.imaged..test1 was sealed before
            ");
        }
    }
    assert_eq!(listed(&store).await, [id.as_str()]);
    let twice = store.begin(&id).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&twice), @"
    INTERNAL: /srv/images/images/ocid1.image.imaged..test1 is there already
    ");
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
    insta::assert_snapshot!(bench.report(&late), @"
    INTERNAL: the upload of image ocid1.image.imaged..test1 was aborted before
    ");
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
        told.push(bench.report(&upload.seal(&sealed).await.unwrap_err()));
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
    let error = upload.seal(&sealed).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&error), @"
    INTERNAL: image ocid1.image.imaged..test1 is not whole: its parts have 100 bytes, its object 50, and its manifest says 100
    ");
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
            upload.seal(&sealed).await.unwrap();
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
async fn a_sweep_removes_the_dead_and_leaves_the_living_and_other_hosts() {
    let bench = Bench::new();
    let store = bench.store().await;
    let living = store.begin(&id(1)).await.unwrap();
    let dead = store.begin(&id(2)).await.unwrap();
    dead.put(parts(&[8192]).remove(0)).await.unwrap();
    drop(dead);
    let elsewhere = DirectoryStore::open("local", &bench.path(), ROOM, "host-b").await.unwrap();
    drop(elsewhere.begin(&id(3)).await.unwrap());

    // Another daemon of the same host sees the same.
    assert_eq!(bench.store().await.sweep().await.unwrap(), 1);
    assert_eq!(files(&bench.path().join("images")), [id(1).as_str(), id(3).as_str()]);
    assert_eq!(store.sweep().await.unwrap(), 0);
    living.put(parts(&[8192]).remove(0)).await.unwrap();
    assert_eq!(elsewhere.sweep().await.unwrap(), 1);
    assert_eq!(files(&bench.path().join("images")), [id(1).as_str()]);
}

/// A crash may come after any step: each prefix of the steps of an upload
/// and of a deletion is laid out and swept.
#[tokio::test]
async fn no_crash_shows_half_an_image() {
    let bench = Bench::new();
    let store = bench.store().await;
    make(&store, &id(1)).await;
    let whole = bench.dir(&id(1));
    let claim = serde_json::to_vec(&Owner::new(HOST.into(), "dead".into())).unwrap();
    let tmp = |name: &str| format!("{name}.tmp");
    let lay = |id: &ImageId, names: &[String]| {
        fs::create_dir(bench.dir(id)).unwrap();
        for name in names {
            let from = whole.join(name.trim_end_matches(".tmp"));
            let bytes = if name == CLAIM { claim.clone() } else { fs::read(from).unwrap() };
            fs::write(bench.dir(id).join(name), bytes).unwrap();
        }
    };
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let uploads = [
        owned(&[CLAIM]),
        owned(&[CLAIM, OBJECT]),
        owned(&[CLAIM, OBJECT, &tmp(EXTENTS)]),
        owned(&[CLAIM, OBJECT, EXTENTS, &tmp(RECORD)]),
        owned(&[CLAIM, OBJECT, EXTENTS, RECORD, &tmp(MANIFEST)]),
    ];
    let deletions = [
        owned(&[CLAIM, OBJECT, EXTENTS, RECORD]),
        owned(&[CLAIM, EXTENTS, RECORD]),
        owned(&[CLAIM, RECORD]),
        owned(&[CLAIM]),
    ];
    for names in uploads.iter().chain(&deletions) {
        lay(&id(2), names);
        assert_eq!(listed(&store).await, [id(1).as_str()], "{names:?}");
        assert_eq!(store.get(&id(2)).await.unwrap(), None, "{names:?}");
        assert_eq!(store.sweep().await.unwrap(), 1, "{names:?}");
        assert_eq!(files(&bench.path().join("images")), [id(1).as_str()], "{names:?}");
    }
    // With its manifest it is an image, and only the claim goes.
    fs::write(whole.join(CLAIM), &claim).unwrap();
    assert_eq!(store.sweep().await.unwrap(), 0);
    assert_eq!(files(&whole), [EXTENTS, OBJECT, MANIFEST, RECORD]);
    assert_eq!(listed(&store).await, [id(1).as_str()]);
    // Before its claim is durable an upload has no object: removed when old.
    for names in [owned(&[]), owned(&[CLAIM])] {
        lay(&id(2), &names);
        if !names.is_empty() {
            fs::write(bench.dir(&id(2)).join(CLAIM), "").unwrap();
        }
        assert_eq!(store.sweep().await.unwrap(), 0, "{names:?}");
        make_old(&bench.dir(&id(2)));
        assert_eq!(store.sweep().await.unwrap(), 1, "{names:?}");
        assert!(!bench.dir(&id(2)).exists(), "{names:?}");
    }
    // An operator's copy under way is nobody's to remove.
    lay(&id(2), &owned(&[OBJECT]));
    make_old(&bench.dir(&id(2)));
    assert_eq!(store.sweep().await.unwrap(), 0);
    assert_eq!(files(&bench.dir(&id(2))), [OBJECT]);
}

#[tokio::test]
async fn a_seal_that_nobody_waits_for_leaves_nothing_after_the_abort() {
    let bench = Bench::new();
    let store = bench.store().await;
    let upload = store.begin(&id(1)).await.unwrap();
    upload.put(parts(&[8192]).remove(0)).await.unwrap();
    let sealed = sealed(&id(1), &parts(&[8192]));
    let mut seal = upload.seal(&sealed);
    assert!((&mut seal).now_or_never().is_none());
    drop(seal);
    upload.abort().await.unwrap();
    assert!(files(&bench.path().join("images")).is_empty());
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
    insta::assert_snapshot!(bench.report(&store.open(&id(1)).await.unwrap_err()), @r#"
    IMAGE_NOT_FOUND: there is no image ocid1.image.imaged..test1 in the store "local"
    "#);

    let upload = store.begin(&id(2)).await.unwrap();
    assert_eq!(store.delete(&id(2)).await.unwrap(), Delete::AlreadyDeleted);
    upload.put(parts(&[100]).remove(0)).await.unwrap();
    upload.seal(&sealed(&id(2), &parts(&[100]))).await.unwrap();
    let claim = fs::File::create(bench.dir(&id(2)).join(CLAIM)).unwrap();
    claim.lock().unwrap();
    let locked = store.delete(&id(2)).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&locked), @"
    IMAGE_LOCKED: image ocid1.image.imaged..test2 is being sealed or deleted by another process
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
      help: something removed it: look whether the store's filesystem is mounted
    STORE_UNAVAILABLE: cannot read /srv/images/images/ocid1.image.imaged..test6/manifest.json
      0: it is larger than 16.0 MiB
      help: look into the kernel's log, and at the filesystem that holds the store
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
    insta::assert_snapshot!(bench.report(&short), @"
    IMAGE_CORRUPT: /srv/images/images/ocid1.image.imaged..test1/extents.blake3 has 63 bytes where 2 extents have 64 B
    ");
}

#[tokio::test]
async fn a_store_that_vanishes_under_an_upload_is_an_error() {
    let bench = Bench::new();
    let store = bench.store().await;
    let upload = store.begin(&id(1)).await.unwrap();
    upload.put(parts(&[8192, 8192]).remove(0)).await.unwrap();
    fs::remove_dir_all(bench.path()).unwrap();
    // As a mount point looks without its filesystem.
    fs::create_dir(bench.path()).unwrap();
    let put = upload.put(parts(&[8192, 8192]).remove(1)).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&put), @"
    STORE_UNAVAILABLE: the store's directory /srv/images vanished
      0: imaged-store.json is not there
      help: is it mounted? mount it, or restart imaged to begin a new store there
    ");
    let sealed = sealed(&id(1), &parts(&[8192]));
    assert_eq!(upload.seal(&sealed).await.unwrap_err().reason(), Reason::StoreUnavailable);
    assert_eq!(store.begin(&id(2)).await.unwrap_err().reason(), Reason::StoreUnavailable);
    assert_eq!(store.space().await.unwrap_err().reason(), Reason::StoreUnavailable);
    assert_eq!(store.list().await.unwrap_err().reason(), Reason::StoreUnavailable);
    upload.abort().await.unwrap();
    assert!(files(&bench.path()).is_empty(), "the bare mount point was written to");
}

#[tokio::test]
async fn an_object_that_was_removed_takes_no_parts() {
    let bench = Bench::new();
    let store = bench.store().await;
    let upload = store.begin(&id(1)).await.unwrap();
    fs::remove_dir_all(bench.dir(&id(1))).unwrap();
    let put = upload.put(parts(&[8192]).remove(0)).await.unwrap_err();
    insta::assert_snapshot!(bench.report(&put), @"
    STORE_UNAVAILABLE: cannot write part 1 of /srv/images/images/ocid1.image.imaged..test1/image.qcow2
      0: No such file or directory (os error 2)
      help: something removed it: look whether the store's filesystem is mounted
    ");
    upload.abort().await.unwrap();
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

/// A filesystem of its own at the store's path, unmounted at the end.
struct Mounted<'a>(&'a Bench);

impl<'a> Mounted<'a> {
    fn new(bench: &'a Bench, arguments: &[&str]) -> Self {
        fs::create_dir(bench.path()).unwrap();
        run(Command::new("mount").args(arguments).arg(bench.path()));
        Self(bench)
    }

    fn ext4(bench: &'a Bench) -> Self {
        let image = bench.temp.path().join("ext4");
        fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image));
        Self::new(bench, &["-o", "loop,errors=remount-ro", image.to_str().unwrap()])
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
              help: delete images from it, lower its min_free, or name another store
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

#[allow(dead_code, reason = "fails to compile when a call's future cannot cross threads")]
fn calls_cross_threads(store: &DirectoryStore, id: &ImageId) {
    fn is_send(_: impl Future + Send) {}
    is_send(DirectoryStore::open("local", Path::new("/"), ROOM, HOST));
    is_send(store.begin(id));
}
