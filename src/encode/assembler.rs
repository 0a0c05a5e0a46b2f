//! Puts encoded extents in order and lays them out.

use std::collections::BTreeMap;

use tokio_util::sync::CancellationToken;

use super::{
    checkpoint::{Checkpoint, Resumed},
    extent::{CLUSTERS, Encoded, EncodedExtent},
    plan::PartPlan,
    window::{Cut, FullPart, SpareMemory, Window},
};
use crate::{
    format::qcow2::{
        self, CLUSTER_SIZE, cluster, content,
        layout::{self, Emit, Layout, Placed},
    },
    model::{
        ByteSize,
        image::{Compression, EXTENT_SIZE},
    },
};

/// The image so far.
#[derive(Debug)]
pub(super) struct Assembler<'a> {
    virtual_size: u64,
    layout: Layout,
    window: Window<'a>,
    /// First extent that is not appended yet.
    next: u64,
    /// What came too early, by first extent. Bounded by the reader's buffers.
    early: BTreeMap<u64, Encoded>,
    digests: Vec<u8>,
    /// How many bytes of them the last checkpoint had.
    told: usize,
    /// Memory for compressed extents, to be used again.
    scratch: Vec<Vec<u8>>,
}

/// What one step did.
#[derive(Debug)]
pub(super) enum Step {
    /// The next extent has not come yet.
    Waiting,
    /// One was appended.
    Appended,
    /// A part is full; the extent that filled it may wait for the next step.
    Full(Cut, Box<Checkpoint>),
}

/// How everything stands at the end of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// First extent that is not appended yet.
    pub(super) next: u64,
    /// Number of the part that is open now.
    pub(super) number: u32,
    /// Of its first byte in the object.
    pub(super) start: u64,
    /// Its first bytes.
    pub(super) carry: Vec<u8>,
    pub(super) layout: layout::State,
}

/// What is left at the end.
#[derive(Debug)]
pub(super) struct Finished {
    pub parts: Vec<FullPart>,
    pub object_size: u64,
    pub virtual_size: u64,
    pub extent_digests: Vec<u8>,
}

impl<'a> Assembler<'a> {
    pub(super) fn new(
        volume: ByteSize,
        compression: Compression,
        spare: &SpareMemory,
        stop: &'a CancellationToken,
    ) -> Self {
        let virtual_size = qcow2::virtual_size(volume.get());
        Self {
            virtual_size,
            layout: Layout::new(virtual_size, compression),
            window: Window::new(PartPlan::for_volume(volume), spare, stop),
            next: 0,
            told: 0,
            early: BTreeMap::new(),
            // At once, because growing would take twice as much for a moment.
            digests: Vec::with_capacity(
                content::extent_count(virtual_size) as usize * content::DIGEST_SIZE,
            ),
            scratch: Vec::new(),
        }
    }

    /// Goes on where another one was interrupted.
    pub(super) fn resume(
        volume: ByteSize,
        compression: Compression,
        spare: &SpareMemory,
        stop: &'a CancellationToken,
        from: Resumed,
    ) -> Self {
        let mut assembler = Self::new(volume, compression, spare, stop);
        let Standing { next, number, start, carry, layout } = from.standing;
        assembler.layout = Layout::resume(assembler.virtual_size, compression, layout);
        assembler.window.resume(number, start, carry, &from.first);
        assembler.digests.extend(from.digests);
        assembler.told = assembler.digests.len();
        assembler.next = next;
        assembler
    }

    /// How everything stands after a part was cut.
    fn checkpoint(&mut self) -> Checkpoint {
        let (number, start, carry) = self.window.standing();
        let (next, layout) = (self.next, self.layout.state());
        let digests = self.digests[self.told..].to_vec();
        self.told = self.digests.len();
        Checkpoint { standing: Standing { next, number, start, carry, layout }, digests }
    }

    /// Memory for the compressed clusters of an extent: its size, whatever
    /// it holds. Fresh zeroes take no memory until they are written to.
    pub(super) fn scratch(&mut self) -> Vec<u8> {
        self.scratch.pop().unwrap_or_else(|| vec![0; EXTENT_SIZE as usize])
    }

    /// See [`Window::copy_of_first`].
    pub(super) fn copy_of_first(&self) -> Option<FullPart> {
        self.window.copy_of_first()
    }

    /// Takes what became of the extents from `first` on.
    pub(super) fn insert(&mut self, first: u64, encoded: Encoded) {
        self.early.insert(first, encoded);
    }

    /// Goes on by one extent or one part.
    pub(super) fn step(&mut self) -> Step {
        if self.window.is_due(self.layout.tail()) {
            self.layout.settle(self.layout.tail(), &mut self.window);
            if let Some(cut) = self.window.cut(self.layout.settled()) {
                return Step::Full(cut, Box::new(self.checkpoint()));
            }
        }
        match self.early.remove(&self.next) {
            None => Step::Waiting,
            Some(Encoded::Zeroes { count }) => {
                self.append_zeroes(count);
                Step::Appended
            }
            Some(Encoded::Data(extent)) => {
                self.append(*extent);
                Step::Appended
            }
        }
    }

    fn append_zeroes(&mut self, count: u64) {
        for index in self.next..self.next + count {
            let len = content::extent_len(self.virtual_size, index);
            self.digests.extend(content::zeroes_digest(len));
        }
        self.next += count;
    }

    fn append(&mut self, extent: EncodedExtent) {
        self.digests.extend(extent.digest);
        let raw = extent.source.bytes().chunks_exact(CLUSTER_SIZE as usize);
        let mut packed = extent.packed.as_slice();
        let first = self.next * CLUSTERS as u64;
        for (guest, (cluster, raw)) in (first..).zip(extent.clusters.iter().zip(raw)) {
            match *cluster {
                cluster::Encoded::Zero => {}
                cluster::Encoded::Raw => {
                    let offset = self.layout.place(guest, Placed::Raw, &mut self.window);
                    self.window.emit(offset, raw);
                }
                cluster::Encoded::Compressed(len) => {
                    let (bytes, rest) = packed.split_at(len);
                    packed = rest;
                    let placed = Placed::Compressed(len);
                    let offset = self.layout.place(guest, placed, &mut self.window);
                    self.window.emit(offset, bytes);
                }
            }
        }
        self.next += 1;
        self.scratch.push(extent.packed);
    }

    /// The tables and what is left, in the order in which it is to be
    /// stored; `None` when extents are missing.
    pub(super) fn finish(mut self) -> Option<Finished> {
        if self.next != content::extent_count(self.virtual_size) {
            return None;
        }
        let finished = self.layout.finish(&mut self.window);
        self.window.emit(0, &finished.header.to_bytes());
        Some(Finished {
            parts: self.window.finish(finished.object_size),
            object_size: finished.object_size,
            virtual_size: self.virtual_size,
            extent_digests: self.digests,
        })
    }
}
