//! Captures that are killed at every step, and what is promised then.
//!
//! A capture that nobody kills writes down its steps: each effect that it has
//! outside of imaged, before and after. Another one is killed at each of
//! them, imaged is started again, and the guest, the store and the journal are
//! looked at.

use std::{
    env,
    fmt::Write as _,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    lab::{Config, Daemon, Guest, Monitor, wait_for},
    live::{assert_nothing_left, assert_prefix, config, object, records, start_writer},
    s3::volume,
    weed::Weed,
};

/// Nobody shuts down that slowly here, so that a wait in vain is short.
const SHUTDOWN_SECONDS: u64 = 12;

/// Of what images are made, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// A volume that nothing uses.
    AtRest,
    Freeze,
    Crash,
    Stop,
}

impl Mode {
    const ALL: [Self; 4] = [Self::AtRest, Self::Freeze, Self::Crash, Self::Stop];

    fn consistency(self) -> &'static [&'static str] {
        match self {
            Self::AtRest => &[],
            Self::Freeze => &["--consistency", "freeze"],
            Self::Crash => &["--consistency", "crash"],
            Self::Stop => &["--consistency", "stop"],
        }
    }
}

/// Where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    Directory,
    Bucket,
}

/// A guest that writes or a volume at rest, and the directory of its imaged.
struct Sweep {
    guest: Option<Guest>,
    dir: tempfile::TempDir,
    weed: Option<Weed>,
    mode: Mode,
}

impl Sweep {
    fn new(mode: Mode, store: Store) -> Self {
        let guest = (mode != Mode::AtRest).then(Guest::boot);
        guest.iter().for_each(start_writer);
        let dir = tempfile::tempdir().unwrap();
        volume(dir.path(), 40);
        let weed = (store == Store::Bucket).then(Weed::start);
        Self { guest, dir, weed, mode }
    }

    fn config(&self, environment: &[(&str, &str)]) -> Config {
        let mut config = match &self.guest {
            Some(guest) => config(guest),
            None => Config {
                lines: format!("boot_volume_dirs = [{:?}]", self.dir.path()),
                ..Config::default()
            },
        };
        // Quick: what is swept is not how the guest is spared.
        config.lines.push_str("\nencode_threads = \"all\"\nlatency_percent = 1000\n");
        for (name, file) in &mut config.instances {
            *name = self.name();
            writeln!(file, "shutdown_seconds = {SHUTDOWN_SECONDS}").unwrap();
        }
        if let Some(weed) = &self.weed {
            write!(config.lines, "\n{}", weed.config(weed.address(), self.dir.path())).unwrap();
        }
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        config.environment = environment.iter().map(own).collect();
        config
    }

    /// Its own, so that its guards can be told from others.
    fn name(&self) -> String {
        let dir = self.dir.path().file_name().unwrap().to_str().unwrap();
        format!("sweep-{}", dir.trim_start_matches('.'))
    }

    fn start(&self, environment: &[(&str, &str)]) -> Daemon {
        Daemon::start_logged(self.dir.path(), &self.config(environment))
    }

    /// Asks for an image, and does not wait: who waits hopes for another
    /// daemon when this one dies.
    fn ask(&self, daemon: &Daemon, more: &[&str]) -> std::process::Output {
        let name = self.name();
        let volume = self.dir.path().join("volume.raw");
        let of = match self.guest {
            Some(_) => ["--instance-id", &name],
            None => ["--boot-volume", volume.to_str().unwrap()],
        };
        let create = ["image", "create", "--compression", "none", "--output", "json"];
        daemon.imagectl(&[&create[..], &of, self.mode.consistency(), more].concat())
    }

    fn create(&self, daemon: &Daemon) -> std::process::Output {
        self.ask(daemon, &["--wait-for-state", "AVAILABLE"])
    }

    /// What a capture does, step by step, and what a recovery does of one
    /// that was killed at the step `killed`.
    fn steps(&self, killed: Option<&str>) -> Vec<String> {
        if let Some(step) = killed {
            assert!(self.dies_at(step), "{step} was not reached");
        }
        let file = self.dir.path().join("steps");
        let _ = fs::remove_file(&file);
        let daemon = self.start(&[("IMAGED_TEST_STEPS", file.to_str().unwrap())]);
        if killed.is_none() {
            let made = self.create(&daemon);
            let said = String::from_utf8_lossy(&made.stderr).into_owned();
            assert!(made.status.success(), "{said}");
        }
        // The last comes when the end is told; the looks are no part of it.
        thread::sleep(Duration::from_millis(500));
        let steps = fs::read_to_string(&file).unwrap();
        self.look(daemon);
        let recovery = |step: &&str| step.contains(" recovery: ") == killed.is_some();
        steps.lines().filter(recovery).map(str::to_owned).collect()
    }

    /// Makes an image with an imaged that dies at `step`; whether it did.
    fn dies_at(&self, step: &str) -> bool {
        let daemon = self.start(&[("IMAGED_TEST_DIES", step)]);
        self.ask(&daemon, &[]);
        daemon.is_killed_at_work()
    }

    /// Kills at `step`, and looks.
    fn kill_at(&self, step: &str) {
        let died = self.dies_at(step);
        self.look(self.start(&[]));
        assert!(died, "it was not reached");
    }

    /// Kills at `step`, then the recovery at `again`, and looks.
    fn kill_twice(&self, step: &str, again: &str) {
        assert!(self.dies_at(step), "{step} was not reached");
        let died =
            Daemon::start_and_die(self.dir.path(), &self.config(&[("IMAGED_TEST_DIES", again)]));
        self.look(self.start(&[]));
        assert!(died, "it was not reached");
    }

    /// Kills after `time`, and looks.
    fn kill_after(&self, time: Duration) {
        let daemon = self.start(&[]);
        thread::scope(|scope| {
            scope.spawn(|| self.ask(&daemon, &[]));
            thread::sleep(time);
            daemon.signal("KILL");
        });
        drop(daemon);
        self.look(self.start(&[]));
    }

    /// What is promised of a guest, its QEMU, the store and the journal once
    /// imaged was started again.
    fn look(&self, daemon: Daemon) {
        let requests = wait_for("the end of the work", Duration::from_secs(60), || {
            let requests = daemon.json(&["work-request", "list", "--limit", "1"])["data"].clone();
            let ended = |request: &Value| !request["time-finished"].is_null();
            requests.as_array().unwrap().iter().all(ended).then_some(requests)
        });
        if let Some(guest) = &self.guest {
            self.is_well(guest);
            assert_nothing_left(guest);
        }
        assert_eq!(guards(&self.name()), 0, "a guard is left");

        let images = daemon.json(&["image", "list"])["data"].as_array().unwrap().clone();
        // The last may be one that looked at an image.
        let made = requests[0]["operation-type"] == "CREATE_IMAGE";
        let made = made && requests[0]["status"] == "SUCCEEDED";
        assert_eq!(images.len(), usize::from(made), "{requests}");
        for image in &images {
            assert_eq!(image["lifecycle-state"], "AVAILABLE");
            let id = image["id"].as_str().unwrap();
            let verified = daemon.imagectl(&["image", "verify", "--image-id", id]);
            assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
            let deleted = daemon.imagectl(&["image", "delete", "--force", "--image-id", id]);
            assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
        }
        match &self.weed {
            None => {
                let left = fs::read_dir(daemon.images()).map_or(0, Iterator::count);
                assert_eq!(left, 0, "something is left in the store");
            }
            Some(weed) => {
                assert_eq!(weed.uploads(), 0, "an upload is left");
                assert_eq!(weed.keys(), ["imaged-store.json"]);
            }
        }
        daemon.stop();
    }

    /// It runs, and writes.
    fn is_well(&self, guest: &Guest) {
        let mut monitor = Monitor::of(guest);
        assert_eq!(monitor.execute("query-status")["status"], "running");
        if self.mode == Mode::Stop {
            guest.vm("wait-agent", &[]);
            if guest.sh("pgrep -f '[w]riter.pl' || true").is_empty() {
                start_writer(guest);
            }
        }
        let mut written = || {
            let disks = monitor.execute("query-blockstats");
            disks[0]["stats"]["wr_operations"].as_u64().unwrap()
        };
        let before = written();
        wait_for("the guest to write", Duration::from_secs(10), || {
            (written() > before).then_some(())
        });
    }

    /// And in the end an image, whose guest has seen nothing.
    fn end(&self) {
        let daemon = self.start(&[]);
        let made = self.create(&daemon);
        let image: Value = serde_json::from_slice(&made.stdout).unwrap();
        let Some(guest) = &self.guest else { return };
        let object = object(&daemon, &image["data"]);
        let records = records(&object, self.mode == Mode::Crash);
        // A guest that was started again counts anew.
        if self.mode != Mode::Stop {
            assert_prefix(&records);
        }
        guest.vm("wait-agent", &[]);
        assert_eq!(guest.sh("cat /run/writer.log || true"), "", "the guest saw an error");
    }
}

/// Guards over the instance called so.
fn guards(instance: &str) -> usize {
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let guard = format!("\0guard\0{instance}\0");
    let is_one = |at: &Path| {
        let line = fs::read(at.join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&guard)
    };
    processes.filter(|process| is_one(&process.path())).count()
}

/// A step's name without the number that tells it from its like.
fn kind(step: &str) -> &str {
    step.rsplit_once(' ').unwrap().0
}

/// Of parts, which are all alike, the first and the last.
fn without_the_like(steps: &[String]) -> Vec<String> {
    let like = |step: &String| kind(step).contains("store put") || kind(step).contains("part");
    let mut kept = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let same = |other: &&String| kind(other) == kind(step);
        let before = steps[..index].iter().filter(same).count();
        let after = steps[index + 1..].iter().filter(same).count();
        if !like(step) || before == 0 || after == 0 {
            kept.push(step.clone());
        }
    }
    kept
}

/// Has `deed` done to each of `steps`.
///
/// # Panics
///
/// With all that did not hold.
fn each(steps: &[String], deed: impl Fn(&str)) {
    let begun = Instant::now();
    let mut violations = String::new();
    for step in steps {
        let before = Instant::now();
        let kept = catch_unwind(AssertUnwindSafe(|| deed(step)));
        println!("{step}: {:.1?}", before.elapsed());
        if let Err(panic) = kept {
            writeln!(violations, "{step}: {}", said(&panic)).unwrap();
        }
    }
    println!("{} kills in {:.0?}", steps.len(), begun.elapsed());
    assert!(violations.is_empty(), "{violations}");
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

#[test]
#[ignore = "needs root, QEMU and minutes"]
fn qemu_sweep_a_capture_is_killed_at_every_step() {
    let sweep = Sweep::new(Mode::Freeze, Store::Directory);
    let steps = without_the_like(&sweep.steps(None));
    for needed in ["guest-fsfreeze-freeze", "qom-set", "store seal", "journal: request"] {
        assert!(steps.iter().any(|step| step.contains(needed)), "no {needed} in {steps:?}");
    }
    each(&steps, |step| sweep.kill_at(step));
    sweep.end();
}

#[test]
#[ignore = "needs root, QEMU and minutes"]
fn qemu_sweep_a_recovery_is_killed_at_every_step() {
    let sweep = Sweep::new(Mode::Freeze, Store::Directory);
    // Everything is there by then, and the guest is frozen.
    let killed = "before guest-fsfreeze-thaw 1";
    let steps = sweep.steps(Some(killed));
    assert!(steps.iter().any(|step| step.contains("qom-set")), "{steps:?}");
    // After one is before the next.
    let last = steps.last().unwrap().clone();
    let steps: Vec<_> = steps.into_iter().filter(|step| step.starts_with("before")).collect();
    each(&[steps, vec![last]].concat(), |step| sweep.kill_twice(killed, step));
    sweep.end();
}

#[test]
#[ignore = "needs root, SeaweedFS and minutes"]
fn root_sweep_a_capture_to_a_bucket_is_killed_at_every_step() {
    let sweep = Sweep::new(Mode::AtRest, Store::Bucket);
    let steps = without_the_like(&sweep.steps(None));
    for needed in ["store put", "journal: part", "store seal"] {
        assert!(steps.iter().any(|step| step.contains(needed)), "no {needed} in {steps:?}");
    }
    each(&steps, |step| sweep.kill_at(step));
    sweep.end();
}

#[test]
#[ignore = "needs root, QEMU and minutes"]
fn qemu_sweep_a_shutdown_is_killed_at_every_step() {
    let sweep = Sweep::new(Mode::Stop, Store::Directory);
    let steps = sweep.steps(None);
    let own = [
        "set-action",
        "guest-shutdown",
        "system_reset",
        "cont",
        "qom-set",
        "guard set",
        "guard lifted",
    ];
    // Of those that a shutdown shares with others, what comes before the
    // guest runs again.
    let own = |step: &&String| own.iter().any(|own| kind(step).ends_with(own));
    let until = steps.iter().position(|step| step == "after guard lifted 1").unwrap();
    let steps: Vec<_> = steps[..=until].iter().filter(own).cloned().collect();
    assert!(steps.iter().any(|step| step.contains("system_reset")), "{steps:?}");
    each(&steps, |step| sweep.kill_at(step));
    sweep.end();
}

/// `make soak SWEEPS=N`.
#[test]
#[ignore = "needs root, QEMU, SeaweedFS and as long as it is given"]
fn qemu_sweep_random_kills() {
    let count = env::var("IMAGED_TEST_SWEEPS").map_or(1, |count| count.parse::<u64>().unwrap());
    let first = env::var("IMAGED_TEST_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let first = first.unwrap_or_else(|| u64::from(std::process::id()) << 20);
    // The product of modes and stores, in turns.
    let product: Vec<_> = Mode::ALL
        .into_iter()
        .flat_map(|mode| [(mode, Store::Directory), (mode, Store::Bucket)])
        .collect();
    let mut violations = Vec::new();
    let mut done = 0;
    for (turn, (mode, store)) in product.iter().enumerate() {
        let seeds: Vec<_> = (first..first + count)
            .filter(|seed| seed % product.len() as u64 == turn as u64)
            .collect();
        if seeds.is_empty() {
            continue;
        }
        let mut sweep = Sweep::new(*mode, *store);
        let steps = sweep.steps(None);
        for seed in seeds {
            let random = crate::lab::noise(16, seed);
            let number = usize::from(u16::from_le_bytes([random[1], random[2]]));
            let kept = catch_unwind(AssertUnwindSafe(|| match random[0] % 2 {
                0 => sweep.kill_at(&steps[number % steps.len()]),
                _ => sweep.kill_after(Duration::from_millis(number as u64 % 6000)),
            }));
            done += 1;
            if let Err(panic) = kept {
                println!("seed {seed}, {mode:?} to {store:?}: {}", said(&panic));
                violations.push(seed);
                // What is left must not be held against the next.
                sweep = Sweep::new(*mode, *store);
            }
        }
    }
    println!("{done} sweeps, {} violations", violations.len());
    assert!(violations.is_empty(), "replay with IMAGED_TEST_SEED=SEED: {violations:?}");
}
