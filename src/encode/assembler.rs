//! Puts encoded extents in order and lays them out.

use std::collections::BTreeMap;

use tokio_util::sync::CancellationToken;

use super::{
    extent::{CLUSTERS, Encoded, EncodedExtent},
    plan::PartPlan,
    window::{FullPart, SpareMemory, Window},
};
use crate::{
    format::qcow2::{
        self, CLUSTER_SIZE, cluster, content,
        layout::{Emit, Layout, Placed},
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
    Full(FullPart),
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
            early: BTreeMap::new(),
            // At once, because growing would take twice as much for a moment.
            digests: Vec::with_capacity(
                content::extent_count(virtual_size) as usize * content::DIGEST_SIZE,
            ),
            scratch: Vec::new(),
        }
    }

    /// Memory for the compressed clusters of an extent: its size, whatever
    /// it holds. Fresh zeroes take no memory until they are written to.
    pub(super) fn scratch(&mut self) -> Vec<u8> {
        self.scratch.pop().unwrap_or_else(|| vec![0; EXTENT_SIZE as usize])
    }

    /// Takes what became of the extents from `first` on.
    pub(super) fn insert(&mut self, first: u64, encoded: Encoded) {
        self.early.insert(first, encoded);
    }

    /// Goes on by one extent or one part.
    pub(super) fn step(&mut self) -> Step {
        if self.window.is_due(self.layout.tail()) {
            self.layout.settle(self.layout.tail(), &mut self.window);
            if let Some(part) = self.window.cut(self.layout.settled()) {
                return Step::Full(part);
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
