//! How much memory a capture takes, whatever the volume's size.

use std::{fs, os::unix::fs::FileExt, path::Path, thread, time::Duration};

use crate::{
    lab::{self, Config, Daemon, Mount, run},
    report::Report,
    stores::oci_service,
    volumes,
    weed::BUCKET,
};

const MIB: f64 = (1 << 20) as f64;
/// What an object has when its parts become large.
const FIRST_PARTS: u64 = 80_000_000_000;

/// Resident sets of a fresh daemon after one capture each.
pub fn resident_sets(report: &mut Report) {
    let wants = ["rss-sparse-400g", "rss-dense-40g", "rss-slope-20g-40g"];
    if !wants.iter().any(|name| report.wants(name)) {
        return;
    }
    let dir = tempfile::tempdir_in(lab::scratch()).unwrap();
    if report.wants("rss-sparse-400g") {
        let volume = dir.path().join("sparse.raw");
        sparse(&volume);
        report.value("rss-sparse-400g", peak(&volume) / MIB, "MiB");
    }
    if report.wants("rss-dense-40g") || report.wants("rss-slope-20g-40g") {
        // Reflinks make 40 GB of data in every cluster out of one Debian, so
        // that no disk of that size is needed; the reader cannot tell.
        let xfs = Mount::new("xfs", 4 << 30);
        let [half, whole] = [20, 40].map(|gb| {
            let volume = xfs.at.path().join("dense.raw");
            dense(&volume, gb * 1_000_000_000);
            peak(&volume)
        });
        report.value("rss-dense-40g", whole / MIB, "MiB");
        report.value("rss-slope-20g-40g", (whole - half) / MIB / 20.0, "MiB/GB");
    }
}

/// Resident set of a fresh daemon while it stores an object in a bucket: until
/// 80 GB are stored, and behind that, where the parts of a volume of 400 GB
/// are large.
pub fn resident_set_of_an_upload(report: &mut Report) {
    let names = ["rss-upload-80gb", "rss-upload-beyond"];
    if !names.iter().any(|name| report.wants(name)) {
        return;
    }
    let xfs = Mount::new("xfs", 4 << 30);
    let volume = xfs.at.path().join("dense.raw");
    dense(&volume, FIRST_PARTS + (4 << 30));
    fs::File::options().write(true).open(&volume).unwrap().set_len(400_000_000_000).unwrap();
    let dir = tempfile::tempdir_in(lab::scratch()).unwrap();
    let (server, _, table) = oci_service(dir.path(), |options| options.forgets_parts = true);
    let dirs = xfs.at.path();
    let lines = format!("boot_volume_dirs = [{dirs:?}]\nencode_threads = \"all\"\n{table}");
    let daemon = Daemon::start(&Config { lines, ..Config::default() });
    let stored = || -> u64 {
        let uploads = server.uploads(BUCKET);
        uploads.iter().flat_map(|upload| &upload.parts).map(|part| part.size).sum()
    };
    let early = thread::scope(|scope| {
        let capture = scope.spawn(|| daemon.create(&volume, &["--compression", "none"]));
        let mut early = 0;
        while !capture.is_finished() {
            // None: not begun yet, or done.
            if (1..FIRST_PARTS).contains(&stored()) {
                early = daemon.peak_memory();
            }
            thread::sleep(Duration::from_millis(250));
        }
        capture.join().unwrap();
        early
    });
    report.value(names[0], early as f64 / MIB, "MiB");
    report.value(names[1], daemon.peak_memory() as f64 / MIB, "MiB");
}

fn peak(volume: &Path) -> f64 {
    let store = tempfile::tempdir_in(lab::scratch()).unwrap();
    let config = Config {
        lines: format!(
            "boot_volume_dirs = [{:?}]\nencode_threads = \"all\"",
            volume.parent().unwrap().display().to_string()
        ),
        store: Some(store.path().join("store")),
        ..Config::default()
    };
    let daemon = Daemon::start(&config);
    daemon.create(volume, &[]);
    daemon.peak_memory() as f64
}

/// 400 GB, of which 2 GiB are data in 128 places.
fn sparse(path: &Path) {
    const SIZE: u64 = 400_000_000_000;
    let file = fs::File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    for index in 0..128 {
        let bytes = lab::noise(16 << 20, index);
        file.write_all_at(&bytes, index * (SIZE / 128)).unwrap();
    }
    file.sync_all().unwrap();
}

/// `size` bytes with data in every cluster.
fn dense(path: &Path, size: u64) {
    let template = path.with_file_name("template.raw");
    if !template.exists() {
        fs::write(&template, filled()).unwrap();
    }
    let chunk = template.metadata().unwrap().len();
    let _ = fs::remove_file(path);
    fs::File::create(path).unwrap().set_len(size).unwrap();
    let clones: Vec<String> = (0..size)
        .step_by(chunk as usize)
        .map(|offset| {
            // Whole blocks: the few bytes at the end stay a hole.
            let len = chunk.min(size - offset) & !4095;
            format!("reflink {} 0 {offset} {len}", template.display())
        })
        .collect();
    let args: Vec<&str> = clones.iter().flat_map(|clone| ["-c", clone.as_str()]).collect();
    run("xfs_io", &[&args[..], &[path.to_str().unwrap()]].concat());
    run("sync", &[]);
}

/// The Debian volume's clusters that hold anything.
fn filled() -> Vec<u8> {
    let file = fs::File::open(volumes::debian()).unwrap();
    let size = file.metadata().unwrap().len();
    let mut bytes = Vec::new();
    let mut cluster = vec![0; 65_536];
    for offset in (0..size).step_by(cluster.len()) {
        file.read_exact_at(&mut cluster, offset).unwrap();
        if cluster.iter().any(|byte| *byte != 0) {
            bytes.extend_from_slice(&cluster);
        }
    }
    bytes
}
