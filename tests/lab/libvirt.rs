//! A libvirtd of the tests' own, with one domain.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::lab::{Config, run, wait_for};

const UUID: &str = "4c6a4f0e-5d0e-4f5e-9f07-0c2f4b7f5a11";

/// A libvirtd that nobody else has, with one domain.
pub struct Libvirt {
    pub dir: tempfile::TempDir,
    name: String,
    process: Child,
    _ends: Option<ChildStdin>,
}

impl Libvirt {
    /// The domain will be called `name`.
    pub fn start(name: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), name)
    }

    /// The same with all that belongs to it in `dir`.
    pub fn start_in(dir: tempfile::TempDir, name: &str) -> Self {
        let log = fs::File::create(dir.path().join("log.txt")).unwrap();
        let mut process = Command::new("tests/lab/libvirt.sh")
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let ends = process.stdin.take();
        let libvirt = Self { dir, name: name.to_owned(), process, _ends: ends };
        libvirt.wait();
        libvirt
    }

    fn wait(&self) {
        wait_for("libvirtd to answer", Duration::from_secs(30), || {
            self.try_virsh(&["version"]).map(|_| ())
        });
    }

    /// Has tests/lab/libvirt.sh do something.
    pub fn order(&self, order: &str) {
        let file = self.dir.path().join(order);
        fs::write(&file, "").unwrap();
        wait_for("libvirt.sh to obey", Duration::from_secs(10), || (!file.exists()).then_some(()));
    }

    pub fn restart(&self) {
        self.order("stop");
        self.order("start");
        self.wait();
    }

    pub fn uri(&self) -> String {
        format!("qemu:///system?socket={}/run/libvirt-sock", self.dir.path().display())
    }

    pub fn try_virsh(&self, args: &[&str]) -> Option<String> {
        let mut virsh = Command::new("virsh");
        let output = virsh.args(["-c", &self.uri()]).args(args).env("LC_ALL", "C").output();
        let output = output.unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    pub fn virsh(&self, args: &[&str]) -> String {
        self.try_virsh(args).unwrap_or_else(|| panic!("virsh {args:?} failed"))
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn scratch(&self) -> PathBuf {
        self.dir.path().join("scratch")
    }

    /// Defines and starts the lab's guest.
    pub fn boot(&self) {
        let guest = PathBuf::from(run("tests/lab/guest.sh", &[]).trim());
        let original = guest.join("disk.raw").display().to_string();
        run("qemu-img", &["convert", "-O", "raw", &original, self.disk().to_str().unwrap()]);
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>{UUID}</uuid>\
             <metadata><i:instance xmlns:i='urn:imaged:instance:1'>\
             <i:compartment>prod</i:compartment><i:shape>VM.Standard2.1</i:shape>\
             <i:shutdown_seconds>20</i:shutdown_seconds></i:instance></metadata>\
             <memory unit='MiB'>768</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{guest}/vmlinuz</kernel>\
             <initrd>{guest}/initrd.img</initrd>\
             <cmdline>root=/dev/vda1 rw quiet init=/sbin/lab-init</cmdline></os>\
             <features><acpi/></features><cpu mode='maximum'/><seclabel type='none'/><devices>\
             <disk type='file' device='disk'><driver name='qemu' type='raw'/>\
             <source file='{disk}'/><target dev='vda' bus='virtio'/></disk>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             </devices></domain>",
            name = self.name,
            guest = guest.display(),
            disk = self.disk().display(),
        );
        let file = self.dir.path().join("domain.xml");
        fs::write(&file, xml).unwrap();
        self.define();
        self.virsh(&["start", &self.name]);
        self.wait_agent();
    }

    pub fn define(&self) {
        self.virsh(&["define", self.dir.path().join("domain.xml").to_str().unwrap()]);
    }

    /// Which boot it is.
    pub fn boot_id(&self) -> String {
        self.sh("cat /proc/sys/kernel/random/boot_id")
    }

    /// The same of a guest that was started anew during a backup. libvirt 9.0
    /// gives up on the news of its agent after 30 seconds, and asks again when
    /// it is restarted itself.
    pub fn wait_new_agent(&self) {
        let ping = json!({ "execute": "guest-ping" });
        let begun = Instant::now();
        while self.try_agent(&ping).is_none() {
            if begun.elapsed() > Duration::from_secs(60) {
                self.restart();
                return self.wait_agent();
            }
            thread::sleep(Duration::from_millis(500));
        }
    }

    /// Until the agent answers.
    pub fn wait_agent(&self) {
        wait_for("the agent to answer", Duration::from_secs(180), || {
            self.try_agent(&json!({ "execute": "guest-ping" }))
        });
    }

    pub fn state(&self) -> String {
        self.virsh(&["domstate", &self.name]).trim().to_owned()
    }

    /// Writes that its disk was asked for, since its QEMU was started.
    pub fn written(&self) -> u64 {
        let told = self.virsh(&["domblkstat", &self.name, "vda"]);
        let count = told.lines().find_map(|line| line.strip_prefix("vda wr_req "));
        count.unwrap().trim().parse().unwrap()
    }

    fn try_agent(&self, command: &Value) -> Option<Value> {
        let said = self.try_virsh(&["qemu-agent-command", &self.name, &command.to_string()])?;
        Some(serde_json::from_str::<Value>(&said).unwrap()["return"].clone())
    }

    /// Runs a shell script in the guest.
    pub fn sh(&self, script: &str) -> String {
        let exec = json!({ "execute": "guest-exec", "arguments": {
            "path": "/bin/sh", "arg": ["-c", script], "capture-output": true } });
        let pid = self.try_agent(&exec).unwrap()["pid"].clone();
        let status = json!({ "execute": "guest-exec-status", "arguments": { "pid": pid } });
        let ended = wait_for("a program of the guest", Duration::from_secs(60), || {
            self.try_agent(&status).filter(|status| status["exited"] == true)
        });
        assert_eq!(ended["exitcode"], 0, "{script}: {ended}");
        let said = ended["out-data"].as_str().unwrap_or_default();
        String::from_utf8(BASE64_STANDARD.decode(said).unwrap()).unwrap()
    }

    pub fn assert_it_writes(&self) {
        let count = || self.sh("wc -l < /records").trim().parse::<u64>().unwrap();
        let before = count();
        wait_for("the guest to write", Duration::from_secs(20), || {
            (count() > before).then_some(())
        });
        assert_eq!(self.sh("cat /run/writer.log"), "", "the guest saw an error");
    }

    pub fn assert_nothing_left(&self) {
        assert_eq!(fs::read_dir(self.scratch()).map_or(0, Iterator::count), 0);
        assert_eq!(self.state(), "running");
        assert!(self.virsh(&["domjobinfo", &self.name]).contains("None"));
        assert_eq!(self.virsh(&["checkpoint-list", &self.name, "--name"]).trim(), "");
    }

    pub fn config(&self) -> Config {
        let lines = format!(
            "libvirt_uri = {:?}\nscratch_size = \"1GiB\"\nscratch_dir = {:?}",
            self.uri(),
            self.scratch()
        );
        Config { lines, ..Config::default() }
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // Its namespace, and all that is in it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
