//! How long a guest is away for an image for which it is shut down, against
//! the quickest restart that anybody could do.
//!
//! The instance's agent has one client at a time, and imaged is it: a second
//! one of the same program, started beside it, is the bench's, on both sides.

use std::{
    cell::RefCell,
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    ROUNDS,
    freeze::{Trace, capture, delete},
    lab::{self, Config, Daemon, Guest, Monitor},
    report::{Report, median},
};

/// Between two questions, which is how exact the times are.
const STEP: Duration = Duration::from_millis(50);
/// Longest that a guest is away.
const LIMIT: Duration = Duration::from_secs(180);

/// A boot that begins has its name from /etc/hostname again.
const RENAME: &str = "echo before >/proc/sys/kernel/hostname";
/// What the next boot starts beside the agent.
const SECOND_AGENT: &str = r"
cat >/sbin/second-agent <<'END'
#!/bin/sh
mkdir -p /run/second
exec qemu-ga --method=virtio-serial --path=/dev/virtio-ports/second --statedir=/run/second
END
chmod 755 /sbin/second-agent
sed -i 's,^while :; do,/sbin/second-agent \&\n&,' /sbin/lab-init
sync
";

pub fn stopped(report: &mut Report) {
    let name = "downtime-stop-s";
    if !report.wants(name) {
        return;
    }
    let dir = tempfile::tempdir_in(lab::scratch()).unwrap();
    // Its path is short enough for a socket.
    let short = tempfile::tempdir().unwrap();
    let second = Second { socket: short.path().join("second.sock") };
    let chardev = format!("socket,id=second,path={},server=on,wait=off", second.socket.display());
    let port = "virtserialport,chardev=second,name=second";
    let guest = Guest::boot_with("raw", &["-chardev", &chardev, "-device", port]);
    let daemon = Daemon::start(&Config {
        store: Some(dir.path().join("store")),
        instances: vec![("web-1".into(), guest.instance())],
        ..Config::default()
    });
    guest.sh(SECOND_AGENT);
    restart(&guest);
    let away = |deed: &dyn Fn()| {
        guest.vm("wait-agent", &[]);
        guest.sh(RENAME);
        second.away(deed)
    };
    let own = RefCell::new(vec![]);
    let image = || {
        let image = capture(&daemon, &["--consistency", "stop"]);
        assert_eq!(image["consistency"], "CLEAN");
        assert_eq!(image["point-in-time"]["stopped"], true);
        let trace = Trace::of(&|args| daemon.json(args), image["id"].as_str().unwrap());
        let down = trace.at("ANSWER", "cont") - trace.at("EVENT", "SHUTDOWN");
        own.borrow_mut().push(down / 1e6);
        delete(&daemon, &image);
    };
    let (mut alone, mut imaged) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        alone.push(away(&|| restart(&guest)));
        imaged.push(away(&image));
    }
    let (alone, imaged) = (median(&alone), median(&imaged));
    report.value("downtime-stop-image-s", imaged, "s, from the last answer to the first");
    report.value("downtime-stop-alone-s", alone, "s, the same of a restart without imaged");
    report.value(name, imaged - alone, "s, the one less the other");
    let down = median(&own.into_inner());
    report.value("downtime-stop-own-s", down, "s of it, from the guest's end to its start");
}

/// Shuts the guest down and starts it again in the same QEMU.
fn restart(guest: &Guest) {
    let mut monitor = Monitor::of(guest);
    let mut agent = UnixStream::connect(guest.agent_socket()).unwrap();
    monitor.execute_with("set-action", &json!({ "shutdown": "pause" }));
    agent.write_all(b"{\"execute\":\"guest-shutdown\"}\n").unwrap();
    until(&mut monitor, "shutdown");
    monitor.execute("system_reset");
    until(&mut monitor, "prelaunch");
    monitor.execute("cont");
    monitor.execute_with("set-action", &json!({ "shutdown": "poweroff" }));
}

/// Looks each 2 ms: what it is slower than an event is nothing to a boot.
fn until(monitor: &mut Monitor, status: &str) {
    let begun = Instant::now();
    while monitor.execute("query-status")["status"] != status {
        assert!(begun.elapsed() < LIMIT, "the VM is not in {status:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The second agent.
struct Second {
    socket: PathBuf,
}

impl Second {
    /// Seconds from the last answer of the boot that is to the first of the
    /// next, for which `deed` is the reason.
    fn away(&self, deed: &dyn Fn()) -> f64 {
        let (tell, is_asked) = mpsc::channel();
        thread::scope(|scope| {
            let watch = scope.spawn(move || watch(&self.socket, &tell));
            is_asked.recv().unwrap();
            deed();
            watch.join().unwrap()
        })
    }
}

/// Asks the agent for its host's name, over and over, and says once that it
/// answers. A question may be lost in the reset, so that no answer is waited
/// for; those that come before the agent is there are kept by the socket.
fn watch(socket: &Path, answers: &mpsc::Sender<()>) -> f64 {
    let mut stream = UnixStream::connect(socket).unwrap();
    let (mut seen, mut told) = (Vec::new(), false);
    let mut last = Instant::now();
    loop {
        stream.write_all(b"{\"execute\":\"guest-get-host-name\"}\n").unwrap();
        let next = Instant::now() + STEP;
        loop {
            for name in names(&mut seen) {
                match (name == "before", told) {
                    (true, _) => {
                        last = Instant::now();
                        told = told || answers.send(()).is_ok();
                    }
                    (false, true) => return last.elapsed().as_secs_f64(),
                    // What was asked before the last restart had ended.
                    (false, false) => {}
                }
            }
            assert!(last.elapsed() < LIMIT, "the guest's second agent does not answer");
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            stream.set_read_timeout(Some(left)).unwrap();
            let mut some = [0; 4096];
            match stream.read(&mut some) {
                Ok(0) => panic!("QEMU has ended"),
                Ok(count) => seen.extend(&some[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Takes the whole answers out of what was read. What is none may be an
/// earlier client's, or cut off by the reset.
fn names(seen: &mut Vec<u8>) -> Vec<String> {
    let whole = seen.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let lines: Vec<u8> = seen.drain(..whole).collect();
    let answers = lines.split(|byte| *byte == b'\n').filter_map(|line| {
        let answer: Value = serde_json::from_slice(line).ok()?;
        Some(answer["return"]["host-name"].as_str()?.to_owned())
    });
    answers.collect()
}
