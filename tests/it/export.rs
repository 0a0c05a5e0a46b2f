//! Images whose objects go elsewhere: to an object of another store, to the
//! object of a pre-authenticated request, to a file.

use std::{
    fs,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use crate::{
    lab::{Config, Daemon, run, scratch, wait_for},
    oci::{BUCKET, Oci, succeed},
    oci_server::{Fault, FaultKind, ParAccess, ParSpec},
    proxy::{self, FaultPlan, FaultProxy},
    s3::volume,
    weed::Weed,
};

/// A daemon whose images go to a directory, with the store `far` of `weed`, by
/// way of `address`.
fn daemon(weed: &Weed, address: std::net::SocketAddr, dir: &Path) -> Daemon {
    Daemon::start(&config(weed, address, dir))
}

fn config(weed: &Weed, address: std::net::SocketAddr, dir: &Path) -> Config {
    let near = format!(
        "default_store = \"near\"\n[stores.near]\nkind = \"directory\"\npath = {:?}\n\
         min_free = \"1MiB\"\n",
        dir.join("near")
    );
    let far = weed.config(address, dir).replace("default_store = \"far\"\n", "");
    Config { lines: format!("boot_volume_dirs = [{dir:?}]\n{near}{far}"), ..Config::default() }
}

fn id_of(image: &serde_json::Value) -> &str {
    image["id"].as_str().unwrap()
}

/// The object of image `id` in the directory store.
fn object_in(dir: &Path, id: &str) -> PathBuf {
    dir.join("near/images").join(id).join("image.qcow2")
}

fn same(a: &Path, b: &Path) {
    run("cmp", &[a.to_str().unwrap(), b.to_str().unwrap()]);
}

/// `file` is a sound image of `volume`.
fn judge(file: &Path, volume: &Path) {
    let (file, volume) = (file.to_str().unwrap(), volume.to_str().unwrap());
    run("qemu-img", &["check", "-q", "-f", "qcow2", file]);
    run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", volume, file]);
}

fn to_far<'a>(id: &'a str, name: &'a str) -> [&'a str; 9] {
    ["image", "export", "to-object", "--image-id", id, "--store", "far", "--name", name]
}

/// What imagectl says, without what differs from run to run.
fn settled(text: &str, dir: &Path, id: &str) -> String {
    let text = text.find("imagectl: ").map_or(text, |at| &text[at..]);
    text.replace(dir.to_str().unwrap(), "/srv").replace(id, "ID")
}

/// Whether `what` is in any file below `dir`.
pub fn is_in_files(dir: &Path, what: &str) -> bool {
    let found = std::process::Command::new("grep")
        .args(["-r", "-a", "-q", "-F", what])
        .arg(dir)
        .status()
        .unwrap();
    found.success()
}

#[test]
#[ignore = "needs root, QEMU's tools and SeaweedFS"]
fn root_export_to_an_object_of_another_store() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let weed = Weed::start();
    let daemon = daemon(&weed, weed.address(), dir.path());
    let volume = volume(dir.path(), 40);
    let image = daemon.create(&volume, &[]);
    let id = id_of(&image);
    for name in ["web-1", "vm/disk 1+%.qcow2", "Übung/💾"] {
        let output = daemon.imagectl(&to_far(id, name));
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let place = format!("the object is at http://{}/images/{name}: ", weed.address());
        assert!(said.starts_with(&place) && said.contains("bytes), ETag \""), "{said}");
        let fetched = dir.path().join("fetched.qcow2");
        weed.python(&format!("s3.download_file(bucket, {name:?}, {fetched:?})"));
        same(&fetched, &object_in(dir.path(), id));
        judge(&fetched, &volume);
    }
    assert_eq!(weed.uploads(), 0);
    let refused = daemon.refusal(&to_far(id, "web-1"));
    insta::assert_snapshot!(settled(&refused, dir.path(), id).replace(&weed.address().to_string(), "s3"), @"
    imagectl: there is an object http://s3/images/web-1
      reason: OBJECT_EXISTS
      help: choose another name, or say --overwrite to replace it
    ");
    succeed(&daemon, &[&to_far(id, "web-1")[..], &["--overwrite"]].concat());

    // Asking twice is asking once, and the name is the image's by default.
    let named = ["image", "export", "to-object", "--image-id", id, "--store", "far"];
    let named = [&named[..], &["--retry-token", "t"]].concat();
    let [first, again] = [daemon.json(&named), daemon.json(&named)];
    assert_eq!(first["data"]["id"], again["data"]["id"]);
    assert_eq!(first["data"]["operation-type"], "EXPORT_IMAGE");
    assert_eq!(first["data"]["status"], "SUCCEEDED");
    assert!(weed.keys().contains(&format!("{id}.qcow2")), "{:?}", weed.keys());
    let said = ["images/x", "../x", "a//b", "imaged-store.json"]
        .map(|name| settled(&daemon.refusal(&to_far(id, name)), dir.path(), id));
    insta::assert_snapshot!(said.concat(), @r#"
    imagectl: the object's name "images/x" is among the store's own
      at --name
      reason: INVALID_PARAMETER
      help: choose another, such as exports/web-1.qcow2
    imagectl: the object's name "../x" has "." or ".." between its slashes, which is lost on the way
      at --name
      reason: INVALID_PARAMETER
      help: choose another, such as exports/web-1.qcow2
    imagectl: the object's name "a//b" has an empty part: it begins or ends with a slash, or has two in a row
      at --name
      reason: INVALID_PARAMETER
      help: choose another, such as exports/web-1.qcow2
    imagectl: the object's name "imaged-store.json" is among the store's own
      at --name
      reason: INVALID_PARAMETER
      help: choose another, such as exports/web-1.qcow2
    "#);
    let mut to_near = to_far(id, "x");
    to_near[6] = "near";
    insta::assert_snapshot!(settled(&daemon.refusal(&to_near), dir.path(), id), @r#"
    imagectl: the store "near" is a directory: it has no objects
      reason: STORE_REFUSED
      help: name a store in a bucket, or use `imagectl image export to-file`
    "#);
    to_near[6] = "nowhere";
    insta::assert_snapshot!(settled(&daemon.refusal(&to_near), dir.path(), id), @r#"
    imagectl: there is no store "nowhere"
      reason: STORE_NOT_FOUND
      help: `imagectl host get` lists the stores
    "#);
    let other = "ocid1.image.imaged..none";
    insta::assert_snapshot!(daemon.refusal(&to_far(other, "x")), @"
    imagectl: there is no image ocid1.image.imaged..none
      reason: IMAGE_NOT_FOUND
      help: `imagectl image list` shows the images of this host's stores
    ");
}

#[test]
#[ignore = "needs root, QEMU's tools and SeaweedFS"]
fn root_export_from_a_bucket_to_another() {
    let oci = Oci::start();
    let weed = Weed::start();
    let dir = oci.dir.path();
    let s3 = weed.config(weed.address(), dir).replace("default_store = \"far\"\n", "");
    let s3 = s3.replace("[stores.far]", "[stores.s3]");
    let tables = format!("{}{s3}", oci.table("far", &oci.server.endpoint(), ""));
    let daemon = oci.daemon_with(&tables);
    let volume = oci.volume(40);
    let image = daemon.create(&volume, &[]);
    let id = id_of(&image);
    let mut export = to_far(id, "from oci");
    export[6] = "s3";
    succeed(&daemon, &export);
    let fetched = oci.path("fetched.qcow2");
    weed.python(&format!("s3.download_file(bucket, 'from oci', {fetched:?})"));
    judge(&fetched, &volume);
    // And within one.
    oci.server.add_fault(Fault::new("POST", "", FaultKind::LoseAnswer).after(1));
    succeed(&daemon, &to_far(id, "out/copy"));
    assert!(oci.server.read(BUCKET, "out/copy") == fs::read(&fetched).unwrap());
    assert!(oci.server.uploads(BUCKET).is_empty());
    println!("peak memory of the daemon: {} MiB", daemon.peak_memory() >> 20);
}

/// A URL for the object `name`, and its secret.
pub fn url(oci: &Oci, access: ParAccess, name: Option<&str>) -> (String, String) {
    let object = name.map(str::to_owned);
    let expires = oci.server.now() + 3_600_000;
    let spec = ParSpec { name: "out".into(), access, object, expires, listing: false };
    let url = format!("{}{}", oci.server.endpoint(), oci.server.create_par(BUCKET, spec));
    let token = url.split("/p/").nth(1).unwrap().split('/').next().unwrap().to_owned();
    assert!(token.len() > 20, "{token}");
    (url, token)
}

/// The arguments for an export to `url`, which lies in a file.
pub fn to_uri(oci: &Oci, id: &str, url: &str) -> Vec<String> {
    let file = oci.path("out.url");
    fs::write(&file, format!("{url}\n")).unwrap();
    let uri = format!("file://{}", file.display());
    ["image", "export", "to-object-uri", "--image-id", id, "--uri", &uri]
        .map(str::to_owned)
        .to_vec()
}

fn refused_uri(oci: &Oci, daemon: &Daemon, id: &str, url: &str) -> String {
    let args = to_uri(oci, id, url);
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let said = daemon.refusal(&args);
    assert!(!said.replace("/p/TOKEN/", "").contains("/p/"), "{said}");
    crate::oci_errors::settled(oci, &said)
}

#[test]
#[ignore = "needs root, QEMU's tools and SeaweedFS"]
fn root_export_to_the_object_of_a_url_which_stays_a_secret() {
    let oci = Oci::start();
    let weed = Weed::start();
    let dir = oci.dir.path();
    let state = tempfile::tempdir().unwrap();
    let lines = format!("boot_volume_dirs = [{dir:?}]\n{}", weed.config(weed.address(), dir));
    let config = Config { lines, ..Config::default() };
    let daemon = Daemon::start_logged(state.path(), &config);
    let volume = oci.volume(40);
    let image = daemon.create(&volume, &[]);
    let id = id_of(&image);
    let exported = |access, name: &str| {
        let (url, token) = url(&oci, access, Some(name));
        let args = to_uri(&oci, id, &url);
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let output = daemon.imagectl(&args);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        assert!(output.status.success() && !said.contains("/p/"), "{said}");
        let fetched = oci.path("fetched.qcow2");
        fs::write(&fetched, oci.server.read(BUCKET, name)).unwrap();
        judge(&fetched, &volume);
        token
    };
    let mut tokens = vec![exported(ParAccess::ObjectReadWrite, "out/disk 1")];
    // Answers are lost on the way: of the beginning, of a part, of the end.
    for access in [ParAccess::ObjectReadWrite, ParAccess::ObjectWrite] {
        oci.server.add_fault(Fault::new("PUT", "/1", FaultKind::LoseAnswer));
        oci.server.add_fault(Fault::new("POST", "", FaultKind::LoseAnswer));
        tokens.push(exported(access, &format!("out/{access:?}")));
    }
    assert!(oci.server.uploads(BUCKET).is_empty());

    // There is an object already.
    let (there, token) = url(&oci, ParAccess::ObjectWrite, Some("out/disk 1"));
    tokens.push(token);
    let mut said = refused_uri(&oci, &daemon, id, &there);
    // It allows no writing; it has expired; it is no such URL.
    let (reads, token) = url(&oci, ParAccess::ObjectRead, Some("out/read"));
    tokens.push(token);
    said += &refused_uri(&oci, &daemon, id, &reads);
    let (late, token) = url(&oci, ParAccess::ObjectWrite, Some("out/late"));
    tokens.push(token);
    oci.server.set_clock_offset(7_200_000);
    said += &refused_uri(&oci, &daemon, id, &late);
    oci.server.set_clock_offset(0);
    for wrong in [
        "https://os.example.com/p/hushhush/n/ns/b/images/",
        "https://os.example.com/p/hushhush/n/ns/b/images/o/",
        "http://os.example.com/p/hushhush/n/ns/b/images/o/disk",
    ] {
        said += &refused_uri(&oci, &daemon, id, wrong);
    }
    tokens.push("hushhush".into());
    insta::assert_snapshot!(said, @"
    imagectl: there is an object https://os/images/out/disk 1
      reason: OBJECT_EXISTS
      help: choose another name, or say --overwrite to replace it
    imagectl: https://os/images cannot begin the upload of out/read: the pre-authenticated request does not allow writing, has expired or was deleted
      0: 404 BucketNotFound: Either the bucket named 'images' does not exist in the namespace 'testns' or you are not authorized to access it (request ID)
      reason: STORE_DENIED
      help: make a new one for the object with --access-type ObjectWrite, and ask again with its URL
    imagectl: https://os/images cannot begin the upload of out/late: the pre-authenticated request does not allow writing, has expired or was deleted
      0: 404 BucketNotFound: Either the bucket named 'images' does not exist in the namespace 'testns' or you are not authorized to access it (request ID)
      reason: STORE_DENIED
      help: make a new one for the object with --access-type ObjectWrite, and ask again with its URL
    imagectl: the URI is not https://HOST/p/TOKEN/n/NAMESPACE/b/BUCKET/o/OBJECT
      at --uri
      reason: INVALID_PARAMETER
      help: make a pre-authenticated request for one object, with --access-type ObjectWrite, and give its whole URL
    imagectl: the URI names no object
      at --uri
      reason: INVALID_PARAMETER
      help: add the object's name to it, or make a pre-authenticated request for one object
    imagectl: the URI is no https one: its secret would be seen on the way
      at --uri
      reason: INVALID_PARAMETER
      help: make a pre-authenticated request for one object, with --access-type ObjectWrite, and give its whole URL
    ");
    // It is taken away in the middle.
    let gone = FaultKind::Refuse { status: 404, code: "BucketNotFound".into(), retry_after: None };
    oci.server.add_fault(Fault::new("PUT", "/2", gone));
    let (taken, token) = url(&oci, ParAccess::ObjectWrite, Some("out/taken"));
    tokens.push(token);
    insta::assert_snapshot!(refused_uri(&oci, &daemon, id, &taken), @"
    imagectl: https://os/images cannot store part N of out/taken: the pre-authenticated request does not allow writing, has expired or was deleted
      0: 404 BucketNotFound: The test asked for this BucketNotFound (request ID)
      reason: STORE_DENIED
      help: make a new one for the object with --access-type ObjectWrite, and ask again with its URL
    ");
    assert!(oci.server.uploads(BUCKET).is_empty());

    // The daemon dies in the middle: the next one aborts it.
    oci.server.add_fault(Fault::new("PUT", "/3", FaultKind::Delay(Duration::from_secs(60))));
    let (dies, token) = url(&oci, ParAccess::ObjectWrite, Some("out/dies"));
    tokens.push(token);
    let args = to_uri(&oci, id, &dies);
    let mut args: Vec<_> = args.iter().map(String::as_str).collect();
    args.extend(["--wait-for-state", "ACCEPTED"]);
    let work = daemon.json(&args)["data"]["id"].as_str().unwrap().to_owned();
    wait_for("parts to be stored", Duration::from_secs(30), || {
        oci.server.uploads(BUCKET).first().filter(|upload| !upload.parts.is_empty()).map(drop)
    });
    daemon.kill();
    let daemon = Daemon::start_logged(state.path(), &config);
    let request = daemon.json(&["work-request", "get", "--work-request-id", &work]);
    assert_eq!(request["data"]["status"], "FAILED");
    let told = request["data"]["errors"][0]["message"].as_str().unwrap();
    insta::assert_snapshot!(crate::oci_errors::settled(&oci, told), @"
    imaged died before the work was done
      help: nothing of it is left; export the image again, with a new retry token
    ");
    assert!(oci.server.uploads(BUCKET).is_empty());

    daemon.stop();
    assert!(is_in_files(state.path(), "work request"), "the log is there");
    for token in tokens {
        assert!(!is_in_files(state.path(), &token), "{token} is in the log or in the journal");
    }
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_export_to_a_file() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let lines = format!("boot_volume_dirs = [{:?}]\n", dir.path());
    let store = Some(dir.path().join("near"));
    let daemon = Daemon::start(&Config { lines, store, ..Config::default() });
    let volume = volume(dir.path(), 200);
    let image = daemon.create(&volume, &[]);
    let id = id_of(&image);
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    let file = out.join("web-1.qcow2");
    let path = file.to_str().unwrap();
    let export = ["image", "export", "to-file", "--image-id", id, "--file", path];
    let answer = daemon.json(&export);
    assert_eq!(answer["data"]["object-digest"], image["object-digest"]);
    assert_eq!(answer["data"]["size-bytes"], image["object-size-bytes"]);
    same(&file, &object_in(dir.path(), id));
    judge(&file, &volume);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    insta::assert_snapshot!(settled(&daemon.refusal(&export), dir.path(), id), @"
    imagectl: the file /srv/out/web-1.qcow2 cannot be written
      0: File exists (os error 17)
      help: choose another name, or say --force to replace it
    ");
    fs::write(&file, "old").unwrap();
    succeed(&daemon, &[&export[..], &["--force"]].concat());
    same(&file, &object_in(dir.path(), id));

    // Killed in the middle: the name is not there, nor anything else.
    fs::remove_file(&file).unwrap();
    let mut killed = 0;
    for micros in (0..12).map(|nth| 30_000 + nth * 15_000) {
        let mut child =
            daemon.command(&export).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(micros));
        child.kill().unwrap();
        let ended = child.wait().unwrap();
        let there = fs::read_dir(&out).unwrap().count();
        if ended.success() {
            fs::remove_file(&file).unwrap();
        } else {
            assert!(
                there == 0
                    || fs::metadata(&file).unwrap().len()
                        == fs::metadata(object_in(dir.path(), id)).unwrap().len()
            );
            let _ = fs::remove_file(&file);
            killed += 1;
        }
    }
    println!("killed {killed} of 12");
    assert!(killed > 0);

    // Not while somebody reads it, which may be slowly.
    let fifo = daemon.command(&export).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let reader = fifo.id().to_string();
    wait_for("imagectl to read", Duration::from_secs(10), || {
        let opened = fs::read_dir(format!("/proc/{reader}/fd")).unwrap();
        opened
            .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
            .any(|to| to.starts_with(&out))
            .then_some(())
    });
    std::thread::sleep(Duration::from_millis(20));
    run("kill", &["-s", "STOP", &reader]);
    let delete = ["image", "delete", "--force", "--image-id", id];
    insta::assert_snapshot!(settled(&daemon.refusal(&delete), dir.path(), id), @"
    imagectl: a client of imaged reads image ID
      reason: IMAGE_LOCKED
      retry: in 30s
      help: wait for its end
    ");
    run("kill", &["-s", "KILL", &reader]);
    drop(fifo.wait_with_output());
    println!("peak memory of the daemon: {} MiB", daemon.peak_memory() >> 20);

    // Bytes that are not what was stored.
    let object = fs::File::options().write(true).open(object_in(dir.path(), id)).unwrap();
    object.write_all_at(b"damage", 100 << 20).unwrap();
    let output = daemon.imagectl(&export);
    assert_eq!(output.status.code(), Some(6));
    let said = String::from_utf8(output.stderr).unwrap();
    insta::assert_snapshot!(settled(&said, dir.path(), id), @"
    imagectl: the image's object is not what was stored
      0: part 10, at offset 94437376 of the object, has another SHA-256
      reason: IMAGE_CORRUPT
      help: make the image again, and look after the store's disks; nothing of it was exported
    ");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
}

#[test]
#[ignore = "needs root, QEMU's tools and SeaweedFS"]
fn root_export_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    let state = tempfile::tempdir().unwrap();
    let config = config(&weed, proxy.address(), dir.path());
    let daemon = Daemon::start_in(state.path(), &config);
    let volume = volume(dir.path(), 100);
    let image = daemon.create(&volume, &[]);
    let id = id_of(&image);
    let keys = weed.keys();

    // A bad network: whole or absent.
    let (mut made, mut failed) = (0, 0);
    for seed in 0..8 {
        proxy.plan(FaultPlan::random(seed, [50, 150, 300][usize::try_from(seed % 3).unwrap()]));
        let name = format!("round-{seed}");
        let output = daemon.imagectl(&to_far(id, &name));
        proxy.plan(FaultPlan::none());
        match output.status.success() {
            true => {
                let fetched = dir.path().join("fetched.qcow2");
                weed.python(&format!("s3.download_file(bucket, {name:?}, {fetched:?})"));
                same(&fetched, &object_in(dir.path(), id));
                weed.python(&format!("s3.delete_object(Bucket=bucket, Key={name:?})"));
                made += 1;
            }
            false => failed += 1,
        }
    }
    println!("{made} made, {failed} failed");
    assert!(made > failed);
    succeed(&daemon, &["store", "gc", "far"]);
    assert_eq!((weed.keys(), weed.uploads()), (keys.clone(), 0));

    // Somebody asks for its end; meanwhile it is EXPORTING and stays.
    let slow = || {
        FaultPlan::rule(|request, _| match proxy::query(&request.target, "partNumber") {
            Some(_) => proxy::Fault::Delay(Duration::from_secs(3)),
            None => proxy::Fault::None,
        })
    };
    proxy.plan(slow());
    let begin = || {
        let args = [&to_far(id, "ends")[..], &["--wait-for-state", "IN_PROGRESS"]].concat();
        daemon.json(&args)["data"]["id"].as_str().unwrap().to_owned()
    };
    let work = begin();
    let shown = daemon.json(&["image", "get", "--image-id", id]);
    assert_eq!(shown["data"]["lifecycle-state"], "EXPORTING");
    let listed = daemon.json(&["image", "list", "--lifecycle-state", "EXPORTING"]);
    assert_eq!(listed["data"][0]["id"], id);
    let delete = daemon.refusal(&["image", "delete", "--force", "--image-id", id]);
    insta::assert_snapshot!(settled(&delete, dir.path(), id).replace(&work, "WORK"), @"
    imagectl: work request WORK uses image ID
      reason: IMAGE_LOCKED
      retry: in 30s
      help: wait for it, or cancel it
    ");
    wait_for("the upload", Duration::from_secs(20), || (weed.uploads() == 1).then_some(()));
    succeed(&daemon, &["work-request", "cancel", "--work-request-id", &work]);
    let watched = daemon.imagectl(&["work-request", "watch", "--work-request-id", &work]);
    assert_eq!(watched.status.code(), Some(5));
    assert_eq!((weed.keys(), weed.uploads()), (keys.clone(), 0));
    let shown = daemon.json(&["image", "get", "--image-id", id]);
    assert_eq!(shown["data"]["lifecycle-state"], "AVAILABLE");

    // The daemon dies; the next one aborts the upload.
    let work = begin();
    wait_for("the upload", Duration::from_secs(20), || (weed.uploads() == 1).then_some(()));
    std::thread::sleep(Duration::from_millis(500));
    daemon.kill();
    proxy.plan(FaultPlan::none());
    let daemon = Daemon::start_in(state.path(), &config);
    assert_eq!((weed.keys(), weed.uploads()), (keys.clone(), 0));
    let failure = |daemon: &Daemon, work: &str| {
        let request = daemon.json(&["work-request", "get", "--work-request-id", work]);
        assert_eq!(request["data"]["status"], "FAILED");
        request["data"]["errors"][0]["message"].as_str().unwrap().to_owned()
    };
    insta::assert_snapshot!(failure(&daemon, &work), @"
    imaged died before the work was done
      help: nothing of it is left; export the image again, with a new retry token
    ");

    // The store is away when it starts again: it is aborted later.
    proxy.plan(slow());
    let args = [&to_far(id, "ends")[..], &["--wait-for-state", "IN_PROGRESS"]].concat();
    let work = daemon.json(&args)["data"]["id"].as_str().unwrap().to_owned();
    wait_for("the upload", Duration::from_secs(20), || (weed.uploads() == 1).then_some(()));
    std::thread::sleep(Duration::from_millis(500));
    daemon.kill();
    proxy.plan(FaultPlan::none());
    proxy.away();
    let daemon = Daemon::start_in(state.path(), &config);
    insta::assert_snapshot!(failure(&daemon, &work), @"
    imaged died before the work was done
      help: its upload could not be aborted now: the next start of imaged, or `imagectl store gc far`, does that; then export the image again, with a new retry token
    ");
    proxy.back();
    let gone = daemon.json(&["store", "gc", "far"]);
    assert_eq!(gone["data"]["uploads"], 1);
    assert_eq!((weed.keys(), weed.uploads()), (keys.clone(), 0));

    // The object is not what was stored.
    let object = fs::File::options().write(true).open(object_in(dir.path(), id)).unwrap();
    object.write_all_at(b"damage", 60 << 20).unwrap();
    let output = daemon.imagectl(&to_far(id, "damaged"));
    assert_eq!(output.status.code(), Some(6));
    let said = String::from_utf8(output.stderr).unwrap();
    insta::assert_snapshot!(settled(&said, dir.path(), id), @"
    imagectl: the image's object is not what was stored
      0: part 6, at offset 52494336 of the object, has another SHA-256
      reason: IMAGE_CORRUPT
      help: make the image again, and look after the store's disks; nothing of it was exported
    ");
    assert_eq!((weed.keys(), weed.uploads()), (keys.clone(), 0));
    // The bucket is gone.
    weed.python(
        "for o in s3.list_objects_v2(Bucket=bucket).get('Contents', []):\n  \
         s3.delete_object(Bucket=bucket, Key=o['Key'])\n\
         s3.delete_bucket(Bucket=bucket)",
    );
    let said = settled(&daemon.refusal(&to_far(id, "x")), dir.path(), id);
    let said = said.replace(&proxy.address().to_string(), "s3");
    insta::assert_snapshot!(said.split(" (request").next().unwrap(), @"
    imagectl: http://s3/images cannot begin the upload of x
      0: 404 NoSuchBucket: The specified bucket does not exist
    ");
}
