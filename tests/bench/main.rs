//! `make bench`: imaged against what people use today, on this machine.
//!
//! Both sides alternate in one run, caches are dropped before each, medians
//! of five rounds are compared, and results are checked. Lines on stdout:
//!
//! ```text
//! bench: NAME ours=SECONDS peer=SECONDS ratio=X.XX     above 1: imaged is faster
//! bench-value: NAME VALUE UNIT
//! ```
//!
//! and the same in `target/bench.json`. An argument runs only the names that
//! contain it, from the beginning of a word on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "figures")]

mod downtime;
mod freeze;
mod guest;
#[path = "../lab/lab.rs"]
mod lab;
#[path = "../lab/host.rs"]
mod lab_host;
#[path = "../lab/libvirt.rs"]
mod lab_libvirt;
mod memory;
#[path = "../lab/oci/mod.rs"]
mod oci_server;
mod peers;
mod reader;
mod report;
mod restore;
mod stages;
mod stores;
mod volumes;
#[path = "../lab/weed.rs"]
mod weed;

use std::{path::Path, time::Instant};

use lab::{Config, Daemon, run};
use report::{Report, median};

/// Rounds of each side.
pub const ROUNDS: usize = 5;

fn main() {
    // cargo bench passes its own flags.
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let mut report = Report::new(only.unwrap_or_default());
    if !nix::unistd::geteuid().is_root() {
        eprintln!("bench: loop devices and cold caches need root");
        std::process::exit(1);
    }
    let volumes = volumes::Volumes::default();
    captures(&volumes, &mut report);
    stores::s3(&volumes, &mut report);
    stores::oci(&volumes, &mut report);
    restore::s3(&volumes, &mut report);
    guest::running(&mut report);
    freeze::windows(&mut report);
    downtime::stopped(&mut report);
    reader::read_limit(&volumes, &mut report);
    memory::resident_sets(&mut report);
    memory::resident_set_of_an_upload(&mut report);
    report.write();
}

/// Whole captures of a 4 GiB loop device with direct I/O into the directory
/// store, digests on, against `qemu-img convert` of the same device with the
/// same compression.
fn captures(volumes: &volumes::Volumes, report: &mut Report) {
    for content in ["debian", "random"] {
        for compression in ["none", "zstd", "deflate"] {
            let name = format!("capture-{compression}-{content}");
            if report.wants(&name) {
                capture(&name, volumes.device(content), compression, content, report);
            }
        }
    }
}

fn capture(name: &str, device: &Path, compression: &str, content: &str, report: &mut Report) {
    let dir = tempfile::tempdir_in(lab::scratch()).unwrap();
    let config = Config {
        lines: "boot_volume_dirs = [\"/dev\"]\nencode_threads = \"all\"".into(),
        store: Some(dir.path().join("store")),
        ..Config::default()
    };
    let daemon = Daemon::start(&config);
    let peer_image = dir.path().join("peer.qcow2");
    let (mut ours, mut peer, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    let (mut our_size, mut peer_size) = (0, 0);
    for round in 0..=ROUNDS {
        cold();
        let before = daemon.cpu_seconds();
        let start = Instant::now();
        let image = daemon.create(device, &["--compression", compression]);
        let our_seconds = start.elapsed().as_secs_f64();
        let our_cpu = daemon.cpu_seconds() - before;
        let id = image["id"].as_str().unwrap();
        let object = dir.path().join("store/images").join(id).join("image.qcow2");
        our_size = object.metadata().unwrap().len();
        if round == 0 {
            check(&object, device);
        }
        let delete = ["image", "delete", "--force", "--image-id", id];
        assert!(daemon.imagectl(&delete).status.success());

        cold();
        let start = Instant::now();
        convert(device, &peer_image, compression);
        let peer_seconds = start.elapsed().as_secs_f64();
        peer_size = peer_image.metadata().unwrap().len();
        std::fs::remove_file(&peer_image).unwrap();
        // The first round warms the machine up and checks the result.
        if round > 0 {
            ours.push(our_seconds);
            peer.push(peer_seconds);
            cpu.push(our_cpu);
        }
    }
    report.compare(name, &ours, &peer);
    let ratio = our_size as f64 / peer_size as f64;
    report.value(&format!("size-ratio-{compression}-{content}"), ratio, "ours/qemu-img");
    if name == "capture-zstd-debian" {
        let gib = volumes::data_bytes() as f64 / (1_u64 << 30) as f64;
        report.value("cpu-seconds-per-GiB", median(&cpu) / gib, "s");
    }
}

/// The peer: direct I/O on both sides, parallel and out of order, as its
/// manual advises for speed.
fn convert(device: &Path, to: &Path, compression: &str) {
    let (device, to) = (device.to_str().unwrap(), to.to_str().unwrap());
    let mut args = vec!["convert", "-W", "-m", "8", "-T", "none", "-t", "none", "-f", "raw"];
    match compression {
        "zstd" => args.extend(["-c", "-o", "compression_type=zstd"]),
        "deflate" => args.push("-c"),
        _ => {}
    }
    args.extend(["-O", "qcow2", device, to]);
    run("qemu-img", &args);
}

/// What was made is a sound image of the device.
pub fn check(object: &Path, device: &Path) {
    let (object, device) = (object.to_str().unwrap(), device.to_str().unwrap());
    run("qemu-img", &["check", "-q", "-f", "qcow2", object]);
    run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", device, object]);
}

/// Nothing of either side's files in memory.
pub fn cold() {
    run("sync", &[]);
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}
