//! Captures straight into a bucket, against the two steps that people use:
//! a conversion to a local file and an upload.

use std::{
    cell::RefCell,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    check, cold,
    lab::{self, Config, Daemon},
    oci_server::{ApiKey, OciServer, Options},
    peers::{S3_CLIENTS, S3Client, S3Clients, Try, UploadManager, convert, timed, versus},
    report::Report,
    stages::Stages,
    volumes::Volumes,
    weed::{BUCKET, Weed},
};

/// What a peer's object is called.
const PEER: &str = "peer.qcow2";

/// A daemon whose images go where `table` says.
pub fn daemon(table: &str) -> Daemon {
    let lines = format!(
        "boot_volume_dirs = [\"/dev\"]\nrestore_dirs = [\"/dev\"]\nencode_threads = \"all\"\n{table}"
    );
    Daemon::start(&Config { lines, ..Config::default() })
}

/// A whole capture of `device`, and its image.
pub fn capture(daemon: &Daemon, device: &Path) -> (Duration, String) {
    cold();
    // imagectl is in memory, too.
    assert!(daemon.imagectl(&["host", "get"]).status.success());
    let mut image = String::new();
    let took = timed(|| {
        let made = daemon.create(device, &["--compression", "zstd"]);
        made["id"].as_str().unwrap().clone_into(&mut image);
    });
    (took, image)
}

/// Deletes an image.
fn delete(daemon: &Daemon, id: &str) {
    assert!(daemon.imagectl(&["image", "delete", "--force", "--image-id", id]).status.success());
}

/// Into SeaweedFS, on the same disk and cores: against qemu-img and the
/// faster of s5cmd and aws, and against the limit that the stages set.
pub fn s3(volumes: &Volumes, report: &mut Report) {
    if !["store-s3", "store-s3-limit", "store-s3-of-limit"].iter().any(|name| report.wants(name)) {
        return;
    }
    let device = volumes.device("debian");
    let dir = tempfile::tempdir_in(lab::scratch()).unwrap();
    let weed = Weed::start();
    let clients = S3Clients::of(weed.address());
    let daemon = daemon(&weed.config(weed.address(), dir.path()));
    let stages = RefCell::new(Stages::new(device, &weed, &dir.path().join("s3.keys")));
    let [file, fetched] = [PEER, "fetched.qcow2"].map(|name| dir.path().join(name));
    let verify = |name: &str| {
        clients.copy(S3Client::S5cmd, &S3Clients::url(name), fetched.to_str().unwrap());
        check(&fetched, device);
        fs::remove_file(&fetched).unwrap();
    };

    let ours = |round| {
        let (took, id) = capture(&daemon, device);
        if round == 0 {
            verify(&format!("images/{id}/image.qcow2"));
        }
        delete(&daemon, &id);
        stages.borrow_mut().round();
        clients.remove("stages");
        took
    };
    let two_steps = |client: S3Client| -> Try<'_> {
        let (file, verify, clients) = (&file, &verify, &clients);
        Box::new(move |round| {
            cold();
            clients.warm(client);
            let took = timed(|| {
                convert(device, file);
                clients.copy(client, file.to_str().unwrap(), &S3Clients::url(PEER));
            });
            if round == 0 {
                verify(PEER);
            }
            clients.remove(PEER);
            fs::remove_file(file).unwrap();
            took
        })
    };
    let mut peers = S3_CLIENTS.map(|(name, client)| (name, two_steps(client)));
    let ours = versus(report, "store-s3", Box::new(ours), &mut peers);
    stages.borrow().report(report, ours);
}

/// A server that speaks OCI's API, in this process, with what is peculiar to
/// it; a profile for it, and the tables of a store in its bucket.
pub fn oci_service(dir: &Path, change: impl FnOnce(&mut Options)) -> (OciServer, PathBuf, String) {
    let key = ApiKey::generate();
    let profile = key.write_profile(&dir.join("client"), "DEFAULT", "x-test-1").unwrap();
    fs::set_permissions(&profile, fs::Permissions::from_mode(0o600)).unwrap();
    let mut options = Options::new(dir.join("server"), vec![key.trusted()]);
    change(&mut options);
    let server = OciServer::start(options);
    server.create_bucket(BUCKET);
    let table = format!(
        "default_store = \"far\"\n[stores.far]\nkind = \"oci\"\nendpoint = {:?}\n\
         bucket = {BUCKET:?}\ncredentials = {profile:?}\n",
        server.endpoint()
    );
    (server, profile, table)
}

/// Into a server that speaks OCI's API, in this process: against qemu-img and
/// the official SDK's upload manager.
pub fn oci(volumes: &Volumes, report: &mut Report) {
    if !report.wants("store-oci") {
        return;
    }
    let device = volumes.device("debian");
    let dir = tempfile::tempdir_in(lab::scratch()).unwrap();
    let (server, profile, table) = oci_service(dir.path(), |_| {});
    let daemon = daemon(&table);
    let manager = RefCell::new(UploadManager::start(&profile, &server.endpoint(), BUCKET));
    let [file, fetched] = [PEER, "fetched.qcow2"].map(|name| dir.path().join(name));
    let verify = |name: &str| {
        fs::write(&fetched, server.read(BUCKET, name)).unwrap();
        check(&fetched, device);
        fs::remove_file(&fetched).unwrap();
    };

    let ours = |round| {
        let (took, id) = capture(&daemon, device);
        if round == 0 {
            verify(&format!("images/{id}/image.qcow2"));
        }
        delete(&daemon, &id);
        took
    };
    let two_steps = |part_size: Option<u64>| -> Try<'_> {
        let (file, verify, server, manager) = (&file, &verify, &server, &manager);
        Box::new(move |round| {
            cold();
            lab::run("qemu-img", &["--version"]);
            let took = timed(|| {
                convert(device, file);
                manager.borrow_mut().upload(PEER, file, part_size);
            });
            if round == 0 {
                verify(PEER);
            }
            server.remove(BUCKET, PEER);
            fs::remove_file(file).unwrap();
            took
        })
    };
    // By itself it makes parts of 128 MiB, so that a smaller object is sent
    // by one thread alone.
    let mut peers = [("sdk", two_steps(None)), ("sdk-10MiB-parts", two_steps(Some(10 << 20)))];
    versus(report, "store-oci", Box::new(ours), &mut peers);
}
