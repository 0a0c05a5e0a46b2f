//! Images of a guest that goes on working.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    net::Shutdown,
    os::unix::{
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::{
    lab::{Config, Daemon, Guest, Monitor, run, scratch, wait_for},
    lifecycle::status,
};

/// Appends numbered records with a checksum to /records, each with fsync, and
/// keeps the longest time that one took, in microseconds, in /run/longest.
pub const WRITER: &str = r#"
use strict; use IO::Handle; use Time::HiRes qw(time);
open(my $records, '>>', '/records') or die $!;
$records->autoflush(1);
my ($number, $longest) = (0, 0);
while (1) {
    my $begin = time;
    my $text = sprintf('%010d', $number);
    my $sum = unpack('%32C*', $text . 'imaged') * 2654435761 % 4294967296;
    print $records "$text $sum\n" or die $!;
    $records->sync or die $!;
    my $took = int((time - $begin) * 1e6);
    if ($took > $longest) {
        $longest = $took;
        open(my $out, '>', '/run/longest') or die $!;
        print $out "$longest\n";
    }
    $number++;
}
"#;

pub fn start_writer(guest: &Guest) {
    guest.sh(&format!(
        "cat > /run/writer.pl <<'END'\n{WRITER}\nEND\n\
         setsid perl /run/writer.pl >/run/writer.log 2>&1 </dev/null &\n\
         for try in 1 2 3 4 5 6 7 8 9; do sleep 0.5; [ -s /records ] && exit 0; done\n\
         cat /run/writer.log >&2; exit 1"
    ));
}

pub fn config(guest: &Guest) -> Config {
    let scratch = guest.disk().with_file_name("scratch");
    Config {
        lines: format!("scratch_size = \"1GiB\"\nscratch_dir = {scratch:?}"),
        instances: vec![("web-1".into(), guest.instance())],
        ..Config::default()
    }
}

fn daemon(guest: &Guest) -> Daemon {
    Daemon::start(&config(guest))
}

pub fn capture(daemon: &Daemon, more: &[&str]) -> Value {
    let args = ["image", "create", "--instance-id", "web-1", "--wait-for-state", "AVAILABLE"];
    daemon.json(&[&args[..], more].concat())["data"].clone()
}

pub fn object(daemon: &Daemon, image: &Value) -> PathBuf {
    daemon.images().join(image["id"].as_str().unwrap()).join("image.qcow2")
}

/// The records in an image, after its journal was replayed. Its filesystem
/// must then be clean; without `replay` it must be so at once.
pub fn records(object: &Path, replay: bool) -> Vec<String> {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let disk = dir.path().join("disk.raw").display().to_string();
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", object.to_str().unwrap(), &disk]);
    // Where the root's partition begins.
    let mut root = format!("{disk}?offset=1048576");
    if replay {
        root = dir.path().join("root").display().to_string();
        let (from, to) = (format!("if={disk}"), format!("of={root}"));
        run("dd", &[&from, &to, "bs=1M", "skip=1", "conv=sparse", "status=none"]);
        // 1: the journal was replayed, and all is well.
        run("sh", &["-c", &format!("e2fsck -E journal_only -p '{root}' || [ $? = 1 ]")]);
    }
    run("e2fsck", &["-f", "-n", &root]);
    run("debugfs", &["-R", "cat /records", &root]).lines().map(str::to_owned).collect()
}

pub fn assert_prefix(records: &[String]) {
    assert!(!records.is_empty());
    for (number, record) in records.iter().enumerate() {
        let text = format!("{number:010}");
        let sum: u64 = text.bytes().chain(*b"imaged").map(u64::from).sum();
        let sum = sum * 2_654_435_761 % 4_294_967_296;
        assert_eq!(*record, format!("{text} {sum}"));
    }
}

/// Of each mode; `make soak` takes more.
fn captures() -> u32 {
    env::var("IMAGED_TEST_CAPTURES").map_or(2, |count| count.parse().unwrap())
}

#[test]
#[ignore = "needs root, QEMU and minutes"]
fn qemu_guest_is_imaged_while_it_writes() {
    let guest = Guest::boot();
    start_writer(&guest);
    let daemon = daemon(&guest);
    let mut before = 0;
    for (mode, consistency) in [("freeze", "FILESYSTEM"), ("crash", "CRASH")] {
        for _ in 0..captures() {
            let image = capture(&daemon, &["--consistency", mode]);
            assert_eq!(image["consistency"], consistency);
            let point = &image["point-in-time"];
            assert_eq!(point["frozen-filesystems"], i32::from(mode == "freeze"));
            assert_eq!(point["fuse"], mode == "freeze");
            assert!(point["scratch-bytes"].as_u64().unwrap() > 0, "{point}");
            println!("window: {} µs", point["window-micros"]);
            let records = records(&object(&daemon, &image), mode == "crash");
            assert_prefix(&records);
            assert!(records.len() > before, "the guest wrote nothing");
            before = records.len();
            assert_sealed_trace(&daemon, &image, mode);
            let id = image["id"].as_str().unwrap();
            assert!(
                daemon.imagectl(&["image", "delete", "--force", "--image-id", id]).status.success()
            );
        }
    }
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
    println!("longest record: {} µs", guest.sh("cat /run/longest").trim());
    assert_nothing_left(&guest);
}

/// What was said to the guest is told by the work request, and lies beside
/// the image with the digest that its manifest has.
fn assert_sealed_trace(daemon: &Daemon, image: &Value, mode: &str) {
    let dir = object(daemon, image).with_file_name("");
    let sealed = fs::read(dir.join("trace.json")).unwrap();
    let manifest: Value =
        serde_json::from_slice(&fs::read(dir.join("manifest.json")).unwrap()).unwrap();
    let digest = run("sha256sum", &[dir.join("trace.json").to_str().unwrap()]);
    assert_eq!(digest.split(' ').next(), manifest["traceDigest"].as_str());

    let requests =
        daemon.json(&["work-request", "list", "--resource-id", image["id"].as_str().unwrap()]);
    let id = requests["data"][0]["id"].as_str().unwrap();
    let told = daemon.json(&["work-request", "get", "--trace", "--work-request-id", id]);
    let told = told["data"]["entries"].as_array().unwrap().clone();
    let commands = told.iter().filter(|entry| entry["kind"] == "COMMAND");
    let commands: Vec<_> = commands.map(|entry| entry["name"].as_str().unwrap()).collect();
    let at = |name: &str| commands.iter().position(|command| *command == name);
    assert!(at("nbd-server-start") < at("qom-set") && at("qom-set") < at("block-export-add"));
    match mode {
        "freeze" => {
            assert!(at("guest-fsfreeze-freeze") < at("qom-set"));
            assert!(at("qom-set") < at("guest-fsfreeze-thaw"));
        }
        _ => assert_eq!(at("guest-fsfreeze-freeze"), None),
    }
    let sealed: Value = serde_json::from_slice(&sealed).unwrap();
    let sealed = sealed["entries"].as_array().unwrap();
    assert!(sealed.len() > 30 && sealed.len() <= told.len(), "{} of {}", sealed.len(), told.len());
}

/// Neither in QEMU nor in the scratch directory.
pub fn assert_nothing_left(guest: &Guest) {
    let scratch = guest.disk().with_file_name("scratch");
    assert_eq!(fs::read_dir(scratch).map_or(0, Iterator::count), 0);
    let nodes = guest.qmp("query-named-block-nodes");
    assert!(!nodes.contains("imaged-"), "{nodes}");
    assert_eq!(guest.qmp("query-block-exports"), "[]");
    // Its own node again, by name.
    assert!(guest.qmp("query-blockstats").contains(r#""node-name": "boot""#));
}

/// Waits until the guest has written more records.
pub fn assert_it_writes(guest: &Guest) {
    let count = || guest.sh("wc -l < /records").trim().parse::<u64>().unwrap();
    let before = count();
    wait_for("the guest to write", Duration::from_secs(10), || (count() > before).then_some(()));
}

/// Asks for an image and returns the work request once it reads.
pub fn reading(daemon: &Daemon, more: &[&str]) -> String {
    let args = ["image", "create", "--instance-id", "web-1"];
    let started = daemon.json(&[&args[..], more].concat());
    let request = started["opc-work-request-id"].as_str().unwrap().to_owned();
    wait_for("the capture to read", Duration::from_secs(60), || {
        let now = status(daemon, &request);
        assert!(now["time-finished"].is_null(), "{now}");
        (now["phase"] == "read").then_some(())
    });
    request
}

/// A guest whose disk is read at a rate that leaves time for accidents.
pub fn slowly(mut config: Config) -> Config {
    config.lines.push_str("\nread_rate = \"48MiB\"");
    config
}

/// A capture whose daemon stands still, until it is told to go on, after the
/// first bytes were read: an emulated guest is slow.
pub fn held_while_reading(daemon: &Daemon) -> String {
    let request = reading(daemon, &[]);
    daemon.signal("STOP");
    request
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_gets_its_disk_back_from_a_daemon_that_was_killed_or_stopped() {
    let guest = Guest::boot();
    start_writer(&guest);
    let running = daemon(&guest);
    let request = reading(&running, &[]);
    let kept = running.kill().unwrap();
    assert_it_writes(&guest);
    assert!(guest.qmp("query-block-exports").contains("imaged-"), "the capture had not begun");

    let running = Daemon::start_in(kept.path(), &config(&guest));
    let ended = status(&running, &request);
    assert_eq!(ended["status"], "FAILED");
    assert!(ended["logs"].to_string().contains("took the snapshot out"), "{ended}");
    assert_nothing_left(&guest);
    assert_it_writes(&guest);

    // In order: what is being done is undone before the end.
    let request = reading(&running, &["--consistency", "crash"]);
    running.stop();
    assert_nothing_left(&guest);
    let running = Daemon::start_in(kept.path(), &config(&guest));
    assert_eq!(status(&running, &request)["errors"][0]["code"], "DAEMON_STOPPED");

    // A cancelled one, and then one that is whole.
    let request = reading(&running, &[]);
    running.json(&["work-request", "cancel", "--work-request-id", &request]);
    wait_for("the end", Duration::from_secs(30), || {
        (status(&running, &request)["status"] == "CANCELED").then_some(())
    });
    assert_nothing_left(&guest);
    let image = capture(&running, &[]);
    assert_prefix(&records(&object(&running, &image), false));

    // QEMU ends in the middle.
    let request = reading(&running, &[]);
    guest.vm("kill", &[]);
    let said = running.refusal(&["work-request", "watch", "--work-request-id", &request]);
    assert!(said.contains("QEMU"), "{said}");
    let scratch = guest.disk().with_file_name("scratch");
    assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_that_overwrites_too_much_loses_its_image_and_nothing_else() {
    let guest = Guest::boot();
    start_writer(&guest);
    let mut config = slowly(config(&guest));
    config.lines = config.lines.replace("1GiB", "4MiB");
    let daemon = Daemon::start(&config);
    // Not zeroes, which take no scratch.
    guest.sh("yes old | head -c 16000000 >/large; sync");
    let request = held_while_reading(&daemon);
    guest.sh(
        "setsid sh -c 'while :; do yes new | head -c 16000000 | dd bs=64k of=/large conv=notrunc,fsync; done' \
         >/dev/null 2>&1 </dev/null &",
    );
    let scratch = guest.disk().with_file_name("scratch");
    let taken = || {
        let mut found = fs::read_dir(&scratch).unwrap();
        let file = found.next()?.unwrap().path().join("scratch.qcow2");
        Some(fs::metadata(file).unwrap().blocks() * 512)
    };
    wait_for("the guest to overwrite", Duration::from_secs(60), || {
        taken().filter(|taken| *taken > 3 << 20)
    });
    // Without imaged it goes on, and the scratch does not grow.
    let written = || guest.sh("cat /proc/diskstats | grep ' vda ' | awk '{print $10 * 512}'");
    let written = || written().trim().parse::<u64>().unwrap();
    let before = written();
    wait_for("the guest to write more", Duration::from_secs(120), || {
        (written() > before + (24 << 20)).then_some(())
    });
    assert!(taken().unwrap() <= 4 << 20, "{:?} of scratch", taken());
    daemon.signal("CONT");
    let said = daemon.refusal(&["work-request", "watch", "--work-request-id", &request]);
    assert!(said.contains("fills the 4.00 MiB of scratch"), "{said}");
    assert_nothing_left(&guest);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
    assert_it_writes(&guest);
}

#[test]
#[ignore = "needs QEMU and a minute"]
fn qemu_guest_without_an_agent_is_refused_and_not_downgraded() {
    let guest = Guest::boot();
    let mut config = config(&guest);
    let without = guest.instance().lines().take(2).map(|line| format!("{line}\n")).collect();
    config.instances = vec![("web-1".into(), without)];
    let daemon = Daemon::start(&config);
    let said = daemon.refusal(&["image", "create", "--instance-id", "web-1"]);
    assert!(said.contains("nothing can freeze instance \"web-1\""), "{said}");
    assert!(said.contains("ask for a crash-consistent image"), "{said}");
}

/// Between imaged and a guest's agent: passes everything on but lines with a
/// word that it was told to lose.
pub struct Proxy {
    socket: PathBuf,
    lose: Arc<Mutex<Option<&'static str>>>,
    lost: Arc<AtomicBool>,
}

/// What a proxy does to a line that it was told of.
#[derive(Clone, Copy)]
enum Deed {
    Lose,
    HoldBack(Duration),
}

impl Proxy {
    /// Loses lines with this word.
    pub fn losing(guest: &Guest, word: &'static str) -> Self {
        Self::new(guest, word, Deed::Lose)
    }

    /// Passes the first line with this word on when `time` is over, and is
    /// honest from then on.
    pub fn holding_back(guest: &Guest, word: &'static str, time: Duration) -> Self {
        Self::new(guest, word, Deed::HoldBack(time))
    }

    fn new(guest: &Guest, lose: &'static str, deed: Deed) -> Self {
        let socket = guest.disk().with_file_name("proxy.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let lose = Arc::new(Mutex::new(Some(lose)));
        let lost = Arc::new(AtomicBool::new(false));
        let (agent, losing, seen) = (guest.agent_socket(), Arc::clone(&lose), Arc::clone(&lost));
        thread::spawn(move || {
            // One client at a time, as QEMU does.
            for client in listener.incoming() {
                let (Ok(client), Ok(agent)) = (client, UnixStream::connect(&agent)) else { return };
                let pass = |from: &UnixStream, to: &UnixStream| {
                    let (from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let (losing, seen) = (Arc::clone(&losing), Arc::clone(&seen));
                    thread::spawn(move || {
                        let mut lines = BufReader::new(&from);
                        let mut line = Vec::new();
                        while lines.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                            let word = *losing.lock().unwrap();
                            let text = String::from_utf8_lossy(&line);
                            if word.is_some_and(|word| text.contains(word)) {
                                seen.store(true, Ordering::SeqCst);
                                match deed {
                                    Deed::Lose => line.clear(),
                                    Deed::HoldBack(time) => {
                                        *losing.lock().unwrap() = None;
                                        thread::sleep(time);
                                    }
                                }
                            }
                            if to.write_all(&line).is_err() {
                                break;
                            }
                            line.clear();
                        }
                        let _ = to.shutdown(Shutdown::Both);
                    })
                };
                let (up, down) = (pass(&client, &agent), pass(&agent, &client));
                up.join().unwrap();
                let _ = client.shutdown(Shutdown::Both);
                down.join().unwrap();
            }
        });
        Self { socket, lose, lost }
    }

    pub fn config(&self, guest: &Guest) -> Config {
        let mut config = config(guest);
        let (real, proxy) = (guest.agent_socket(), &self.socket);
        config.instances[0].1 =
            config.instances[0].1.replace(real.to_str().unwrap(), proxy.to_str().unwrap());
        config
    }

    pub fn wait_until_lost(&self) {
        wait_for("the proxy to lose a line", Duration::from_secs(30), || {
            self.lost.load(Ordering::SeqCst).then_some(())
        });
    }

    fn heal(&self) {
        *self.lose.lock().unwrap() = None;
    }
}

/// Writes that the guest's disk has seen, asked past the agent, which runs
/// nothing while it thinks that the guest is frozen.
pub fn writes(guest: &Guest) -> u64 {
    let statistics = Monitor::of(guest).execute("query-blockstats");
    let disks = statistics.as_array().unwrap().iter();
    disks.map(|disk| disk["stats"]["wr_operations"].as_u64().unwrap()).sum()
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_that_a_dead_daemon_left_frozen_thaws_by_its_fuse() {
    let guest = Guest::boot();
    start_writer(&guest);
    let proxy = Proxy::losing(&guest, "\"execute\":\"guest-fsfreeze-thaw\"");
    let running = Daemon::start(&proxy.config(&guest));
    let started = running.json(&["image", "create", "--instance-id", "web-1"]);
    let request = started["opc-work-request-id"].as_str().unwrap().to_owned();
    proxy.wait_until_lost();
    let kept = running.kill().unwrap();

    // Nobody is there to thaw it.
    let before = writes(&guest);
    thread::sleep(Duration::from_secs(2));
    assert_eq!(writes(&guest), before, "it was not frozen");
    wait_for("the fuse", Duration::from_secs(40), || (writes(&guest) > before).then_some(()));

    proxy.heal();
    let running = Daemon::start_in(kept.path(), &proxy.config(&guest));
    assert_eq!(status(&running, &request)["status"], "FAILED");
    assert_nothing_left(&guest);
    running.stop();
    assert_it_writes(&guest);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_whose_freeze_is_not_answered_is_thawed() {
    let guest = Guest::boot();
    start_writer(&guest);
    // The answer to a freeze, or to a thaw: how many there were.
    let proxy = Proxy::losing(&guest, "{\"return\": 1}");
    let running = Daemon::start(&proxy.config(&guest));
    let started = running.json(&["image", "create", "--instance-id", "web-1"]);
    let request = started["opc-work-request-id"].as_str().unwrap().to_owned();
    proxy.wait_until_lost();
    proxy.heal();
    let said = running.refusal(&["work-request", "watch", "--work-request-id", &request]);
    assert!(said.contains("the guest agent did not freeze the guest's filesystems"), "{said}");
    assert_nothing_left(&guest);
    running.stop();
    assert_it_writes(&guest);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_on_qcow2_is_imaged_through_its_exports() {
    let guest = Guest::boot_on("qcow2");
    start_writer(&guest);
    let daemon = daemon(&guest);
    for (mode, replay) in [("freeze", false), ("crash", true)] {
        let image = capture(&daemon, &["--consistency", mode]);
        assert_prefix(&records(&object(&daemon, &image), replay));
    }
    assert_nothing_left(&guest);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");
}

#[test]
#[ignore = "needs root, QEMU and a minute"]
fn qemu_guest_whose_disk_somebody_else_writes_to_is_refused() {
    let guest = Guest::boot();
    let daemon = daemon(&guest);
    let other = fs::OpenOptions::new().append(true).open(guest.disk()).unwrap();
    let create = ["image", "create", "--instance-id", "web-1", "--wait-for-state", "AVAILABLE"];
    let said = daemon.refusal(&create);
    assert!(said.contains("is open for writing by it-"), "{said}");
    assert_nothing_left(&guest);
    drop(other);
    capture(&daemon, &[]);
}

#[test]
#[ignore = "needs root, QEMU and two minutes"]
fn qemu_guest_is_rehearsed_and_its_image_tells_what_was_expected() {
    let guest = Guest::boot();
    start_writer(&guest);
    let daemon = daemon(&guest);
    let rehearse = ["image", "create", "--rehearse", "--instance-id", "web-1"];
    let work = daemon.json(&rehearse)["data"].clone();
    assert_nothing_left(&guest);
    let found = &work["rehearsal"];
    assert_eq!(found["consistency"], "FILESYSTEM");
    assert_eq!(found["sampled-seconds"], 60);
    let number = |value: &Value| value.as_u64().unwrap();
    assert!(number(&found["written-bytes"]) > 0, "{found}");
    assert!(number(&found["point-in-time"]["scratch-bytes"]) > 0, "{found}");
    assert_eq!(found["expected"]["from-experience"], false);
    let data = number(&found["expected"]["object-size-bytes"]);
    assert!((200 << 20..4 << 30).contains(&data), "{found}");
    assert_eq!(daemon.json(&["image", "list"])["data"], serde_json::json!([]));

    let image = capture(&daemon, &[]);
    assert_eq!(image["expected"], found["expected"]);
    assert_eq!(guest.sh("cat /run/writer.log"), "", "the guest saw an error");

    guest.vm("shutdown", &[]);
    let said = daemon.refusal(&rehearse);
    assert!(said.contains("does not run: there is nothing to rehearse"), "{said}");
}
