//! Real parts for tests and benchmarks: a daemon of one's own, loop devices,
//! mounted filesystems. Everything is taken down when it is dropped.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{net::UnixStream, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// Runs a program to its end and returns what it printed.
///
/// # Panics
///
/// When it fails, with its stderr.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Waits until `done` gives something.
///
/// # Panics
///
/// When it does not within `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Processor time that a process, and its children that have ended, have
/// taken so far, user and system, in seconds.
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks = |index: usize| fields[index].parse::<f64>().unwrap();
    // USER_HZ is 100 on every Linux that imaged runs on.
    (11..=14).map(ticks).sum::<f64>() / 100.0
}

/// An imaged with its own socket, state and store.
pub struct Daemon {
    child: Child,
    dir: PathBuf,
    kept: Option<tempfile::TempDir>,
}

/// What differs from the defaults.
#[derive(Default)]
pub struct Config {
    /// Lines for the top of the configuration.
    pub lines: String,
    /// Where images go; none: in the daemon's own directory.
    pub store: Option<PathBuf>,
    /// Instance files, by name without `.toml`.
    pub instances: Vec<(String, String)>,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
}

impl Daemon {
    /// Starts one in a directory of its own and waits until it answers.
    pub fn start(config: &Config) -> Self {
        let kept = tempfile::tempdir().unwrap();
        let mut daemon = Self::start_in(kept.path(), config);
        daemon.kept = Some(kept);
        daemon
    }

    /// Starts one in `dir`, which may have been a daemon's before.
    pub fn start_in(dir: &Path, config: &Config) -> Self {
        Self::start_telling(dir, config, Stdio::inherit())
    }

    /// The same, and what it logs is added to a file in `dir`.
    pub fn start_logged(dir: &Path, config: &Config) -> Self {
        let log = fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        Self::start_telling(dir, config, log.into())
    }

    fn start_telling(dir: &Path, config: &Config, stderr: Stdio) -> Self {
        let child = spawn(dir, config, stderr);
        let mut daemon = Self { child, dir: dir.to_owned(), kept: None };
        wait_for("imaged to answer", Duration::from_secs(20), || {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("imaged ended: {status}");
            }
            daemon.imagectl(&["host", "get"]).status.success().then_some(())
        });
        daemon
    }

    /// Starts one that is expected to die before it answers, with what it
    /// logs in a file in `dir`; whether it was killed.
    pub fn start_and_die(dir: &Path, config: &Config) -> bool {
        let log = fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let mut daemon =
            Self { child: spawn(dir, config, log.into()), dir: dir.to_owned(), kept: None };
        let ended = wait_for("imaged to die", Duration::from_secs(60), || {
            match daemon.child.try_wait().unwrap() {
                Some(status) => Some(Some(status)),
                None => daemon.imagectl(&["host", "get"]).status.success().then_some(None),
            }
        });
        ended.is_some_and(|status| status.signal() == Some(libc::SIGKILL))
    }

    /// Whether it is killed before its work is done.
    pub fn is_killed_at_work(&self) -> bool {
        let stat = format!("/proc/{}/stat", self.pid());
        let gone = || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z "));
        let at_work = || {
            // A dead one is not waited for.
            let host = self.command(&["host", "get", "--output", "json"]);
            let mut bounded = Command::new("timeout");
            bounded.arg("2").arg(host.get_program()).args(host.get_args());
            let host = bounded.env("IMAGED_SOCKET", self.dir.join("imaged.sock")).output().unwrap();
            let host: Value = serde_json::from_slice(&host.stdout).unwrap_or_default();
            let host = &host["data"];
            host["work-requests-in-progress"] != 0 || host["work-requests-waiting"] != 0
        };
        let mut look = Instant::now() + Duration::from_secs(1);
        wait_for("imaged to die or to be done", Duration::from_secs(120), || {
            if gone() {
                return Some(true);
            }
            if Instant::now() < look {
                return None;
            }
            look = Instant::now() + Duration::from_secs(1);
            (!at_work() && !gone()).then_some(false)
        })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its images are, unless the configuration says otherwise.
    pub fn images(&self) -> PathBuf {
        self.dir.join("state/images/images")
    }

    /// Runs imagectl against it.
    pub fn imagectl(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// imagectl against it, to be run by the caller.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_imagectl"));
        command.args(args).env("IMAGED_SOCKET", self.dir.join("imaged.sock")).stdin(Stdio::null());
        command
    }

    /// Runs imagectl with `--output json` and returns its answer.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn json(&self, args: &[&str]) -> Value {
        let args = [args, &["--output", "json"]].concat();
        let output = self.imagectl(&args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "imagectl {args:?}: {stderr}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Makes an image of `volume` and waits for it.
    pub fn create(&self, volume: &Path, more: &[&str]) -> Value {
        let volume = volume.to_str().unwrap();
        let args = ["image", "create", "--boot-volume", volume, "--wait-for-state", "AVAILABLE"];
        self.json(&[&args, more].concat())["data"].clone()
    }

    /// What imagectl says when it fails.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub fn refusal(&self, args: &[&str]) -> String {
        let output = self.imagectl(args);
        assert!(!output.status.success(), "imagectl {args:?} succeeded");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: &str) {
        run("kill", &["-s", signal, &self.pid().to_string()]);
    }

    /// Stops it in order and waits.
    pub fn stop(mut self) -> Option<tempfile::TempDir> {
        self.signal("TERM");
        wait_for("imaged to stop", Duration::from_secs(30), || self.child.try_wait().unwrap());
        self.kept.take()
    }

    /// Kills it in the middle of whatever it does.
    pub fn kill(mut self) -> Option<tempfile::TempDir> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.kept.take()
    }

    /// Largest resident set so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Processor time so far, user and system, in seconds.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.pid())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts an imaged that is expected to fail, and returns what it says.
pub fn failing_start(dir: &Path, config: &Config) -> String {
    let child = spawn(dir, config, Stdio::piped());
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success(), "imaged started");
    String::from_utf8(output.stderr).unwrap()
}

fn spawn(dir: &Path, config: &Config, stderr: Stdio) -> Child {
    let instances = dir.join("instances.d");
    fs::create_dir_all(&instances).unwrap();
    for (name, text) in &config.instances {
        fs::write(instances.join(format!("{name}.toml")), text).unwrap();
    }
    let at = |name: &str| dir.join(name).display().to_string();
    let store = match &config.store {
        None => String::new(),
        Some(path) => format!(
            "default_store = \"test\"\n[stores.test]\nkind = \"directory\"\npath = {:?}\nmin_free = \"1MiB\"\n",
            path.display().to_string()
        ),
    };
    let text = format!(
        "socket = {:?}\nsocket_group = \"root\"\nstate_dir = {:?}\ninstances_dir = {:?}\n{}\n{store}",
        at("imaged.sock"),
        at("state"),
        at("instances.d"),
        config.lines,
    );
    let path = dir.join("imaged.toml");
    fs::write(&path, text).unwrap();
    // No test's daemon outlives its test.
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_imaged"), "--config"])
        .arg(&path)
        .envs(config.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap()
}

/// The lab's guest, emulated, on a copy of its disk.
pub struct Guest {
    dir: tempfile::TempDir,
}

impl Guest {
    /// Boots it from a disk in `format`, until its agent answers.
    pub fn boot_on(format: &str) -> Self {
        Self::boot_with(format, &[])
    }

    /// The same, with more arguments for QEMU.
    pub fn boot_with(format: &str, more: &[&str]) -> Self {
        // Not in `scratch()`: its path is too long for a socket.
        Self::boot_from(tempfile::tempdir().unwrap(), format, more)
    }

    /// Boots it from a raw disk in `dir`.
    pub fn boot_in(dir: &Path) -> Self {
        Self::boot_at(tempfile::tempdir_in(dir).unwrap())
    }

    /// Boots it from a raw disk, with all that belongs to it in `dir`.
    pub fn boot_at(dir: tempfile::TempDir) -> Self {
        Self::boot_from(dir, "raw", &[])
    }

    fn boot_from(dir: tempfile::TempDir, format: &str, more: &[&str]) -> Self {
        let guest = Self { dir };
        let original = PathBuf::from(run("tests/lab/guest.sh", &[])).join("disk.raw");
        let (original, disk) = (original.display().to_string(), guest.disk());
        let disk = disk.to_str().unwrap();
        run("qemu-img", &["convert", "-f", "raw", "-O", format, &original, disk]);
        let monitor = guest.dir.path().join("monitor.sock");
        let monitor = format!("unix:{},server=on,wait=off", monitor.display());
        let start = ["--disk", disk, "--format", format, "--", "-qmp", &monitor];
        guest.vm("start", &[&start[..], more].concat());
        guest.vm("wait-agent", &[]);
        guest
    }

    /// Boots it from a raw disk.
    pub fn boot() -> Self {
        Self::boot_on("raw")
    }

    /// A verb of `tests/lab/vm.py`.
    pub fn vm(&self, verb: &str, args: &[&str]) -> String {
        run(
            "tests/lab/vm.py",
            &[&[verb, "--dir", self.dir.path().to_str().unwrap()], args].concat(),
        )
    }

    /// Whether a verb of `tests/lab/vm.py` fails.
    pub fn vm_fails(&self, verb: &str) -> bool {
        let dir = self.dir.path().to_str().unwrap();
        let vm = Command::new("tests/lab/vm.py").args([verb, "--dir", dir]).output();
        !vm.unwrap().status.success()
    }

    /// Runs a shell script in it, and returns what it printed.
    pub fn sh(&self, script: &str) -> String {
        self.vm("exec", &["/bin/sh", "-c", script])
    }

    /// What its QEMU answers to a question, in JSON.
    pub fn qmp(&self, question: &str) -> String {
        self.vm("qmp", &[question])
    }

    /// Its disk.
    pub fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// Where its agent listens.
    pub fn agent_socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    /// Where its QEMU listens.
    pub fn qmp_socket(&self) -> PathBuf {
        self.dir.path().join("qmp.sock")
    }

    /// Its file in `instances.d`.
    pub fn instance(&self) -> String {
        format!(
            "boot_volume = {:?}\nqmp_socket = {:?}\nagent_socket = {:?}\n",
            self.disk(),
            self.qmp_socket(),
            self.agent_socket()
        )
    }
}

/// QEMU's second monitor: imaged has the other one while it works.
pub struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects to `guest`'s.
    pub fn of(guest: &Guest) -> Self {
        Self::at(&guest.dir.path().join("monitor.sock"))
    }

    /// Connects to the one at `socket`.
    pub fn at(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut monitor = Self { stream: BufReader::new(stream) };
        monitor.line();
        monitor.execute("qmp_capabilities");
        monitor
    }

    /// Does something without arguments.
    pub fn execute(&mut self, command: &str) -> Value {
        self.execute_with(command, &json!({}))
    }

    /// Does something.
    ///
    /// # Panics
    ///
    /// When QEMU refuses.
    pub fn execute_with(&mut self, command: &str, arguments: &Value) -> Value {
        let message = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{message}").unwrap();
        loop {
            let answer = self.line();
            assert!(answer["error"].is_null(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return answer["return"].clone();
            }
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // By its own pid file.
        let dir = self.dir.path().to_str().unwrap();
        let _ = Command::new("tests/lab/vm.py").args(["kill", "--dir", dir]).status();
    }
}

/// A loop device with direct I/O.
pub struct Loop {
    /// `/dev/loopN`.
    pub device: PathBuf,
}

impl Loop {
    /// Attaches `file`.
    pub fn attach(file: &Path, sector_size: u32) -> Self {
        let sectors = format!("--sector-size={sector_size}");
        let file = file.to_str().unwrap();
        // One at a time: a losetup that lost the race for a free device has
        // the winner's open for a moment.
        let attach = ["/dev/loop-control", "losetup", "--find", "--show", "--direct-io=on"];
        let device = run("flock", &[&attach[..], &[&sectors, file]].concat());
        Self { device: device.into() }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

/// A device that answers a process no more: its reads wait in the kernel.
pub struct Stuck {
    group: PathBuf,
    number: String,
}

impl Stuck {
    /// What `pid` and its threads read of `device` from here on.
    pub fn reads(pid: u32, device: &Path) -> Self {
        Self::reads_at(pid, device, 1)
    }

    /// The same, at `bytes` a second.
    pub fn reads_at(pid: u32, device: &Path, bytes: u64) -> Self {
        let group = PathBuf::from(format!("/sys/fs/cgroup/blkio/imaged-test-{pid}"));
        fs::create_dir(&group).unwrap();
        let number = run("stat", &["-c", "%Hr:%Lr", device.to_str().unwrap()]);
        let stuck = Self { group, number };
        stuck.limit(bytes);
        fs::write(stuck.group.join("cgroup.procs"), pid.to_string()).unwrap();
        stuck
    }

    /// It answers again.
    pub fn heal(&self) {
        self.limit(0);
    }

    /// Bytes a second; 0: as many as come.
    fn limit(&self, bytes: u64) {
        let limit = self.group.join("blkio.throttle.read_bps_device");
        fs::write(limit, format!("{} {bytes}", self.number)).unwrap();
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        self.heal();
        if let Ok(members) = fs::read_to_string(self.group.join("cgroup.procs")) {
            for pid in members.lines() {
                let _ = fs::write("/sys/fs/cgroup/blkio/cgroup.procs", pid);
            }
        }
        let _ = fs::remove_dir(&self.group);
    }
}

/// A filesystem of its own.
pub struct Mount {
    /// Where it is mounted.
    pub at: tempfile::TempDir,
    device: Loop,
    _image: tempfile::TempDir,
}

impl Mount {
    /// Makes and mounts a filesystem: `ext4`, `xfs`.
    pub fn new(kind: &str, bytes: u64) -> Self {
        let image = tempfile::tempdir_in(scratch()).unwrap();
        let file = image.path().join("fs.img");
        fs::File::create(&file).unwrap().set_len(bytes).unwrap();
        run(&format!("mkfs.{kind}"), &["-q", file.to_str().unwrap()]);
        let device = Loop::attach(&file, 512);
        let at = tempfile::tempdir().unwrap();
        run("mount", &[device.device.to_str().unwrap(), at.path().to_str().unwrap()]);
        Self { at, device, _image: image }
    }

    /// Whoever writes waits in the kernel, until the answer is dropped.
    pub fn freeze(&self) -> Frozen {
        let at = self.at.path().to_str().unwrap();
        run("fsfreeze", &["--freeze", at]);
        Frozen(at.to_owned())
    }

    /// Makes an ext4 read-only as a disk error does, also while files are
    /// open for writing.
    pub fn fail(&self) {
        run("mount", &["-o", "remount,errors=remount-ro", self.at.path().to_str().unwrap()]);
        let device = self.device.device.file_name().unwrap().to_str().unwrap();
        fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "test").unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.at.path()).status();
        let _ = &self.device;
    }
}

/// A filesystem that answers no writer.
pub struct Frozen(String);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").args(["--unfreeze", &self.0]).status();
    }
}

/// Runs a Python script with the clients of S3 and OCI, and returns what it
/// printed.
pub fn python(script: &str) -> String {
    let packages = run("tests/lab/python.sh", &[]);
    let output =
        Command::new("python3").args(["-c", script]).env("PYTHONPATH", packages).output().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Room for large files: beside the build's products, not in memory.
pub fn scratch() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).to_owned();
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// A file of `size` bytes: `pattern` at each of `offsets`, holes between.
pub fn sparse_file(path: &Path, size: u64, data: &[(u64, Vec<u8>)]) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (offset, bytes) in data {
        file.write_all_at(bytes, *offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// Bytes that do not compress; the same for the same seed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Text that compresses.
pub fn text(len: usize) -> Vec<u8> {
    let line = b"Nov 21 08:45:16 web-1 systemd[1]: Started imaged.service - custom images.\n";
    let mut text = line.repeat(len / line.len() + 1);
    text.truncate(len);
    text
}
