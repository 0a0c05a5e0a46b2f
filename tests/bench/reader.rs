//! The reader alone against fio: how near to the device's limit it comes.

use std::{path::Path, sync::mpsc::sync_channel, thread, time::Instant};

use imaged::{
    block,
    port::{NamedBy, Piece, Volumes as _},
};
use tokio_util::sync::CancellationToken;

use crate::{ROUNDS, cold, lab::run, report::Report, volumes::Volumes};

/// Every byte of the random volume, in 1 MiB reads, 16 at once, on both
/// sides.
pub fn read_limit(volumes: &Volumes, report: &mut Report) {
    if !report.wants("read-limit") {
        return;
    }
    let device = volumes.device("random").to_owned();
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        cold();
        let our_seconds = read(&device, drop);
        cold();
        let peer_seconds = fio(&device);
        if round > 0 {
            ours.push(our_seconds);
            peer.push(peer_seconds);
        }
    }
    report.compare("read-limit", &ours, &peer);
}

/// Reads a device as a capture does, and hands its pieces to `take`. Returns
/// what it took, in seconds.
pub fn read(device: &Path, take: impl FnMut(Piece) + Send) -> f64 {
    let host = block::HostVolumes::new(vec!["/dev".into()], block::ReaderSettings::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut held = runtime.block_on(host.hold(device, NamedBy::Request)).unwrap();
    let (pieces_in, pieces) = sync_channel(4);
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || pieces.into_iter().for_each(take));
        held.read(&pieces_in, &CancellationToken::new()).unwrap();
        drop(pieces_in);
    });
    start.elapsed().as_secs_f64()
}

/// fio's own time for the reads, without its start; with registered buffers
/// and file, as imaged has them.
fn fio(device: &Path) -> f64 {
    let file = format!("--filename={}", device.display());
    let output = run(
        "fio",
        &[
            "--name=read",
            &file,
            "--readonly",
            "--rw=read",
            "--bs=1M",
            "--iodepth=16",
            "--ioengine=io_uring",
            "--fixedbufs",
            "--registerfiles",
            "--direct=1",
            "--output-format=json",
        ],
    );
    let report: serde_json::Value = serde_json::from_str(&output).unwrap();
    report["jobs"][0]["read"]["runtime"].as_f64().unwrap() / 1000.0
}
