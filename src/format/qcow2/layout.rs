//! Where everything of a qcow2 goes, without ever going back.
//!
//! [`Layout`] is arithmetic: told what each guest cluster became, in
//! ascending order, it answers at which host offset the bytes belong, and
//! emits L2 tables and refcount blocks as they become complete. Only the
//! header waits for the end.
//!
//! Compressed clusters are packed byte after byte into open host clusters, the
//! *packs*; raw clusters go behind them. So bytes are not strictly appended:
//! what is left of a pack may be filled later. [`Layout::settled`] tells below
//! which offset nothing will change any more.
//!
//! ```text
//!   ──────── settled ─┐
//!   ┌───────┬─────────▼─┬───────┬────────┬───────┐
//!   │ final │ pack ░░░░░│  raw  │ pack ░░│  raw  │◄ tail
//!   └───────┴───────────┴───────┴────────┴───────┘
//! ```

use std::{collections::VecDeque, ops::Range};

use super::{
    CLUSTER_BITS, CLUSTER_SIZE, COMPRESSED, COPIED, Header, L2_ENTRIES, REFCOUNTS_PER_BLOCK,
    SECTOR, header,
};
use crate::model::image::Compression;

/// Packs that are kept open: enough that what raw clusters cut off is filled
/// by the next small clusters.
const MAX_PACKS: usize = 16;

/// Takes bytes of the image that belong at an offset.
pub trait Emit {
    /// `bytes` belong at `offset`. With the bytes that belong where
    /// [`Layout::place`] says, every byte behind the header's cluster comes
    /// exactly once.
    fn emit(&mut self, offset: u64, bytes: &[u8]);
}

/// Most bytes that an image of a volume of `virtual_size` bytes can have: no
/// guest cluster takes more than one host cluster.
#[must_use]
pub const fn largest_object(virtual_size: u64) -> u64 {
    let data = virtual_size.div_ceil(CLUSTER_SIZE);
    let l2 = data.div_ceil(L2_ENTRIES);
    let l1 = l2.div_ceil(L2_ENTRIES);
    let counted = 1 + data + l2 + l1;
    // Blocks count themselves and their table: one more than for the rest.
    let blocks = counted.div_ceil(REFCOUNTS_PER_BLOCK - 1) + 1;
    (counted + blocks + blocks.div_ceil(L2_ENTRIES)) * CLUSTER_SIZE
}

/// The growing layout of one image.
#[derive(Debug)]
pub struct Layout {
    header: Header,
    /// Guest clusters of the volume.
    guest_clusters: u64,
    /// First guest cluster that has not come yet.
    next_guest: u64,
    /// End of the allocated host clusters.
    tail: u64,
    /// Free bytes of open clusters of compressed data; none is empty.
    packs: Vec<Range<u64>>,
    l1: Vec<u64>,
    /// Entries of the L2 table that is being filled; empty: none yet.
    l2: Vec<u64>,
    /// Which entry of L1 it belongs to.
    l2_index: u64,
    refcounts: Refcounts,
}

/// All that a layout knows between two extents, to go on by another process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in `Layout`")]
pub struct State {
    pub next_guest: u64,
    pub tail: u64,
    pub packs: Vec<Range<u64>>,
    pub l1: Vec<u64>,
    pub l2: Vec<u64>,
    pub l2_index: u64,
    /// Offsets of emitted refcount blocks.
    pub table: Vec<u64>,
    /// Refcount blocks that are open.
    pub open: Vec<Vec<u16>>,
}

/// Refcounts of host clusters: blocks that are not emitted yet, and where the
/// others are.
#[derive(Debug, Default)]
struct Refcounts {
    /// Offsets of emitted blocks.
    table: Vec<u64>,
    /// Blocks still open; the first covers what follows the emitted ones.
    open: VecDeque<Vec<u16>>,
}

/// How one guest cluster is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// A whole cluster as it is.
    Raw,
    /// So many bytes, at least one and less than a cluster.
    Compressed(usize),
}

/// What is known at the end.
#[derive(Debug)]
pub struct Finished {
    /// The object's size: a whole number of clusters.
    pub object_size: u64,
    /// The header, to be written at offset 0.
    pub header: Header,
}

impl Layout {
    /// The layout of an image of a volume of `virtual_size` bytes. Cluster 0
    /// is the header's.
    #[must_use]
    pub fn new(virtual_size: u64, compression: Compression) -> Self {
        let guest_clusters = virtual_size.div_ceil(CLUSTER_SIZE);
        let mut refcounts = Refcounts::default();
        refcounts.add(0);
        Self {
            header: header::written(virtual_size, compression),
            guest_clusters,
            next_guest: 0,
            tail: CLUSTER_SIZE,
            packs: Vec::new(),
            l1: Vec::new(),
            l2: Vec::new(),
            l2_index: 0,
            refcounts,
        }
    }

    /// All that it knows, for [`Self::resume`].
    #[must_use]
    pub fn state(&self) -> State {
        State {
            next_guest: self.next_guest,
            tail: self.tail,
            packs: self.packs.clone(),
            l1: self.l1.clone(),
            l2: self.l2.clone(),
            l2_index: self.l2_index,
            table: self.refcounts.table.clone(),
            open: self.refcounts.open.iter().cloned().collect(),
        }
    }

    /// The layout as it was when it gave its `state`.
    #[must_use]
    pub fn resume(virtual_size: u64, compression: Compression, state: State) -> Self {
        let State { next_guest, tail, packs, l1, l2, l2_index, table, open } = state;
        let refcounts = Refcounts { table, open: open.into() };
        let new = Self::new(virtual_size, compression);
        Self { next_guest, tail, packs, l1, l2, l2_index, refcounts, ..new }
    }

    /// Finds the place of guest cluster `guest` and returns its host offset.
    /// Clusters come in ascending order; those left out read as zeroes.
    /// Tables that have become complete are emitted.
    pub fn place(&mut self, guest: u64, placed: Placed, out: &mut impl Emit) -> u64 {
        debug_assert!(guest >= self.next_guest && guest < self.guest_clusters);
        self.next_guest = guest + 1;
        if guest / L2_ENTRIES != self.l2_index {
            self.flush_l2(out);
            self.l2_index = guest / L2_ENTRIES;
        }

        let (entry, offset) = match placed {
            Placed::Raw => {
                let offset = self.allocate();
                (offset | COPIED, offset)
            }
            Placed::Compressed(len) => {
                let offset = self.pack(len as u64, out);
                (compressed_entry(offset, len as u64), offset)
            }
        };
        if self.l2.is_empty() {
            self.l2.resize(L2_ENTRIES as usize, 0);
        }
        self.l2[(guest % L2_ENTRIES) as usize] = entry;
        self.flush_refcounts(out);
        offset
    }

    /// End of the allocated clusters.
    #[must_use]
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Nothing below this offset will be emitted or placed any more, the
    /// header excepted.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.packs.iter().map(|pack| pack.start).fold(self.tail, u64::min)
    }

    /// Gives up the free bytes of packs that lie below `offset` and apart
    /// from the tail, so that everything below can leave.
    pub fn settle(&mut self, offset: u64, out: &mut impl Emit) {
        let tail = self.tail;
        for pack in self.packs.extract_if(.., |pack| pack.start < offset && pack.end < tail) {
            fill(&pack, out);
        }
    }

    /// Emits what is left but the header, and tells the rest.
    pub fn finish(mut self, out: &mut impl Emit) -> Finished {
        self.flush_l2(out);
        for pack in std::mem::take(&mut self.packs) {
            fill(&pack, out);
        }
        self.l1.resize(self.guest_clusters.div_ceil(L2_ENTRIES) as usize, 0);
        self.header.l1_entries = self.l1.len() as u32;
        self.header.l1_offset = self.tail;
        let l1 = std::mem::take(&mut self.l1);
        self.emit_clusters(&l1, out);

        // The last blocks count themselves and the table, so their number is
        // found by trying: one more block may need one more.
        let used = self.tail / CLUSTER_SIZE;
        let emitted = self.refcounts.table.len() as u64;
        let mut blocks = self.refcounts.open.len() as u64;
        let (blocks, table_clusters) = loop {
            let table_clusters = (emitted + blocks).div_ceil(CLUSTER_SIZE / 8).max(1);
            let needed = (used + blocks + table_clusters).div_ceil(REFCOUNTS_PER_BLOCK) - emitted;
            if needed <= blocks {
                break (blocks, table_clusters);
            }
            blocks = needed;
        };
        let first_block = self.tail;
        for cluster in 0..blocks + table_clusters {
            self.refcounts.add(used + cluster);
        }
        self.tail += (blocks + table_clusters) * CLUSTER_SIZE;
        for block in 0..blocks {
            let offset = first_block + block * CLUSTER_SIZE;
            self.refcounts.emit_first(offset, out);
        }
        self.header.refcount_table_offset = first_block + blocks * CLUSTER_SIZE;
        self.header.refcount_table_clusters = table_clusters as u32;
        emit_be(self.header.refcount_table_offset, &self.refcounts.table, out);
        Finished { object_size: self.tail, header: self.header }
    }

    /// One new host cluster at the tail.
    fn allocate(&mut self) -> u64 {
        let offset = self.tail;
        self.tail += CLUSTER_SIZE;
        self.refcounts.add(offset / CLUSTER_SIZE);
        offset
    }

    /// Room for `len` bytes of compressed data: in the pack that they fit
    /// best, else from the pack at the tail on into new clusters.
    fn pack(&mut self, len: u64, out: &mut impl Emit) -> u64 {
        let free = |pack: &Range<u64>| pack.end - pack.start;
        let packs = || self.packs.iter().enumerate();
        let fits = packs().filter(|(_, pack)| free(pack) >= len).min_by_key(|(_, pack)| free(pack));
        let found = fits.or_else(|| packs().find(|(_, pack)| pack.end == self.tail));
        let mut pack = match found.map(|(index, _)| index) {
            Some(index) => self.packs.swap_remove(index),
            None => self.tail..self.tail,
        };

        let offset = pack.start;
        pack.start += len;
        // A cluster is counted once for each compressed cluster in it.
        if !offset.is_multiple_of(CLUSTER_SIZE) {
            self.refcounts.add(offset / CLUSTER_SIZE);
        }
        while pack.end < pack.start {
            pack.end = self.allocate() + CLUSTER_SIZE;
        }
        if !pack.is_empty() {
            self.packs.push(pack);
        }
        if self.packs.len() > MAX_PACKS
            && let Some((index, _)) = self.packs.iter().enumerate().min_by_key(|(_, p)| free(p))
        {
            fill(&self.packs.swap_remove(index), out);
        }
        offset
    }

    fn flush_l2(&mut self, out: &mut impl Emit) {
        if self.l2.is_empty() {
            return;
        }
        let offset = self.allocate();
        emit_be(offset, &self.l2, out);
        self.l2.clear();
        self.l1.resize(self.l2_index as usize, 0);
        self.l1.push(offset | COPIED);
        self.flush_refcounts(out);
    }

    /// Emits the refcount blocks whose clusters are settled.
    fn flush_refcounts(&mut self, out: &mut impl Emit) {
        loop {
            let first = self.refcounts.table.len() as u64;
            let end = (first + 1) * REFCOUNTS_PER_BLOCK * CLUSTER_SIZE;
            if self.tail >= end {
                self.settle(end, out);
            }
            if self.settled() < end {
                return;
            }
            let offset = self.allocate();
            self.refcounts.emit_first(offset, out);
        }
    }

    fn emit_clusters(&mut self, entries: &[u64], out: &mut impl Emit) {
        for chunk in entries.chunks(L2_ENTRIES as usize) {
            let offset = self.allocate();
            emit_be(offset, chunk, out);
        }
    }
}

impl Refcounts {
    fn add(&mut self, cluster: u64) {
        let block = (cluster / REFCOUNTS_PER_BLOCK) as usize - self.table.len();
        while self.open.len() <= block {
            self.open.push_back(vec![0; REFCOUNTS_PER_BLOCK as usize]);
        }
        // At most 2^16 bytes hold at most 2^16 - 1 compressed clusters beside
        // the one that began before: no overflow in practice, and QEMU's
        // limit would be the same.
        let count = &mut self.open[block][(cluster % REFCOUNTS_PER_BLOCK) as usize];
        *count = count.saturating_add(1);
    }

    fn emit_first(&mut self, offset: u64, out: &mut impl Emit) {
        let counts = self.open.pop_front().unwrap_or_default();
        let mut bytes: Vec<u8> = counts.iter().flat_map(|count| count.to_be_bytes()).collect();
        bytes.resize(CLUSTER_SIZE as usize, 0);
        out.emit(offset, &bytes);
        self.table.push(offset);
    }
}

/// Fills the rest of a pack with zeroes.
fn fill(pack: &Range<u64>, out: &mut impl Emit) {
    static ZEROES: [u8; CLUSTER_SIZE as usize] = [0; CLUSTER_SIZE as usize];
    out.emit(pack.start, &ZEROES[..(pack.end - pack.start) as usize]);
}

/// Entries as big-endian bytes, filled with zeroes to whole clusters.
fn emit_be(offset: u64, entries: &[u64], out: &mut impl Emit) {
    let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    bytes.resize(bytes.len().next_multiple_of(CLUSTER_SIZE as usize), 0);
    out.emit(offset, &bytes);
}

/// The L2 entry of a compressed cluster: the offset, and the sectors that it
/// touches beyond the first, above bit 62 - (`CLUSTER_BITS` - 8).
fn compressed_entry(offset: u64, len: u64) -> u64 {
    let sectors = (offset + len - 1) / SECTOR - offset / SECTOR;
    COMPRESSED | sectors << (62 - (CLUSTER_BITS - 8)) | offset
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_sector_count_covers_the_bytes() {
        let sectors = |entry: u64| (entry & !COMPRESSED) >> 54;
        assert_eq!(sectors(compressed_entry(0x10000, 1)), 0);
        assert_eq!(sectors(compressed_entry(0x10000, 512)), 0);
        assert_eq!(sectors(compressed_entry(0x10000, 513)), 1);
        assert_eq!(sectors(compressed_entry(0x101ff, 2)), 1);
        assert_eq!(sectors(compressed_entry(0x101ff, 65_024)), 127);
    }

    /// Remembers where bytes went; keeps those of tables.
    #[derive(Default)]
    struct Disk {
        extents: BTreeMap<u64, u64>,
        tables: BTreeMap<u64, Vec<u8>>,
    }

    impl Disk {
        fn write(&mut self, offset: u64, len: u64) {
            if len > 0 {
                assert!(self.extents.insert(offset, len).is_none(), "{offset} comes twice");
            }
        }
    }

    impl Emit for Disk {
        fn emit(&mut self, offset: u64, bytes: &[u8]) {
            self.write(offset, bytes.len() as u64);
            if bytes.iter().any(|byte| *byte != 0) {
                self.tables.insert(offset, bytes.to_vec());
            }
        }
    }

    /// Runs of clusters, long enough to cross tables and refcount blocks.
    #[derive(Debug, Clone, Copy)]
    enum Run {
        Skip(u64),
        Raw(u64),
        Compressed(u64, usize),
        Mixed(u64, usize),
    }

    fn run() -> impl Strategy<Value = Run> {
        let len = || prop_oneof![1_u64..40, 6_000_u64..30_000];
        let size = || 1_usize..65_000;
        prop_oneof![
            len().prop_map(Run::Skip),
            len().prop_map(Run::Raw),
            (len(), size()).prop_map(|(len, size)| Run::Compressed(len, size)),
            (len(), size()).prop_map(|(len, size)| Run::Mixed(len, size)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        /// The whole file is written exactly once, nothing is written below
        /// what was settled, and the refcounts are what the tables say.
        #[test]
        fn every_byte_once_and_every_cluster_counted(
            runs in prop::collection::vec(run(), 1..12),
            part in prop_oneof![Just(0_u64), Just(8 << 20)],
        ) {
            let clusters: u64 = runs.iter().map(|run| match *run {
                Run::Skip(len) | Run::Raw(len) => len,
                Run::Compressed(len, _) | Run::Mixed(len, _) => len,
            }).sum();
            let mut layout = Layout::new(clusters * CLUSTER_SIZE - 512, Compression::Zstd);
            let mut disk = Disk::default();
            disk.write(0, CLUSTER_SIZE);
            let (mut guest, mut settled, mut next_part) = (0, 0, part);
            for run in runs {
                let (len, pattern) = match run {
                    Run::Skip(len) => { guest += len; continue }
                    Run::Raw(len) => (len, [Placed::Raw; 3]),
                    Run::Compressed(len, size) => (len, [Placed::Compressed(size); 3]),
                    Run::Mixed(len, size) => (len, [
                        Placed::Compressed(size), Placed::Raw, Placed::Compressed(65_000 - size),
                    ]),
                };
                for index in 0..len {
                    let placed = pattern[index as usize % 3];
                    let offset = layout.place(guest, placed, &mut disk);
                    prop_assert!(offset >= settled);
                    disk.write(offset, match placed {
                        Placed::Raw => CLUSTER_SIZE,
                        Placed::Compressed(size) => size as u64,
                    });
                    if part > 0 && layout.tail() >= next_part {
                        layout.settle(next_part, &mut disk);
                        while layout.settled() >= next_part { next_part += part }
                    }
                    settled = layout.settled();
                    guest += 1;
                }
            }
            let finished = layout.finish(&mut disk);

            let mut end = 0;
            for (offset, len) in &disk.extents {
                prop_assert_eq!(*offset, end);
                end = offset + len;
            }
            prop_assert_eq!(end, finished.object_size);
            prop_assert!(end <= largest_object(clusters * CLUSTER_SIZE));
            check_refcounts(&disk, &finished, clusters);
        }
    }

    fn entries(table: Option<&Vec<u8>>) -> Vec<u64> {
        let bytes = table.map_or(&[][..], Vec::as_slice);
        bytes.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect()
    }

    fn check_refcounts(disk: &Disk, finished: &Finished, clusters: u64) {
        let total = (finished.object_size / CLUSTER_SIZE) as usize;
        let mut expected = vec![0_u16; total];
        let mut count = |offset: u64| expected[(offset / CLUSTER_SIZE) as usize] += 1;
        let header = &finished.header;
        count(0);
        count(header.l1_offset);
        let l1 = entries(disk.tables.get(&header.l1_offset));
        for (index, l1_entry) in l1.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            let offset = l1_entry & !COPIED;
            count(offset);
            for (guest, entry) in entries(disk.tables.get(&offset)).into_iter().enumerate() {
                let guest = index as u64 * L2_ENTRIES + guest as u64;
                assert!(entry == 0 || guest < clusters);
                if entry & COMPRESSED != 0 {
                    let start = entry & ((1 << 54) - 1);
                    // The last sector may end in a cluster that is not used.
                    let len = disk.extents[&start];
                    for cluster in start / CLUSTER_SIZE..=(start + len - 1) / CLUSTER_SIZE {
                        count(cluster * CLUSTER_SIZE);
                    }
                } else if entry != 0 {
                    count(entry & !COPIED);
                }
            }
        }
        let mut found = Vec::new();
        let table_size = u64::from(header.refcount_table_clusters) * CLUSTER_SIZE;
        for cluster in 0..u64::from(header.refcount_table_clusters) {
            count(header.refcount_table_offset + cluster * CLUSTER_SIZE);
        }
        assert_eq!(disk.extents[&header.refcount_table_offset], table_size);
        for block in entries(disk.tables.get(&header.refcount_table_offset)) {
            if block != 0 {
                count(block);
                let bytes = disk.tables[&block].as_chunks().0;
                found.extend(bytes.iter().map(|count| u16::from_be_bytes(*count)));
            }
        }
        assert!(found[total..].iter().all(|count| *count == 0));
        assert_eq!(found[..total], expected);
    }
}
