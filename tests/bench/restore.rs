//! An image back from a bucket onto a device, against the two steps that
//! people use: a download and a conversion.

use std::{cell::RefCell, fs, thread};

use crate::{
    cold,
    lab::{self, Loop, run},
    peers::{S3_CLIENTS, S3Client, S3Clients, Try, timed, versus},
    report::{Report, median},
    stores::{capture, daemon},
    volumes::{SIZE, Volumes},
    weed::Weed,
};

/// The same object for both sides: imaged's, in SeaweedFS.
pub fn s3(volumes: &Volumes, report: &mut Report) {
    if !["restore-s3", "restore-s3-floor"].iter().any(|name| report.wants(name)) {
        return;
    }
    let source = volumes.device("debian").to_str().unwrap();
    let dir = tempfile::tempdir_in(lab::scratch()).unwrap();
    let weed = Weed::start();
    let clients = S3Clients::of(weed.address());
    let daemon = daemon(&weed.config(weed.address(), dir.path()));
    let (_, id) = capture(&daemon, volumes.device("debian"));
    let object = S3Clients::url(&format!("images/{id}/image.qcow2"));
    let [file, disk] = ["fetched.qcow2", "target.raw"].map(|name| dir.path().join(name));
    lab::sparse_file(&disk, SIZE, &[]);
    let target = Loop::attach(&disk, 512);
    let to = target.device.to_str().unwrap();
    let empty = || {
        run("blkdiscard", &["--force", to]);
        cold();
    };
    let verify = |round| {
        if round == 0 {
            run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", source, to]);
        }
    };

    // The kernel's own, for the loop device, is in neither.
    let cpu = RefCell::new(Vec::new());
    let ours = |round| {
        empty();
        assert!(daemon.imagectl(&["host", "get"]).status.success());
        let restore = ["volume", "restore", "--image-id", &id, "--to", to, "--force"];
        let before = daemon.cpu_seconds() + weed.cpu_seconds();
        let took = timed(|| {
            let output = daemon.imagectl(&restore);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{restore:?}: {said}");
        });
        cpu.borrow_mut().push(daemon.cpu_seconds() + weed.cpu_seconds() - before);
        verify(round);
        took
    };
    let two_steps = |client: S3Client| -> Try<'_> {
        let (file, object, clients) = (&file, &object, &clients);
        Box::new(move |round| {
            empty();
            clients.warm(client);
            let file = file.to_str().unwrap();
            let took = timed(|| {
                clients.copy(client, object, file);
                // The file is in memory, the device is to have the bytes.
                let fast = ["convert", "-n", "-W", "-m", "16", "-t", "none"];
                run("qemu-img", &[&fast[..], &["-f", "qcow2", "-O", "raw", file, to]].concat());
            });
            verify(round);
            fs::remove_file(file).unwrap();
            took
        })
    };
    let mut peers = S3_CLIENTS.map(|(name, client)| (name, two_steps(client)));
    versus(report, "restore-s3", Box::new(ours), &mut peers);
    let cores = thread::available_parallelism().unwrap().get() as f64;
    let floor = median(&cpu.borrow()) / cores;
    report.value("restore-s3-floor", floor, "s, imaged's and the store's time on all cores");
}
