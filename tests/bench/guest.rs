//! What a capture costs a guest that runs, and how fast it is.
//!
//! The guest is emulated on the same two cores, which makes everything in it
//! slower and the comparison with its idle self harder for imaged.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    ROUNDS, cold,
    lab::{self, Config, Daemon, Guest, Monitor, run, wait_for},
    report::{Report, median},
};

/// Writes 4 KiB with O_DSYNC each millisecond, walking through a file of
/// 64 MiB as a log does, until /run/stop is there. Of what it did while
/// /run/count was there it prints the 99th percentile of the times that the
/// writes took, and the longest from the end of one to the end of the next,
/// in microseconds.
const PROBE: &str = r#"
use strict; use Fcntl; use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC usleep);
sysopen(my $file, '/probe', O_RDWR | 010000) or die $!;
my ($at, $gap, @took) = (int(rand(16384)), 0);
my $last = clock_gettime(CLOCK_MONOTONIC);
until (-e '/run/stop') {
    sysseek($file, 4096 * ($at++ % 16384), 0) or die $!;
    my $begin = clock_gettime(CLOCK_MONOTONIC);
    syswrite($file, chr(1 + $at % 255) x 4096) == 4096 or die $!;
    my $end = clock_gettime(CLOCK_MONOTONIC);
    if (-e '/run/count') {
        push @took, $end - $begin;
        $gap = $end - $last if $end - $last > $gap;
    }
    $last = $end;
    usleep(1000);
}
@took = sort { $a <=> $b } @took;
printf "%d %d\n", 1e6 * $took[$#took * 0.99], 1e6 * $gap;
"#;

/// For an idle run.
const WATCH: Duration = Duration::from_secs(10);

/// What the guest saw.
struct Seen {
    p99: f64,
    gap: f64,
}

pub fn running(report: &mut Report) {
    let names = ["freeze-window-ms", "guest-latency-ratio", "scratch-bytes", "capture-live-debian"];
    if !names.iter().any(|name| report.wants(name)) {
        return;
    }
    let guest = Guest::boot();
    let dir = tempfile::tempdir_in(lab::scratch()).unwrap();
    let area = guest.disk().with_file_name("scratch");
    let daemon = |more: &str| {
        Daemon::start(&Config {
            lines: format!("scratch_dir = {area:?}\n{more}"),
            store: Some(dir.path().join("store")),
            instances: vec![("web-1".into(), guest.instance())],
        })
    };
    if names[..3].iter().any(|name| report.wants(name)) {
        cost(&guest, &daemon(""), report);
    }
    if report.wants("capture-live-debian") {
        speed(&guest, &daemon("encode_threads = \"all\""), dir.path(), report);
    }
}

/// With default settings.
fn cost(guest: &Guest, daemon: &Daemon, report: &mut Report) {
    guest.sh(&format!("cat > /run/probe.pl <<'END'\n{PROBE}\nEND"));
    guest.sh("yes | head -c 67108864 >/probe; sync");
    let (mut windows, mut own, mut gaps, mut ratios, mut scratch) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let before = watched(guest, || thread::sleep(WATCH));
        let mut image = Value::Null;
        let during = watched(guest, || image = capture(daemon));
        let point = &image["point-in-time"];
        let frozen = own_part(daemon, image["id"].as_str().unwrap());
        windows.push(point["window-micros"].as_f64().unwrap() / 1e3);
        own.push(windows.last().unwrap() - frozen / 1e3);
        gaps.push((during.gap - before.gap) / 1e3);
        ratios.push(during.p99 / before.p99);
        scratch.push(point["scratch-bytes"].as_f64().unwrap());
        delete(daemon, &image);
    }
    report.value("freeze-window-ms", median(&windows), "ms, order to freeze until thawed");
    report.value("freeze-window-own-ms", median(&own), "ms of it, without the guest's own");
    report.value("freeze-window-guest-ms", median(&gaps), "ms, longest gap less an idle run's");
    report.value("guest-latency-ratio", median(&ratios), "p99 during/before");
    report.value("scratch-bytes", median(&scratch), "bytes");
}

/// What the guest sees while something is done.
fn watched(guest: &Guest, deed: impl FnOnce()) -> Seen {
    guest.sh("rm -f /run/stop /run/count /run/seen; setsid perl /run/probe.pl >/run/seen 2>&1 </dev/null &");
    thread::sleep(Duration::from_secs(1));
    guest.sh("touch /run/count");
    deed();
    let seen = guest.sh(
        "rm /run/count; touch /run/stop; until [ -s /run/seen ]; do sleep 0.1; done; cat /run/seen",
    );
    let mut numbers = seen.split_whitespace().map(|number| number.parse().unwrap());
    Seen { p99: numbers.next().unwrap(), gap: numbers.next().unwrap() }
}

fn capture(daemon: &Daemon) -> Value {
    let create = ["image", "create", "--instance-id", "web-1", "--wait-for-state", "AVAILABLE"];
    daemon.json(&create)["data"].clone()
}

fn delete(daemon: &Daemon, image: &Value) {
    let id = image["id"].as_str().unwrap();
    assert!(daemon.imagectl(&["image", "delete", "--force", "--image-id", id]).status.success());
}

/// Microseconds that the guest took to freeze and to thaw: from the orders to
/// the agent's answers.
fn own_part(daemon: &Daemon, image: &str) -> f64 {
    let requests = daemon.json(&["work-request", "list", "--resource-id", image]);
    let id = requests["data"][0]["id"].as_str().unwrap().to_owned();
    let trace = daemon.json(&["work-request", "get", "--trace", "--work-request-id", &id]);
    let entries = trace["data"]["entries"].as_array().unwrap().clone();
    let at = |kind: &str, name: &str| {
        let is_it = |entry: &&Value| entry["kind"] == kind && entry["name"] == name;
        entries.iter().find(is_it).unwrap()["at-micros"].as_f64().unwrap()
    };
    let took = |name: &str| at("ANSWER", name) - at("COMMAND", name);
    took("guest-fsfreeze-freeze") + took("guest-fsfreeze-thaw")
}

/// Against QEMU's own backup job to a qcow2 of the same compression.
fn speed(guest: &Guest, daemon: &Daemon, dir: &std::path::Path, report: &mut Report) {
    let target = dir.join("peer.qcow2");
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        cold();
        let begun = Instant::now();
        let image = capture(daemon);
        let our_seconds = begun.elapsed().as_secs_f64();
        let object = dir.join("store/images").join(image["id"].as_str().unwrap());
        run("qemu-img", &["check", "-q", object.join("image.qcow2").to_str().unwrap()]);
        delete(daemon, &image);

        let size = guest.disk().metadata().unwrap().len().to_string();
        let target_path = target.to_str().unwrap();
        let zstd = ["create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", target_path];
        run("qemu-img", &[&zstd[..], &[&size]].concat());
        cold();
        let begun = Instant::now();
        backup(guest, target_path);
        let peer_seconds = begun.elapsed().as_secs_f64();
        run("qemu-img", &["check", "-q", target_path]);
        fs::remove_file(&target).unwrap();
        // The first round warms the machine up.
        if round > 0 {
            ours.push(our_seconds);
            peer.push(peer_seconds);
        }
    }
    report.compare("capture-live-debian", &ours, &peer);
}

fn backup(guest: &Guest, target: &str) {
    let mut monitor = Monitor::of(guest);
    monitor.execute_with(
        "blockdev-add",
        &json!({
            "driver": "qcow2", "node-name": "target", "discard": "unmap",
            "file": { "driver": "file", "filename": target, "cache": { "direct": true } },
        }),
    );
    monitor.execute_with(
        "blockdev-backup",
        &json!({
            "job-id": "backup", "device": "boot", "target": "target", "sync": "full",
            "compress": true,
        }),
    );
    wait_for("the backup job", Duration::from_secs(300), || {
        monitor.execute("query-jobs").as_array().unwrap().is_empty().then_some(())
    });
    monitor.execute_with("blockdev-del", &json!({ "node-name": "target" }));
}
