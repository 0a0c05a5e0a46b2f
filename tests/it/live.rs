//! Images of a guest that goes on working.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::lab::{Config, Daemon, Guest, run, scratch};

/// Appends numbered records with a checksum to /records, each with fsync, and
/// keeps the longest time that one took, in microseconds, in /run/longest.
const WRITER: &str = r#"
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

fn start_writer(guest: &Guest) {
    guest.sh(&format!(
        "cat > /run/writer.pl <<'END'\n{WRITER}\nEND\n\
         setsid perl /run/writer.pl >/run/writer.log 2>&1 </dev/null &\n\
         for try in 1 2 3 4 5 6 7 8 9; do sleep 0.5; [ -s /records ] && exit 0; done\n\
         cat /run/writer.log >&2; exit 1"
    ));
}

fn daemon(guest: &Guest) -> Daemon {
    Daemon::start(&Config {
        lines: format!("scratch_size = \"1GiB\"\nscratch_dir = {:?}", guest.disk().with_file_name("scratch")),
        instances: vec![("web-1".into(), guest.instance())],
        ..Config::default()
    })
}

fn capture(daemon: &Daemon, more: &[&str]) -> Value {
    let args = ["image", "create", "--instance-id", "web-1", "--wait-for-state", "AVAILABLE"];
    daemon.json(&[&args[..], more].concat())["data"].clone()
}

fn object(daemon: &Daemon, image: &Value) -> PathBuf {
    daemon.images().join(image["id"].as_str().unwrap()).join("image.qcow2")
}

/// The records in an image, after its journal was replayed. Its filesystem
/// must then be clean; without `replay` it must be so at once.
fn records(object: &Path, replay: bool) -> Vec<String> {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let disk = dir.path().join("disk.raw");
    let root = dir.path().join("root.ext4");
    let (disk, root) = (disk.to_str().unwrap(), root.to_str().unwrap());
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", object.to_str().unwrap(), disk]);
    let (of, from) = (format!("of={root}"), format!("if={disk}"));
    run("dd", &[&from, &of, "bs=1M", "skip=1", "conv=sparse", "status=none"]);
    if replay {
        // 1: the journal was replayed, and all is well.
        run("sh", &["-c", &format!("e2fsck -E journal_only -p {root} || [ $? = 1 ]")]);
    }
    run("e2fsck", &["-f", "-n", root]);
    run("debugfs", &["-R", "cat /records", root]).lines().map(str::to_owned).collect()
}

fn assert_prefix(records: &[String]) {
    assert!(!records.is_empty());
    for (number, record) in records.iter().enumerate() {
        let text = format!("{number:010}");
        let sum: u64 = text.bytes().chain(*b"imaged").map(u64::from).sum();
        let sum = sum * 2_654_435_761 % 4_294_967_296;
        assert_eq!(*record, format!("{text} {sum}"));
    }
}

#[test]
#[ignore = "needs root, QEMU and minutes"]
fn qemu_guest_is_imaged_while_it_writes() {
    let guest = Guest::boot();
    start_writer(&guest);
    let daemon = daemon(&guest);
    let nodes = |_: ()| guest.sh("cat /run/writer.log");
    let mut before = 0;
    for (mode, consistency) in [("freeze", "FILESYSTEM"), ("crash", "CRASH")] {
        for _ in 0..3 {
            let image = capture(&daemon, &["--consistency", mode]);
            assert_eq!(image["consistency"], consistency);
            let records = records(&object(&daemon, &image), mode == "crash");
            assert_prefix(&records);
            assert!(records.len() > before, "the guest wrote nothing");
            before = records.len();
            let id = image["id"].as_str().unwrap();
            assert!(daemon.imagectl(&["image", "delete", "--force", "--image-id", id]).status.success());
        }
    }
    assert_eq!(nodes(()), "", "the guest saw an error");
    println!("longest record: {} µs", guest.sh("cat /run/longest").trim());
    let scratch = guest.disk().with_file_name("scratch");
    assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
}
