//! What an operator reads when OCI refuses.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use crate::{
    lab::Daemon,
    oci::{BUCKET, Oci, succeed},
    oci_server::ApiKey,
};

/// `text` without what differs from run to run.
pub fn settled(oci: &Oci, text: &str) -> String {
    let text = text.replace(&oci.server.endpoint(), "https://os");
    let text = text.replace(oci.dir.path().to_str().unwrap(), "/etc");
    // What is told while it runs depends on how fast it runs.
    let text = text.find("imagectl: ").map_or(&*text, |at| &text[at..]);
    let text = without(text, "ocid1.", "OCID", |c| c.is_alphanumeric() || c == '.');
    let text = without(&text, "store part ", "store part N", |c| c.is_ascii_digit());
    without(&text, "test-1:", "ID", |c| c.is_ascii_hexdigit() || c == '-')
}

/// `text` with `by` where `begin` is and what follows and is of `name`.
fn without(text: &str, begin: &str, by: &str, name: impl Fn(char) -> bool) -> String {
    let mut parts = text.split(begin);
    let mut settled = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        settled.push_str(by);
        settled.push_str(part.trim_start_matches(&name));
    }
    settled
}

/// What is wrong with each store, as `imagectl host get` tells.
pub fn problems(daemon: &Daemon) -> String {
    let host = daemon.json(&["host", "get"]);
    let stores = host["data"]["stores"].as_array().unwrap().iter();
    let told = stores.map(|store| {
        let problem = store["problem"].as_str().unwrap_or("none");
        format!("{}: {problem}", store["name"].as_str().unwrap())
    });
    told.collect::<Vec<_>>().join("\n")
}

/// Changes a line of the file `profile`, for another beside it.
fn changed(profile: &Path, name: &str, from: &str, to: &str) -> std::path::PathBuf {
    let file = profile.with_file_name(name);
    let text = fs::read_to_string(profile).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(&file, text.replace(from, to)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    file
}

#[test]
#[ignore = "needs root"]
fn root_oci_a_store_that_cannot_be_used_says_what_to_do() {
    let oci = Oci::start();
    let endpoint = oci.server.endpoint();
    let stranger = ApiKey::generate();
    let profile = oci.path("client/config");
    let foreign = stranger.write_profile(&oci.path("stranger"), "DEFAULT", "x").unwrap();
    fs::set_permissions(&foreign, fs::Permissions::from_mode(0o600)).unwrap();
    let secured = changed(&profile, "secured", "[DEFAULT]\n", "[DEFAULT]\npass_phrase=hush\n");
    let with = |name: &str, file: &Path| {
        let profile = format!("{profile:?}");
        oci.table(name, &endpoint, "").replace(&profile, &format!("{file:?}"))
    };
    let html = html();
    let tables = [
        oci.table("far", &endpoint, ""),
        oci.table("profile", &endpoint, "profile = \"OTHER\""),
        oci.table("bucket", &endpoint, "").replace(BUCKET, "other"),
        oci.table("namespace", &endpoint, "namespace = \"other\""),
        oci.table("web", &format!("http://{html}"), ""),
        oci.table("webspace", &format!("http://{html}"), "namespace = \"testns\""),
        with("stranger", &foreign),
        with("secured", &secured),
    ];
    let daemon = oci.daemon_with(&tables.concat());
    let web = html.to_string();
    let told = settled(&oci, &problems(&daemon)).replace(&web, "web");
    insta::assert_snapshot!(told, @r#"
    bucket: the store "bucket" cannot be opened
      0: https://os/other cannot read imaged-store.json
      1: 404 BucketNotFound: Either the bucket named 'other' does not exist in the namespace 'testns' or you are not authorized to access it (request ID)
      help: make the bucket, or correct `bucket` in the store's table; it may be there, too, and the credentials may not see it; imaged tries again whenever the store is used
    far: none
    namespace: the store "namespace" cannot be opened
      0: https://os/images cannot read imaged-store.json
      1: 404 BucketNotFound: Either the bucket named 'images' does not exist in the namespace 'other' or you are not authorized to access it (request ID)
      help: make the bucket, or correct `bucket` in the store's table; it may be there, too, and the credentials may not see it; imaged tries again whenever the store is used
    profile: the store "profile" cannot be opened
      0: there is no section [OTHER] in /etc/client/config
      help: `profile` in the store's table names the section; imaged tries again whenever the store is used
    secured: the store "secured" cannot be opened
      0: the key /etc/client/key.pem cannot be used
      1: it is encrypted
      help: it must be an RSA key in PEM without a pass phrase (`openssl pkey -in /etc/client/key.pem -out NEW` decrypts one), and the profile must have no pass_phrase; imaged tries again whenever the store is used
    stranger: the store "stranger" cannot be opened
      0: https://os/images cannot tell its namespace
      1: 401 NotAuthenticated: The required information to complete authentication was not provided or was incorrect. (request ID)
      help: look into the store's `credentials`: the key is unknown there, or another; imaged tries again whenever the store is used
    web: the store "web" cannot be opened
      0: http://web/images cannot tell its namespace
      1: 404 Not Found
      help: is it the right endpoint and bucket?; imaged tries again whenever the store is used
    webspace: the store "webspace" cannot be opened
      0: http://web/images cannot read imaged-store.json
      1: 404 Not Found
      help: is it the right endpoint and bucket?; imaged tries again whenever the store is used
    "#);
}

/// A server that knows nothing of stores; its thread ends with the process.
fn html() -> std::net::SocketAddr {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let page = "<html>It works</html>";
            let _ = write!(
                stream,
                "HTTP/1.1 404 Not Found\r\nconnection: close\r\n\
                 content-length: {}\r\n\r\n{page}",
                page.len()
            );
        }
    });
    address
}

fn refused_capture(oci: &Oci, daemon: &Daemon) -> String {
    let volume = oci.volume(24);
    let create = ["image", "create", "--boot-volume", volume.to_str().unwrap()];
    let args = [&create[..], &["--wait-for-state", "AVAILABLE"]].concat();
    settled(oci, &daemon.refusal(&args))
}

#[test]
#[ignore = "needs root"]
fn root_oci_a_clock_that_is_wrong_is_not_taken_for_a_wrong_key() {
    let oci = Oci::start();
    oci.server.set_clock_offset(3_600_500);
    let daemon = oci.daemon(&oci.server.endpoint(), "");
    let told = settled(&oci, &problems(&daemon));
    // Seconds, and the dates that the service tells.
    let told = told.replace("59m 59s", "1h").replace("59m 58s", "1h");
    let (before, rest) = told.split_once("Date '").unwrap();
    let (_, after) = rest.split_once("'] ").unwrap_or(("", rest));
    insta::assert_snapshot!(format!("{before}… {after}"), @r#"
    far: the store "far" cannot be opened
      0: https://os/images cannot tell its namespace: this host's clock and the store's differ by 1h
      1: 401 NotAuthenticated: … (request ID)
      help: set the clock (`timedatectl`): requests are signed with the time; imaged tries again whenever the store is used
    "#);
    oci.server.set_clock_offset(0);
    daemon.create(&oci.volume(4), &[]);
}

#[test]
#[ignore = "needs root"]
fn root_oci_a_quota_that_is_reached_leaves_nothing() {
    let oci = Oci::start();
    oci.server.set_quota(BUCKET, Some(10 << 20));
    let daemon = oci.daemon(&oci.server.endpoint(), "");
    insta::assert_snapshot!(refused_capture(&oci, &daemon), @"
    imagectl: https://os/images cannot store part N of images/OCID/image.qcow2
      0: 400 QuotaExceeded: Fulfilling this request exceeds the quota of the compartment (request ID)
      reason: STORE_FULL
      help: delete images from it, raise its quota, or make another store the default_store
    ");
    assert_eq!(oci.keys(), ["imaged-store.json"]);
    assert!(oci.server.uploads(BUCKET).is_empty());
}

#[test]
#[ignore = "needs root"]
fn root_oci_a_retention_rule_keeps_images_and_not_the_store_from_being_used() {
    let oci = Oci::start();
    let tables = oci.table("far", &oci.server.endpoint(), "");
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_in(dir.path(), &oci.config(&tables));
    oci.server.set_retention(BUCKET, true);
    let image = daemon.create(&oci.volume(4), &[]);
    let id = image["id"].as_str().unwrap();
    let delete = ["image", "delete", "--force", "--image-id", id];
    insta::assert_snapshot!(settled(&oci, &daemon.refusal(&delete)).replace(id, "OCID"), @"
    imagectl: https://os/images cannot delete images/OCID/manifest.json
      0: 403 RetentionRuleViolation: The object 'images/OCID/manifest.json' in bucket 'images' is protected by a retention rule (request ID)
      reason: STORE_REFUSED
      help: a retention rule of the bucket protects it: wait for its end, or take the rule away
    ");
    succeed(&daemon, &["image", "verify", "--image-id", id]);
    // The claim on it stays; the next start finds it and goes on.
    daemon.stop();
    let daemon = Daemon::start_in(dir.path(), &oci.config(&tables));
    assert_eq!(problems(&daemon), "far: none");
    succeed(&daemon, &["image", "verify", "--image-id", id]);
    oci.server.set_retention(BUCKET, false);
    succeed(&daemon, &delete);
}
