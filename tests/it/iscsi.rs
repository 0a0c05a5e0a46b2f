//! iSCSI in a guest, with a real target and a real initiator.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    lab::{Daemon, Guest, run, wait_for},
    live::{capture, config, object, reading, slowly},
    tgt::{SECRET, Tgt},
};

const LIST: [&str; 5] = ["instance", "iscsi", "list", "--instance-id", "web-1"];

fn listed(daemon: &Daemon) -> Value {
    daemon.json(&LIST)["data"].clone()
}

/// The attachment to `iqn` by the target's own portal.
fn of<'a>(listed: &'a Value, iqn: &str) -> &'a Value {
    let attachments = listed["attachments"].as_array().unwrap();
    let found = attachments.iter().find(|one| one["iqn"] == iqn && one["address"] == "10.0.2.2");
    found.unwrap_or_else(|| panic!("no {iqn} in {listed}"))
}

#[test]
#[ignore = "needs root, QEMU, tgt and minutes"]
fn qemu_iscsi_of_a_guest_is_listed() {
    let guest = Guest::boot();
    let daemon = Daemon::start_logged(guest.disk().parent().unwrap(), &slowly(config(&guest)));
    let nothing = listed(&daemon);
    assert_eq!(nothing["attachments"], json!([]));
    assert_eq!(nothing["initiator-name"], "iqn.1993-08.org.debian:01:imaged-demo");
    assert_eq!(nothing["has-iscsiadm"], true);

    let mut tgt = Tgt::start();
    let (data, swap, unused) = (tgt.volume(64, true), tgt.volume(32, false), tgt.volume(8, false));
    // A lost connection is noticed within seconds.
    let quick = [
        ("node.conn[0].timeo.noop_out_interval", "1"),
        ("node.conn[0].timeo.noop_out_timeout", "1"),
    ];
    let at_boot = [quick[0], quick[1], ("node.startup", "automatic")];
    tgt.record(&guest, &data, true, &at_boot);
    tgt.record(&guest, &swap, false, &quick);
    tgt.record(&guest, &unused, false, &[]);
    let disk = tgt.log_in(&guest, &data);
    let swap_disk = tgt.log_in(&guest, &swap);
    guest.sh(&format!(
        "set -e; mkfs.ext4 -q /dev/{disk}1\n\
         mkdir '/data one'; mount /dev/{disk}1 '/data one'\n\
         mkswap /dev/{swap_disk} >/dev/null\n\
         swapon /dev/{swap_disk}"
    ));
    let sessions = tgt.sessions();
    assert_eq!(sessions.len(), 2);

    let now = listed(&daemon);
    assert_eq!(now["attachments"].as_array().unwrap().len(), 3, "{now}");
    let found = of(&now, &data);
    assert_eq!((&found["state"], &found["chap"]), (&"LOGGED_IN".into(), &true.into()));
    assert_eq!((&found["at-boot"], &found["on-record"]), (&true.into(), &true.into()));
    assert_eq!(
        found["devices"],
        json!([
            {"kind": "DISK", "mapper-name": null, "name": disk, "size-in-bytes": 64 << 20, "uses": []},
            {"kind": "PARTITION", "mapper-name": null, "name": format!("{disk}1"),
             "size-in-bytes": (64 << 20) - (1 << 20), "uses": ["/data one (ext4)"]},
        ])
    );
    let found = of(&now, &swap);
    assert_eq!((&found["state"], &found["chap"]), (&"LOGGED_IN".into(), &false.into()));
    assert_eq!(found["devices"][0]["uses"], json!(["swap"]));
    let found = of(&now, &unused);
    assert_eq!((&found["state"], &found["devices"]), (&"LOGGED_OUT".into(), &json!([])));
    assert_eq!(found["at-boot"], false);
    // To look changes nothing.
    assert_eq!(tgt.sessions(), sessions);

    // What a guest asked a portal for, it remembers.
    let ask = format!("iscsiadm -m discovery -t sendtargets -p {}", tgt.portal());
    guest.sh(&ask);
    assert_eq!(listed(&daemon)["discovery-portals"], json!([tgt.portal()]));

    // The agent is a capture's while there is one.
    let request = reading(&daemon, &[]);
    let said = daemon.refusal(&LIST);
    assert!(said.contains("SOURCE_LOCKED") && said.contains(&request), "{said}");
    assert!(
        daemon
            .imagectl(&["work-request", "cancel", "--work-request-id", &request])
            .status
            .success()
    );
    wait_for("the capture to end", Duration::from_secs(60), || {
        daemon.imagectl(&LIST).status.success().then_some(())
    });

    // A target that is gone hangs whoever asks its disks; this asks none.
    drop(tgt);
    wait_for("the loss of the connection", Duration::from_secs(60), || {
        let begun = Instant::now();
        let lost = of(&listed(&daemon), &data)["state"] == "RECOVERING";
        assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
        lost.then_some(())
    });

    // No secret of the guest's came to the host.
    let log = std::fs::read_to_string(guest.disk().with_file_name("log")).unwrap();
    assert!(!log.contains(SECRET));

    // An agent that starts no programs cannot tell.
    guest.sh(
        "mkdir -p /etc/qemu; printf '[general]\\nblacklist=guest-exec\\nblock-rpcs=guest-exec\\n' \
         >/etc/qemu/qemu-ga.conf; (sleep 1; pkill qemu-ga) >/dev/null 2>&1 </dev/null &",
    );
    let said = wait_for("an agent that starts no programs", Duration::from_secs(60), || {
        let tried = daemon.imagectl(&LIST);
        let said = String::from_utf8(tried.stderr).unwrap();
        (!tried.status.success() && said.contains("may not run")).then_some(said)
    });
    insta::assert_snapshot!(said, @r#"
    imagectl: the agent in instance "web-1" may not run guest-exec
      reason: GUEST_AGENT_DISABLED
      help: allow guest-exec and guest-exec-status in the guest's qemu-ga configuration (Red Hat's and Oracle's forbid them in /etc/sysconfig/qemu-ga), or look in the guest: iscsiadm -m session; iscsiadm -m node
    "#);
    guest.vm("kill", &[]);
    let said = daemon.refusal(&LIST);
    insta::assert_snapshot!(said, @r#"
    imagectl: instance "web-1" does not run
      at --instance-id
      reason: INVALID_PARAMETER
      help: start it: its sessions end with it, and only its guest tells of the rest
    "#);
}

/// A guest with two volumes: one with CHAP and a filesystem on a partition,
/// one with swap.
struct Attached {
    guest: Guest,
    tgt: Tgt,
    data: String,
    swap: String,
}

impl Attached {
    fn new() -> Self {
        let guest = Guest::boot();
        let mut tgt = Tgt::start();
        let (data, swap) = (tgt.volume(64, true), tgt.volume(32, false));
        tgt.record(&guest, &data, true, &[("node.startup", "automatic")]);
        tgt.record(&guest, &swap, false, &[]);
        let disk = tgt.log_in(&guest, &data);
        let swap_disk = tgt.log_in(&guest, &swap);
        guest.sh(&format!(
            "set -e; mkfs.ext4 -q /dev/{disk}1\n\
             mkdir '/data one'; mount -o noatime /dev/{disk}1 '/data one'; echo kept >'/data one/file'\n\
             mkswap /dev/{swap_disk} >/dev/null; swapon /dev/{swap_disk}\n\
             find /etc/iscsi/nodes -type f | sort | xargs sha256sum >/records"
        ));
        Self { guest, tgt, data, swap }
    }

    /// All is as it was.
    fn assert_it_is_back(&self, daemon: &Daemon) {
        let now = listed(daemon);
        assert_eq!(now["attachments"].as_array().unwrap().len(), 2, "{now}");
        let data = of(&now, &self.data);
        assert_eq!((&data["state"], &data["at-boot"]), (&"LOGGED_IN".into(), &true.into()));
        assert_eq!(data["devices"][1]["uses"], json!(["/data one (ext4)"]));
        assert_eq!(of(&now, &self.swap)["devices"][0]["uses"], json!(["swap"]));
        self.guest.sh("set -e; sha256sum --quiet -c /records; grep -q ^kept '/data one/file'\n\
             grep -q 'data.040one.*noatime' /proc/self/mountinfo; echo new >'/data one/new'");
        assert_eq!(self.tgt.sessions().len(), 2);
    }

    /// Nothing is left.
    fn assert_it_is_gone(&self, daemon: &Daemon) {
        let now = listed(daemon);
        assert_eq!((&now["attachments"], &now["discovery-portals"]), (&json!([]), &json!([])));
        assert_eq!(self.tgt.sessions(), [0; 0]);
        let left = self.guest.sh(&format!(
            "find /etc/iscsi/nodes /etc/iscsi/send_targets -mindepth 1 2>/dev/null\n\
             grep -rl {SECRET} /etc /var/lib 2>/dev/null; ls -d /sys/block/sd* 2>/dev/null; true"
        ));
        assert_eq!(left, "");
    }
}

const DISCONNECT: [&str; 5] = ["instance", "iscsi", "disconnect", "--instance-id", "web-1"];
const RECONNECT: [&str; 5] = ["instance", "iscsi", "reconnect", "--instance-id", "web-1"];

fn sealed(dir: &std::path::Path) -> usize {
    std::fs::read_dir(dir.join("state/sealed-iscsi")).map_or(0, Iterator::count)
}

#[test]
#[ignore = "needs root, QEMU, tgt and minutes"]
fn qemu_iscsi_is_taken_and_given_back() {
    let attached = Attached::new();
    let guest = &attached.guest;
    let dir = guest.disk().parent().unwrap().to_owned();
    let daemon = Daemon::start_logged(&dir, &config(guest));
    let done = |args: &[&str]| {
        let done = daemon.imagectl(args);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    let said = daemon.refusal(&RECONNECT);
    insta::assert_snapshot!(said, @r#"
    imagectl: imaged has taken no iSCSI from instance "web-1"
      at --instance-id
      reason: INVALID_PARAMETER
      help: `imagectl instance iscsi list` shows what its guest has
    "#);

    done(&DISCONNECT);
    attached.assert_it_is_gone(&daemon);
    assert_eq!(sealed(&dir), 1);
    // Twice is once.
    done(&DISCONNECT);
    // A host that is about to be maintained gives back what it took.
    done(&["host", "drain"]);
    assert!(daemon.refusal(&DISCONNECT).contains("HOST_DRAINED"));
    done(&RECONNECT);
    done(&["host", "resume"]);
    attached.assert_it_is_back(&daemon);
    assert_eq!(sealed(&dir), 0);

    // A target that is away keeps the others from nothing, and is tried again.
    done(&DISCONNECT);
    attached.tgt.admits(&attached.data, false);
    let said = daemon.refusal(&RECONNECT);
    assert!(said.contains("the guest did not log in to its iSCSI targets"), "{said}");
    assert_eq!(of(&listed(&daemon), &attached.swap)["devices"][0]["uses"], json!(["swap"]));
    assert_eq!(sealed(&dir), 1);
    attached.tgt.admits(&attached.data, true);
    done(&RECONNECT);
    attached.assert_it_is_back(&daemon);
    assert_eq!(sealed(&dir), 0);

    // Who uses it is told, and nothing is taken.
    guest.sh("cd '/data one' && setsid sleep 1000 >/dev/null 2>&1 </dev/null &");
    let said = daemon.refusal(&DISCONNECT);
    assert!(said.contains("/data one is kept by sleep (pid "), "{said}");
    assert!(said.contains("GUEST_BUSY"), "{said}");
    attached.assert_it_is_back(&daemon);
    guest
        .sh("mkdir -p '/data one/below'; mount -t tmpfs none '/data one/below'; pkill sleep; true");
    let said = daemon.refusal(&DISCONNECT);
    assert!(said.contains("what is mounted on /data one/below"), "{said}");
    guest.sh("umount '/data one/below'");

    // What was taken stays so when imaged is started again, and survives a
    // reboot of the guest.
    done(&DISCONNECT);
    daemon.stop();
    let daemon = Daemon::start_logged(&dir, &config(guest));
    attached.assert_it_is_gone(&daemon);
    let done = daemon.imagectl(&RECONNECT);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    attached.assert_it_is_back(&daemon);

    let log = std::fs::read_to_string(dir.join("log")).unwrap();
    assert!(!log.contains(SECRET));
    daemon.stop();
    // Neither in the journal.
    let journal = std::fs::read(dir.join("state/journal.redb")).unwrap();
    assert!(!journal.windows(SECRET.len()).any(|bytes| bytes == SECRET.as_bytes()));
}

/// The image has no record, nor its secret in any block, and the guest gets it
/// all back after the reboot.
#[test]
#[ignore = "needs root, QEMU, tgt and minutes"]
fn qemu_iscsi_is_taken_for_an_image_and_given_back() {
    let attached = Attached::new();
    let guest = &attached.guest;
    let dir = guest.disk().parent().unwrap().to_owned();
    let daemon = Daemon::start_logged(&dir, &config(guest));
    let image = capture(&daemon, &["--consistency", "stop", "--iscsi", "disconnect"]);
    assert_eq!(image["consistency"], "CLEAN");
    println!("{}", image["time-line"]);
    let raw = dir.join("raw");
    let object = object(&daemon, &image).display().to_string();
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &object, raw.to_str().unwrap()]);
    let found = Command::new("grep").args(["-qaF", SECRET]).arg(&raw).status().unwrap();
    assert_eq!(found.code(), Some(1), "the secret is in the image");
    let root = format!("{}?offset=1048576", raw.display());
    let left = run("debugfs", &["-R", "ls -p /etc/iscsi/nodes", &root]);
    assert_eq!(left.matches("iqn").count(), 0, "{left}");
    assert_eq!(sealed(&dir), 0);
    attached.assert_it_is_back(&daemon);
    let said = daemon.refusal(
        &[
            &["image", "create", "--instance-id", "web-1"][..],
            &["--iscsi", "disconnect"],
            &["--consistency", "crash"],
        ]
        .concat(),
    );
    insta::assert_snapshot!(said, @"
    imagectl: iSCSI is disconnected for the image of an instance that is shut down
      at --iscsi
      reason: INVALID_PARAMETER
      help: ask with --consistency stop, or disconnect it before and reconnect it after: `imagectl instance iscsi disconnect`
    ");
}

/// The worst moment: it is disconnected, and shut down.
#[test]
#[ignore = "needs root, QEMU, tgt and minutes"]
fn qemu_iscsi_comes_back_when_imaged_dies_while_the_guest_is_shut_down() {
    let attached = Attached::new();
    let guest = &attached.guest;
    let dir = guest.disk().parent().unwrap().to_owned();
    let mut dying = config(guest);
    dying.environment = vec![("IMAGED_TEST_DIES".into(), "before system_reset 1".into())];
    let daemon = Daemon::start_logged(&dir, &dying);
    let create = ["image", "create", "--instance-id", "web-1", "--consistency", "stop"];
    daemon.imagectl(&[&create[..], &["--iscsi", "disconnect"]].concat());
    assert!(daemon.is_killed_at_work());
    drop(daemon);
    assert_eq!(attached.tgt.sessions(), [0; 0]);
    let daemon = Daemon::start_logged(&dir, &config(guest));
    // Emulated, a boot takes its time.
    wait_for("the guest to have it back", Duration::from_secs(300), || {
        (attached.tgt.sessions().len() == 2 && sealed(&dir) == 0).then_some(())
    });
    attached.assert_it_is_back(&daemon);
    let requests = daemon.json(&["work-request", "list", "--limit", "1"])["data"].clone();
    assert_eq!(requests[0]["status"], "FAILED", "{requests}");
}

#[test]
#[ignore = "needs root, QEMU, tgt and minutes"]
fn qemu_iscsi_comes_back_when_imaged_is_killed_at_any_step() {
    let attached = Attached::new();
    let guest = &attached.guest;
    let dir = guest.disk().parent().unwrap().to_owned();
    let start = |name: &str, value: &str| {
        let mut config = config(guest);
        config.environment = vec![(name.to_owned(), value.to_owned())];
        Daemon::start_logged(&dir, &config)
    };
    let done = |daemon: &Daemon, args: &[&str]| {
        let done = daemon.imagectl(args);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    // What `args` does, step by step, where imaged touches the guest or the vault.
    let steps = |args: &[&str]| {
        let file = dir.join("steps");
        let _ = std::fs::remove_file(&file);
        let daemon = start("IMAGED_TEST_STEPS", file.to_str().unwrap());
        done(&daemon, args);
        daemon.stop();
        let told = std::fs::read_to_string(&file).unwrap();
        // After one step in the guest is before the next one.
        let own = |step: &&str| step.starts_with("before guest-exec") || step.contains("vault");
        let own = told.lines().filter(|step| !step.contains("recovery")).filter(own);
        own.map(str::to_owned).collect::<Vec<_>>()
    };
    let taken = steps(&DISCONNECT);
    let given = steps(&RECONNECT);
    assert!(taken.len() >= 7 && given.len() >= 5, "{taken:?} {given:?}");
    let killed = |step: &str, args: &[&str]| {
        let daemon = start("IMAGED_TEST_DIES", step);
        daemon.imagectl(&[args, &["--wait-for-state", "ACCEPTED"]].concat());
        assert!(daemon.is_killed_at_work(), "{step} was not reached");
    };

    for step in &taken {
        killed(step, &DISCONNECT);
        let daemon = Daemon::start_logged(&dir, &config(guest));
        println!("{step} of a disconnect");
        attached.assert_it_is_back(&daemon);
        assert_eq!(sealed(&dir), 0, "{step}");
        daemon.stop();
    }
    // One that dies while it gives back is asked again.
    for step in &given {
        let daemon = Daemon::start_logged(&dir, &config(guest));
        done(&daemon, &DISCONNECT);
        daemon.stop();
        killed(step, &RECONNECT);
        let daemon = Daemon::start_logged(&dir, &config(guest));
        println!("{step} of a reconnect");
        let again = daemon.imagectl(&RECONNECT);
        // The last is over when nothing but the file is left.
        assert!(again.status.success() || step.contains("vault wipe"), "{step}");
        attached.assert_it_is_back(&daemon);
        assert_eq!(sealed(&dir), 0, "{step}");
        daemon.stop();
    }
}
