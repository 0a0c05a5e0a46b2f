//! Images of libvirt's domains, with a libvirtd of the tests' own.

use std::{
    fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    lab::{Config, Daemon, run, wait_for},
    lab_libvirt::Libvirt,
    lifecycle::status,
    live::{WRITER, assert_prefix, capture, object, reading, records, slowly},
};

pub fn start_writer(libvirt: &Libvirt) {
    libvirt.sh(&format!(
        "cat > /run/writer.pl <<'END'\n{WRITER}\nEND\n\
         setsid perl /run/writer.pl >/run/writer.log 2>&1 </dev/null & sleep 3"
    ));
}

#[test]
#[ignore = "needs root, libvirt and minutes"]
fn libvirt_domain_is_imaged_and_comes_back_whatever_happens() {
    let libvirt = Libvirt::start("web-1");
    libvirt.boot();
    start_writer(&libvirt);
    let daemon = Daemon::start(&libvirt.config());
    let told = daemon.json(&["instance", "list"])["data"].clone();
    assert_eq!(told[0]["name"], "web-1");
    assert_eq!(told[0]["compartment-id"], "prod");
    assert_eq!(told[0]["shape"], "VM.Standard2.1");
    assert_eq!(told[0]["lifecycle-state"], "RUNNING");

    let mut before = 0;
    for (mode, consistency) in [("freeze", "FILESYSTEM"), ("crash", "CRASH")] {
        let image = capture(&daemon, &["--consistency", mode]);
        assert_eq!(image["consistency"], consistency);
        println!("{mode}: {} µs", image["point-in-time"]["window-micros"]);
        assert_eq!(image["point-in-time"]["fuse"], mode == "freeze");
        let records = records(&object(&daemon, &image), mode == "crash");
        assert_prefix(&records);
        assert!(records.len() > before, "the guest wrote nothing");
        before = records.len();
        libvirt.assert_nothing_left();
        libvirt.assert_it_writes();
    }
    daemon.stop();

    // libvirtd is killed and comes back while the image is read.
    let config = slowly(libvirt.config());
    let daemon = Daemon::start(&config);
    let request = reading(&daemon, &[]);
    libvirt.restart();
    wait_for("the image", Duration::from_secs(120), || {
        let now = status(&daemon, &request);
        assert_ne!(now["status"], "FAILED", "{now}");
        (now["status"] == "SUCCEEDED").then_some(())
    });
    libvirt.assert_nothing_left();

    // imaged is killed while it reads.
    let request = reading(&daemon, &[]);
    let kept = daemon.kill().unwrap();
    libvirt.assert_it_writes();
    let daemon = Daemon::start_in(kept.path(), &config);
    assert_eq!(status(&daemon, &request)["status"], "FAILED");
    libvirt.assert_nothing_left();
    libvirt.assert_it_writes();
    daemon.stop();

    // The guest overwrites more than it may.
    let mut config = config;
    config.lines = config.lines.replace("1GiB", "20MiB");
    let daemon = Daemon::start(&config);
    libvirt.sh("yes old | head -c 40000000 >/large; sync");
    let request = reading(&daemon, &["--consistency", "crash"]);
    libvirt.sh(
        "setsid sh -c 'for i in 1 2 3; do yes new | head -c 40000000 | dd bs=64k of=/large conv=notrunc,fsync; done' \
         >/dev/null 2>&1 </dev/null &",
    );
    let said = daemon.refusal(&["work-request", "watch", "--work-request-id", &request]);
    assert!(said.contains("given up at four fifths of the 20.0 MiB"), "{said}");
    libvirt.assert_nothing_left();
    libvirt.assert_it_writes();
}

#[test]
#[ignore = "needs root, libvirt and minutes"]
fn libvirt_domain_is_shut_down_for_its_image_unless_libvirt_would_forget_it() {
    let libvirt = Libvirt::start("web-1");
    libvirt.boot();
    start_writer(&libvirt);
    let daemon = Daemon::start(&libvirt.config());
    let before = libvirt.boot_id();
    let image = capture(&daemon, &["--consistency", "stop"]);
    assert_eq!(
        (&image["consistency"], &image["snapshot"]),
        (&"CLEAN".into(), &"COPY_BEFORE_WRITE".into())
    );
    assert_eq!(image["point-in-time"]["stopped"], true);
    // Without a replay: the filesystem was unmounted.
    assert_prefix(&records(&object(&daemon, &image), false));
    libvirt.wait_new_agent();
    assert_ne!(libvirt.boot_id(), before, "it was not shut down");
    start_writer(&libvirt);
    libvirt.assert_it_writes();
    libvirt.assert_nothing_left();

    // A transient one is imaged while it runs, and not shut down.
    libvirt.virsh(&["undefine", "web-1"]);
    let before = libvirt.boot_id();
    let stop = ["image", "create", "--instance-id", "web-1", "--consistency", "stop"];
    let said = daemon.refusal(&[&stop[..], &["--wait-for-state", "AVAILABLE"]].concat());
    assert!(said.contains("(it is transient)"), "{said}");
    assert!(said.contains("--consistency freeze or crash"), "{said}");
    assert_eq!(capture(&daemon, &[])["consistency"], "FILESYSTEM");
    assert_eq!(libvirt.boot_id(), before);
    libvirt.assert_it_writes();
    libvirt.assert_nothing_left();

    // One that is shut off stays so.
    libvirt.define();
    libvirt.virsh(&["shutdown", "web-1", "--mode", "agent"]);
    wait_for("the domain to be shut off", Duration::from_secs(60), || {
        (libvirt.state() == "shut off").then_some(())
    });
    let image = capture(&daemon, &["--consistency", "stop"]);
    assert_eq!((&image["consistency"], &image["point-in-time"]), (&"CLEAN".into(), &Value::Null));
    assert_eq!(libvirt.state(), "shut off");
}

/// What the rule of the four fifths is for: libvirt's own backup stops the
/// guest.
#[test]
#[ignore = "needs root, libvirt and minutes"]
fn libvirt_domain_whose_scratch_fills_is_stopped_by_a_backup_and_not_by_imaged() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = dir.path().join("scratch");
    fs::create_dir(&scratch).unwrap();
    let small = Small::mount(&scratch, "40m");
    let libvirt = Libvirt::start_in(dir, "web-1");
    libvirt.boot();
    libvirt.sh("yes old | head -c 60000000 >/large; sync");
    let overwrite = |pause: &str| {
        libvirt.sh(&format!(
            "setsid sh -c 'for i in $(seq 0 57); do yes new | head -c 1048576 | \
             dd bs=1M seek=$i of=/large conv=notrunc,fsync iflag=fullblock; sleep {pause}; done' \
             >/dev/null 2>&1 </dev/null &"
        ));
    };

    let order = libvirt.dir.path().join("backup.xml");
    let backup = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{0}/nbd'/><disks>\
         <disk name='vda' backup='yes' type='file' exportname='x'>\
         <scratch file='{0}/file'/></disk></disks></domainbackup>",
        scratch.display()
    );
    fs::write(&order, backup).unwrap();
    libvirt.virsh(&["backup-begin", "web-1", order.to_str().unwrap()]);
    overwrite("0");
    wait_for("the guest to be stopped", Duration::from_secs(60), || {
        (libvirt.state() == "paused").then_some(())
    });
    let reason = libvirt.virsh(&["domstate", "web-1", "--reason"]);
    assert!(reason.contains("I/O error"), "{reason}");
    libvirt.virsh(&["domjobabort", "web-1"]);
    libvirt.virsh(&["resume", "web-1"]);
    libvirt.wait_agent();
    start_writer(&libvirt);

    // Its imaged is dead when it happens: the guard ends the backup.
    let mut config = slowly(libvirt.config());
    config.lines = config.lines.replace("1GiB", "30MiB").replace("48MiB", "4MiB");
    let daemon = Daemon::start(&config);
    let request = reading(&daemon, &["--consistency", "crash"]);
    let kept = daemon.kill().unwrap();
    overwrite("0.3");
    wait_for("the backup to be ended", Duration::from_secs(60), || {
        assert_eq!(libvirt.state(), "running");
        libvirt.virsh(&["domjobinfo", "web-1"]).contains("None").then_some(())
    });
    libvirt.assert_it_writes();
    let daemon = Daemon::start_in(kept.path(), &config);
    assert_eq!(status(&daemon, &request)["status"], "FAILED");
    libvirt.assert_nothing_left();
    libvirt.assert_it_writes();
    drop((daemon, libvirt, small));
}

/// A filesystem in memory, of a size, until it is dropped.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, size: &str) -> Self {
        let size = format!("size={size}");
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", at.to_str().unwrap()]);
        Self(at.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn libvirt_of_the_daemon(daemon: &Daemon) -> Value {
    let host = daemon.json(&["host", "get"]);
    let features = host["data"]["features"].as_array().unwrap().clone();
    features.into_iter().find(|feature| feature["name"] == "libvirt").unwrap()
}

/// A daemon whose libvirtd would be at `socket` still has its own instance.
fn assert_others_are_served(dir: &Path, socket: &Path) -> Value {
    let volume = dir.join("disk");
    fs::write(&volume, vec![0; 1 << 20]).unwrap();
    let instance = format!("boot_volume = {volume:?}\nqmp_socket = {:?}\n", dir.join("none"));
    let config = Config {
        lines: format!("libvirt_uri = \"qemu:///system?socket={}\"", socket.display()),
        instances: vec![("web-2".into(), instance)],
        ..Config::default()
    };
    let daemon = Daemon::start(&config);
    let begun = Instant::now();
    let told = daemon.json(&["instance", "list"]);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(told["data"].as_array().unwrap().len(), 1);
    assert_eq!(told["data"][0]["name"], "web-2");
    let args = ["image", "create", "--instance-id", "web-2", "--wait-for-state", "AVAILABLE"];
    assert_eq!(daemon.json(&args)["data"]["lifecycle-state"], "AVAILABLE");
    libvirt_of_the_daemon(&daemon)
}

#[test]
#[ignore = "needs libvirt's clients"]
fn libvirt_that_is_away_or_hangs_keeps_no_other_instance() {
    let dir = tempfile::tempdir().unwrap();
    let feature = assert_others_are_served(dir.path(), &dir.path().join("nobody"));
    assert_eq!(feature["available"], false);
    assert!(feature["details"].as_str().unwrap().contains("Failed to connect socket"), "{feature}");

    let silent = dir.path().join("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    let feature = assert_others_are_served(dir.path(), &silent);
    assert_eq!(feature["available"], false);
    assert!(feature["details"].as_str().unwrap().contains("did not answer"), "{feature}");
}
