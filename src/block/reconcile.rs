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

#[cfg(test)]
mod tests {
    //! The argument, played through: a device, a filter with a scratch, and
    //! guest writes whose every step may fall between any two steps of the
    //! reader. All from a seed.
    #![allow(clippy::cast_possible_truncation, reason = "the sizes here are small")]

    use std::{cell::RefCell, rc::Rc};

    use proptest::prelude::*;

    use super::*;
    use crate::error::{Error, Reason};

    /// Bytes of the volume: the last cluster is short.
    const SIZE: u64 = 30;
    /// Bytes of a cluster of the filter.
    const CLUSTER: u64 = 4;
    /// Bytes of an extent of the reader: no multiple of a cluster.
    const EXTENT: u64 = 10;

    /// What a guest does to a range: new bytes, or zeroes.
    #[derive(Debug, Clone)]
    struct Op {
        range: Range<u64>,
        byte: u8,
        /// Whether its first copy fails.
        fails: bool,
        state: OpState,
    }

    #[derive(Debug, Clone, PartialEq)]
    enum OpState {
        /// Copies the cluster of this byte next.
        Copying(u64),
        /// Waits for snapshot reads of its range, then writes.
        Waiting,
        /// Writes this byte next.
        Writing(u64),
        Over,
    }

    struct World {
        device: Vec<u8>,
        /// What copy-before-write saved.
        scratch: Vec<Option<u8>>,
        broken: bool,
        /// A range that a snapshot read has frozen.
        frozen: Option<Range<u64>>,
        ops: Vec<Op>,
        random: u64,
    }

    impl World {
        fn random(&mut self, below: u64) -> u64 {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            (self.random >> 20) % below
        }

        /// The guest takes a few steps, of any of its requests.
        fn guest(&mut self) {
            for _ in 0..self.random(6) {
                let at = self.random(self.ops.len() as u64);
                let mut op = self.ops[at as usize].clone();
                self.step(&mut op);
                self.ops[at as usize] = op;
            }
        }

        /// As `cbw_do_copy_before_write`, then the write.
        fn step(&mut self, op: &mut Op) {
            op.state = match op.state {
                // Once broken, nothing is copied, and nothing waited for.
                OpState::Copying(_) if self.broken => OpState::Writing(op.range.start),
                OpState::Copying(at) if op.fails => {
                    op.fails = false;
                    self.broken = true;
                    let _ = at;
                    OpState::Waiting
                }
                OpState::Copying(at) => {
                    let start = at - at % CLUSTER;
                    let end = (start + CLUSTER).min(SIZE);
                    for byte in start..end {
                        let byte = byte as usize;
                        self.scratch[byte].get_or_insert(self.device[byte]);
                    }
                    if end < op.range.end { OpState::Copying(end) } else { OpState::Waiting }
                }
                OpState::Waiting => {
                    let frozen = self.frozen.clone().unwrap_or_default();
                    let clusters =
                        op.range.start / CLUSTER * CLUSTER..op.range.end.next_multiple_of(CLUSTER);
                    let meets = frozen.start < clusters.end && clusters.start < frozen.end;
                    if meets { OpState::Waiting } else { OpState::Writing(op.range.start) }
                }
                OpState::Writing(at) => {
                    self.device[at as usize] = op.byte;
                    if at + 1 < op.range.end { OpState::Writing(at + 1) } else { OpState::Over }
                }
                OpState::Over => OpState::Over,
            }
        }
    }

    /// What is done wrong on purpose.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Mistake {
        None,
        /// Nothing is read again.
        NoSecondRead,
        /// The scratch is asked before the direct read.
        AskedBefore,
        /// Holes are believed without asking the scratch.
        HolesBelieved,
        /// The map is of before the point in time.
        OldMap,
        /// Nothing vouches in the end.
        NoVouching,
        /// The scratch forgets clusters of zeroes.
        ForgetfulScratch,
    }

    struct Sides {
        world: Rc<RefCell<World>>,
        mistake: Mistake,
        /// What the scratch said before the read.
        before: Rc<RefCell<Vec<Range<u64>>>>,
    }

    fn saved_now(world: &RefCell<World>, range: Range<u64>, mistake: Mistake) -> Vec<Range<u64>> {
        let mut found = Vec::new();
        for at in range {
            // An answer takes time, extent by extent.
            world.borrow_mut().guest();
            let cluster = at - at % CLUSTER;
            let world = world.borrow();
            let saved = &world.scratch[cluster as usize..(cluster + CLUSTER).min(SIZE) as usize];
            let zeroes = saved.iter().all(|&byte| byte == Some(0));
            let forgotten = mistake == Mistake::ForgetfulScratch && zeroes;
            if world.scratch[at as usize].is_some() && !forgotten {
                found.push(at..at + 1);
            }
        }
        found
    }

    impl Saved for Sides {
        fn saved(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
            Ok(match self.mistake {
                Mistake::NoSecondRead => Vec::new(),
                Mistake::AskedBefore => self.before.borrow().clone(),
                mistake => saved_now(&self.world, range, mistake),
            })
        }
    }

    impl Snapshot for Sides {
        /// As `cbw_co_preadv_snapshot`: the error is looked at first only, and
        /// what the device has is read while its range is frozen.
        fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()> {
            let mut world = self.world.borrow_mut();
            if world.broken {
                return Err(Error::new(Reason::SnapshotBroken, "the snapshot is broken"));
            }
            let range = offset..offset + bytes.len() as u64;
            let saved: Vec<_> = world.scratch[within(range.start)..within(range.end)].to_vec();
            world.frozen = Some(range);
            drop(world);
            for (at, (byte, saved)) in bytes.iter_mut().zip(saved).enumerate() {
                let mut world = self.world.borrow_mut();
                world.guest();
                *byte = saved.unwrap_or(world.device[within(offset) + at]);
            }
            self.world.borrow_mut().frozen = None;
            Ok(())
        }

        fn vouch(&mut self) -> Result<()> {
            let broken = self.world.borrow().broken && self.mistake != Mistake::NoVouching;
            if broken { Err(Error::new(Reason::SnapshotBroken, "broken")) } else { Ok(()) }
        }
    }

    fn ops(random: &mut World, breaks: bool) -> Vec<Op> {
        (0..6)
            .map(|number| {
                let start = random.random(SIZE);
                let end = start + 1 + random.random((SIZE - start).min(12));
                // Every third is a discard or write-zeroes.
                let byte = if number % 3 == 0 { 0 } else { 100 + number };
                let fails = breaks && random.random(8) == 0;
                Op { range: start..end, byte, fails, state: OpState::Copying(start) }
            })
            .collect()
    }

    /// One capture. `None`: it failed. Else whether the image is that of the
    /// point in time.
    fn capture(seed: u64, breaks: bool, mistake: Mistake) -> Option<bool> {
        let mut world = World {
            device: Vec::new(),
            scratch: vec![None; SIZE as usize],
            broken: false,
            frozen: None,
            ops: Vec::new(),
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        };
        // Half of the clusters are holes.
        let holes: Vec<bool> = (0..=SIZE / CLUSTER).map(|_| world.random(2) == 0).collect();
        let hole = |at: u64| holes[(at / CLUSTER) as usize];
        world.device = (0..SIZE).map(|at| if hole(at) { 0 } else { 1 + at as u8 }).collect();
        let old_map = world.device.clone();
        if mistake == Mistake::OldMap {
            let at = world.random(SIZE) as usize;
            world.device[at] = 77;
        }
        let point_in_time = world.device.clone();
        world.ops = ops(&mut world, breaks);
        let world = Rc::new(RefCell::new(world));
        let before = Rc::new(RefCell::new(Vec::new()));
        let sides = || Sides { world: world.clone(), mistake, before: before.clone() };
        let mut reconciler = Reconciler::new(sides(), sides());

        let mut image = vec![0; SIZE as usize];
        for start in (0..SIZE).step_by(EXTENT as usize) {
            let range = start..(start + EXTENT).min(SIZE);
            let bytes = within(range.start)..within(range.end);
            if mistake == Mistake::AskedBefore {
                *before.borrow_mut() = saved_now(&world, range.clone(), mistake);
            }
            world.borrow_mut().guest();
            let map = if mistake == Mistake::OldMap {
                old_map.clone()
            } else {
                world.borrow().device.clone()
            };
            let result = if map[bytes.clone()].iter().all(|&byte| byte == 0) {
                world.borrow_mut().guest();
                let parts = match mistake {
                    Mistake::HolesBelieved => Ok(Vec::new()),
                    _ => reconciler.overwritten(range),
                };
                parts.and_then(|parts| {
                    parts.into_iter().try_for_each(|part| {
                        let place = within(part.start)..within(part.end);
                        reconciler.read(part.start, &mut image[place])
                    })
                })
            } else {
                for at in bytes.clone() {
                    world.borrow_mut().guest();
                    image[at] = world.borrow().device[at];
                }
                reconciler.correct(start, &mut image[bytes])
            };
            result.ok()?;
        }
        reconciler.finish().ok()?;
        Some(image == point_in_time)
    }

    const SEEDS: u64 = 20_000;

    #[test]
    fn every_capture_is_of_the_point_in_time_or_fails() {
        let mut failed = 0;
        for seed in 0..SEEDS {
            assert_eq!(capture(seed, false, Mistake::None), Some(true), "seed {seed}");
            match capture(seed, true, Mistake::None) {
                None => failed += 1,
                right => assert_eq!(right, Some(true), "seed {seed}, with failures"),
            }
        }
        assert!((SEEDS / 10..SEEDS * 9 / 10).contains(&failed), "{failed} of {SEEDS} failed");
    }

    #[test]
    fn each_step_is_needed() {
        for mistake in [
            Mistake::NoSecondRead,
            Mistake::AskedBefore,
            Mistake::HolesBelieved,
            Mistake::OldMap,
            Mistake::NoVouching,
            Mistake::ForgetfulScratch,
        ] {
            let breaks = mistake == Mistake::NoVouching;
            let wrong = (0..SEEDS).find(|&seed| capture(seed, breaks, mistake) == Some(false));
            assert!(wrong.is_some(), "{mistake:?} was not noticed");
        }
    }

    #[test]
    fn a_broken_snapshot_answers_a_read_that_was_under_way_with_the_guests_bytes() {
        let op = |range: Range<u64>, fails| {
            let state = OpState::Copying(range.start);
            Op { range, byte: 200, fails, state }
        };
        let mut world = World {
            device: vec![1; SIZE as usize],
            scratch: vec![None; SIZE as usize],
            broken: false,
            frozen: Some(0..4),
            ops: Vec::new(),
            random: 1,
        };
        let (mut waits, mut breaks) = (op(0..4, false), op(8..12, true));
        for _ in 0..9 {
            world.step(&mut waits);
        }
        assert_eq!((waits.state, world.device[0]), (OpState::Waiting, 1));
        let mut passes = op(0..4, false);
        world.step(&mut breaks);
        for _ in 0..9 {
            world.step(&mut passes);
        }
        assert_eq!((passes.state, world.device[0]), (OpState::Over, 200));
    }

    #[test]
    fn only_what_lies_in_the_read_is_overwritten() {
        assert_eq!(
            overwritten(&(10..20), &[0..5, 5..11, 11..12, 14..15, 19..90]),
            [10..12, 14..15, 19..20]
        );
        assert!(overwritten(&(10..20), &[0..10, 20..30]).is_empty());
        assert!(overwritten(&(10..10), std::slice::from_ref(&(0..30))).is_empty());
    }

    proptest! {
        #[test]
        fn a_byte_is_overwritten_if_it_was_saved(
            read in 0..60_u64,
            len in 0..30_u64,
            cuts in prop::collection::btree_set(0..100_u64, 0..12),
        ) {
            let cuts: Vec<_> = cuts.into_iter().collect();
            let saved: Vec<_> = cuts.chunks_exact(2).map(|cut| cut[0]..cut[1]).collect();
            let found = overwritten(&(read..read + len), &saved);
            prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
            for at in 0..100 {
                let wanted = (read..read + len).contains(&at) && saved.iter().any(|s| s.contains(&at));
                prop_assert_eq!(found.iter().any(|f| f.contains(&at)), wanted);
            }
        }
    }
}
