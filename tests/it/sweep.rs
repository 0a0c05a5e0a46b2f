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
    lab::{Config, Daemon, Guest, Monitor, Mount, wait_for},
    lab_libvirt::Libvirt,
    libvirt,
    live::{assert_nothing_left, assert_prefix, config, object, records, start_writer},
    s3::volume,
    weed::Weed,
};

/// Nobody shuts down that slowly here, so that a wait in vain is short.
const SHUTDOWN_SECONDS: u64 = 12;

/// How images are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    AtRest,
    Freeze,
    Crash,
    Stop,
    /// Of a guest that does not shut down.
    ForceStop,
}

impl Mode {
    fn words(self) -> &'static [&'static str] {
        match self {
            Self::AtRest => &[],
            Self::Freeze => &["--consistency", "freeze"],
            Self::Crash => &["--consistency", "crash"],
            Self::Stop => &["--consistency", "stop"],
            Self::ForceStop => &["--consistency", "stop", "--force-stop"],
        }
    }

    fn stops(self) -> bool {
        matches!(self, Self::Stop | Self::ForceStop)
    }

    /// Whether the image needs a replay of its journal.
    fn crashes(self) -> bool {
        matches!(self, Self::Crash | Self::ForceStop)
    }
}

/// Of what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A volume that nothing uses.
    Volume,
    Qemu,
    /// A QEMU whose volume the host can clone.
    Cloned,
    /// A domain of libvirt's.
    Domain,
    /// A domain whose volume the host can clone.
    ClonedDomain,
}

impl Kind {
    /// How its images are taken.
    fn snapshot(self) -> &'static str {
        match self {
            Self::Volume => "AT_REST",
            Self::Qemu | Self::Domain => "COPY_BEFORE_WRITE",
            Self::Cloned | Self::ClonedDomain => "REFLINK",
        }
    }
}

/// Where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    Directory,
    Bucket,
}

/// Every mode of every kind.
const MODES: [(Kind, Mode); 14] = [
    (Kind::Volume, Mode::AtRest),
    (Kind::Qemu, Mode::Freeze),
    (Kind::Qemu, Mode::Crash),
    (Kind::Qemu, Mode::Stop),
    (Kind::Qemu, Mode::ForceStop),
    (Kind::Cloned, Mode::Freeze),
    (Kind::Cloned, Mode::Crash),
    (Kind::Cloned, Mode::Stop),
    (Kind::Domain, Mode::Freeze),
    (Kind::Domain, Mode::Crash),
    (Kind::Domain, Mode::Stop),
    (Kind::Domain, Mode::ForceStop),
    (Kind::ClonedDomain, Mode::Freeze),
    (Kind::ClonedDomain, Mode::Stop),
];

/// A guest, by who runs it.
enum Machine {
    Qemu { guest: Guest, _volume: Option<Mount> },
    Domain { libvirt: Libvirt, _volume: Option<Mount> },
}

impl Machine {
    /// Boots one that writes.
    fn boot(kind: Kind, name: &str) -> Option<Self> {
        let cloned = matches!(kind, Kind::Cloned | Kind::ClonedDomain);
        let volume = cloned.then(|| Mount::new("xfs", 6 << 30));
        let dir = match &volume {
            Some(volume) => tempfile::tempdir_in(volume.at.path()),
            None => tempfile::tempdir(),
        };
        let machine = match kind {
            Kind::Volume => return None,
            Kind::Qemu | Kind::Cloned => {
                Self::Qemu { guest: Guest::boot_at(dir.unwrap()), _volume: volume }
            }
            Kind::Domain | Kind::ClonedDomain => {
                let libvirt = Libvirt::start_in(dir.unwrap(), name);
                libvirt.boot();
                Self::Domain { libvirt, _volume: volume }
            }
        };
        machine.start_writer();
        Some(machine)
    }

    fn config(&self, name: &str) -> Config {
        match self {
            Self::Qemu { guest, .. } => {
                let mut config = config(guest);
                let lines = format!("{}shutdown_seconds = {SHUTDOWN_SECONDS}\n", guest.instance());
                config.instances = vec![(name.to_owned(), lines)];
                config
            }
            Self::Domain { libvirt, .. } => libvirt.config(),
        }
    }

    fn sh(&self, script: &str) -> String {
        match self {
            Self::Qemu { guest, .. } => guest.sh(script),
            Self::Domain { libvirt, .. } => libvirt.sh(script),
        }
    }

    fn wait_agent(&self) {
        match self {
            Self::Qemu { guest, .. } => drop(guest.vm("wait-agent", &[])),
            Self::Domain { libvirt, .. } => libvirt.wait_new_agent(),
        }
    }

    fn start_writer(&self) {
        match self {
            Self::Qemu { guest, .. } => start_writer(guest),
            Self::Domain { libvirt, .. } => libvirt::start_writer(libvirt),
        }
    }

    /// Writes of its disk until now.
    fn written(&self) -> u64 {
        match self {
            Self::Qemu { guest, .. } => {
                let disks = Monitor::of(guest).execute("query-blockstats");
                disks[0]["stats"]["wr_operations"].as_u64().unwrap()
            }
            Self::Domain { libvirt, .. } => libvirt.written(),
        }
    }

    fn assert_it_runs(&self) {
        match self {
            Self::Qemu { guest, .. } => {
                assert_eq!(Monitor::of(guest).execute("query-status")["status"], "running");
            }
            Self::Domain { libvirt, .. } => assert_eq!(libvirt.state(), "running"),
        }
    }

    fn assert_nothing_left(&self) {
        match self {
            Self::Qemu { guest, .. } => assert_nothing_left(guest),
            Self::Domain { libvirt, .. } => libvirt.assert_nothing_left(),
        }
    }
}

/// A guest that writes or a volume at rest, and the directory of its imaged.
struct Sweep {
    machine: Option<Machine>,
    dir: tempfile::TempDir,
    weed: Option<Weed>,
    kind: Kind,
    mode: Mode,
}

impl Sweep {
    fn new((kind, mode): (Kind, Mode), store: Store) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::boot(kind, &name(dir.path()));
        if let (Some(machine), Mode::ForceStop) = (&machine, mode) {
            machine.sh("printf '#!/bin/sh\n' >/sbin/shutdown; sync");
        }
        if machine.is_none() {
            volume(dir.path(), 40);
        }
        let weed = (store == Store::Bucket).then(Weed::start);
        Self { machine, dir, weed, kind, mode }
    }

    fn config(&self, environment: &[(&str, &str)]) -> Config {
        let mut config = match &self.machine {
            Some(machine) => machine.config(&self.name()),
            None => Config {
                lines: format!("boot_volume_dirs = [{:?}]", self.dir.path()),
                ..Config::default()
            },
        };
        // Quick: what is swept is not how the guest is spared.
        config.lines.push_str("\nencode_threads = \"all\"\nlatency_percent = 1000\n");
        if let Some(weed) = &self.weed {
            write!(config.lines, "\n{}", weed.config(weed.address(), self.dir.path())).unwrap();
        }
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        config.environment = environment.iter().map(own).collect();
        config
    }

    fn name(&self) -> String {
        name(self.dir.path())
    }

    fn start(&self, environment: &[(&str, &str)]) -> Daemon {
        Daemon::start_logged(self.dir.path(), &self.config(environment))
    }

    /// Asks for an image, and does not wait: who waits hopes for another
    /// daemon when this one dies.
    fn ask(&self, daemon: &Daemon, more: &[&str]) -> std::process::Output {
        let name = self.name();
        let volume = self.dir.path().join("volume.raw");
        let of = match self.machine {
            Some(_) => ["--instance-id", &name],
            None => ["--boot-volume", volume.to_str().unwrap()],
        };
        let create = ["image", "create", "--compression", "none", "--output", "json"];
        daemon.imagectl(&[&create[..], &of, self.mode.words(), more].concat())
    }

    fn create(&self, daemon: &Daemon) -> Value {
        let made = self.ask(daemon, &["--wait-for-state", "AVAILABLE"]);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        serde_json::from_slice::<Value>(&made.stdout).unwrap()["data"].clone()
    }

    /// What a capture does, step by step, and what a recovery does of one
    /// that was killed at the step `killed`.
    fn steps(&self, killed: Option<&str>) -> Vec<String> {
        if let Some(step) = killed {
            let log = || fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(self.dies_at(step), "{step} was not reached: {}", log());
        }
        let file = self.dir.path().join("steps");
        let _ = fs::remove_file(&file);
        let daemon = self.start(&[("IMAGED_TEST_STEPS", file.to_str().unwrap())]);
        if killed.is_none() {
            self.create(&daemon);
        }
        // The last comes when the end is told; the looks are no part of it.
        thread::sleep(Duration::from_millis(500));
        let steps = fs::read_to_string(&file).unwrap();
        self.look(daemon);
        let recovery = |step: &&str| step.contains(" recovery: ") == killed.is_some();
        moments(steps.lines().filter(recovery).map(str::to_owned).collect())
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

    /// What is promised of a guest, its hypervisor, the store and the journal
    /// once imaged was started again.
    fn look(&self, daemon: Daemon) {
        let requests = wait_for("the end of the work", Duration::from_secs(60), || {
            let requests = daemon.json(&["work-request", "list", "--limit", "1"])["data"].clone();
            let ended = |request: &Value| !request["time-finished"].is_null();
            requests.as_array().unwrap().iter().all(ended).then_some(requests)
        });
        if let Some(machine) = &self.machine {
            self.is_well(machine);
            machine.assert_nothing_left();
            if self.mode == Mode::Freeze {
                let fuses = "grep -ls 'imaged-thaw-fus[e]' /proc/[0-9]*/cmdline || true";
                assert_eq!(machine.sh(fuses), "", "a fuse is left");
            }
        }
        wait_for("the guards to end", Duration::from_secs(5), || {
            (guards(&self.name()) == 0).then_some(())
        });

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
            delete(&daemon, image);
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
    fn is_well(&self, machine: &Machine) {
        machine.assert_it_runs();
        if self.mode.stops() {
            machine.wait_agent();
            if machine.sh("pgrep -f '[w]riter.pl' || true").is_empty() {
                machine.start_writer();
            }
        }
        let before = machine.written();
        wait_for("the guest to write", Duration::from_secs(10), || {
            (machine.written() > before).then_some(())
        });
    }

    /// And in the end an image, whose guest has seen nothing.
    fn end(&self) {
        let daemon = self.start(&[]);
        let image = self.create(&daemon);
        assert_eq!(image["snapshot"], self.kind.snapshot());
        let Some(machine) = &self.machine else { return };
        let records = records(&object(&daemon, &image), self.mode.crashes());
        delete(&daemon, &image);
        // A guest that was started again counts anew.
        if !self.mode.stops() {
            assert_prefix(&records);
        }
        machine.wait_agent();
        assert_eq!(machine.sh("cat /run/writer.log || true"), "", "the guest saw an error");
    }
}

fn delete(daemon: &Daemon, image: &Value) {
    let id = image["id"].as_str().unwrap();
    let deleted = daemon.imagectl(&["image", "delete", "--force", "--image-id", id]);
    assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
}

/// The instance of the sweep in `dir`, so that its guards can be told from
/// others'.
fn name(dir: &Path) -> String {
    let dir = dir.file_name().unwrap().to_str().unwrap();
    format!("sweep-{}", dir.trim_start_matches('.'))
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

/// After one effect is before the next one: the same moment, unless something
/// is waited for in between.
fn moments(steps: Vec<String>) -> Vec<String> {
    let waits = |step: &String| kind(step) == "after shutdown";
    let is_last = |at: usize| at + 1 == steps.len();
    let is_next = |at: usize| steps[at].starts_with("after") && steps[at + 1].starts_with("before");
    let mut kept = steps.clone();
    let mut at = 0;
    kept.retain(|step| {
        at += 1;
        waits(step) || is_last(at - 1) || !is_next(at - 1)
    });
    kept
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
    let mut sweep = Sweep::new((Kind::Qemu, Mode::Freeze), Store::Directory);
    let steps = without_the_like(&sweep.steps(None));
    for needed in ["guest-fsfreeze-freeze", "qom-set", "store seal", "journal: request"] {
        assert!(steps.iter().any(|step| step.contains(needed)), "no {needed} in {steps:?}");
    }
    each(&steps, |step| sweep.kill_at(step));
    sweep.end();
    // What it shares with a freeze was swept.
    sweep.mode = Mode::Crash;
    each(&own_steps(&sweep, &["qom-set"]), |step| sweep.kill_at(step));
}

#[test]
#[ignore = "needs root, QEMU and minutes"]
fn qemu_sweep_a_recovery_is_killed_at_every_step() {
    let sweep = Sweep::new((Kind::Qemu, Mode::Freeze), Store::Directory);
    // Everything is there by then, and the guest is frozen.
    let killed = "before guest-fsfreeze-thaw 1";
    let steps = sweep.steps(Some(killed));
    assert!(steps.iter().any(|step| step.contains("qom-set")), "{steps:?}");
    each(&steps, |step| sweep.kill_twice(killed, step));
    sweep.end();
}

#[test]
#[ignore = "needs root, SeaweedFS and minutes"]
fn root_sweep_a_capture_to_a_bucket_is_killed_at_every_step() {
    let sweep = Sweep::new((Kind::Volume, Mode::AtRest), Store::Bucket);
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
    let sweep = Sweep::new((Kind::Cloned, Mode::Stop), Store::Directory);
    let own = [
        "blockdev-add",
        "set-action",
        "guest-shutdown",
        "host snapshot",
        "system_reset",
        "blockdev-del",
        "cont",
        "guard set",
        "guard lifted",
    ];
    let steps = own_steps(&sweep, &own);
    each(&steps, |step| sweep.kill_at(step));
    sweep.end();
}

/// Of a capture's steps those that it does not share with others: `own`, all
/// of which there must be.
fn own_steps(sweep: &Sweep, own: &[&str]) -> Vec<String> {
    let steps = sweep.steps(None);
    for own in own {
        assert!(steps.iter().any(|step| kind(step).ends_with(own)), "no {own} in {steps:?}");
    }
    let is_own = |step: &String| own.iter().any(|own| kind(step).ends_with(own));
    steps.into_iter().filter(is_own).collect()
}

#[test]
#[ignore = "needs root, libvirt and minutes"]
fn libvirt_sweep_a_frozen_domain_is_killed_at_every_step() {
    let mut sweep = Sweep::new((Kind::Domain, Mode::Freeze), Store::Directory);
    let own = ["guard set", "guest-fsfreeze-freeze", "backup-begin", "guest-fsfreeze-thaw"];
    let end = ["domjobabort", "order removed", "guard lifted"];
    let steps = own_steps(&sweep, &[&own[..], &end].concat());
    each(&steps, |step| sweep.kill_at(step));
    sweep.end();
    sweep.mode = Mode::Crash;
    each(&own_steps(&sweep, &["backup-begin"]), |step| sweep.kill_at(step));
}

#[test]
#[ignore = "needs root, libvirt and minutes"]
fn libvirt_sweep_a_stopped_domain_is_killed_at_every_step() {
    let sweep = Sweep::new((Kind::ClonedDomain, Mode::Stop), Store::Directory);
    let own = ["shutdown", "start", "host snapshot", "resume", "guard lifted"];
    let steps = own_steps(&sweep, &own);
    each(&steps, |step| sweep.kill_at(step));
    sweep.end();
}

/// `make soak SWEEPS=N`.
#[test]
#[ignore = "needs root, QEMU, SeaweedFS and as long as it is given"]
fn qemu_sweep_random_kills() {
    let count = env::var("IMAGED_TEST_SWEEPS").map_or(1, |count| count.parse::<u64>().unwrap());
    let first = env::var("IMAGED_TEST_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    // The product, in turns; the first is the quickest.
    let product: Vec<_> = MODES
        .into_iter()
        .flat_map(|mode| [(mode, Store::Directory), (mode, Store::Bucket)])
        .collect();
    let first = first.unwrap_or_else(|| u64::from(std::process::id()) * product.len() as u64);
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
