//! The part of the object that is being filled, and the memory of all parts.
//!
//! A part ends where nothing below changes any more, at the first such place
//! behind the size that the plan gives it, so that nothing but a few bytes
//! (`carry`) goes over into the next one. Its memory is a run of segments:
//! parts differ in size, their segments do not.
//!
//! ```text
//!          start                            end          settled
//!   ─ part n ─┼── segment ──┼── segment ──┼──┼─ carry (< 4 KiB) ─┤
//! ```

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::plan::PartPlan;
use crate::{
    format::qcow2::layout::Emit,
    port::Body,
    sys::aligned::{ALIGNMENT, AlignedBuf},
};

/// Bytes of a segment: a huge page, which a direct write sends as one piece.
const SEGMENT: usize = 2 << 20;

/// Segments of a part of `size` bytes at least: it ends behind the extent
/// that filled it, with the tables that the extent completed.
const fn segments(size: u64) -> usize {
    (size as usize).div_ceil(SEGMENT) + 1
}

/// The segment of a part that holds its byte `offset`, and where.
const fn place(offset: u64) -> (usize, usize) {
    ((offset / SEGMENT as u64) as usize, offset as usize % SEGMENT)
}

/// The memory that images which are encoded at once share, beside what each
/// has for the part that it fills: so that a lone one has two parts on their
/// way to the store, and all together are bounded. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct SpareMemory(
    /// Segments that are lent.
    Arc<AtomicUsize>,
);

impl SpareMemory {
    /// Takes a segment, unless `most` are lent.
    fn take(&self, most: usize) -> bool {
        let more = |lent: usize| (lent < most).then_some(lent + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

/// The open part, and the first one, which waits for the header.
#[derive(Debug)]
pub(super) struct Window<'a> {
    plan: PartPlan,
    first: Option<FullPart>,
    /// Of the open part, from 1.
    number: u32,
    /// Offset of its first byte in the object.
    start: u64,
    /// Its memory so far.
    segments: Vec<Segment>,
    /// Its first bytes, while it has no memory: who closes a part must not
    /// wait for what only that part can give back.
    carry: Vec<u8>,
    pool: Pool<'a>,
}

/// The end of a part.
#[derive(Debug)]
pub(super) enum Cut {
    /// It can leave.
    Full(FullPart),
    /// It is the first, and waits for the header.
    Kept,
}

/// A part on its way out.
#[derive(Debug)]
pub(super) struct FullPart {
    /// From 1.
    pub number: u32,
    /// Of its first byte in the object.
    pub offset: u64,
    /// Its length.
    pub size: u64,
    segments: Vec<Segment>,
}

impl Body for FullPart {
    fn piece(&self, index: usize) -> Option<&[u8]> {
        let begin = index * SEGMENT;
        let len = (self.size as usize).checked_sub(begin)?.min(SEGMENT);
        self.segments.get(index).filter(|_| len > 0).map(|segment| &segment.memory()[..len])
    }
}

impl<'a> Window<'a> {
    pub(super) fn new(plan: PartPlan, spare: &SpareMemory, stop: &'a CancellationToken) -> Self {
        Self {
            plan,
            first: None,
            number: 1,
            start: 0,
            segments: Vec::new(),
            carry: Vec::new(),
            pool: Pool::new(spare.clone(), stop),
        }
    }

    /// Whether the open part is as large as planned when the object goes on
    /// to `tail`.
    pub(super) fn is_due(&self, tail: u64) -> bool {
        tail.saturating_sub(self.start) >= self.plan.size(self.number)
    }

    /// Ends the open part below `settled`, where nothing changes any more;
    /// `None` when it would be too small.
    pub(super) fn cut(&mut self, settled: u64) -> Option<Cut> {
        let end = settled - settled % ALIGNMENT as u64;
        if !self.is_due(end) {
            return None;
        }
        let (index, from) = place(end - self.start);
        let mut carry = Vec::new();
        if let Some(last) = self.segments.get(index) {
            // Less than a page, which no segment's end divides.
            carry.extend_from_slice(&last.memory()[from..from + (settled - end) as usize]);
        }
        let part = self.close(end - self.start);
        self.carry = carry;
        Some(match part.number {
            1 => {
                self.first = Some(part);
                Cut::Kept
            }
            _ => Cut::Full(part),
        })
    }

    /// A copy of the first part as it is, without the header.
    pub(super) fn copy_of_first(&self) -> Option<FullPart> {
        let first = self.first.as_ref()?;
        let copied = |segment: &Segment| {
            let mut memory = AlignedBuf::zeroed(SEGMENT);
            memory.copy_from_slice(segment.memory());
            Segment { memory: Some(memory), home: None }
        };
        let segments = first.segments.iter().map(copied).collect();
        Some(FullPart { number: 1, offset: 0, size: first.size, segments })
    }

    /// Number and offset of the open part, and its first bytes, after a cut.
    pub(super) fn standing(&self) -> (u32, u64, Vec<u8>) {
        (self.number, self.start, self.carry.clone())
    }

    /// Goes on after a cut, with the first part's bytes.
    pub(super) fn resume(&mut self, number: u32, start: u64, carry: Vec<u8>, first: &[u8]) {
        self.emit(0, first);
        self.first = Some(self.close(first.len() as u64));
        (self.number, self.start, self.carry) = (number, start, carry);
    }

    /// Takes all that is left of an object of `size` bytes, the first part
    /// last.
    pub(super) fn finish(mut self, size: u64) -> Vec<FullPart> {
        if !self.carry.is_empty() {
            self.segment(0);
        }
        let last = self.close(size.saturating_sub(self.start));
        let last = Some(last).filter(|part| part.size > 0);
        last.into_iter().chain(self.first).collect()
    }

    /// Ends the open part after so many bytes.
    fn close(&mut self, size: u64) -> FullPart {
        let (number, offset) = (self.number, self.start);
        self.number += 1;
        self.start += size;
        FullPart { number, offset, size, segments: mem::take(&mut self.segments) }
    }

    /// Segment `index` of the open part.
    fn segment(&mut self, index: usize) -> &mut [u8] {
        while self.segments.len() <= index {
            let mut segment = self.pool.take(segments(self.plan.size(self.number)));
            if self.segments.is_empty() {
                let carry = mem::take(&mut self.carry);
                segment.memory_mut()[..carry.len()].copy_from_slice(&carry);
            }
            self.segments.push(segment);
        }
        self.segments[index].memory_mut()
    }

    /// The memory at `offset`, to the end of its segment.
    fn memory(&mut self, offset: u64) -> &mut [u8] {
        if offset >= self.start {
            let (index, from) = place(offset - self.start);
            return &mut self.segment(index)[from..];
        }
        // Only the header comes so late.
        let (index, from) = place(offset);
        let first = self.first.as_mut().and_then(|first| first.segments.get_mut(index));
        first.map(|segment| &mut segment.memory_mut()[from..]).unwrap_or_default()
    }
}

impl Emit for Window<'_> {
    fn emit(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let memory = self.memory(offset);
            let len = memory.len().min(bytes.len());
            memory[..len].copy_from_slice(&bytes[..len]);
            bytes = &bytes[len..];
            offset += len as u64;
        }
    }
}

/// Memory that goes back to its pool when it is dropped.
#[derive(Debug)]
struct Segment {
    /// There until it is dropped.
    memory: Option<AlignedBuf>,
    home: Option<Sender<AlignedBuf>>,
}

impl Segment {
    fn memory(&self) -> &[u8] {
        self.memory.as_deref().unwrap_or_default()
    }

    fn memory_mut(&mut self) -> &mut [u8] {
        self.memory.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        if let (Some(memory), Some(home)) = (self.memory.take(), self.home.take()) {
            // Nobody there any more: the memory is freed.
            let _ = home.send(memory);
        }
    }
}

#[derive(Debug)]
struct Pool<'a> {
    home: Sender<AlignedBuf>,
    /// As many at most as were made.
    returned: Receiver<AlignedBuf>,
    /// Segments that it has made of its own.
    own: usize,
    /// Spare ones that it has.
    lent: usize,
    spare: SpareMemory,
    stop: &'a CancellationToken,
}

impl<'a> Pool<'a> {
    fn new(spare: SpareMemory, stop: &'a CancellationToken) -> Self {
        let (home, returned) = channel();
        Self { home, returned, own: 0, lent: 0, spare, stop }
    }

    /// Whether one more segment may be made, for an image whose parts have
    /// `each`: it then counts. Of its own it has the first part's, the open
    /// part's, and one more for the tables at the end.
    fn grow(&mut self, each: usize) -> bool {
        if self.own < segments(super::plan::SMALL) + each + 1 {
            self.own += 1;
            return true;
        }
        let lent = self.spare.take(2 * each);
        self.lent += usize::from(lent);
        lent
    }

    /// A segment with any contents, for an image whose parts have `each`;
    /// waits for the store to give one back.
    ///
    /// Who waits holds no full part, so those who do can send theirs.
    fn take(&mut self, each: usize) -> Segment {
        let home = Some(self.home.clone());
        loop {
            let memory = match self.returned.try_recv() {
                Ok(memory) => memory,
                Err(_) if self.grow(each) => AlignedBuf::zeroed(SEGMENT),
                Err(_) => match self.returned.recv_timeout(Duration::from_millis(100)) {
                    Ok(memory) => memory,
                    // Everything ends: what is written now is thrown away,
                    // and the memory freed.
                    Err(RecvTimeoutError::Timeout) if self.stop.is_cancelled() => {
                        return Segment { memory: Some(AlignedBuf::zeroed(SEGMENT)), home: None };
                    }
                    Err(_) => continue,
                },
            };
            return Segment { memory: Some(memory), home };
        }
    }
}

impl Drop for Pool<'_> {
    fn drop(&mut self) {
        self.spare.0.fetch_sub(self.lent, Ordering::Relaxed);
    }
}
