//! Memory aligned for direct I/O.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
};

/// Alignment of every buffer: a page, the largest logical sector that Linux
/// block devices have.
pub const ALIGNMENT: usize = 4096;

/// Buffers of this size and more are made of huge pages where the kernel has
/// some to give. A direct read or write of 1 MiB is then one request of a few
/// segments; with small pages it is 256 segments, more than most block
/// devices take at once (a loop device: 128), and is cut up. The size of a
/// huge page on x86-64, and on arm64 with 4 KiB pages.
const HUGE: usize = 2 << 20;

/// A zeroed buffer of fixed length whose address is a multiple of
/// [`ALIGNMENT`] and does not change when the value moves.
pub struct AlignedBuf {
    start: NonNull<u8>,
    len: usize,
    memory: Memory,
}

/// Where the bytes come from, and how they go back.
#[derive(Clone, Copy)]
enum Memory {
    Allocated(Layout),
    Mapped { base: NonNull<libc::c_void>, len: usize },
}

// SAFETY: the buffer owns its memory alone, as `Box<[u8]>` does.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads, as with `Box<[u8]>`.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes, `len` rounded up to a multiple of [`ALIGNMENT`], at
    /// least one.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let len = len.max(1).next_multiple_of(ALIGNMENT);
        let Ok(layout) = Layout::from_size_align(len, ALIGNMENT) else {
            // Larger than isize::MAX: no allocator could have served it.
            handle_alloc_error(Layout::new::<u8>())
        };
        let found = if len < HUGE { Self::allocated(layout) } else { Self::mapped(len) };
        found.unwrap_or_else(|| handle_alloc_error(layout))
    }

    fn allocated(layout: Layout) -> Option<Self> {
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, len: layout.size(), memory: Memory::Allocated(layout) })
    }

    /// A mapping of its own, with a huge page's alignment.
    fn mapped(len: usize) -> Option<Self> {
        let mapped = len.checked_add(HUGE)?;
        // SAFETY: a new anonymous mapping touches no other memory.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = NonNull::new(base)?;
        let skipped = base.cast::<u8>().align_offset(HUGE);
        // SAFETY: less than HUGE bytes are skipped, and the mapping has HUGE
        // bytes more than `len`.
        let start = unsafe { base.cast::<u8>().add(skipped) };
        // SAFETY: the range lies in the mapping; the advice changes no byte.
        // Where it is refused, small pages do.
        unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        Some(Self { start, len, memory: Memory::Mapped { base, len: mapped } })
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points to `len` initialised bytes that this value
        // owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        match self.memory {
            // SAFETY: allocated with this layout by `allocated`, freed once.
            Memory::Allocated(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            Memory::Mapped { base, len } => {
                // SAFETY: mapped with this length by `mapped`, unmapped once.
                unsafe { libc::munmap(base.as_ptr(), len) };
            }
        }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_buffers_are_zeroed_aligned_and_whole() {
        for len in [0, 1, ALIGNMENT + 1, HUGE - 1, HUGE, 3 * HUGE + 1] {
            let mut buffer = AlignedBuf::zeroed(len);
            assert_eq!(buffer.len(), len.max(1).next_multiple_of(ALIGNMENT));
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            if len >= HUGE {
                assert_eq!(buffer.as_ptr() as usize % HUGE, 0);
            }
            assert!(buffer.iter().all(|&byte| byte == 0));
            buffer.fill(7);
            assert!(buffer.iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn large_buffers_are_given_back() {
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/statm").unwrap();
            maps.split(' ').next().unwrap().parse::<usize>().unwrap()
        };
        drop(AlignedBuf::zeroed(64 << 20));
        let before = mapped();
        (0..64).for_each(|_| drop(AlignedBuf::zeroed(1 << 30)));
        // 64 GiB in pages of 4 KiB would be 16 million; other tests run too.
        assert!(mapped() < before + (4 << 20));
    }
}
