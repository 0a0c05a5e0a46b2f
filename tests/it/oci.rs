//! Images in OCI Object Storage: a server that speaks its API and verifies
//! every signature, and the official SDK, which judges both.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    lab::{Config, Daemon, Guest, python, run, scratch},
    oci_server::{ApiKey, Fault, FaultKind, OciServer, Options},
    proxy::{FaultPlan, FaultProxy},
    s3::volume,
};

/// The bucket that there is.
pub const BUCKET: &str = "images";

/// The server with one bucket, and a profile for it.
pub struct Oci {
    pub server: OciServer,
    pub dir: tempfile::TempDir,
    profile: PathBuf,
}

impl Oci {
    /// Starts one.
    pub fn start() -> Self {
        Self::start_as(|_| {})
    }

    /// Starts one that `change` makes peculiar.
    pub fn start_as(change: impl FnOnce(&mut Options)) -> Self {
        let dir = tempfile::tempdir_in(scratch()).unwrap();
        let key = ApiKey::generate();
        let profile = key.write_profile(&dir.path().join("client"), "DEFAULT", "x-test-1").unwrap();
        fs::set_permissions(&profile, fs::Permissions::from_mode(0o600)).unwrap();
        let mut options = Options::new(dir.path().join("server"), vec![key.trusted()]);
        change(&mut options);
        let server = OciServer::start(options);
        server.create_bucket(BUCKET);
        Self { server, dir, profile }
    }

    /// A file of the test's own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A volume of `noisy` MiB of noise, and some text.
    pub fn volume(&self, noisy: u64) -> PathBuf {
        volume(self.dir.path(), noisy)
    }

    /// The table of the store `name`, by way of `endpoint`.
    pub fn table(&self, name: &str, endpoint: &str, more: &str) -> String {
        let credentials = &self.profile;
        format!(
            "[stores.{name}]\nkind = \"oci\"\nendpoint = {endpoint:?}\nbucket = {BUCKET:?}\n\
             credentials = {credentials:?}\n{more}\n"
        )
    }

    /// A daemon whose images go to the store `far`, by way of `endpoint`.
    pub fn daemon(&self, endpoint: &str, more: &str) -> Daemon {
        self.daemon_with(&self.table("far", endpoint, more))
    }

    /// A daemon whose images go to the store `far` of `tables`.
    pub fn daemon_with(&self, tables: &str) -> Daemon {
        Daemon::start(&self.config(tables))
    }

    /// Its configuration.
    pub fn config(&self, tables: &str) -> Config {
        let dirs = self.dir.path();
        let lines = format!("boot_volume_dirs = [{dirs:?}]\ndefault_store = \"far\"\n{tables}");
        Config { lines, ..Config::default() }
    }

    /// Runs Python with the official SDK: `client` is the client, `ns` and
    /// `bucket` say where.
    pub fn python(&self, script: &str) -> String {
        let (profile, endpoint) = (&self.profile, self.server.endpoint());
        let trust = match self.server.ca_pem_path() {
            Some(file) => format!("client.base_client.session.verify = {file:?}\n"),
            None => String::new(),
        };
        python(&format!(
            "import oci, json, os\nfrom oci.object_storage import ObjectStorageClient\n\
             for name in ('REQUESTS_CA_BUNDLE', 'CURL_CA_BUNDLE'): os.environ.pop(name, None)\n\
             config = oci.config.from_file({profile:?})\n\
             client = ObjectStorageClient(config, service_endpoint={endpoint:?},\n  \
             retry_strategy=oci.retry.NoneRetryStrategy())\n{trust}\
             ns, bucket = client.get_namespace().data, {BUCKET:?}\n{script}"
        ))
    }

    /// The object of image `id`, fetched by the SDK, is a sound image of
    /// `volume`.
    pub fn judge(&self, id: &str, volume: &Path) {
        let object = self.fetched(id);
        let (object, volume) = (object.to_str().unwrap(), volume.to_str().unwrap());
        run("qemu-img", &["check", "-q", "-f", "qcow2", object]);
        run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", volume, object]);
    }

    /// The object of image `id`, fetched by the SDK.
    pub fn fetched(&self, id: &str) -> PathBuf {
        let object = self.path("fetched.qcow2");
        self.python(&format!(
            "got = client.get_object(ns, bucket, 'images/{id}/image.qcow2')\n\
             with open({object:?}, 'wb') as file:\n  \
             for chunk in got.data.raw.stream(1 << 20, decode_content=False): file.write(chunk)\n"
        ));
        object
    }

    /// Names of all objects, in order.
    pub fn keys(&self) -> Vec<String> {
        self.server.objects(BUCKET).into_iter().map(|object| object.name).collect()
    }
}

/// Runs imagectl, which must succeed.
pub fn succeed(daemon: &Daemon, args: &[&str]) {
    let output = daemon.imagectl(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The objects of the image `id`.
fn of(id: &str) -> Vec<String> {
    let files = ["extents.blake3", "image.qcow2", "manifest.json", "record.json"];
    files.iter().map(|file| format!("images/{id}/{file}")).collect()
}

fn goes_there_and_comes_back(oci: &Oci, daemon: &Daemon) {
    let volume = oci.volume(40);
    let image = daemon.create(&volume, &[]);
    let id = image["id"].as_str().unwrap();
    assert_eq!(image["store"], "far");
    oci.judge(id, &volume);
    succeed(daemon, &["image", "verify", "--image-id", id]);

    assert_eq!(oci.keys(), [vec!["imaged-store.json".into()], of(id)].concat());
    assert!(oci.server.uploads(BUCKET).is_empty());
    let object = oci.server.object(BUCKET, &format!("images/{id}/image.qcow2")).unwrap();
    assert!(object.headers.contains_key("opc-multipart-sha256"), "{:?}", object.headers);
    assert!(object.headers.contains_key("opc-meta-imaged-upload"), "{:?}", object.headers);
    let refused: Vec<_> = oci.server.requests().into_iter().filter(|r| r.status == 401).collect();
    assert!(refused.is_empty(), "{refused:?}");

    succeed(daemon, &["image", "delete", "--force", "--image-id", id]);
    assert_eq!(oci.keys(), ["imaged-store.json"]);
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_oci_an_image_goes_there_is_read_back_and_deleted() {
    let oci = Oci::start();
    let daemon = oci.daemon(&oci.server.endpoint(), "");
    goes_there_and_comes_back(&oci, &daemon);
}

#[test]
#[ignore = "needs root and QEMU"]
fn qemu_oci_a_running_guest_goes_there() {
    let oci = Oci::start();
    let guest = Guest::boot();
    let of_guest = crate::live::config(&guest);
    let table = oci.table("far", &oci.server.endpoint(), "");
    let lines = format!("{}\ndefault_store = \"far\"\n{table}", of_guest.lines);
    let daemon = Daemon::start(&Config { lines, ..of_guest });
    crate::live::start_writer(&guest);
    let image = crate::live::capture(&daemon, &[]);
    let id = image["id"].as_str().unwrap();
    let object = oci.fetched(id);
    run("qemu-img", &["check", "-q", "-f", "qcow2", object.to_str().unwrap()]);
    crate::live::assert_prefix(&crate::live::records(&object, true));
    succeed(&daemon, &["image", "verify", "--image-id", id]);
    crate::live::assert_nothing_left(&guest);
    let local = run("du", &["-sk", daemon.dir().to_str().unwrap()]);
    println!("peak of memory: {} MiB, on local disk: {local}", daemon.peak_memory() >> 20);
    let kib: u64 = local.split_whitespace().next().unwrap().parse().unwrap();
    assert!(kib < 32 << 10, "something is staged: {local}");
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_oci_an_image_goes_there_over_tls_by_an_authority_that_is_named() {
    let oci = Oci::start_as(|options| options.tls = true);
    let trusted = format!("prefix = \"\"\nca_file = {:?}", oci.server.ca_pem_path().unwrap());
    let endpoint = oci.server.endpoint();
    let untrusted = oci.table("untrusted", &endpoint, "");
    let daemon = oci.daemon_with(&(oci.table("far", &endpoint, &trusted) + &untrusted));
    let problems = crate::oci_errors::problems(&daemon);
    assert!(problems.contains("invalid peer certificate: UnknownIssuer"), "{problems}");
    assert!(problems.contains("`ca_file`"), "{problems}");
    goes_there_and_comes_back(&oci, &daemon);
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_oci_what_passes_costs_nothing_but_time() {
    let oci = Oci::start();
    let refuse = |status, code: &str, retry_after| FaultKind::Refuse {
        status,
        code: code.into(),
        retry_after,
    };
    let daemon = oci.daemon(&oci.server.endpoint(), "");
    // The beginning of an upload that nobody will know the name of.
    oci.server.add_fault(Fault::new("POST", "/u", FaultKind::LoseAnswer));
    oci.server.add_fault(Fault::new("POST", "/u", refuse(409, "IncorrectState", None)));
    oci.server.add_fault(Fault::new("PUT", "", refuse(429, "TooManyRequests", Some(1))).part(1));
    oci.server.add_fault(Fault::new("PUT", "", FaultKind::CutAfter(100_000)).part(2));
    oci.server.add_fault(Fault::new("PUT", "", refuse(409, "LockConflict", None)).part(2));
    let failed = FaultKind::AnswerAfter { status: 500, code: "InternalServerError".into() };
    oci.server.add_fault(Fault::new("PUT", "", failed.clone()).part(3));
    // The completion, whose first answer is lost, is not there any more.
    oci.server.add_fault(Fault::new("POST", "", FaultKind::LoseAnswer).after(2));
    oci.server.add_fault(Fault::new("PUT", "/manifest.json", failed));
    let volume = oci.volume(40);
    let image = daemon.create(&volume, &[]);
    let id = image["id"].as_str().unwrap();
    oci.judge(id, &volume);
    assert_eq!(oci.keys(), [vec!["imaged-store.json".into()], of(id)].concat());
    assert!(oci.server.uploads(BUCKET).is_empty(), "{:?}", oci.server.uploads(BUCKET));
    let repeated = oci.server.requests().into_iter().filter(|request| request.status != 200);
    assert!(repeated.count() >= 8, "some faults did not hit");
}

#[test]
#[ignore = "needs root"]
fn root_oci_what_a_dead_daemon_began_is_swept() {
    let oci = Oci::start();
    // Nothing is answered any more once parts come.
    let delay = FaultKind::Delay(Duration::from_secs(60));
    oci.server.add_fault(Fault::new("PUT", "", delay).part(1).times(9));
    let tables = oci.table("far", &oci.server.endpoint(), "");
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_in(dir.path(), &oci.config(&tables));
    let volume = oci.volume(40);
    daemon.json(&["image", "create", "--boot-volume", volume.to_str().unwrap()]);
    crate::lab::wait_for("parts", Duration::from_secs(30), || {
        (!oci.server.uploads(BUCKET).is_empty()).then_some(())
    });
    daemon.kill();
    oci.server.clear_faults();
    assert_eq!(oci.keys().len(), 2, "{:?}", oci.keys());
    // Without its journal nobody can go on with it.
    std::fs::remove_file(dir.path().join("state/journal.redb")).unwrap();
    let _daemon = Daemon::start_in(dir.path(), &oci.config(&tables));
    crate::lab::wait_for("the sweep", Duration::from_secs(30), || {
        let swept = oci.server.uploads(BUCKET).is_empty() && oci.keys() == ["imaged-store.json"];
        swept.then_some(())
    });
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_oci_a_killed_daemon_goes_on_and_sends_no_part_twice() {
    let oci = Oci::start();
    let delay = FaultKind::Delay(Duration::from_secs(60));
    oci.server.add_fault(Fault::new("PUT", "", delay).part(3));
    let tables = oci.table("far", &oci.server.endpoint(), "");
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_in(dir.path(), &oci.config(&tables));
    let volume = oci.volume(80);
    let started = daemon.json(&["image", "create", "--boot-volume", volume.to_str().unwrap()]);
    let request = started["opc-work-request-id"].as_str().unwrap();
    crate::lab::wait_for("parts", Duration::from_secs(30), || {
        let uploads = oci.server.uploads(BUCKET);
        uploads.first().filter(|upload| upload.parts.len() >= 3).map(|_| ())
    });
    daemon.kill();
    oci.server.clear_faults();
    let daemon = Daemon::start_in(dir.path(), &oci.config(&tables));
    let watched = daemon.imagectl(&["work-request", "watch", "--work-request-id", request]);
    assert!(watched.status.success(), "{}", String::from_utf8_lossy(&watched.stderr));
    let id = daemon.json(&["image", "list"])["data"][0]["id"].as_str().unwrap().to_owned();
    oci.judge(&id, &volume);
    let requests = oci.server.requests();
    let mut stored: Vec<_> = requests
        .iter()
        .filter(|request| request.executed_status == 200)
        .filter_map(|request| request.part)
        .collect();
    stored.sort_unstable();
    let all = stored.len();
    stored.dedup();
    assert_eq!(stored.len(), all, "parts were stored twice: {stored:?}");
    assert_eq!(oci.keys(), [vec!["imaged-store.json".into()], of(&id)].concat());
}

#[test]
#[ignore = "needs root"]
fn root_oci_an_interrupted_capture_that_is_cancelled_in_the_queue_leaves_nothing() {
    let oci = Oci::start();
    let delay = FaultKind::Delay(Duration::from_secs(60));
    oci.server.add_fault(Fault::new("PUT", "", delay).part(3).times(9));
    let tables = oci.table("far", &oci.server.endpoint(), "");
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_in(dir.path(), &oci.config(&tables));
    let volume = oci.volume(80);
    let other = oci.path("other.raw");
    fs::copy(&volume, &other).unwrap();
    for volume in [&volume, &other] {
        daemon.json(&["image", "create", "--boot-volume", volume.to_str().unwrap()]);
    }
    crate::lab::wait_for("parts of both", Duration::from_secs(30), || {
        let uploads = oci.server.uploads(BUCKET);
        (uploads.len() == 2 && uploads.iter().all(|upload| upload.parts.len() >= 3)).then_some(())
    });
    daemon.kill();

    oci.server.clear_faults();
    let delay = FaultKind::Delay(Duration::from_secs(5));
    oci.server.add_fault(Fault::new("PUT", "", delay).part(1).times(2));
    let mut config = oci.config(&tables);
    config.lines = format!("max_captures = 1\n{}", config.lines);
    let daemon = Daemon::start_in(dir.path(), &config);
    let both = daemon.json(&["work-request", "list"])["data"].clone();
    let both: Vec<_> = both.as_array().unwrap().iter().map(|r| r["id"].as_str().unwrap()).collect();
    let has_begun = |request: &&&str| {
        let got = daemon.json(&["work-request", "get", "--work-request-id", request]);
        got["data"]["logs"].to_string().contains("goes on")
    };
    let request = crate::lab::wait_for("one of them to go on", Duration::from_secs(30), || {
        both.iter().find(has_begun).copied()
    });
    let queued = both.iter().find(|id| **id != request).unwrap();
    daemon.json(&["work-request", "cancel", "--work-request-id", queued]);
    crate::lab::wait_for("the removal", Duration::from_secs(30), || {
        (oci.server.uploads(BUCKET).len() == 1).then_some(())
    });
    let watched = daemon.imagectl(&["work-request", "watch", "--work-request-id", request]);
    assert!(watched.status.success(), "{}", String::from_utf8_lossy(&watched.stderr));
    let id = daemon.json(&["image", "list"])["data"][0]["id"].as_str().unwrap().to_owned();
    oci.judge(&id, &volume);
    assert_eq!(oci.keys(), [vec!["imaged-store.json".into()], of(&id)].concat());
    assert!(oci.server.uploads(BUCKET).is_empty());
}

/// Uploads under faults.
fn uploads() -> u64 {
    std::env::var("IMAGED_TEST_UPLOADS").map_or(8, |count| count.parse().unwrap())
}

#[test]
#[ignore = "needs root and QEMU's tools"]
fn root_oci_each_upload_through_a_bad_network_is_whole_or_absent() {
    let oci = Oci::start();
    let volume = oci.volume(32);
    let upstream = oci.server.endpoint().trim_start_matches("http://").parse().unwrap();
    let proxy = FaultProxy::start(upstream);
    // Nothing tells that a namespace was damaged on the way, without TLS.
    let endpoint = format!("http://{}", proxy.address());
    let tables = oci.table("far", &endpoint, "namespace = \"testns\"");
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_in(dir.path(), &oci.config(&tables));
    let seed = std::env::var("IMAGED_TEST_SEED").map_or_else(|_| fresh(), |s| s.parse().unwrap());
    println!("replay with IMAGED_TEST_SEED={seed}");
    let (mut made, mut failed) = (Vec::new(), Vec::new());
    // From a bad day to one on which nothing works for long.
    for (round, per_mille) in (0..uploads()).zip([50, 150, 300, 700].into_iter().cycle()) {
        proxy.plan(FaultPlan::random(seed + round, per_mille));
        let volume = volume.to_str().unwrap();
        let create = ["image", "create", "--boot-volume", volume, "--output", "json"];
        let output = daemon.imagectl(&[&create[..], &["--wait-for-state", "AVAILABLE"]].concat());
        if output.status.success() {
            let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            made.push(said["data"]["id"].as_str().unwrap().to_owned());
        } else {
            failed.push(String::from_utf8(output.stderr).unwrap());
        }
    }
    proxy.plan(FaultPlan::none());
    println!("{} made, {} failed: {failed:#?}", made.len(), failed.len());
    for said in &failed {
        assert!(said.contains("help:"), "{said}");
    }
    assert!(made.len() > failed.len(), "most faults are to be survived");

    // The same volume gives the same object, byte by byte.
    let object = |id: &String| oci.server.read(BUCKET, &format!("images/{id}/image.qcow2"));
    let first = object(&made[0]);
    assert!(made.iter().all(|id| object(id) == first));
    oci.judge(&made[0], &volume);

    // What stayed when even the removal failed, the next start takes.
    daemon.stop();
    let daemon = Daemon::start_in(dir.path(), &oci.config(&tables));
    let listed = daemon.json(&["image", "list", "--all"]);
    let mut wanted: Vec<_> = listed["data"].as_array().unwrap().iter().collect();
    wanted.sort_by_key(|image| image["id"].as_str().unwrap().to_owned());
    let ids = wanted.iter().map(|image| image["id"].as_str().unwrap());
    let mut keys = vec!["imaged-store.json".to_owned()];
    keys.extend(ids.flat_map(of));
    assert_eq!(oci.keys(), keys);
    assert!(oci.server.uploads(BUCKET).is_empty());
    assert!(wanted.len() >= made.len(), "an image is missing");
}

fn fresh() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into()
}
