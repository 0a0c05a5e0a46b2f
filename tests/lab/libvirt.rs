//! A libvirtd of the tests' own, with one domain.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use crate::lab::{Config, run, wait_for};

const UUID: &str = "4c6a4f0e-5d0e-4f5e-9f07-0c2f4b7f5a11";

/// A libvirtd that nobody else has; `web-1` is its domain.
pub struct Libvirt {
    dir: tempfile::TempDir,
    process: Child,
    _ends: Option<ChildStdin>,
}

impl Libvirt {
    /// Starts one and waits until it answers.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = fs::File::create(dir.path().join("log.txt")).unwrap();
        let mut process = Command::new("tests/lab/libvirt.sh")
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let ends = process.stdin.take();
        let libvirt = Self { dir, process, _ends: ends };
        wait_for("libvirtd to answer", Duration::from_secs(30), || {
            libvirt.try_virsh(&["version"]).map(|_| ())
        });
        libvirt
    }

    fn uri(&self) -> String {
        format!("qemu:///system?socket={}/run/libvirt-sock", self.dir.path().display())
    }

    fn try_virsh(&self, args: &[&str]) -> Option<String> {
        let mut virsh = Command::new("virsh");
        let output = virsh.args(["-c", &self.uri()]).args(args).env("LC_ALL", "C").output();
        let output = output.unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    /// What virsh prints.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn virsh(&self, args: &[&str]) -> String {
        self.try_virsh(args).unwrap_or_else(|| panic!("virsh {args:?} failed"))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Defines and starts the lab's guest, until its agent answers.
    pub fn boot(&self) {
        let guest = PathBuf::from(run("tests/lab/guest.sh", &[]).trim());
        let original = guest.join("disk.raw").display().to_string();
        run("cp", &["--sparse=always", &original, self.at("disk").to_str().unwrap()]);
        let xml = format!(
            "<domain type='qemu'><name>web-1</name><uuid>{UUID}</uuid>\
             <memory unit='MiB'>768</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{guest}/vmlinuz</kernel>\
             <initrd>{guest}/initrd.img</initrd>\
             <cmdline>root=/dev/vda1 rw quiet init=/sbin/lab-init</cmdline></os>\
             <features><acpi/></features><cpu mode='maximum'/><seclabel type='none'/><devices>\
             <disk type='file' device='disk'><driver name='qemu' type='raw'/>\
             <source file='{disk}'/><target dev='vda' bus='virtio'/></disk>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             </devices></domain>",
            guest = guest.display(),
            disk = self.at("disk").display(),
        );
        let file = self.at("web-1.xml");
        fs::write(&file, xml).unwrap();
        self.virsh(&["define", file.to_str().unwrap()]);
        self.virsh(&["start", "web-1"]);
        wait_for("the agent to answer", Duration::from_secs(180), || {
            self.try_virsh(&["qemu-agent-command", "web-1", "{\"execute\":\"guest-ping\"}"])
        });
    }

    /// Of an imaged that has its domains.
    pub fn config(&self) -> Config {
        let lines = format!(
            "libvirt_uri = {:?}\nscratch_size = \"1GiB\"\nscratch_dir = {:?}",
            self.uri(),
            self.at("scratch")
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
