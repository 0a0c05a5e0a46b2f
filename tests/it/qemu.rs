//! imaged's clients on a real QEMU and the lab's guest.
//!
//! Names that begin with `qemu_` need QEMU; `qemu_guest_` also the lab's
//! guest, emulated.

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::{Child, Command as Program, Stdio},
    sync::Arc,
    time::Duration,
};

use imaged::{
    error::Reason,
    hypervisor::{
        Refusal,
        agent::{Agent, FreezeStatus, GuestProgram},
        qmp::{
            AllocationMap, Command, DevicePath, Done, Event, EventKind, Events, FilePath, NodeRef,
            Observed, Qmp, ServerStop, SocketPath, Switch,
        },
    },
    model::trace::Kind,
    recorder::Recorder,
};
use tokio::time::{Instant, timeout};

use crate::lab::{Guest, Monitor, run, scratch, wait_for};

/// A QEMU without a guest: its virtual CPUs have not begun. It ends with this.
struct Qemu {
    child: Child,
    dir: tempfile::TempDir,
}

impl Qemu {
    /// With `args`, in which `DIR` is a directory with `boot.raw` (64 MiB) and
    /// `overlay.qcow2`.
    fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir_in(scratch()).unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        std::fs::File::create(at("boot.raw")).unwrap().set_len(64 << 20).unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", &at("overlay.qcow2"), "64M"]);
        let args: Vec<_> =
            args.iter().map(|arg| arg.replace("DIR", dir.path().to_str().unwrap())).collect();
        // No test's QEMU outlives its test.
        let child = Program::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-S", "-display", "none"])
            .args(["-machine", "q35,accel=tcg", "-nodefaults", "-no-user-config"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp"))])
            .args(&args)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let qemu = Self { child, dir };
        wait_for("QEMU", Duration::from_secs(20), || qemu.path("qmp").exists().then_some(()));
        qemu
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn connect(&self) -> Qmp {
        Qmp::connect(&self.path("qmp"), Arc::new(Recorder::new()), later()).await.unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(500)
}

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

/// The device of the boot disk, and its node.
async fn boot_disk(qmp: &Qmp) -> (DevicePath, NodeRef) {
    let devices = qmp.execute(Command::query_block(), later()).await.unwrap();
    let disk = devices.into_iter().find(|device| device.inserted.is_some()).unwrap();
    (disk.qdev.unwrap(), disk.inserted.unwrap().node_name.unwrap())
}

async fn drive(qmp: &Qmp, device: &DevicePath) -> NodeRef {
    let all = qmp.execute(Command::query_statistics(), later()).await.unwrap();
    all.into_iter().find(|found| found.qdev.as_ref() == Some(device)).unwrap().node_name.unwrap()
}

/// The next event that `wanted` takes.
async fn next(events: &mut Events, wanted: impl Fn(&Event) -> bool) -> Event {
    timeout(Duration::from_secs(10), async {
        loop {
            match events.next().await {
                Observed::Event(event) if wanted(&event) => return *event,
                Observed::Event(_) => {}
                other => panic!("{other:?}"),
            }
        }
    })
    .await
    .unwrap()
}

fn nbd_reads(socket: &Path, export: &str) -> bool {
    let url = format!("nbd+unix:///{export}?socket={}", socket.display());
    let args = ["10", "qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", &url];
    Program::new("timeout").args(args).stdout(Stdio::null()).status().unwrap().success()
}

/// Puts a snapshot in, reads it, takes it out again: every command that the
/// newer way needs, and what QEMU says when the order is wrong.
async fn snapshot_and_back(qemu: &Qemu) {
    let qmp = qemu.connect().await;
    let schema = qmp.execute(Command::query_schema(), later()).await.unwrap();
    assert!(schema.has_breakable_snapshots() && schema.has_command("block-export-add"));
    let (device, boot) = boot_disk(&qmp).await;
    let nodes_before = qmp.execute(Command::query_nodes(), later()).await.unwrap();

    let file = FilePath::new(&qemu.path("overlay.qcow2")).unwrap();
    let filter: NodeRef = name("imaged-f");
    let timeout = NonZeroU32::new(30).unwrap();
    let put_in: [Command<Done>; 3] = [
        Command::add_scratch(name("imaged-s"), file),
        Command::add_overlay(name("imaged-o"), name("imaged-s")),
        Command::add_copy_before_write(name("imaged-f"), boot.clone(), name("imaged-o"), timeout),
    ];
    for command in put_in {
        qmp.execute(command, later()).await.unwrap();
    }
    let switched = qmp.switch_drive(&device, &boot, &filter, later()).await.unwrap();
    assert_eq!(switched, Switch::Switched);
    assert_eq!(drive(&qmp, &device).await, filter);
    // QEMU would abort.
    let again = qmp.switch_drive(&device, &boot, &filter, later()).await.unwrap();
    assert_eq!(again, Switch::AlreadyThere);

    let socket = qemu.path("nbd");
    let show: [Command<Done>; 4] = [
        Command::add_snapshot_access(name("imaged-a"), name("imaged-f")),
        Command::start_nbd_server(SocketPath::new(&socket).unwrap()),
        Command::add_export(name("imaged-e"), name("imaged-a"), AllocationMap::Hidden),
        Command::add_export(name("imaged-m"), name("imaged-o"), AllocationMap::Told),
    ];
    for command in show {
        qmp.execute(command, later()).await.unwrap();
    }
    let exports = qmp.execute(Command::query_exports(), later()).await.unwrap();
    assert_eq!(exports.len(), 2);
    assert!(nbd_reads(&socket, "imaged-e"));
    assert!(!nbd_reads(&socket, "imaged-x"), "there is no such export");

    // In the wrong order QEMU refuses, and says so in its own words.
    let early = Command::delete_node(name("imaged-f"));
    let error = qmp.execute(early, later()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HypervisorRefused);
    assert!(Refusal::behind(&error).unwrap().description.contains("in use"), "{error:?}");

    let mut events = qmp.events();
    for export in ["imaged-m", "imaged-e"] {
        qmp.execute(Command::delete_export(name(export)), later()).await.unwrap();
        let gone = next(&mut events, |event| event.kind == EventKind::BlockExportDeleted).await;
        assert_eq!(gone.details.id.as_deref(), Some(export));
    }
    assert_eq!(qmp.stop_nbd_server(later()).await.unwrap(), ServerStop::Stopped);
    assert_eq!(qmp.stop_nbd_server(later()).await.unwrap(), ServerStop::AlreadyStopped);
    qmp.execute(Command::delete_node(name("imaged-a")), later()).await.unwrap();
    for expected in [Switch::Switched, Switch::AlreadyThere] {
        assert_eq!(qmp.switch_drive(&device, &filter, &boot, later()).await.unwrap(), expected);
    }
    for node in ["imaged-f", "imaged-o", "imaged-s"] {
        qmp.execute(Command::delete_node(name(node)), later()).await.unwrap();
    }
    assert_eq!(drive(&qmp, &device).await, boot);
    let nodes_after = qmp.execute(Command::query_nodes(), later()).await.unwrap();
    assert_eq!(nodes_before, nodes_after, "something is left");

    let gone = qmp.execute(Command::delete_node(name("imaged-s")), later()).await.unwrap_err();
    assert_eq!(gone.reason(), Reason::HypervisorRefused);
    let absent = DevicePath::from_qdev("absent").unwrap();
    let error = qmp.switch_drive(&absent, &boot, &filter, later()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HypervisorRefused);
    qmp.close().await;
}

const BOOT: &str = r#"{"driver": "raw", "node-name": "boot", "file": {"driver": "file", "filename": "DIR/boot.raw"}}"#;

#[tokio::test]
#[ignore = "needs QEMU"]
async fn qemu_snapshot_of_a_virtio_disk() {
    let device = "virtio-blk-pci,id=bootdisk,drive=boot";
    snapshot_and_back(&Qemu::start(&["-blockdev", BOOT, "-device", device])).await;
}

#[tokio::test]
#[ignore = "needs QEMU"]
async fn qemu_snapshot_of_a_disk_in_an_iothread() {
    let device = "virtio-blk-pci,drive=boot,iothread=io0";
    let args = ["-object", "iothread,id=io0", "-blockdev", BOOT, "-device", device];
    snapshot_and_back(&Qemu::start(&args)).await;
}

/// Its `drive` property names the drive whatever node is in it.
#[tokio::test]
#[ignore = "needs QEMU"]
async fn qemu_snapshot_of_a_disk_made_with_drive() {
    let drive = "if=none,id=d0,format=raw,file=DIR/boot.raw";
    let scsi = ["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=d0,id=sd"];
    snapshot_and_back(&Qemu::start(&[&["-drive", drive][..], &scsi].concat())).await;
}

#[tokio::test]
#[ignore = "needs QEMU"]
async fn qemu_is_watched_from_greeting_to_death() {
    let second = ["-qmp", "unix:DIR/second,server=on,wait=off"];
    let disk = ["-blockdev", BOOT, "-device", "virtio-blk-pci,drive=boot"];
    let mut qemu = Qemu::start(&[second, [disk[0], disk[1]], [disk[2], disk[3]]].concat());
    let recorder = Arc::new(Recorder::new());
    let qmp = Qmp::connect(&qemu.path("qmp"), Arc::clone(&recorder), later()).await.unwrap();
    assert_eq!(qmp.process(), Some(qemu.child.id()), "setpriv has become QEMU");
    let status = qmp.execute(Command::query_status(), later()).await.unwrap();
    assert_eq!((status.running, status.status.as_str()), (false, "prelaunch"));

    // A second client is told who is in the way; the first is not disturbed.
    let second = Qmp::connect(&qemu.path("qmp"), Arc::default(), soon()).await.unwrap_err();
    assert_eq!(second.reason(), Reason::HypervisorBusy);

    let mut events = qmp.events();
    Monitor::at(&qemu.path("second")).execute("cont");
    next(&mut events, |event| event.kind == EventKind::Resume).await;

    // The monitor is free once it is closed.
    qmp.close().await;
    let qmp = Qmp::connect(&qemu.path("qmp"), Arc::clone(&recorder), later()).await.unwrap();
    let mut events = qmp.events();
    qemu.child.kill().unwrap();
    qemu.child.wait().unwrap();
    let ended = timeout(Duration::from_secs(5), events.next()).await.unwrap();
    assert!(matches!(ended, Observed::Ended(_)), "{ended:?}");
    let error = qmp.execute(Command::query_status(), later()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HypervisorGone);
    let names: Vec<_> = recorder.trace().entries.into_iter().map(|entry| entry.name).collect();
    for expected in ["query-status", "RESUME"] {
        assert!(names.iter().any(|name| name == expected), "{expected} in {names:?}");
    }
}

#[tokio::test]
#[ignore = "needs root, QEMU and a minute"]
async fn qemu_guest_freezes_thaws_and_blows_its_fuse() {
    let guest = Guest::boot();
    let recorder = Arc::new(Recorder::new());
    let agent =
        Agent::connect(&guest.agent_socket(), Arc::clone(&recorder), later()).await.unwrap();

    let info = agent.info(later()).await.unwrap();
    assert!(info.version.starts_with("7.2") && info.allows("guest-exec"), "{info:?}");
    assert_eq!(agent.host_name(later()).await.unwrap(), "imaged-demo");
    let os = agent.os_info(later()).await.unwrap();
    assert_eq!((os.id.as_deref(), os.is_windows()), (Some("debian"), false));
    let mounted = agent.filesystems(later()).await.unwrap();
    assert!(mounted.iter().any(|fs| fs.mountpoint == "/" && fs.kind == "ext4"), "{mounted:?}");

    // What was frozen is thawed, once.
    assert_eq!(agent.freeze_status(later()).await.unwrap(), FreezeStatus::Thawed);
    let frozen = agent.freeze(later()).await.unwrap();
    assert!(frozen >= 1);
    assert_eq!(agent.freeze_status(later()).await.unwrap(), FreezeStatus::Frozen);
    for refused in
        [agent.freeze(later()).await.unwrap_err(), agent.os_info(later()).await.unwrap_err()]
    {
        assert_eq!(refused.reason(), Reason::GuestAgentRefused, "{refused:?}");
    }
    assert_eq!(agent.thaw(later()).await.unwrap(), frozen);
    assert_eq!(agent.thaw(later()).await.unwrap(), 0);

    // An answer that comes too late: the guest freezes all the same, and the
    // next command is in step.
    let hurry = Instant::now() + Duration::from_millis(1);
    assert_eq!(agent.freeze(hurry).await.unwrap_err().reason(), Reason::GuestAgentTimeout);
    assert_eq!(agent.freeze_status(later()).await.unwrap(), FreezeStatus::Frozen);
    // Another client of a daemon that has died meanwhile.
    drop(agent);
    let agent =
        Agent::connect(&guest.agent_socket(), Arc::clone(&recorder), later()).await.unwrap();
    assert_eq!(agent.freeze_status(later()).await.unwrap(), FreezeStatus::Frozen);
    assert_eq!(agent.thaw(later()).await.unwrap(), frozen);

    // A fuse that is disarmed, then one that blows.
    let seconds = |count| NonZeroU32::new(count).unwrap();
    let fuse = GuestProgram::ThawFuse { after_seconds: seconds(100) };
    let process = agent.start(fuse, later()).await.unwrap();
    assert!(!agent.status(process, later()).await.unwrap().exited);
    let disarm = agent.start(GuestProgram::DisarmFuses, later()).await.unwrap();
    assert_eq!(ended(&agent, disarm).await, Some(0));
    assert_eq!(ended(&agent, process).await, Some(0));

    let fuse = GuestProgram::ThawFuse { after_seconds: seconds(2) };
    let process = agent.start(fuse, later()).await.unwrap();
    assert_eq!(agent.freeze(later()).await.unwrap(), frozen);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(agent.thaw(later()).await.unwrap(), 0, "the fuse has thawed it all");
    assert_eq!(ended(&agent, process).await, Some(GuestProgram::BLEW));

    let trace = recorder.trace();
    let text = serde_json::to_string(&trace).unwrap();
    assert!(!text.contains("fsfreeze --unfreeze"), "arguments of programs are recorded");
    let freezes = trace.entries.iter().filter(|entry| {
        (entry.kind, entry.name.as_str()) == (Kind::Command, "guest-fsfreeze-freeze")
    });
    assert_eq!(freezes.count(), 4);
}

/// Waits for the end of a program in the guest.
async fn ended(agent: &Agent, process: imaged::hypervisor::agent::GuestProcess) -> Option<i64> {
    for _ in 0..100 {
        let status = agent.status(process, later()).await.unwrap();
        if status.exited {
            return status.exit_code;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{process:?} goes on");
}
