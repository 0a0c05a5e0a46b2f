//! The unit under a real systemd, which `systemd-nspawn` boots.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::lab::{Loop, run, scratch, sparse_file, text};

/// What `tests/lab/service.sh` saw; more than one value where it looked more
/// than once.
fn facts(dir: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut facts = BTreeMap::<_, BTreeSet<_>>::new();
    for line in fs::read_to_string(dir.join("facts")).unwrap_or_default().lines() {
        let (name, value) = line.split_once('=').unwrap();
        facts.entry(name.to_owned()).or_default().insert(value.to_owned());
    }
    facts
}

/// CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_KILL, CAP_SETGID,
/// CAP_SETUID, CAP_SETPCAP, CAP_IPC_LOCK and CAP_SYS_PTRACE
/// (linux/capability.h).
const CAPABILITIES: &str = "00000000000841e7";

#[test]
#[ignore = "needs root, loop devices and systemd-nspawn"]
fn nspawn_the_unit_serves_restarts_and_lets_imaged_do_all_its_work() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tree = run(root.join("tests/lab/systemd.sh").to_str().unwrap(), &[]);
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = dir.path().join("volume.raw");
    sparse_file(&volume, 8 << 20, &[(0, text(1 << 20))]);
    let device = Loop::attach(&volume, 512);
    let device = device.device.to_str().unwrap();
    let lab = dir.path().join("lab");
    fs::create_dir(&lab).unwrap();
    fs::copy(root.join("tests/lab/service.sh"), lab.join("run")).unwrap();
    fs::write(lab.join("loop"), device).unwrap();

    let console = fs::File::create(dir.path().join("console")).unwrap();
    let bind = |from: &Path, to: &str| format!("--bind-ro={}:{to}", from.display());
    let unit = root.join("systemd/imaged.service");
    let booted = Command::new("timeout")
        .args(["--kill-after=10", "120", "setpriv", "--pdeathsig", "TERM", "systemd-nspawn"])
        .args(["--quiet", "--register=no", "--keep-unit", "--boot", "--volatile=overlay"])
        .arg(format!("--machine=imaged-{}", std::process::id()))
        .args(["--directory", &tree])
        // A hypervisor's root has it, nspawn's does not.
        .arg("--capability=CAP_IPC_LOCK")
        .arg(format!("--bind={}:/lab", lab.display()))
        .arg(format!("--bind={device}"))
        .arg(bind(Path::new(env!("CARGO_BIN_EXE_imaged")), "/usr/bin/imaged"))
        .arg(bind(Path::new(env!("CARGO_BIN_EXE_imagectl")), "/usr/bin/imagectl"))
        .arg(bind(&unit, "/etc/systemd/system/imaged.service"))
        .stdin(Stdio::null())
        .stderr(console.try_clone().unwrap())
        .stdout(console)
        .status()
        .unwrap();
    let seen = facts(&lab);
    let log = fs::read_to_string(lab.join("log")).unwrap_or_default();
    let fact = |name: &str| {
        let values = seen.get(name).unwrap_or_else(|| panic!("no {name}: {booted}\n{log}"));
        values.iter().map(String::as_str).collect::<Vec<_>>().join("|")
    };
    assert_eq!(fact("end"), "reached");

    // `systemctl start` returns when imaged has said that it is ready.
    assert_eq!(fact("verify"), "0", "{log}");
    assert_eq!(fact("start"), "0", "{log}");
    assert_eq!(fact("state"), "active serving");
    assert_eq!(fact("capabilities"), CAPABILITIES);
    for works in ["create_home", "create_tmp", "create_device", "verify_image", "delete"] {
        assert_eq!(fact(works), "0", "{works}: {log}");
    }
    let host: Value = serde_json::from_slice(&fs::read(lab.join("host.json")).unwrap()).unwrap();
    let features = host["data"]["features"].as_array().unwrap();
    let missing = features.iter().filter(|f| f["available"] != true);
    let missing: Vec<_> = missing.map(|feature| feature["name"].as_str().unwrap()).collect();
    // Neither is in this system.
    assert_eq!(missing, ["lvm", "libvirt"], "{features:?}");
    assert!(features.iter().any(|feature| feature["name"] == "sealing"), "{features:?}");
    assert!(fact("held").contains("is open for writing by sleep (pid "), "{}", fact("held"));
    assert!(fact("stranger").contains("cannot connect"), "{}", fact("stranger"));
    assert_eq!((fact("mounted"), fact("unmounted")), ("1".into(), "0".into()));

    // The journal has what tracing knows, as fields.
    let journal = fs::read_to_string(lab.join("journal.json")).unwrap();
    let entries: Vec<Value> =
        journal.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ended = entries.iter().find(|entry| entry["MESSAGE"] == "work request ended").unwrap();
    assert_eq!((&ended["F_STATUS"], &ended["PRIORITY"]), (&"Succeeded".into(), &"5".into()));
    assert!(ended["F_WORK_REQUEST"].as_str().unwrap().starts_with("ocid1.workrequest."));
    assert_eq!(ended["TARGET"], "imaged::work::tracker");
    // Neither a filter nor a missing capability took anything away.
    let warnings: Vec<_> = entries
        .iter()
        .filter(|entry| entry["_EXE"] == "/usr/bin/imaged" && entry["PRIORITY"] != "5")
        .collect();
    assert!(warnings.is_empty(), "{warnings:?}");

    assert_eq!((fact("killed"), fact("after_kill")), ("1 active".into(), "0".into()));
    assert_eq!((fact("stop"), fact("stopped")), ("0".into(), "success 0".into()));
    // Neither is started again.
    assert_eq!((fact("start_wrong"), fact("wrong")), ("1".into(), "failed 78".into()));
    assert!(fact("wrong_said").contains("line 6: stores.data.nonsense: unknown key"), "{log}");
    assert_eq!((fact("start_arguments"), fact("arguments")), ("1".into(), "failed 2".into()));
    let exposure: f64 = fact("exposure").parse().unwrap();
    assert!(exposure <= 4.0, "systemd-analyze security says {exposure}");
}
