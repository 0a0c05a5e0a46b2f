//! Reads a volume past the guest that writes to it: which of the bytes that
//! were read straight from the device are not those of the point in time,
//! and where the right ones are.
//!
//! ```text
//! point in time: every writer goes through QEMU's copy-before-write filter
//!   │
//!   ├─ map of the device      (holes are skipped, not read)
//!   ├─ direct read of a range, complete
//!   ├─ what of the range is allocated in the scratch node?   (asked after)
//!   ├─ allocated: dropped, and read again from the snapshot
//!   ┆  … all ranges …
//!   └─ vouch: a read of the snapshot succeeds, after everything else
//! ```
//!
//! # Why it is right
//!
//! Let a write of the guest be any change of the device: a write, a discard,
//! write-zeroes. QEMU's filter (`block/copy-before-write.c`,
//! `cbw_do_copy_before_write` under all three) copies each cluster that a
//! write touches to the scratch node *before* it lets the write through,
//! unless it was copied before. It lets a write through without a copy only
//! after it has set `snapshot_error`, which nothing ever clears.
//!
//! 1. Say a byte that a direct read returned is not that of the point in
//!    time. Then a write to it was let through after the point in time and
//!    before the read was complete.
//! 2. The vouching read succeeded, later. So `snapshot_error` was not set when
//!    the write was let through, so its clusters had been copied by then.
//! 3. The scratch was asked after the read was complete, so after the copy. A
//!    copied cluster is allocated in the scratch and stays so. So the byte lay
//!    in an allocated range, was dropped, and came from the snapshot.
//!
//! The same holds for a hole in the device's map, with "the map was made" for
//! "the read was complete": what was not written since the point in time was
//! a hole then. Clusters being copied while the scratch is asked have not been
//! overwritten yet; taking them for overwritten costs a second read. Reads
//! torn by a write are of a range that the write touched. Which granularity
//! the scratch has does not matter: the filter copies whole clusters of its
//! own (64 KiB or the scratch's, the larger; the volume's last may be
//! short), so what a write touched is allocated whole.
//!
//! # Holes in the argument, and what closes them
//!
//! - **Order.** Asking the scratch before the read is complete misses the
//!   writes in between; a map or a byte from before the point in time misses
//!   those up to it. [`Reconciler`] takes only what was read already. The map,
//!   and a device's odd last bytes, must be got after the point in time.
//! - **The point in time is not the filter's creation** but the moment from
//!   which every writer goes through it (`qom-set drive`). Nothing may be read
//!   or mapped before.
//! - **A broken snapshot answers reads that were under way.** When a copy
//!   fails, QEMU waits for snapshot reads of that write's range; later writes
//!   skip the filter at once, also those to ranges that are being read, and
//!   the read does not look at the error again. It can return new bytes and
//!   success. So the snapshot's bytes need the vouching as much as the
//!   device's, and nothing is right before [`Reconciler::finish`].
//! - **Another server at the same socket** (QEMU died and came back) knows
//!   nothing of this point in time. Connections are never made again.
//! - **Writers beside the filter.** The filter refuses other writers of the
//!   node below (`cbw_child_perm` unshares `WRITE`) once it has a parent, and
//!   so it cannot be taken out while the snapshot's node is attached: a test
//!   sees QEMU refuse it. Writers outside this QEMU are found by the volume's
//!   holder checks. What reaches the device without QEMU's block layer cannot
//!   be imaged live: `scsi-block`, `scsi-generic`, vhost-user, vfio, vdpa.
//! - **A scratch that forgets zeroes.** QEMU saves a cluster of zeroes as
//!   write-zeroes. A qcow2 of version 2 without a backing file leaves it
//!   unallocated (`zero_in_l2_slice` in `block/qcow2-cluster.c`). The scratch
//!   must be a qcow2 of version 3 (`compat=1.1`), without a backing file, not
//!   preallocated (only slow), at least as large as the volume, and nobody may
//!   discard through the snapshot's export: it is read-only.
//! - **A map that is allowed to be vague.** NBD lets a server answer flags of
//!   0 for any extent instead of an error; as a depth that means "never
//!   written". QEMU's server answers errors as errors, so only the scratch's
//!   own export in the same QEMU is asked, never its file by another process,
//!   which would miss what QEMU has in its caches.
//! - **Caches.** A direct read makes Linux write back the dirty pages of the
//!   range first, and waits; then it is as new as what a guest behind the page
//!   cache wrote. That holds for the same inode only: the reader opens the
//!   very file or device node that QEMU has open, not a path of a multipath
//!   device, not the file under a loop device. Buffered reads could find old
//!   pages; where direct I/O is impossible they share QEMU's page cache, which
//!   is right for files.
//! - **The device is not the guest's disk.** LUKS, an offset, a size, throttle
//!   filters, qcow2: between the guest's node and the file there may be only
//!   `raw` without offset and size. Everything else is read from the export.
//! - **Resizing.** Growth adds what was not there at the point in time. A
//!   shrink loses bytes without the filter (it has no truncate); the size is
//!   compared before and after, and imaged never sends `block_resize`.
//! - **Discards** may be of gigabytes and are copied first: they fill the
//!   scratch or run into `cbw-timeout`, which breaks the snapshot and fails
//!   the image. (QEMU kept `cbw-timeout` in 32 bits of nanoseconds: 30 s meant
//!   4.2 s. At most 4 s mean what they say.)
//! - **I/O threads** change who runs the filter, not the order of copy, error
//!   flag and write, which are one coroutine's.
//! - **Migration** hands the device to another host. It must end the capture.

use std::ops::Range;

use crate::{error::Result, model::ByteSize};

/// What copy-before-write saved.
pub trait Saved {
    /// What of `range` is allocated in the scratch node, now: ascending and
    /// disjoint; what lies outside of `range` is ignored.
    ///
    /// # Errors
    ///
    /// `READ_FAILED`: nothing is known then.
    fn saved(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>>;
}

/// The volume as it was at the point in time.
pub trait Snapshot {
    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    ///
    /// `SNAPSHOT_BROKEN`, `READ_FAILED`.
    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()>;

    /// Succeeds only if the snapshot is whole now, and so was ever before.
    ///
    /// # Errors
    ///
    /// `SNAPSHOT_BROKEN`, `READ_FAILED`.
    fn vouch(&mut self) -> Result<()>;
}

/// The parts of `read` that the guest has overwritten, merged where they
/// touch: `saved` is what the scratch said, after `read` was read.
#[must_use]
pub fn overwritten(read: &Range<u64>, saved: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    for range in saved {
        let part = range.start.max(read.start)..range.end.min(read.end);
        match found.last_mut() {
            _ if part.is_empty() => {}
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => found.push(part),
        }
    }
    found
}

/// Turns what was read of a device into what it held at the point in time.
#[derive(Debug)]
pub struct Reconciler<A, S> {
    scratch: A,
    snapshot: S,
    read_again: u64,
}

impl<A: Saved, S: Snapshot> Reconciler<A, S> {
    /// From the scratch and the snapshot of the same filter.
    pub fn new(scratch: A, snapshot: S) -> Self {
        Self { scratch, snapshot, read_again: 0 }
    }

    /// Puts right what a direct read at `offset` returned in `bytes`. The
    /// read must be complete, and must have begun after the point in time.
    ///
    /// # Errors
    ///
    /// `SNAPSHOT_BROKEN`, `READ_FAILED`; `bytes` are of no use then.
    pub fn correct(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let parts = self.overwritten(offset..offset.saturating_add(bytes.len() as u64))?;
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return Ok(()) };
        // One read from the first to the last: what lies between is right in
        // the snapshot too, and a round trip costs more than its bytes.
        self.read(first.start, &mut bytes[within(first.start - offset)..within(last.end - offset)])
    }

    /// Which parts of `range`, a hole in the device's map that was made after
    /// the point in time, are to be [`read`](Self::read) from the snapshot.
    ///
    /// # Errors
    ///
    /// `READ_FAILED`.
    pub fn overwritten(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let saved = self.scratch.saved(range.clone())?;
        Ok(overwritten(&range, &saved))
    }

    /// Fills `bytes` from the snapshot.
    ///
    /// # Errors
    ///
    /// `SNAPSHOT_BROKEN`, `READ_FAILED`.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.read_again = self.read_again.saturating_add(bytes.len() as u64);
        self.snapshot.read(offset, bytes)
    }

    /// How much came from the snapshot.
    #[must_use]
    pub fn read_again(&self) -> ByteSize {
        ByteSize(self.read_again)
    }

    /// Vouches for everything that was read. To be called after the last of
    /// it; without success none of it is known to be right.
    ///
    /// # Errors
    ///
    /// `SNAPSHOT_BROKEN`, `READ_FAILED`.
    pub fn finish(mut self) -> Result<ByteSize> {
        self.snapshot.vouch()?;
        Ok(self.read_again())
    }
}

/// An offset within a slice, from one that was made of its length.
#[allow(clippy::cast_possible_truncation, reason = "64-bit only, see lib.rs")]
fn within(offset: u64) -> usize {
    offset as usize
}
