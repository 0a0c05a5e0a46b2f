//! Any bytes as a qcow2: opened, and everything read that is near.
#![no_main]

use imaged::{format::qcow2::image::Image, port::ReadAt};
use libfuzzer_sys::fuzz_target;

struct Bytes<'a>(&'a [u8]);

impl ReadAt for Bytes<'_> {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| std::io::ErrorKind::UnexpectedEof)?;
        let end = start.checked_add(buf.len()).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let bytes = self.0.get(start..end).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let object = Bytes(data);
    let Ok(mut image) = Image::open(&object) else { return };
    let cluster = 1_u64 << image.header().cluster_bits;
    let size = image.header().virtual_size;
    let mut buf = vec![0; cluster as usize];
    // The first clusters, and the last: each may go wrong alone.
    let last = size.saturating_sub(1) / cluster;
    for index in (0..32).chain([last]).filter(|index| index * cluster < size) {
        let len = cluster.min(size - index * cluster) as usize;
        let _ = image.read_at(&mut buf[..len], index * cluster);
    }
});
