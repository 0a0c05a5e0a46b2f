//! The volumes that are imaged: made once, attached as loop devices.

use std::{
    cell::OnceCell,
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use crate::lab::{self, Loop, run};

/// Bytes of every volume: 4 GiB.
pub const SIZE: u64 = 4 << 30;

/// Loop devices over the volumes, attached at first use.
#[derive(Default)]
pub struct Volumes {
    debian: OnceCell<Loop>,
    random: OnceCell<Loop>,
}

impl Volumes {
    /// The device with `content`: `debian` or `random`.
    pub fn device(&self, content: &str) -> &Path {
        let (cell, file): (_, fn() -> PathBuf) = match content {
            "debian" => (&self.debian, debian),
            _ => (&self.random, random),
        };
        &cell.get_or_init(|| Loop::attach(&file(), 512)).device
    }
}

/// The demo guest's disk: a Debian root filesystem, the rest holes.
pub fn debian() -> PathBuf {
    let guest = run("tests/lab/guest.sh", &[]);
    let file = lab::scratch().join("debian.raw");
    if !file.exists() {
        let from = format!("{guest}/disk.raw");
        run("cp", &["--sparse=always", &from, file.to_str().unwrap()]);
    }
    file
}

/// Bytes that the Debian volume's file holds.
pub fn data_bytes() -> u64 {
    debian().metadata().unwrap().blocks() * 512
}

/// Bytes that do not compress, all of them.
fn random() -> PathBuf {
    let file = lab::scratch().join("random.raw");
    if file.metadata().is_ok_and(|metadata| metadata.len() == SIZE) {
        return file;
    }
    let unfinished = file.with_extension("unfinished");
    let out = fs::File::create(&unfinished).unwrap();
    let step = 64 << 20;
    for offset in (0..SIZE).step_by(step) {
        out.write_all_at(&lab::noise(step, offset), offset).unwrap();
    }
    out.sync_all().unwrap();
    fs::rename(&unfinished, &file).unwrap();
    file
}
