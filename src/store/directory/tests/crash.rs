//! What a crash leaves, and what a store that goes away does.

use std::time::{Duration, SystemTime};

use super::*;
use crate::store::{directory::claim::CLAIM, form::TOMBSTONE};

fn make_old(dir: &Path) {
    let old = SystemTime::now() - Duration::from_secs(25 * 3600);
    fs::File::open(dir).unwrap().set_modified(old).unwrap();
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
    assert_eq!(bench.store().await.sweep(&[]).await.unwrap(), 1);
    assert_eq!(files(&bench.path().join("images")), [id(1).as_str(), id(3).as_str()]);
    assert_eq!(store.sweep(&[]).await.unwrap(), 0);
    living.put(parts(&[8192]).remove(0)).await.unwrap();
    assert_eq!(elsewhere.sweep(&[]).await.unwrap(), 1);
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
            let from = if name == TOMBSTONE { MANIFEST } else { name.trim_end_matches(".tmp") };
            let from = whole.join(from);
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
        owned(&[TOMBSTONE, OBJECT, EXTENTS, RECORD]),
        owned(&[TOMBSTONE, EXTENTS, RECORD]),
        owned(&[TOMBSTONE, RECORD]),
        owned(&[TOMBSTONE]),
        owned(&[TOMBSTONE, CLAIM, OBJECT]),
    ];
    for names in uploads.iter().chain(&deletions) {
        lay(&id(2), names);
        assert_eq!(listed(&store).await, [id(1).as_str()], "{names:?}");
        assert_eq!(store.get(&id(2)).await.unwrap(), None, "{names:?}");
        assert_eq!(store.sweep(&[]).await.unwrap(), 1, "{names:?}");
        assert_eq!(files(&bench.path().join("images")), [id(1).as_str()], "{names:?}");
    }
    // With its manifest it is an image, and only the claim goes.
    fs::write(whole.join(CLAIM), &claim).unwrap();
    lay(&id(2), &owned(&[TOMBSTONE, OBJECT, EXTENTS, RECORD]));
    fs::copy(whole.join(MANIFEST), bench.dir(&id(2)).join(MANIFEST)).unwrap();
    let restored = fs::read_to_string(bench.dir(&id(2)).join(MANIFEST)).unwrap();
    let restored = restored.replace(id(1).as_str(), id(2).as_str());
    fs::write(bench.dir(&id(2)).join(MANIFEST), restored).unwrap();
    assert_eq!(store.sweep(&[]).await.unwrap(), 0);
    assert_eq!(files(&whole), [EXTENTS, OBJECT, MANIFEST, RECORD]);
    assert_eq!(listed(&store).await, [id(1).as_str(), id(2).as_str()]);
    assert_eq!(store.delete(&id(2)).await.unwrap(), Delete::Deleted);
    assert_eq!(files(&bench.path().join("images")), [id(1).as_str()]);
    // Before its claim is durable an upload has no object: removed when old.
    for names in [owned(&[]), owned(&[CLAIM])] {
        lay(&id(2), &names);
        if !names.is_empty() {
            fs::write(bench.dir(&id(2)).join(CLAIM), "").unwrap();
        }
        assert_eq!(store.sweep(&[]).await.unwrap(), 0, "{names:?}");
        make_old(&bench.dir(&id(2)));
        assert_eq!(store.sweep(&[]).await.unwrap(), 1, "{names:?}");
        assert!(!bench.dir(&id(2)).exists(), "{names:?}");
    }
    // An operator's copy under way is nobody's to remove.
    lay(&id(2), &owned(&[OBJECT]));
    make_old(&bench.dir(&id(2)));
    assert_eq!(store.sweep(&[]).await.unwrap(), 0);
    assert_eq!(files(&bench.dir(&id(2))), [OBJECT]);
}

#[tokio::test]
async fn a_seal_that_nobody_waits_for_leaves_nothing_after_the_abort() {
    let bench = Bench::new();
    let store = bench.store().await;
    let upload = store.begin(&id(1)).await.unwrap();
    upload.put(parts(&[8192]).remove(0)).await.unwrap();
    let sealed = sealed(&id(1), &parts(&[8192]));
    let mut seal = upload.seal(Arc::new(sealed.clone()));
    assert!((&mut seal).now_or_never().is_none());
    drop(seal);
    upload.abort().await.unwrap();
    assert!(files(&bench.path().join("images")).is_empty());
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
    assert_eq!(
        upload.seal(Arc::new(sealed.clone())).await.unwrap_err().reason(),
        Reason::StoreUnavailable
    );
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
