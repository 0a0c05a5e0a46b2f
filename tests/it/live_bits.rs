//! The image of a running guest, bit for bit.

use std::{fs, io::Write as _, time::Duration};

use serde_json::json;

use crate::{
    lab::{Config, Daemon, Guest, Loop, Monitor, Stuck, run, scratch, wait_for},
    live::{capture, object, reading},
};

const SIZE: u64 = 384 << 20;

/// Writes, discards and writes zeroes all over /dev/vdb, each done when the
/// next begins. /run/pause holds it, which /run/paused confirms; /run/done
/// counts.
const HAMMER: &str = r#"
use strict; use Fcntl;
srand($ARGV[0]);
my $size = $ARGV[1];
sysopen(my $disk, '/dev/vdb', O_RDWR | 010000) or die $!;
my ($count, $pass) = (0, 0);
while (1) {
    for my $step (0 .. $size / 1048576 - 1) {
        while (-e '/run/pause') {
            open(my $out, '>', '/run/paused'); close $out;
            select(undef, undef, undef, 0.05);
        }
        unlink '/run/paused';
        # A prime with no factor of the count visits all, far apart.
        my $mib = ($step * 101 + $pass) % ($size / 1048576);
        my $from = $mib * 1048576 + int(rand(2040)) * 512;
        my $length = 512 * (1 + int(rand(256)));
        $length = $size - $from if $from + $length > $size;
        my $deed = int(rand(8));
        if ($deed < 4) {
            sysseek($disk, $from, 0) or die $!;
            syswrite($disk, chr(1 + $count % 255) x $length) == $length or die $!;
        } else {
            # BLKDISCARD, BLKZEROOUT
            ioctl($disk, $deed < 6 ? 0x1277 : 0x127f, pack('QQ', $from, $length)) or die $!;
        }
        $count++;
        open(my $out, '>', '/run/done.new'); print $out "$count\n"; close $out;
        rename('/run/done.new', '/run/done');
    }
    $pass++;
}
"#;

#[test]
#[ignore = "needs root, loop devices, QEMU and two minutes"]
fn qemu_guest_that_changes_everything_meanwhile_is_imaged_bit_for_bit() {
    for direct in [true, false] {
        compare_with_backup_job(direct);
    }
}

/// `direct`: QEMU's cache, past the host's pages or through them.
fn compare_with_backup_job(direct: bool) {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let file = dir.path().join("data.raw");
    let mut data = fs::File::create(&file).unwrap();
    // Two thirds are full of something, the rest was never written.
    let mut stretch = Vec::with_capacity(1 << 20);
    for number in 0..(SIZE >> 20) * 2 / 3 {
        stretch.clear();
        stretch.resize(1 << 20, 0x80 | u8::try_from(number % 97).unwrap());
        data.write_all(&stretch).unwrap();
    }
    data.set_len(SIZE).unwrap();
    data.sync_all().unwrap();
    drop(data);
    let volume = Loop::attach(&file, 512);

    let node = json!({
        "driver": "raw", "node-name": "data", "discard": "unmap",
        "file": {
            "driver": "host_device", "filename": volume.device, "node-name": "data-file",
            "discard": "unmap", "cache": { "direct": direct },
        },
    });
    let node = node.to_string();
    let device = "virtio-blk-pci,id=datadisk,drive=data";
    let guest = Guest::boot_with("raw", &["-blockdev", &node, "-device", device]);
    let instance =
        guest.instance().replace(guest.disk().to_str().unwrap(), volume.device.to_str().unwrap());
    let area = guest.disk().with_file_name("scratch");
    let daemon = Daemon::start(&Config {
        lines: format!("scratch_size = \"1GiB\"\nscratch_dir = {area:?}"),
        instances: vec![("web-1".into(), instance)],
        ..Config::default()
    });
    let seed = std::env::var("IMAGED_TEST_SEED")
        .map_or_else(|_| u64::from(std::process::id()), |seed| seed.parse().unwrap());
    println!("IMAGED_TEST_SEED={seed}");
    guest.sh(&format!(
        "cat > /run/hammer.pl <<'END'\n{HAMMER}\nEND\n\
         setsid perl /run/hammer.pl {seed} {SIZE} >/run/hammer.log 2>&1 </dev/null &"
    ));
    let count = || guest.sh("cat /run/done || echo 0").trim().parse::<u64>().unwrap();
    let mut monitor = Monitor::of(&guest);
    for round in 0..2 {
        let before = count();
        wait_for("the hammer", Duration::from_secs(60), || (count() > before + 50).then_some(()));
        guest.sh("touch /run/pause; until [ -e /run/paused ]; do sleep 0.1; done");

        // The same point in time for both: nothing is written.
        let slow = Stuck::reads_at(daemon.pid(), &volume.device, 24 << 20);
        let request = reading(&daemon, &["--consistency", "crash"]);
        let target = dir.path().join(format!("backup-{round}.raw"));
        fs::File::create(&target).unwrap().set_len(SIZE).unwrap();
        monitor.execute_with(
            "blockdev-add",
            &json!({
                "driver": "raw", "node-name": "target",
                "file": { "driver": "file", "filename": target },
            }),
        );
        monitor.execute_with(
            "blockdev-backup",
            &json!({
                "job-id": "backup", "device": "data", "target": "target", "sync": "full",
                "auto-dismiss": true,
            }),
        );
        let before = count();
        guest.sh("rm /run/pause");
        let watch = ["work-request", "watch", "--work-request-id", &request];
        let ended = daemon.imagectl(&watch);
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        let done = count() - before;
        drop(slow);
        wait_for("the backup job", Duration::from_secs(60), || {
            monitor.execute("query-jobs").as_array().unwrap().is_empty().then_some(())
        });
        monitor.execute_with("blockdev-del", &json!({ "node-name": "target" }));

        let images = daemon.json(&["image", "list", "--sort-by", "timecreated"]);
        let image = &images["data"][0];
        let scratch = image["point-in-time"]["scratch-bytes"].as_u64().unwrap();
        println!("round {round}: {done} deeds meanwhile, {scratch} bytes of scratch");
        assert!(done > 50 && scratch > 4 << 20, "the guest changed too little to tell");
        let ours = object(&daemon, image);
        let (ours, theirs) = (ours.to_str().unwrap(), target.to_str().unwrap());
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", ours, theirs]);
    }
    assert_eq!(guest.sh("cat /run/hammer.log"), "", "the guest saw an error");
    // And one of a quiet guest, against the volume itself.
    guest.sh("touch /run/pause; until [ -e /run/paused ]; do sleep 0.1; done");
    let image = capture(&daemon, &["--consistency", "crash"]);
    let ours = object(&daemon, &image);
    guest.vm("kill", &[]);
    let volume = volume.device.to_str().unwrap();
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", ours.to_str().unwrap(), volume]);
}

/// A QEMU that dies when a snapshot's reader goes away must not be tried.
#[test]
#[ignore = "needs QEMU and a minute"]
fn qemu_guest_whose_disk_has_a_thread_of_its_own_is_refused() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let disk = |name: &str| {
        let path = dir.path().join(name);
        fs::write(&path, vec![1; 1 << 20]).unwrap();
        path
    };
    let node = |name: &str| {
        let file = json!({ "driver": "file", "filename": disk(name) });
        json!({ "driver": "raw", "node-name": name, "file": file }).to_string()
    };
    let nodes = ["blk", "threaded", "plain"].map(node);
    let guest = Guest::boot_with(
        "raw",
        &[
            &["-object", "iothread,id=io0", "-device", "virtio-scsi-pci,id=scsi0,iothread=io0"][..],
            &["-device", "virtio-scsi-pci,id=scsi1"],
            &["-blockdev", &nodes[0], "-device", "virtio-blk-pci,drive=blk,iothread=io0"],
            &["-blockdev", &nodes[1], "-device", "scsi-hd,drive=threaded,bus=scsi0.0,id=sd0"],
            &["-blockdev", &nodes[2], "-device", "scsi-hd,drive=plain,bus=scsi1.0,id=sd1"],
        ]
        .concat(),
    );
    let area = guest.disk().with_file_name("scratch");
    for (name, refused) in [("blk", true), ("threaded", true), ("plain", false)] {
        let path = dir.path().join(name);
        let instance =
            guest.instance().replace(guest.disk().to_str().unwrap(), path.to_str().unwrap());
        let daemon = Daemon::start(&Config {
            lines: format!("scratch_dir = {area:?}\nscratch_size = \"64MiB\""),
            instances: vec![("web-1".into(), instance)],
            ..Config::default()
        });
        if refused {
            let said = daemon.refusal(&["image", "create", "--instance-id", "web-1"]);
            assert!(said.contains("an I/O thread serves its boot disk, and QEMU"), "{said}");
        } else {
            capture(&daemon, &["--consistency", "crash"]);
        }
        daemon.stop();
    }
}
