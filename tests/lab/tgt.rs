//! tgt: a real iSCSI target of the test's own.

use std::{
    fs::File,
    net::{Ipv4Addr, TcpListener},
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::lab::{Guest, run, scratch, wait_for};

/// The name that a guest has to give for a volume with CHAP.
const USER: &str = "imagedtest";
/// What it proves that with.
pub const SECRET: &str = "imaged-chap-secret";

/// A running target; ended with this value.
pub struct Tgt {
    child: Child,
    dir: tempfile::TempDir,
    port: u16,
    /// The number of the socket by which it is administered.
    control: String,
    targets: u32,
}

impl Tgt {
    /// Starts one without volumes.
    pub fn start() -> Self {
        let dir = tempfile::tempdir_in(scratch()).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let log = File::create(dir.path().join("log")).unwrap();
        // At most 32767.
        let control = (port / 2).to_string();
        // No test's target outlives its test.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "tgtd", "--foreground", "--control-port"])
            .args([&control, "--iscsi", &format!("portal=127.0.0.1:{port}")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let tgt = Self { child, dir, port, control, targets: 0 };
        wait_for("tgtd", Duration::from_secs(20), || {
            let shown = tgt.admin(&["--op", "show", "--mode", "target"]).output().unwrap();
            shown.status.success().then_some(())
        });
        tgt
    }

    fn admin(&self, args: &[&str]) -> Command {
        let mut command = Command::new("tgtadm");
        command.args(["--control-port", &self.control, "--lld", "iscsi"]).args(args);
        command
    }

    fn told(&self, args: &[&str]) {
        let done = self.admin(args).output().unwrap();
        assert!(done.status.success(), "tgtadm {args:?}: {done:?}");
    }

    /// A target with one LUN of `mib`, one partition on it; its name. With
    /// `chap` it asks who is there.
    pub fn volume(&mut self, mib: u64, chap: bool) -> String {
        self.targets += 1;
        let (tid, iqn) = (self.targets.to_string(), format!("iqn.2015-12.test:{}", self.targets));
        let file = self.dir.path().join(&tid);
        File::create(&file).unwrap().set_len(mib << 20).unwrap();
        let target = ["--mode", "target", "--tid", &tid];
        self.told(&[&["--op", "new"], &target[..], &["--targetname", &iqn]].concat());
        let file = file.to_str().unwrap();
        // The guest has nothing for that.
        run("sh", &["-c", &format!("echo 2048,,L | sfdisk -q {file}")]);
        let unit = ["--op", "new", "--mode", "logicalunit", "--tid", &tid, "--lun", "1"];
        self.told(&[&unit[..], &["--backing-store", file]].concat());
        self.told(&[&["--op", "bind"], &target[..], &["--initiator-address", "ALL"]].concat());
        if chap {
            let account = ["--mode", "account", "--user", USER];
            self.told(&[&["--op", "new"], &account[..], &["--password", SECRET]].concat());
            self.told(&[&["--op", "bind"], &account[..], &["--tid", &tid]].concat());
        }
        iqn
    }

    /// Whether anyone may log in to the target `iqn`.
    pub fn admits(&self, iqn: &str, all: bool) {
        let (_, tid) = iqn.rsplit_once(':').unwrap();
        let op = if all { "bind" } else { "unbind" };
        let target = ["--mode", "target", "--tid", tid, "--initiator-address", "ALL"];
        self.told(&[&["--op", op], &target[..]].concat());
    }

    /// Where the lab's guest reaches it, by QEMU's user network.
    pub fn portal(&self) -> String {
        format!("10.0.2.2:{}", self.port)
    }

    /// Has `guest` make a record of the target `iqn`, with `settings` of
    /// `iscsiadm`'s.
    pub fn record(&self, guest: &Guest, iqn: &str, chap: bool, settings: &[(&str, &str)]) {
        let of = format!("iscsiadm -m node -T {iqn} -p {}", self.portal());
        let mut script = format!(
            "set -e; modprobe -a iscsi_tcp sd_mod; pgrep iscsid >/dev/null || iscsid; {of} -o new\n"
        );
        let auth = [("authmethod", "CHAP"), ("username", USER), ("password", SECRET)];
        let auth = auth.map(|(name, value)| (format!("node.session.auth.{name}"), value));
        let auth = auth.iter().filter(|_| chap).map(|(name, value)| (name.as_str(), *value));
        for (name, value) in auth.chain(settings.iter().copied()) {
            script.push_str(&format!("{of} -o update -n {name} -v {value}\n"));
        }
        guest.sh(&script);
    }

    /// Has `guest` log in to the target `iqn`; the disk that it gets.
    pub fn log_in(&self, guest: &Guest, iqn: &str) -> String {
        let disk = guest.sh(&format!(
            "set -e; iscsiadm -m node -T {iqn} -p {} --login >/dev/null\n\
             for try in $(seq 50); do\n\
             for session in /sys/class/iscsi_session/*; do\n\
             [ \"$(cat $session/targetname)\" = {iqn} ] || continue\n\
             for disk in $session/device/target*/*/block/*; do\n\
             [ -e \"$disk\" ] && [ -b /dev/${{disk##*/}} ] && echo ${{disk##*/}} && exit 0\n\
             done; done; sleep 0.1; done; exit 1",
            self.portal()
        ));
        disk.trim().to_owned()
    }

    /// The numbers of the sessions that it has, in order.
    pub fn sessions(&self) -> Vec<u32> {
        let control = ["-C", &self.control, "--lld", "iscsi"];
        let shown = run("tgtadm", &[&control[..], &["--op", "show", "--mode", "target"]].concat());
        let numbers = shown.lines().filter_map(|line| line.trim().strip_prefix("I_T nexus: "));
        let mut numbers: Vec<_> = numbers.map(|number| number.parse().unwrap()).collect();
        numbers.sort_unstable();
        numbers
    }
}

impl Drop for Tgt {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
