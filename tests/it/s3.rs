//! Images in an S3 bucket: a real SeaweedFS, and a proxy that does to requests
//! what networks do.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    lab::{Config, Daemon, Guest, noise, run, scratch, sparse_file, text, wait_for},
    proxy::{self, Fault, FaultPlan, FaultProxy},
    weed::Weed,
};

const MIB: u64 = 1 << 20;

/// A volume with noise and text, whose image has some parts.
pub fn volume(dir: &Path, noisy: u64) -> PathBuf {
    let path = dir.join("volume.raw");
    let len = usize::try_from(noisy * MIB).unwrap();
    let data = [(0, noise(len, noisy)), ((noisy + 8) * MIB, text(3 << 20))];
    sparse_file(&path, (noisy + 64) * MIB, &data);
    path
}

fn daemon(weed: &Weed, address: std::net::SocketAddr, dir: &Path) -> Daemon {
    let lines = format!("boot_volume_dirs = [{dir:?}]\n{}", weed.config(address, dir));
    Daemon::start(&Config { lines, ..Config::default() })
}

/// The object of image `id`, fetched by boto3, is a sound image of `volume`.
fn judge(weed: &Weed, id: &str, volume: &Path, dir: &Path) {
    let object = dir.join("fetched.qcow2");
    let fetch = format!("s3.download_file(bucket, 'images/{id}/image.qcow2', {object:?})");
    weed.python(&fetch);
    let (object, volume) = (object.to_str().unwrap(), volume.to_str().unwrap());
    run("qemu-img", &["check", "-q", "-f", "qcow2", object]);
    run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", volume, object]);
}

#[test]
#[ignore = "needs root, QEMU's tools and SeaweedFS"]
fn root_s3_an_image_goes_there_is_read_back_and_deleted() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = volume(dir.path(), 40);
    let weed = Weed::start();
    let daemon = daemon(&weed, weed.address(), dir.path());
    let image = daemon.create(&volume, &[]);
    let id = image["id"].as_str().unwrap();
    assert_eq!(image["store"], "far");
    judge(&weed, id, &volume, dir.path());
    let verified = daemon.imagectl(&["image", "verify", "--image-id", id]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));

    let named = |file: &str| format!("images/{id}/{file}");
    let wanted = ["extents.blake3", "image.qcow2", "manifest.json", "record.json"].map(named);
    assert_eq!(weed.keys(), [&["imaged-store.json".to_owned()], &wanted[..]].concat());
    assert_eq!(weed.uploads(), 0);
    let delete = daemon.imagectl(&["image", "delete", "--force", "--image-id", id]);
    assert!(delete.status.success(), "{}", String::from_utf8_lossy(&delete.stderr));
    assert_eq!(weed.keys(), ["imaged-store.json"]);
}

/// Uploads under faults: 200 is what `make soak` does.
fn uploads() -> u64 {
    std::env::var("IMAGED_TEST_UPLOADS").map_or(8, |count| count.parse().unwrap())
}

#[test]
#[ignore = "needs root and SeaweedFS"]
fn root_s3_each_upload_through_a_bad_network_is_whole_or_absent() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = volume(dir.path(), 32);
    let weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    let daemon = daemon(&weed, proxy.address(), dir.path());
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
    let digests = weed.python(&format!(
        "import hashlib\n\
         for id in {made:?}:\n  \
         body = s3.get_object(Bucket=bucket, Key=f'images/{{id}}/image.qcow2')['Body']\n  \
         print(hashlib.sha256(body.read()).hexdigest())\n"
    ));
    let digests: std::collections::BTreeSet<_> = digests.lines().collect();
    assert_eq!(digests.len(), 1, "{digests:?}");
    judge(&weed, &made[0], &volume, dir.path());
    // What a failed one left is what its abort could not reach.
    let collected = daemon.imagectl(&["store", "gc", "far"]);
    assert!(collected.status.success(), "{}", String::from_utf8_lossy(&collected.stderr));
    println!("{}", String::from_utf8_lossy(&collected.stdout));
    assert_eq!(weed.uploads(), 0);
    // The answer to the last of its requests may be lost for good.
    let listed = daemon.json(&["image", "list", "--all"]);
    let listed = listed["data"].as_array().unwrap().iter();
    let whole: Vec<_> = listed.map(|image| image["id"].as_str().unwrap().to_owned()).collect();
    assert!(made.iter().all(|id| whole.contains(id)), "an image is missing: {whole:?}");
    let of_none = |key: &String| !whole.iter().any(|id| key.contains(&format!("/{id}/")));
    let keys = weed.keys();
    assert_eq!(keys.iter().filter(|key| of_none(key)).collect::<Vec<_>>(), ["imaged-store.json"]);
    assert_eq!(keys.len(), 1 + 4 * whole.len());
    let store = &daemon.json(&["store", "list"])["data"][0];
    let counted = |name: &str| store[name].as_u64().unwrap();
    assert!(counted("retried-requests") >= uploads(), "{store}");
    assert!(failed.is_empty() || counted("failed-calls") > 0, "{store}");
}

fn fresh() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into()
}

/// Bytes that were sent of each part, by number.
fn sent(proxy: &FaultProxy) -> std::collections::BTreeMap<u32, u64> {
    proxy.body_bytes(|entry| {
        let number = proxy::query(&entry.target, "partNumber")?.parse::<u32>().ok()?;
        (entry.method == "PUT").then_some(number)
    })
}

/// Parts that the store has acknowledged.
fn acknowledged(proxy: &FaultProxy) -> Vec<u32> {
    let log = proxy.log();
    let done = log.iter().filter(|entry| entry.method == "PUT" && entry.status == Some(200));
    let numbers = done.filter_map(|entry| proxy::query(&entry.target, "partNumber")?.parse().ok());
    numbers.collect()
}

/// Waits until so many parts are acknowledged.
pub fn wait_for_parts(proxy: &FaultProxy, count: usize) {
    wait_for("parts to be stored", Duration::from_secs(60), || {
        (acknowledged(proxy).len() >= count).then_some(())
    });
}

/// Each part takes its time.
fn slowly() -> FaultPlan {
    FaultPlan::rule(|request, _| match proxy::query(&request.target, "partNumber") {
        Some(_) => Fault::Delay(Duration::from_millis(300)),
        None => Fault::None,
    })
}

fn begin(daemon: &Daemon, volume: &Path) -> String {
    let volume = volume.to_str().unwrap();
    let started = daemon.json(&["image", "create", "--boot-volume", volume]);
    started["opc-work-request-id"].as_str().unwrap().to_owned()
}

#[test]
#[ignore = "needs root, QEMU's tools and SeaweedFS"]
fn root_s3_a_killed_daemon_goes_on_and_sends_no_part_twice() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = volume(dir.path(), 120);
    let weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    proxy.plan(slowly());
    let lines = format!(
        "boot_volume_dirs = [{:?}]\n{}",
        dir.path(),
        weed.config(proxy.address(), dir.path())
    );
    let config = Config { lines, ..Config::default() };
    let mut daemon = Daemon::start(&config);
    let request = begin(&daemon, &volume);
    let mut state = None;
    // Killed twice, and stopped in order once.
    for (parts, kill) in [(3, true), (6, false), (8, true)] {
        wait_for_parts(&proxy, parts);
        let kept = if kill { daemon.kill() } else { daemon.stop() };
        state = kept.or(state);
        daemon = Daemon::start_in(state.as_ref().unwrap().path(), &config);
    }
    let watched = daemon.imagectl(&["work-request", "watch", "--work-request-id", &request]);
    assert!(watched.status.success(), "{}", String::from_utf8_lossy(&watched.stderr));
    let ended = crate::lifecycle::status(&daemon, &request);
    assert_eq!(ended["status"], "SUCCEEDED", "{ended}");
    let mut numbers = acknowledged(&proxy);
    let all = numbers.len();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(all, numbers.len(), "parts were stored twice: {:?}", sent(&proxy));
    let id = daemon.json(&["image", "list"])["data"][0]["id"].as_str().unwrap().to_owned();
    judge(&weed, &id, &volume, dir.path());
    let verified = daemon.imagectl(&["image", "verify", "--image-id", &id]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    assert_eq!(weed.uploads(), 0);
    assert!(!weed.keys().iter().any(|key| key.starts_with("uploads/")));
}

#[test]
#[ignore = "needs root and SeaweedFS"]
fn root_s3_a_volume_that_was_written_to_meanwhile_is_not_gone_on_with() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = volume(dir.path(), 60);
    let weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    proxy.plan(slowly());
    let lines = weed.config(proxy.address(), dir.path());
    let lines = format!("boot_volume_dirs = [{:?}]\n{lines}", dir.path());
    let config = Config { lines, ..Config::default() };
    let daemon = Daemon::start(&config);
    let request = begin(&daemon, &volume);
    wait_for_parts(&proxy, 2);
    let state = daemon.kill().unwrap();
    assert_eq!(weed.uploads(), 1);
    run("sh", &["-c", &format!("printf x | dd of={volume:?} conv=notrunc status=none")]);
    let daemon = Daemon::start_in(state.path(), &config);
    let watched = daemon.imagectl(&["work-request", "watch", "--work-request-id", &request]);
    let said = String::from_utf8(watched.stderr).unwrap();
    assert!(said.contains("was written to, or exchanged, since its point in time"), "{said}");
    assert!(said.contains("with a new retry token"), "{said}");
    assert_eq!(weed.keys(), ["imaged-store.json"]);
    assert_eq!(weed.uploads(), 0);
    // And it is free again.
    proxy.plan(FaultPlan::none());
    daemon.create(&volume, &[]);
}

#[test]
#[ignore = "needs root and SeaweedFS"]
fn root_s3_an_outage_is_waited_for_and_a_restart_in_it_too() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = volume(dir.path(), 60);
    let mut weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    proxy.plan(slowly());
    let lines = weed.config(proxy.address(), dir.path());
    let lines = format!("boot_volume_dirs = [{:?}]\n{lines}", dir.path());
    let config = Config { lines, ..Config::default() };
    let daemon = Daemon::start(&config);
    let request = begin(&daemon, &volume);
    wait_for_parts(&proxy, 2);
    proxy.away();
    // The service itself dies, too, and comes back with what it had stored.
    weed.restart();
    std::thread::sleep(Duration::from_secs(3));
    let state = daemon.kill().unwrap();
    let daemon = Daemon::start_in(state.path(), &config);
    let now = crate::lifecycle::status(&daemon, &request);
    assert_eq!(now["status"], "IN_PROGRESS", "{now}");
    proxy.back();
    let watched = daemon.imagectl(&["work-request", "watch", "--work-request-id", &request]);
    assert!(watched.status.success(), "{}", String::from_utf8_lossy(&watched.stderr));
    let id = daemon.json(&["image", "list"])["data"][0]["id"].as_str().unwrap().to_owned();
    judge(&weed, &id, &volume, dir.path());
}

#[test]
#[ignore = "needs root, QEMU and SeaweedFS"]
fn qemu_s3_a_running_guest_goes_there_over_a_killed_daemon() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let guest = Guest::boot();
    let weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    proxy.plan(slowly());
    let of_guest = crate::live::config(&guest);
    let lines = format!("{}\n{}", of_guest.lines, weed.config(proxy.address(), dir.path()));
    let config = Config { lines, ..of_guest };
    let daemon = Daemon::start(&config);
    crate::live::start_writer(&guest);
    let started = daemon.json(&["image", "create", "--instance-id", "web-1"]);
    let request = started["opc-work-request-id"].as_str().unwrap().to_owned();
    wait_for_parts(&proxy, 3);
    let state = daemon.kill().unwrap();
    let used = run("du", &["-sk", state.path().to_str().unwrap()]);
    println!("the state directory takes {used}");
    let daemon = Daemon::start_in(state.path(), &config);
    let watched = daemon.imagectl(&["work-request", "watch", "--work-request-id", &request]);
    assert!(watched.status.success(), "{}", String::from_utf8_lossy(&watched.stderr));
    let mut numbers = acknowledged(&proxy);
    let all = numbers.len();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(all, numbers.len(), "parts were stored twice");
    println!("peak of memory: {} MiB", daemon.peak_memory() >> 20);

    // What was there in the moment, whole, and nothing of later.
    let id = daemon.json(&["image", "list"])["data"][0]["id"].as_str().unwrap().to_owned();
    let object = dir.path().join("fetched.qcow2");
    weed.python(&format!("s3.download_file(bucket, 'images/{id}/image.qcow2', {object:?})"));
    run("qemu-img", &["check", "-q", "-f", "qcow2", object.to_str().unwrap()]);
    crate::live::assert_prefix(&crate::live::records(&object, true));
    let verified = daemon.imagectl(&["image", "verify", "--image-id", &id]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    // The guest has its disk back.
    assert!(!guest.qmp("query-named-block-nodes").contains("imaged-"));
    assert!(weed.keys().iter().any(|key| key.ends_with("trace.json")));
}

/// What `imagectl store check` says of a store with these lines, ports and
/// directories masked.
fn checked(weed: &Weed, dir: &Path, change: impl Fn(String) -> String) -> String {
    let lines = change(weed.config(weed.address(), dir));
    let daemon = Daemon::start(&Config { lines, ..Config::default() });
    let output = daemon.imagectl(&["store", "check", "far"]);
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    let port = format!(":{}", weed.address().port());
    let text = text.replace(&port, ":PORT").replace("127.0.0.1:PORT", "HOST:PORT");
    let text = text.replace(dir.to_str().unwrap(), "DIR");
    // How often it was asked depends on chance.
    let asked = |text: &str| {
        let begin = text.find("was asked ")? + "was asked ".len();
        let end = begin + text[begin..].find(',')?;
        Some(format!("{}N times in N s{}", &text[..begin], &text[end..]))
    };
    let text = asked(&text).unwrap_or(text);
    let masked = text.split("(request ").enumerate().map(|(index, piece)| match index {
        0 => piece.to_owned(),
        _ => format!("(request ID{}", &piece[piece.find(')').unwrap()..]),
    });
    masked.collect()
}

#[test]
#[ignore = "needs root and SeaweedFS"]
fn root_s3_a_check_says_what_is_wrong_and_what_to_do() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let weed = Weed::start();
    let said = |change: fn(String) -> String| checked(&weed, dir.path(), change);
    insta::assert_snapshot!(said(|lines| lines), @"
    STEP             WORKS
    read             yes
    list             yes
    begin an upload  yes
    store a part     yes
    remove           yes
    ");
    insta::assert_snapshot!(said(|lines| format!("{lines}prefix = \"Büro 1/50 %+\"\n")), @"
    STEP             WORKS
    read             yes
    list             yes
    begin an upload  yes
    store a part     yes
    remove           yes
    ");
    insta::assert_snapshot!(said(|lines| lines.replace("\"images\"", "\"imagse\"")), @r#"
    STEP  WORKS
    read  NO
    imagectl: the store "far" cannot be used
      0: the store "far" cannot be opened
      1: http://HOST:PORT/imagse cannot read imaged-store.json
      2: 404 NoSuchBucket: The specified bucket does not exist (request ID)
      help: make the bucket, or correct `bucket` in the store's table; it may be there, too, and the credentials may not see it; imaged tries again whenever the store is used
    "#);
    insta::assert_snapshot!(said(|lines| lines.replace("s3.keys", "none.keys")), @r#"
    STEP  WORKS
    read  NO
    imagectl: the store "far" cannot be used
      0: the store "far" cannot be opened
      1: the credentials DIR/none.keys cannot be read
      2: No such file or directory (os error 2)
      help: make the file, or correct `credentials` in the store's table; imaged tries again whenever the store is used
    "#);
    insta::assert_snapshot!(said(|lines| lines.replace("http://", "https://")), @r#"
    STEP  WORKS
    read  NO
    imagectl: the store "far" cannot be used
      0: the store "far" cannot be opened
      1: the store was asked N times in N s, in vain
      2: https://HOST:PORT does not answer
      3: error sending request
      4: client error (Connect)
      5: received corrupt message of type InvalidContentType
      help: look whether the service runs and whether this host reaches it, then ask again; imaged tries again whenever the store is used
    "#);
    insta::assert_snapshot!(said(|lines| lines.replace("127.0.0.1", "127.0.0.2")), @r#"
    STEP  WORKS
    read  NO
    imagectl: the store "far" cannot be used
      0: the store "far" cannot be opened
      1: the store was asked N times in N s, in vain
      2: http://127.0.0.2:PORT does not answer
      3: error sending request
      4: client error (Connect)
      5: tcp connect error
      6: Connection refused (os error 111)
      help: look whether the service runs and whether this host reaches it, then ask again; imaged tries again whenever the store is used
    "#);

    let keys = |text: &str, secret: &str| {
        let lines = weed.config(weed.address(), dir.path());
        let file = dir.path().join("s3.keys");
        let wrong = std::fs::read_to_string(&file).unwrap().replace(text, secret);
        let other = dir.path().join("wrong.keys");
        std::fs::write(&other, wrong).unwrap();
        std::fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .unwrap();
        drop(lines);
    };
    keys("imagedtestsecret", "guessed");
    let wrong = |lines: String| lines.replace("s3.keys", "wrong.keys");
    insta::assert_snapshot!(said(wrong), @r#"
    STEP  WORKS
    read  NO
    imagectl: the store "far" cannot be used
      0: the store "far" cannot be opened
      1: http://HOST:PORT/images cannot read imaged-store.json
      2: 403 SignatureDoesNotMatch: The request signature we calculated does not match the signature you provided. Check your key and signing method. (request ID)
      help: look into the store's `credentials`: the key is unknown there, or another; imaged tries again whenever the store is used
    "#);
    keys("= imagedtest\n", "= nobody\n");
    insta::assert_snapshot!(said(wrong), @r#"
    STEP  WORKS
    read  NO
    imagectl: the store "far" cannot be used
      0: the store "far" cannot be opened
      1: http://HOST:PORT/images cannot read imaged-store.json
      2: 403 InvalidAccessKeyId: The access key ID you provided does not exist in our records. (request ID)
      help: look into the store's `credentials`: the key is unknown there, or another; imaged tries again whenever the store is used
    "#);

    // Something that answers, and is no store.
    let page = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = page.local_addr().unwrap();
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        for stream in page.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let body = "<html><body>It works!</body></html>";
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n";
            let _ = write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len());
        }
    });
    let lines = weed.config(address, dir.path());
    let daemon = Daemon::start(&Config { lines, ..Config::default() });
    let said = daemon.refusal(&["store", "check", "far"]);
    insta::assert_snapshot!(said.replace(&address.to_string(), "HOST:PORT"), @r#"
    imagectl: the store "far" cannot be used
      0: the store "far" cannot be opened
      1: what answers is not the store "far"
      2: http://HOST:PORT/images/imaged-store.json cannot be understood
      3: expected value at line 1 column 1
      help: is it the right endpoint and bucket? Where a newer imaged made the store, update this one; imaged tries again whenever the store is used
    "#);
    let said = daemon.refusal(&["store", "check", "near"]);
    insta::assert_snapshot!(said, @r#"
    imagectl: there is no store "near"
      reason: STORE_NOT_FOUND
      help: `imagectl host get` lists the stores
    "#);
}

#[test]
#[ignore = "needs root and SeaweedFS"]
fn root_s3_an_object_that_was_changed_behind_its_manifest_is_found() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = volume(dir.path(), 40);
    let weed = Weed::start();
    let daemon = daemon(&weed, weed.address(), dir.path());
    let image = daemon.create(&volume, &[]);
    let id = image["id"].as_str().unwrap();
    let key = format!("images/{id}/image.qcow2");
    let verdict = || {
        let said = daemon.refusal(&["image", "verify", "--image-id", id]);
        let said = said.replace(id, "ID").replace(&weed.address().to_string(), "WEED");
        // Where parts end depends on which thread was quicker.
        let words = said[said.find("imagectl:").unwrap()..].split_inclusive([' ', ',']);
        let long = |word: &str| word.chars().filter(char::is_ascii_digit).count() > 4;
        words.map(|word| if long(word) { "N " } else { word }).collect::<String>()
    };
    let change = |script: &str| {
        weed.python(&format!(
            "body = bytearray(s3.get_object(Bucket=bucket, Key='{key}')['Body'].read())\n{script}\n\
             s3.put_object(Bucket=bucket, Key='{key}', Body=bytes(body))"
        ));
        verdict()
    };
    let said = [
        change("body[12 << 20] ^= 1"),
        change("body[12 << 20] ^= 1; body += b'more'"),
        change("del body[5 << 20:]"),
        {
            weed.python(&format!("s3.delete_object(Bucket=bucket, Key='{key}')"));
            verdict()
        },
    ];
    insta::assert_snapshot!(said.join("\n\n"), @r#"
    imagectl: image ID in store "far" is not what was stored
      0: part 2, at offset N of the object, has another SHA-256
      reason: IMAGE_CORRUPT
      help: do not launch from it: make the image again, and look after the store's disks


    imagectl: image ID in store "far" is not what was stored
      0: the object has 40.4 MiB N bytes) and was stored with 40.4 MiB N bytes)
      reason: IMAGE_CORRUPT
      help: do not launch from it: make the image again, and look after the store's disks


    imagectl: image ID in store "far" is not what was stored
      0: the object has 5.00 MiB N bytes) and was stored with 40.4 MiB N bytes)
      reason: IMAGE_CORRUPT
      help: do not launch from it: make the image again, and look after the store's disks


    imagectl: http://WEED/images/images/ID/image.qcow2 is missing
      reason: IMAGE_CORRUPT
      help: bring it back if the bucket keeps old versions; else make the image again
    "#);
}

#[test]
#[ignore = "needs root and SeaweedFS"]
fn root_s3_a_bucket_that_keeps_versions_is_used_and_told_of() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = volume(dir.path(), 24);
    let weed = Weed::start();
    weed.python(
        "s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={'Status': 'Enabled'})",
    );
    let daemon = daemon(&weed, weed.address(), dir.path());
    let image = daemon.create(&volume, &[]);
    let id = image["id"].as_str().unwrap();
    judge(&weed, id, &volume, dir.path());
    let delete = daemon.imagectl(&["image", "delete", "--force", "--image-id", id]);
    assert!(delete.status.success());
    insta::assert_snapshot!(String::from_utf8(delete.stderr).unwrap(), @"its store keeps old versions, and with them its bytes: remove them, or give the bucket a lifecycle rule that does");
    assert_eq!(weed.keys(), ["imaged-store.json"]);
    let versions = "print(len(s3.list_object_versions(Bucket=bucket)['Versions']))";
    assert!(weed.python(versions).trim().parse::<u32>().unwrap() > 4);
    let gone = daemon.refusal(&["image", "verify", "--image-id", id]);
    assert!(gone.contains("there is no image"), "{gone}");
}
