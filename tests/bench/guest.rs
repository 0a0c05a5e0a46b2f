//! What a capture costs a guest that runs, and how fast it is.
//!
//! The guest is emulated on the same two cores, which makes everything in it
//! slower and the comparison with its idle self harder for imaged.

use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant, UNIX_EPOCH},
};

use serde_json::{Value, json};

use crate::{
    ROUNDS, cold,
    freeze::{capture, delete, guests_part},
    lab::{self, Config, Daemon, Guest, Monitor, run, wait_for},
    report::{Report, median},
};

/// Writes 4 KiB with O_DSYNC each millisecond, walking through a file of
/// 64 MiB as a log does, until /run/stop is there. Then it prints when each
/// write began and how long it took, in microseconds.
const PROBE: &str = r#"
use strict; use Fcntl; use Time::HiRes qw(clock_gettime CLOCK_REALTIME usleep);
sysopen(my $file, '/probe', O_RDWR | 010000) or die $!;
my ($at, @seen) = (int(rand(16384)));
until (-e '/run/stop') {
    sysseek($file, 4096 * ($at++ % 16384), 0) or die $!;
    my $begin = clock_gettime(CLOCK_REALTIME);
    syswrite($file, chr(1 + $at % 255) x 4096) == 4096 or die $!;
    push @seen, [$begin, clock_gettime(CLOCK_REALTIME) - $begin];
    usleep(1000);
}
printf "%d %d\n", 1e6 * $_->[0], 1e6 * $_->[1] for @seen;
"#;

/// For an idle run, and for one with a burner.
const WATCH: Duration = Duration::from_secs(5);

/// What the guest saw.
struct Seen {
    /// Microseconds of each write, ascending.
    took: Vec<f64>,
    /// Longest time from the end of one to the end of the next, in
    /// milliseconds.
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
            ..Config::default()
        })
    };
    if report.wants("capture-live-debian") {
        speed(&guest, &daemon("encode_threads = \"all\""), dir.path(), report);
    }
    if names[..3].iter().any(|name| report.wants(name)) {
        cost(&guest, &daemon(""), report);
    }
}

/// With default settings.
fn cost(guest: &Guest, daemon: &Daemon, report: &mut Report) {
    guest.sh(&format!("cat > /run/probe.pl <<'END'\n{PROBE}\nEND"));
    guest.sh("yes | head -c 67108864 >/probe; sync");
    // So much that the freeze is not most of it.
    for copy in ["/usr-1", "/usr-2"] {
        guest.sh(&format!("cp -r /usr {copy} && sync"));
    }
    let (mut windows, mut own, mut gaps, mut scratch) = (vec![], vec![], vec![], vec![]);
    let (mut idle, mut during, mut burnt) = (vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let alone = watched(guest, || thread::sleep(WATCH));
        let mut image = Value::Null;
        let imaged = watched(guest, || image = capture(daemon, &[]));
        let burner = watched(guest, burn);
        let point = &image["point-in-time"];
        let frozen = guests_part(&|args| daemon.json(args), image["id"].as_str().unwrap());
        windows.push(point["window-micros"].as_f64().unwrap() / 1e3);
        own.push(windows.last().unwrap() - frozen / 1e3);
        gaps.push(imaged.gap - alone.gap);
        scratch.push(point["scratch-bytes"].as_f64().unwrap());
        idle.extend(alone.took);
        during.extend(imaged.took);
        burnt.extend(burner.took);
        delete(daemon, &image);
    }
    let usual = p99(idle);
    report.value("freeze-window-ms", median(&windows), "ms, order to freeze until thawed");
    report.value("freeze-window-own-ms", median(&own), "ms of it, without the guest's own");
    report.value("freeze-window-guest-ms", median(&gaps), "ms, longest gap less an idle run's");
    report.value("guest-latency-ratio", p99(during) / usual, "p99 during/idle");
    report.value("guest-latency-burner", p99(burnt) / usual, "the same with a busy core instead");
    report.value("scratch-bytes", median(&scratch), "bytes");
}

/// What the guest sees while something is done: neither before nor after,
/// when it has an agent's work.
fn watched(guest: &Guest, deed: impl FnOnce()) -> Seen {
    guest.sh("rm -f /run/stop /run/seen; setsid perl /run/probe.pl >/run/seen 2>&1 </dev/null &");
    let now = || UNIX_EPOCH.elapsed().unwrap().as_secs_f64() * 1e6;
    let sent = now();
    let guests: f64 = guest.sh("date +%s%6N").trim().parse().unwrap();
    let ahead = guests - (sent + now()) / 2.0;
    thread::sleep(Duration::from_secs(1));
    let begun = now();
    deed();
    let (from, to) = (begun + ahead, now() + ahead);
    thread::sleep(Duration::from_millis(500));
    let seen = guest.sh(
        "touch /run/stop; while pgrep -f /run/[p]robe >/dev/null; do sleep 0.1; done; cat /run/seen",
    );
    let numbers = |line: &str| -> Option<(f64, f64)> {
        let (begun, took) = line.split_once(' ')?;
        Some((begun.parse().ok()?, took.parse().ok()?))
    };
    let within = |(begun, _): &(f64, f64)| (from..to).contains(begun);
    let seen: Vec<_> = seen.lines().filter_map(numbers).filter(within).collect();
    let ends = |pair: &[(f64, f64)]| (pair[1].0 + pair[1].1 - pair[0].0 - pair[0].1) / 1e3;
    let gap = seen.windows(2).map(ends).fold(0.0, f64::max);
    Seen { took: seen.into_iter().map(|(_, took)| took).collect(), gap }
}

fn p99(mut took: Vec<f64>) -> f64 {
    took.sort_by(f64::total_cmp);
    took[(took.len() - 1) * 99 / 100]
}

/// What the machine does to its emulated guest when somebody computes: one
/// core, of idle class, no I/O at all.
fn burn() {
    let seconds = WATCH.as_secs().to_string();
    let burnt = ["--idle", "0", "timeout", &seconds, "sh", "-c", "while :; do :; done"];
    Command::new("chrt").args(burnt).status().unwrap();
}

/// Against QEMU's own backup job to a qcow2 of the same compression.
fn speed(guest: &Guest, daemon: &Daemon, dir: &std::path::Path, report: &mut Report) {
    let target = dir.join("peer.qcow2");
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        cold();
        let begun = Instant::now();
        let image = capture(daemon, &[]);
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
