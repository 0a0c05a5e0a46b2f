//! Images in OCI Object Storage by pre-authenticated requests.

use std::{fs, os::unix::fs::PermissionsExt, sync::Arc};

use imaged::{
    model::{ByteSize, image::ObjectDigest},
    port::{Body, Part},
    store::{ObjectPar, ParUrl, StoredAs},
};
use sha2::{Digest, Sha256};

use crate::{
    lab::Daemon,
    oci::{BUCKET, Oci, succeed},
    oci_server::{Fault, FaultKind, ParAccess, ParSpec},
};

/// The table of the store `name`, by a new request. `at` begins the names
/// that it is for.
fn table(oci: &Oci, name: &str, access: ParAccess, listing: bool, at: Option<&str>) -> String {
    let spec = ParSpec {
        name: name.into(),
        access,
        object: at.map(str::to_owned),
        expires: oci.server.now() + 3_600_000,
        listing,
    };
    let url = format!("{}{}", oci.server.endpoint(), oci.server.create_par(BUCKET, spec));
    let file = oci.path(&format!("{name}.url"));
    fs::write(&file, url + "\n").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let prefix = at.map_or(String::new(), |prefix| format!("prefix = {prefix:?}\n"));
    format!("[stores.{name}]\nkind = \"par\"\ncredentials = {file:?}\n{prefix}")
}

/// What imagectl says, without what differs from run to run.
fn said(oci: &Oci, daemon: &Daemon, args: &[&str]) -> String {
    settled(oci, &daemon.refusal(args))
}

fn settled(oci: &Oci, text: &str) -> String {
    assert!(!text.contains("/p/"), "{text}");
    crate::oci_errors::settled(oci, text)
}

fn refused_capture(oci: &Oci, daemon: &Daemon) -> String {
    let volume = oci.volume(4);
    let create = ["image", "create", "--boot-volume", volume.to_str().unwrap()];
    said(oci, daemon, &[&create[..], &["--wait-for-state", "AVAILABLE"]].concat())
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_oci_par_an_image_goes_there_and_is_read_back_and_stays() {
    let oci = Oci::start();
    let access = ParAccess::AnyObjectReadWrite;
    let daemon = oci.daemon_with(&table(&oci, "far", access, true, None));
    // Beginnings and completions whose answers are lost.
    oci.server.add_fault(Fault::new("POST", "", FaultKind::LoseAnswer));
    oci.server.add_fault(Fault::new("PUT", "/1", FaultKind::LoseAnswer));
    oci.server.add_fault(Fault::new("PUT", "/manifest.json", FaultKind::LoseAnswer));
    let volume = oci.volume(40);
    let image = daemon.create(&volume, &[]);
    let id = image["id"].as_str().unwrap();
    oci.judge(id, &volume);
    succeed(&daemon, &["image", "verify", "--image-id", id]);
    let listed = daemon.json(&["image", "list"]);
    assert_eq!(listed["data"][0]["id"], id);
    // No claim: nobody could take it away.
    assert_eq!(oci.keys().len(), 5, "{:?}", oci.keys());
    assert!(oci.server.uploads(BUCKET).is_empty());

    let delete = said(&oci, &daemon, &["image", "delete", "--force", "--image-id", id]);
    insta::assert_snapshot!(delete.replace(id, "ID"), @"
    imagectl: https://os/images cannot delete images/OCID/manifest.json: a pre-authenticated request can remove nothing
      reason: STORE_DENIED
      help: remove it with rights of your own: `oci os object bulk-delete --bucket-name images --prefix images/OCID`
    ");
    assert_eq!(oci.keys().len(), 5, "{:?}", oci.keys());
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_oci_par_that_only_writes_takes_an_image() {
    let oci = Oci::start();
    let access = ParAccess::AnyObjectWrite;
    let daemon = oci.daemon_with(&table(&oci, "far", access, false, None));
    oci.server.add_fault(Fault::new("POST", "", FaultKind::LoseAnswer));
    oci.server.add_fault(Fault::new("PUT", "/manifest.json", FaultKind::LoseAnswer));
    let volume = oci.volume(24);
    let image = daemon.create(&volume, &[]);
    let id = image["id"].as_str().unwrap();
    assert_eq!(image["lifecycle-state"], "AVAILABLE");
    oci.judge(id, &volume);
    assert_eq!(oci.keys().len(), 5, "{:?}", oci.keys());
    assert!(oci.server.uploads(BUCKET).is_empty());
    let verify = said(&oci, &daemon, &["image", "verify", "--image-id", id]);
    insta::assert_snapshot!(verify.replace(id, "ID"), @"
    imagectl: https://os/images cannot read images/OCID/manifest.json: the pre-authenticated request does not allow reading, has expired or was deleted
      0: 404 BucketNotFound: Either the bucket named 'images' does not exist in the namespace 'testns' or you are not authorized to access it (request ID)
      reason: STORE_DENIED
      help: make a new one for the bucket with --access-type AnyObjectReadWrite and --bucket-listing-action ListObjects, and put its URL into the file that the store's `credentials` names; then restart imaged
    ");
    insta::assert_snapshot!(said(&oci, &daemon, &["image", "list"]), @"
    imagectl: https://os/images cannot list images/: the pre-authenticated request does not allow listing, has expired or was deleted
      0: 404 BucketNotFound: Either the bucket named 'images' does not exist in the namespace 'testns' or you are not authorized to access it (request ID)
      reason: STORE_DENIED
      help: make a new one for the bucket with --access-type AnyObjectReadWrite and --bucket-listing-action ListObjects, and put its URL into the file that the store's `credentials` names; then restart imaged
    ");
    let host = daemon.json(&["host", "get"]);
    assert_eq!(host["data"]["stores"][0]["problem"], serde_json::Value::Null);
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_oci_par_of_a_prefix_takes_an_image_and_does_not_list() {
    let oci = Oci::start();
    let access = ParAccess::AnyObjectReadWrite;
    let daemon = oci.daemon_with(&table(&oci, "far", access, false, Some("hosts/a/")));
    let image = daemon.create(&oci.volume(4), &[]);
    let id = image["id"].as_str().unwrap();
    succeed(&daemon, &["image", "verify", "--image-id", id]);
    assert!(oci.keys().iter().all(|key| key.starts_with("hosts/a/")), "{:?}", oci.keys());
    insta::assert_snapshot!(said(&oci, &daemon, &["image", "list"]), @"
    imagectl: https://os/images cannot list hosts/a/images/: the pre-authenticated request does not allow listing, has expired or was deleted
      0: 404 BucketNotFound: Either the bucket named 'images' does not exist in the namespace 'testns' or you are not authorized to access it (request ID)
      reason: STORE_DENIED
      help: make a new one for the bucket with --access-type AnyObjectReadWrite and --bucket-listing-action ListObjects, and put its URL into the file that the store's `credentials` names; then restart imaged
    ");
}

#[test]
#[ignore = "needs root"]
fn root_oci_par_that_cannot_be_used_says_what_to_do() {
    let oci = Oci::start();
    let tables = [
        table(&oci, "far", ParAccess::AnyObjectReadWrite, true, None),
        table(&oci, "reads", ParAccess::AnyObjectRead, true, None),
        table(&oci, "single", ParAccess::ObjectReadWrite, false, Some("disk 1")),
    ];
    let tables = tables.concat().replace("prefix = \"disk 1\"\n", "");
    // It finds no store there, and cannot begin one.
    let tables = tables.replace("[stores.reads]", "[stores.reads]\nprefix = \"reads\"");
    let daemon = oci.daemon_with(&tables);
    daemon.json(&["image", "list"]);
    let problems = crate::oci_errors::problems(&daemon);
    insta::assert_snapshot!(settled(&oci, &problems), @r#"
    far: none
    reads: the store "reads" cannot be opened
      0: https://os/images cannot store reads/imaged-store.json: the pre-authenticated request does not allow writing, has expired or was deleted
      1: 404 BucketNotFound: Either the bucket named 'images' does not exist in the namespace 'testns' or you are not authorized to access it (request ID)
      help: make a new one for the bucket with --access-type AnyObjectReadWrite and --bucket-listing-action ListObjects, and put its URL into the file that the store's `credentials` names; then restart imaged; imaged tries again whenever the store is used
    single: the store "single" cannot be opened
      0: the pre-authenticated request is of one object, "disk 1"
      help: make one for the bucket, with --access-type AnyObjectReadWrite; `prefix` in the store's table is for what the names must begin with; imaged tries again whenever the store is used
    "#);

    // It expires while the store is open.
    oci.server.set_clock_offset(7_200_000);
    insta::assert_snapshot!(refused_capture(&oci, &daemon), @"
    imagectl: https://os/images cannot begin the upload of images/OCID/image.qcow2: the pre-authenticated request does not allow writing, has expired or was deleted
      0: 404 BucketNotFound: Either the bucket named 'images' does not exist in the namespace 'testns' or you are not authorized to access it (request ID)
      reason: STORE_DENIED
      help: make a new one for the bucket with --access-type AnyObjectReadWrite and --bucket-listing-action ListObjects, and put its URL into the file that the store's `credentials` names; then restart imaged
    ");
    // In the middle of an upload.
    oci.server.set_clock_offset(0);
    oci.server.clear_requests();
    let gone = FaultKind::Refuse { status: 404, code: "BucketNotFound".into(), retry_after: None };
    oci.server.add_fault(Fault::new("PUT", "/1", gone));
    insta::assert_snapshot!(refused_capture(&oci, &daemon), @"
    imagectl: https://os/images cannot store part N of images/OCID/image.qcow2: the pre-authenticated request does not allow writing, has expired or was deleted
      0: 404 BucketNotFound: The test asked for this BucketNotFound (request ID)
      reason: STORE_DENIED
      help: make a new one for the bucket with --access-type AnyObjectReadWrite and --bucket-listing-action ListObjects, and put its URL into the file that the store's `credentials` names; then restart imaged
    ");
    assert!(oci.server.uploads(BUCKET).is_empty());
    assert_eq!(oci.keys(), ["imaged-store.json"]);
}

struct Piece(Vec<u8>);

impl Body for Piece {
    fn piece(&self, index: usize) -> Option<&[u8]> {
        (index == 0).then_some(&self.0)
    }
}

#[tokio::test]
async fn an_object_is_written_by_a_request_for_it_alone() {
    let oci = Oci::start();
    let url = |access, object: Option<&str>| {
        let expires = oci.server.now() + 3_600_000;
        let object = object.map(str::to_owned);
        let spec = ParSpec { name: "one".into(), access, object, expires, listing: false };
        let url = format!("{}{}", oci.server.endpoint(), oci.server.create_par(BUCKET, spec));
        ParUrl::parse(&url).unwrap()
    };
    let all = ObjectPar::new(url(ParAccess::AnyObjectWrite, None), None).unwrap_err();
    let par = ObjectPar::new(url(ParAccess::ObjectWrite, Some("out/disk 1")), None).unwrap();
    assert!(!format!("{par:?}").contains("/p/"), "{par:?}");
    let upload = par.begin("host").await.unwrap();
    let mut parts = Vec::new();
    for (number, byte) in [(2, b'b'), (1, b'a')] {
        let bytes = vec![byte; 100_000];
        let sha256 = ObjectDigest(Sha256::digest(&bytes).into());
        let (offset, size) = (0, ByteSize(bytes.len() as u64));
        let part = Part { number, offset, size, body: Box::new(Piece(bytes)), sha256 };
        let etag = par.put_part(&upload, Arc::new(part)).await.unwrap();
        parts.insert(0, StoredAs { number, etag, sha256 });
    }
    // What the service put together is compared with what was sent.
    let mut others = parts.clone();
    others.reverse();
    let mixed = par.complete(&upload, &others).await.unwrap_err();
    let whole = [vec![b'a'; 100_000], vec![b'b'; 100_000]].concat();
    assert!(oci.server.read(BUCKET, "out/disk 1") == whole);
    let again = par.complete(&upload, &parts).await.unwrap_err();
    par.abort(&upload).await.unwrap();
    let said = [all, mixed, again].map(|error| settled(&oci, &error.report()));
    insta::assert_snapshot!(said.join("\n"), @"
    the pre-authenticated request is of no single object
      help: make one with --access-type ObjectWrite and --object-name, or add the object's name to the URL
    https://os/images cannot complete out/disk 1: it has put other parts together than were sent
      help: ask again; if it happens again, tell the service's people (request ID)
    https://os/images cannot complete out/disk 1: it has lost the upload
      help: look whether the object is there: an earlier order may have been carried out
    ");
}
