//! Equal buffers cut from one piece of aligned memory.
//!
//! The memory lives as long as anything can touch it: every buffer and every
//! ring that registered it hold it. A [`Buffer`] is the only way to its bytes,
//! and there is one for each slot, so whoever owns it, owns them.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::Arc,
};

use super::aligned::{ALIGNMENT, AlignedBuf};

/// The memory that buffers are cut from.
pub struct Slab {
    /// Taken from `memory`, which is not touched again before it is freed.
    start: NonNull<u8>,
    buffer_size: usize,
    count: u16,
    _memory: AlignedBuf,
}

// SAFETY: bytes are reached through `Buffer`s only, each of which owns its
// own; the slab itself only frees them, when no buffer is left.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    /// Cuts `count` zeroed buffers of `buffer_size` bytes each, rounded up to
    /// a multiple of [`ALIGNMENT`].
    #[must_use]
    pub fn cut(count: u16, buffer_size: usize) -> (Arc<Self>, Vec<Buffer>) {
        let buffer_size = buffer_size.max(1).next_multiple_of(ALIGNMENT);
        let mut memory = AlignedBuf::zeroed(buffer_size.saturating_mul(usize::from(count)));
        let start = NonNull::from(&mut *memory).cast();
        let slab = Arc::new(Self { start, buffer_size, count, _memory: memory });
        let buffers = (0..count).map(|slot| Buffer { slab: Arc::clone(&slab), slot }).collect();
        (slab, buffers)
    }

    /// How many buffers there are, lent or not.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Bytes in each.
    #[must_use]
    pub fn buffer_size(&self) -> usize {
        self.buffer_size
    }

    /// Where a slot's bytes begin, for the kernel.
    pub(super) fn address(&self, slot: u16) -> *mut u8 {
        debug_assert!(slot < self.count);
        // SAFETY: `memory` has `count * buffer_size` bytes, and a slot is
        // less than `count`.
        unsafe { self.start.as_ptr().add(usize::from(slot) * self.buffer_size) }
    }
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slab({} x {} bytes)", self.count, self.buffer_size)
    }
}

/// One buffer of a [`Slab`], and the right to its bytes.
pub struct Buffer {
    slab: Arc<Slab>,
    slot: u16,
}

impl Buffer {
    /// Its number in the slab.
    #[must_use]
    pub fn slot(&self) -> u16 {
        self.slot
    }

    /// Whether it was cut from `slab`.
    #[must_use]
    pub fn is_from(&self, slab: &Arc<Slab>) -> bool {
        Arc::ptr_eq(&self.slab, slab)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the slot's bytes are initialised and live while the slab
        // does; no other value gives access to them.
        unsafe { std::slice::from_raw_parts(self.slab.address(self.slot), self.slab.buffer_size) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only access.
        unsafe {
            std::slice::from_raw_parts_mut(self.slab.address(self.slot), self.slab.buffer_size)
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({})", self.slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_do_not_overlap() {
        let (slab, mut buffers) = Slab::cut(3, 5000);
        assert_eq!((slab.count(), slab.buffer_size()), (3, 8192));
        for (byte, buffer) in (1..).zip(&mut buffers) {
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            buffer.fill(byte);
        }
        for (byte, buffer) in (1..).zip(&buffers) {
            assert_eq!(buffer.len(), 8192);
            assert!(buffer.iter().all(|&found| found == byte));
        }
    }

    #[test]
    fn memory_lives_until_the_last_buffer_goes() {
        let (slab, mut buffers) = Slab::cut(2, 4096);
        let memory = Arc::downgrade(&slab);
        drop(slab);
        let last = buffers.pop().unwrap();
        drop(buffers);
        assert_eq!(last[4095], 0);
        assert!(memory.upgrade().is_some());
        drop(last);
        assert!(memory.upgrade().is_none());
    }

    #[test]
    fn a_buffer_knows_its_slab() {
        let ((one, buffers), (other, _)) = (Slab::cut(1, 1), Slab::cut(1, 1));
        assert!(buffers[0].is_from(&one));
        assert!(!buffers[0].is_from(&other));
    }
}
