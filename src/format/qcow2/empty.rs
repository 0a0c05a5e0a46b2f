//! An image without data, for others to write to.

use super::{CLUSTER_SIZE, header};
use crate::model::image::Compression;

/// Bits of a refcount: 2 bytes.
const REFCOUNT_SIZE: u64 = 2;

/// An image (version 3, without a backing file) of `virtual_size` bytes, all
/// zeroes, in which nothing is allocated. It is as long as what is returned.
///
/// ```text
/// header │ refcount table │ refcount block │ L1 table …
/// ```
#[must_use]
pub fn empty(virtual_size: u64) -> Vec<u8> {
    let mut header = header::written(virtual_size.next_multiple_of(512), Compression::Deflate);
    let l1_entries = header.l1_needed();
    // One cluster of L1 entries reaches 4 TiB; a refcount block counts 32,768
    // clusters, so one is enough for any L1 table that QEMU takes.
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER_SIZE).max(1);
    let clusters = 3 + l1_clusters;
    header.l1_entries = u32::try_from(l1_entries).unwrap_or(u32::MAX);
    header.refcount_table_offset = CLUSTER_SIZE;
    header.refcount_table_clusters = 1;
    header.l1_offset = 3 * CLUSTER_SIZE;

    let mut image = vec![0; at(clusters * CLUSTER_SIZE)];
    let mut put = |offset: u64, value: &[u8]| {
        image[at(offset)..at(offset) + value.len()].copy_from_slice(value);
    };
    put(0, &header.to_bytes());
    put(CLUSTER_SIZE, &(2 * CLUSTER_SIZE).to_be_bytes());
    for cluster in 0..clusters {
        put(2 * CLUSTER_SIZE + cluster * REFCOUNT_SIZE, &1_u16.to_be_bytes());
    }
    image
}

#[allow(clippy::cast_possible_truncation, reason = "64-bit only, see lib.rs")]
fn at(offset: u64) -> usize {
    offset as usize
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    #[ignore = "needs qemu-img"]
    fn qemu_finds_no_fault_and_can_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty.qcow2");
        for size in [1, 512, 4 << 30, 400 << 30, (8 << 40) + 512] {
            std::fs::write(&path, empty(size)).unwrap();
            let run = |program: &str, args: &[&str]| {
                let output = Command::new(program).args(args).arg(&path).output().unwrap();
                assert!(output.status.success(), "{size}: {output:?}");
                String::from_utf8(output.stdout).unwrap()
            };
            run("qemu-img", &["check", "-q", "-f", "qcow2"]);
            let info = run("qemu-img", &["info", "--output=json", "-f", "qcow2"]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], size.next_multiple_of(512));
            assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
            let last = (size.next_multiple_of(512) - 512).to_string();
            run("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 7 {last} 512")]);
            run("qemu-img", &["check", "-q", "-f", "qcow2"]);
        }
    }
}
