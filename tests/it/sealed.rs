//! Exports to URLs whose imaged dies: what aborts their uploads is kept,
//! sealed, and the next start does that.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    export::{is_in_files, to_uri, url},
    lab::{Config, Daemon, run, wait_for},
    oci::{BUCKET, Oci},
    oci_server::{Fault, FaultKind, ParAccess},
};

/// An image in a directory, and a service to export it to.
struct Bench {
    oci: Oci,
    kept: tempfile::TempDir,
    config: Config,
    image: String,
}

impl Bench {
    fn new(noisy: u64) -> Self {
        let (oci, kept) = (Oci::start(), tempfile::tempdir().unwrap());
        let lines = format!("boot_volume_dirs = [{:?}]\n", oci.dir.path());
        let store = Some(oci.path("near"));
        let config = Config { lines, store, ..Config::default() };
        let daemon = Daemon::start_in(kept.path(), &config);
        let image = daemon.create(&oci.volume(noisy), &[])["id"].as_str().unwrap().to_owned();
        daemon.stop();
        Self { oci, kept, config, image }
    }

    fn dir(&self) -> &Path {
        self.kept.path()
    }

    fn with(&self, name: &str, value: &str) -> Config {
        let environment = vec![(name.to_owned(), value.to_owned())];
        let (lines, store) = (self.config.lines.clone(), self.config.store.clone());
        Config { lines, store, environment, ..Config::default() }
    }

    /// Orders an export to the object `name`; the URL's secret.
    fn order(&self, daemon: &Daemon, name: &str) -> (Value, String) {
        let (url, token) = url(&self.oci, ParAccess::ObjectWrite, Some(name));
        let args = to_uri(&self.oci, &self.image, &url);
        let mut args: Vec<_> = args.iter().map(String::as_str).collect();
        args.extend(["--wait-for-state", "ACCEPTED", "--output", "json"]);
        let output = daemon.imagectl(&args);
        (serde_json::from_slice(&output.stdout).unwrap_or_default(), token)
    }

    /// Kills an imaged that has sent a part to the object `name`; its work
    /// request, and the URL's secret.
    fn dies(&self, config: &Config, name: &str) -> (String, String) {
        let daemon = Daemon::start_logged(self.dir(), config);
        let slow = FaultKind::Delay(Duration::from_secs(60));
        self.oci.server.add_fault(Fault::new("PUT", "/3", slow));
        let (begun, token) = self.order(&daemon, name);
        wait_for("parts to be stored", Duration::from_secs(30), || {
            let uploads = self.oci.server.uploads(BUCKET);
            uploads
                .iter()
                .any(|upload| upload.object == name && !upload.parts.is_empty())
                .then_some(())
        });
        daemon.kill();
        self.oci.server.clear_faults();
        (begun["data"]["id"].as_str().unwrap().to_owned(), token)
    }

    /// What its vault has: names and sealed texts.
    fn sealed(&self) -> Vec<(String, String)> {
        let Ok(entries) = fs::read_dir(self.dir().join("state/sealed")) else { return Vec::new() };
        let sealed = entries.map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(path).unwrap())
        });
        sealed.collect()
    }

    fn uploads(&self) -> usize {
        self.oci.server.uploads(BUCKET).len()
    }

    /// What a request's log and its error say.
    fn told(&self, daemon: &Daemon, work: &str) -> String {
        let request = daemon.json(&["work-request", "get", "--work-request-id", work]);
        assert_eq!(request["data"]["status"], "FAILED");
        let (logs, errors) = (&request["data"]["logs"], &request["data"]["errors"]);
        let told = logs.as_array().unwrap().iter().chain(errors.as_array().unwrap());
        let told: Vec<_> = told.map(|entry| entry["message"].as_str().unwrap()).collect();
        let told = told.join("\n").replace(&self.oci.server.endpoint(), "https://os");
        assert!(!told.contains("/p/"), "{told}");
        told
    }
}

#[test]
#[ignore = "needs root, QEMU's tools and systemd-creds"]
fn root_export_to_a_url_is_aborted_by_the_next_start_which_wipes_what_it_took() {
    let bench = Bench::new(40);
    let (work, token) = bench.dies(&bench.config, "out/dies");
    let sealed = bench.sealed();
    let [(name, text)] = &sealed[..] else { panic!("{sealed:?}") };
    // It opens on this host, and gives access to that upload alone.
    let file = bench.dir().join("state/sealed").join(name);
    let words = ["decrypt", &format!("--name=imaged-{name}"), file.to_str().unwrap(), "-"];
    let opened: Value = serde_json::from_str(&run("systemd-creds", &words)).unwrap();
    let path = opened["path"].as_str().unwrap();
    assert!(path.contains("/u/out/dies/id/"), "{path}");
    let upload_token = path.split('/').nth(2).unwrap();
    assert!(upload_token.len() > 20 && upload_token != token, "{path}");
    let secrets = [&*token, upload_token];

    // It dies in its recovery, too; what was done is done again.
    for (step, uploads) in [("before recovery: url abort", 1), ("after recovery: url abort", 0)] {
        let config = bench.with("IMAGED_TEST_DIES", &format!("{step} 1"));
        assert!(Daemon::start_and_die(bench.dir(), &config), "{step}");
        assert_eq!((bench.uploads(), bench.sealed().len()), (uploads, 1), "{step}");
    }
    let config = bench.with("IMAGED_TEST_DIES", "before recovery: vault wipe 1");
    assert!(Daemon::start_and_die(bench.dir(), &config));
    assert_eq!(bench.sealed(), sealed);
    assert!(is_in_files(&bench.dir().join("state"), text.lines().next().unwrap()));

    let daemon = Daemon::start_logged(bench.dir(), &bench.config);
    assert_eq!((bench.uploads(), bench.sealed()), (0, Vec::new()));
    insta::assert_snapshot!(bench.told(&daemon, &work), @"
    imaged was started again: no upload to https://os/images/out/dies is left
    imaged died before the work was done
      help: nothing of it is left; export the image again, with a new retry token
    ");
    for line in text.lines() {
        assert!(!is_in_files(&bench.dir().join("state"), line), "{line}");
    }
    for secret in secrets {
        assert!(!is_in_files(bench.dir(), secret), "{secret} is in the log or in the journal");
    }
    assert!(bench.oci.keys().is_empty(), "{:?}", bench.oci.keys());
}

#[test]
#[ignore = "needs root, QEMU's tools and systemd-creds"]
fn root_export_to_a_url_that_cannot_be_aborted_says_what_is_left() {
    let bench = Bench::new(40);
    // Its pre-authenticated request has expired when imaged is back.
    let (work, _) = bench.dies(&bench.config, "out/late");
    bench.oci.server.set_clock_offset(7_200_000);
    let daemon = Daemon::start_logged(bench.dir(), &bench.config);
    let told = bench.told(&daemon, &work);
    insta::assert_snapshot!(crate::oci_errors::settled(&bench.oci, &told), @"
    imaged was started again: the upload to https://os/images/out/late cannot be aborted: https://os/images cannot abort the upload of out/late: the pre-authenticated request does not allow writing, has expired or was deleted: 404 BucketNotFound: Either the bucket named 'images' does not exist in the namespace 'testns' or you are not authorized to access it (request ID)
    imaged died before the work was done
      help: what was sent to https://os/images/out/late is no object yet, and stays as an upload until a lifecycle rule of the bucket, or `oci os multipart abort`, removes it: imaged cannot; export the image again, with a new retry token
    ");
    assert_eq!((bench.uploads(), bench.sealed()), (1, Vec::new()));
    bench.oci.server.set_clock_offset(0);
    daemon.stop();

    // There is no systemd-creds: it is sent all the same.
    let bin = bench.dir().join("bin");
    fs::create_dir(&bin).unwrap();
    symlink(run("sh", &["-c", "command -v setpriv"]), bin.join("setpriv")).unwrap();
    let lacking = bench.with("PATH", bin.to_str().unwrap());
    let (work, _) = bench.dies(&lacking, "out/unsealed");
    assert_eq!(bench.sealed(), Vec::new());
    let daemon = Daemon::start_logged(bench.dir(), &lacking);
    insta::assert_snapshot!(bench.told(&daemon, &work), @"
    should imaged die before the end, what is sent to https://os/images/out/unsealed stays as an upload: there is no systemd-creds on this host
    imaged died before the work was done
      help: what was sent to https://os/images/out/unsealed is no object yet, and stays as an upload until a lifecycle rule of the bucket, or `oci os multipart abort`, removes it: imaged cannot; export the image again, with a new retry token
    ");
    assert_eq!(bench.uploads(), 2);
    let host = daemon.json(&["host", "get"])["data"]["features"].clone();
    let sealing = host.as_array().unwrap().iter().find(|feature| feature["name"] == "sealing");
    assert_eq!(sealing.unwrap()["available"], false);
    insta::assert_snapshot!(sealing.unwrap()["details"].as_str().unwrap(), @"there is no systemd-creds on this host; it comes with systemd 250 and newer; without it a crash of imaged leaves its upload to a URL, and no guest is disconnected from iSCSI");
}

#[test]
#[ignore = "needs root, QEMU's tools, systemd-creds and a minute"]
fn root_export_to_a_url_survives_death_at_every_step() {
    let bench = Bench::new(12);
    let steps = bench.dir().join("steps");
    let daemon =
        Daemon::start_in(bench.dir(), &bench.with("IMAGED_TEST_STEPS", steps.to_str().unwrap()));
    bench.order(&daemon, "whole");
    assert!(!daemon.is_killed_at_work());
    let whole = bench.oci.server.read(BUCKET, "whole");
    assert_eq!((bench.uploads(), bench.sealed()), (0, Vec::new()));
    daemon.stop();
    let steps = fs::read_to_string(steps).unwrap();
    let steps: Vec<_> = steps.lines().filter(|step| !step.contains("recovery: ")).collect();
    for step in ["url begin", "vault keep", "url complete", "vault wipe"] {
        assert!(steps.contains(&&*format!("after {step} 1")), "{step}: {steps:?}");
    }
    let at = |step: &str| steps.iter().position(|&known| known == step).unwrap();
    // Only the service's answer says what an upload is called.
    let known =
        steps[at("after vault keep 1")..].iter().position(|step| step.starts_with("after journal"));
    let unknown = at("after url begin 1")..at("after vault keep 1") + known.unwrap();
    let begun = Instant::now();
    for (nth, &step) in steps.iter().enumerate() {
        let daemon = Daemon::start_in(bench.dir(), &bench.with("IMAGED_TEST_DIES", step));
        let name = format!("out/{nth}");
        bench.order(&daemon, &name);
        assert!(daemon.is_killed_at_work(), "{step}");
        drop(daemon);
        Daemon::start_in(bench.dir(), &bench.config).stop();
        assert_eq!(bench.sealed(), Vec::new(), "{step}");
        let left = bench.oci.server.uploads(BUCKET);
        assert_eq!(left.len(), usize::from(unknown.contains(&nth)), "{step}: {left:?}");
        for upload in left {
            assert!(upload.parts.is_empty(), "{step}: {upload:?}");
            bench.oci.server.remove_upload(BUCKET, &upload.id);
        }
        let there = bench.oci.keys().contains(&name);
        assert_eq!(there, nth >= at("after url complete 1"), "{step}");
        assert!(!there || bench.oci.server.read(BUCKET, &name) == whole, "{step}");
    }
    println!("{} deaths in {:.0?}", steps.len(), begun.elapsed());
}
