//! The parts of the object that are still being filled.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use crate::{format::qcow2::layout::Emit, sys::aligned::AlignedBuf};

/// Bytes of the first part, which waits in memory for the header. Above the
/// 5 MiB that object stores demand of every part but the last.
pub(super) const FIRST_PART: u64 = 16 << 20;
/// Bytes of every other part but the last.
pub(super) const PART: u64 = 8 << 20;
/// Buffers for these that each image has for itself: one being filled, and
/// one that a table or a cluster may spill into, or that is on its way out.
pub(super) const OWN: usize = 2;
/// Buffers that all images share: a lone one has one more being hashed and
/// one more on its way to the store.
const SPARE: usize = 2;

/// The buffers that images which are encoded at once share, so that the
/// memory of all of them is bounded. Clones share them.
#[derive(Debug, Clone)]
pub struct SpareParts(Arc<AtomicUsize>);

impl Default for SpareParts {
    fn default() -> Self {
        Self(Arc::new(AtomicUsize::new(SPARE)))
    }
}

impl SpareParts {
    fn take(&self) -> bool {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .is_ok()
    }
}

/// Open parts in order, beginning at the first byte that is not settled.
#[derive(Debug)]
pub(super) struct Window<'a> {
    /// The first part, kept to the end.
    first: AlignedBuf,
    /// The others that are open.
    open: VecDeque<Buffer>,
    /// Parts but the first that have left.
    gone: u32,
    pool: Pool<'a>,
}

/// A part on its way out.
pub(super) struct FullPart {
    /// From 1.
    pub number: u32,
    /// Of its first byte in the object.
    pub offset: u64,
    buffer: Buffer,
    len: usize,
}

impl FullPart {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer.memory()[..self.len]
    }
}

impl AsRef<[u8]> for FullPart {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl fmt::Debug for FullPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FullPart({})", self.number)
    }
}

impl<'a> Window<'a> {
    pub(super) fn new(spare: &SpareParts, stop: &'a CancellationToken) -> Self {
        Self {
            first: AlignedBuf::zeroed(FIRST_PART as usize),
            open: VecDeque::new(),
            gone: 0,
            pool: Pool::new(spare.clone(), stop),
        }
    }

    /// Offset in the object below which everything must be settled for
    /// [`Self::pop`] to be right.
    pub(super) fn next_end(&self) -> u64 {
        FIRST_PART + (u64::from(self.gone) + 1) * PART
    }

    /// Takes the oldest part but the first.
    pub(super) fn pop(&mut self) -> Option<FullPart> {
        let buffer = self.open.pop_front()?;
        let offset = self.next_end() - PART;
        self.gone += 1;
        Some(FullPart { number: self.gone + 1, offset, buffer, len: PART as usize })
    }

    /// Takes all that is left of an object of `size` bytes, the first part
    /// last.
    pub(super) fn finish(mut self, size: u64) -> Vec<FullPart> {
        let mut parts = Vec::new();
        while let Some(mut part) = self.pop() {
            part.len = part.len.min(size.saturating_sub(part.offset) as usize);
            if part.len > 0 {
                parts.push(part);
            }
        }
        let len = size.min(FIRST_PART) as usize;
        let buffer = Buffer { memory: Some(self.first), home: None };
        parts.push(FullPart { number: 1, offset: 0, buffer, len });
        parts
    }

    /// The open memory at `offset`, to the end of its part.
    fn memory(&mut self, offset: u64) -> &mut [u8] {
        if offset < FIRST_PART {
            return &mut self.first[offset as usize..];
        }
        let behind = offset - FIRST_PART;
        let index = (behind / PART) as usize - self.gone as usize;
        while self.open.len() <= index {
            let buffer = self.pool.take();
            self.open.push_back(buffer);
        }
        &mut self.open[index].memory_mut()[(behind % PART) as usize..PART as usize]
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

/// A buffer that goes back to its pool when it is dropped.
#[derive(Debug)]
struct Buffer {
    /// There until it is dropped.
    memory: Option<AlignedBuf>,
    home: Option<SyncSender<AlignedBuf>>,
}

impl Buffer {
    fn memory(&self) -> &[u8] {
        self.memory.as_deref().unwrap_or_default()
    }

    fn memory_mut(&mut self) -> &mut [u8] {
        self.memory.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(memory), Some(home)) = (self.memory.take(), self.home.take()) {
            // Never full: there are as many places as buffers. Nobody there
            // any more: the memory is freed.
            let _ = home.try_send(memory);
        }
    }
}

#[derive(Debug)]
struct Pool<'a> {
    home: SyncSender<AlignedBuf>,
    returned: Receiver<AlignedBuf>,
    /// Of its own, how many it may still make.
    own: usize,
    /// How many spare ones it has.
    lent: usize,
    spare: SpareParts,
    stop: &'a CancellationToken,
}

impl<'a> Pool<'a> {
    fn new(spare: SpareParts, stop: &'a CancellationToken) -> Self {
        let (home, returned) = sync_channel(OWN + SPARE);
        Self { home, returned, own: OWN, lent: 0, spare, stop }
    }

    /// Whether one more buffer may be made: it then counts.
    fn grow(&mut self) -> bool {
        if self.own > 0 {
            self.own -= 1;
            return true;
        }
        let lent = self.spare.take();
        self.lent += usize::from(lent);
        lent
    }

    /// A buffer with any contents; waits for the store to give one back.
    ///
    /// Who waits holds no full part, so those who do can send theirs.
    fn take(&mut self) -> Buffer {
        let home = Some(self.home.clone());
        loop {
            let memory = match self.returned.try_recv() {
                Ok(memory) => memory,
                Err(_) if self.grow() => AlignedBuf::zeroed(PART as usize),
                Err(_) => match self.returned.recv_timeout(Duration::from_millis(100)) {
                    Ok(memory) => memory,
                    // Everything ends: what is written now is thrown away,
                    // and the buffer freed.
                    Err(RecvTimeoutError::Timeout) if self.stop.is_cancelled() => {
                        return Buffer {
                            memory: Some(AlignedBuf::zeroed(PART as usize)),
                            home: None,
                        };
                    }
                    Err(_) => continue,
                },
            };
            return Buffer { memory: Some(memory), home };
        }
    }
}

impl Drop for Pool<'_> {
    fn drop(&mut self) {
        self.spare.0.fetch_add(self.lent, Ordering::Relaxed);
    }
}
