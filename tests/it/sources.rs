//! What may be imaged, and what an operator hears when it may not.

use std::{fs, process::Command};

use crate::{
    image::daemon,
    lab::{Config, Daemon, Loop, Mount, noise, run, scratch, sparse_file, text},
};

const MIB: u64 = 1 << 20;

/// What imagectl says of a volume that cannot be imaged, without paths that
/// change.
fn refusal(daemon: &Daemon, volume: &str, dir: &str) -> String {
    let stderr = daemon.refusal(&["image", "create", "--boot-volume", volume]);
    let (images, requests) =
        (daemon.json(&["image", "list"]), daemon.json(&["work-request", "list"]));
    assert_eq!(images["data"].as_array().unwrap().len(), 0);
    assert_eq!(requests["data"].as_array().unwrap().len(), 0, "it was accepted");
    stderr.replace(dir, "DIR")
}

#[test]
#[ignore = "needs root"]
fn root_wrong_volumes_are_refused_with_advice() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let at = dir.path().to_str().unwrap();
    let daemon = daemon(dir.path());
    fs::write(dir.path().join("empty.raw"), []).unwrap();
    fs::create_dir(dir.path().join("directory")).unwrap();
    sparse_file(&dir.path().join("large.raw"), 401 << 30, &[]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", &format!("{at}/disk.qcow2"), "1M"]);

    let mut said = String::new();
    let volumes = [
        "DIR/missing.raw",
        "DIR/directory",
        "/dev/null",
        "DIR/empty.raw",
        "DIR/large.raw",
        "DIR/disk.qcow2",
    ];
    for volume in volumes {
        said += &refusal(&daemon, &volume.replace("DIR", at), at);
        said += "\n";
    }
    insta::assert_snapshot!(said);

    let outside = refusal(&daemon, "/etc/hostname", at);
    assert!(outside.contains("boot_volume_dirs"), "{outside}");
    // A link out of the allowed directories is no way around them.
    std::os::unix::fs::symlink("/etc/hostname", dir.path().join("link.raw")).unwrap();
    let link = refusal(&daemon, &format!("{at}/link.raw"), at);
    assert!(link.contains("boot_volume_dirs"), "{link}");
}

#[test]
#[ignore = "needs root, loop devices and QEMU's tools"]
fn root_held_volumes_are_refused_and_the_holder_is_named() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let at = dir.path().to_str().unwrap().to_owned();
    let daemon = daemon(dir.path());

    let mount = Mount::new("ext4", 64 * MIB);
    let mounted = run("findmnt", &["-no", "SOURCE", mount.at.path().to_str().unwrap()]);
    let said = refusal(&daemon, &mounted, &at);
    assert!(said.contains(mount.at.path().to_str().unwrap()), "{said}");

    let file = dir.path().join("disk.raw");
    sparse_file(&file, 64 * MIB, &[(0, text(1000))]);
    let device = Loop::attach(&file, 512);
    let said = refusal(&daemon, file.to_str().unwrap(), &at);
    assert!(said.contains(device.device.to_str().unwrap()), "{said}");

    // QEMU holds by lock bytes; O_EXCL alone would succeed here.
    let loop_device = device.device.to_str().unwrap();
    let mut qemu = Command::new("qemu-nbd")
        .args(["--format=raw", "--persistent", "--socket"])
        .arg(dir.path().join("nbd.sock"))
        .arg(loop_device)
        .spawn()
        .unwrap();
    crate::lab::wait_for("qemu-nbd", std::time::Duration::from_secs(10), || {
        dir.path().join("nbd.sock").exists().then_some(())
    });
    let said = refusal(&daemon, loop_device, &at);
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    assert!(said.contains("qemu-nbd") && said.contains("pid"), "{said}");
    daemon.create(&device.device, &[]);
}

#[test]
#[ignore = "needs root and loop devices"]
fn root_an_unreadable_sector_ends_the_capture_and_is_named() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let daemon = daemon(dir.path());
    // A loop device over a file that was cut short gives EIO behind its end.
    let file = dir.path().join("disk.raw");
    sparse_file(&file, 64 * MIB, &[(0, noise(64 << 20, 3))]);
    let device = Loop::attach(&file, 512);
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(40 * MIB + 4096).unwrap();

    let volume = device.device.to_str().unwrap();
    let wait = ["--wait-for-state", "AVAILABLE"];
    let said = daemon.refusal(&[&["image", "create", "--boot-volume", volume][..], &wait].concat());
    assert!(said.contains(volume), "{said}");
    assert!(said.contains(&(40 * MIB + 4096).to_string()), "{said}");
    assert!(said.contains("Input/output error"), "{said}");
    assert_nothing_left(&daemon);
}

/// No image, and no file of one.
pub fn assert_nothing_left(daemon: &Daemon) {
    assert_eq!(daemon.json(&["image", "list"])["data"].as_array().unwrap().len(), 0);
    let left: Vec<_> = fs::read_dir(daemon.images()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
#[ignore = "needs root"]
fn root_instances_are_at_rest_when_nothing_greets_on_their_socket() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let disk = dir.path().join("web-1.raw");
    sparse_file(&disk, 16 * MIB, &[(0, text(100_000))]);
    let qmp = dir.path().join("qmp.sock");
    let instance = format!(
        "compartment = \"prod\"\nboot_volume = {:?}\nqmp_socket = {:?}\noperating_system = \"Debian\"\n",
        disk.display().to_string(),
        qmp.display().to_string()
    );
    let config = Config {
        lines: format!("boot_volume_dirs = [{:?}]", dir.path().display().to_string()),
        instances: vec![("web-1".into(), instance)],
        ..Config::default()
    };
    let daemon = Daemon::start(&config);
    let create = ["image", "create", "--wait-for-state", "AVAILABLE", "--instance-id"];

    let said = daemon.refusal(&[&create[..], &["web-2"]].concat());
    assert!(said.contains("there is no instance \"web-2\" on this host"), "{said}");

    // Something that greets as QEMU does: the instance runs, and its volume is
    // not read as one at rest.
    let listener = std::os::unix::net::UnixListener::bind(&qmp).unwrap();
    let greeter = std::thread::spawn(move || {
        use std::io::Write;
        while let Ok((mut stream, _)) = listener.accept() {
            let version = r#"{"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}"#;
            let greeting =
                format!("{{\"QMP\": {{\"version\": {version}, \"capabilities\": []}}}}\r\n");
            let _ = stream.write_all(greeting.as_bytes());
            if stream.peer_addr().is_err() {
                break;
            }
        }
    });
    let said = daemon.refusal(&[&create[..], &["web-1"]].concat());
    assert!(said.contains("QEMU can no longer begin a session"), "{said}");
    let listed = daemon.json(&["instance", "list"]);
    assert_eq!(listed["data"][0]["lifecycle-state"], "RUNNING");
    fs::remove_file(&qmp).unwrap();
    drop(greeter);

    let image = daemon.json(&[&create[..], &["web-1"]].concat())["data"].clone();
    assert_eq!(image["compartment-id"], "prod");
    assert_eq!(image["operating-system"], "Debian");
    assert_eq!(image["operating-system-version"], "UNKNOWN");
}

#[test]
#[ignore = "needs root"]
fn root_a_volume_may_be_read_only_and_end_in_mid_sector() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let daemon = daemon(dir.path());
    for size in [1, 511, 4096 + 513, MIB - 1, MIB + 1] {
        let path = dir.path().join("odd.raw");
        fs::write(&path, noise(usize::try_from(size).unwrap(), size)).unwrap();
        let image = daemon.create(&path, &[]);
        let object = daemon.images().join(image["id"].as_str().unwrap()).join("image.qcow2");
        run(
            "qemu-img",
            &[
                "compare",
                "-q",
                "-f",
                "raw",
                "-F",
                "qcow2",
                path.to_str().unwrap(),
                object.to_str().unwrap(),
            ],
        );
    }
}
