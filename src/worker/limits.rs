//! What a worker may use, and why so much.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::{ByteSize, image::EXTENT_SIZE};

/// Longest time for which a worker may owe an answer without producing an
/// extent. It runs at `SCHED_IDLE`: on a host whose cores are all busy it
/// still gets about a three-hundredth of one, and an extent takes
/// milliseconds. Time in which the store is read does not count.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Most lanes, and so threads, of one worker: what one message can carry.
pub const MAX_LANES: usize = crate::sys::descriptors::MAX_PASSED;

/// Program, libraries, the first stack (60 MiB in a debug build, as
/// measured), and an L1 table of 32 MiB, twice while it is read; half as much
/// again.
const FIXED: u64 = 192 * ByteSize::MIB;

/// A stack of 2 MiB, an extent, a window, zstd's tables, and for clusters of
/// 2 MiB, the largest, an L2 table (twice while it is read), what is packed
/// and one cluster.
const EACH_LANE: u64 = 20 * ByteSize::MIB;

/// A worker's limits. Beside these it has no processes, no new descriptors,
/// no file sizes and no core dumps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// `RLIMIT_AS`: all that it may map, the program included.
    pub address_space: ByteSize,
    /// `RLIMIT_CPU`, in seconds over all its threads.
    pub processor_seconds: u64,
}

impl Limits {
    /// For decoding `volume` by so many `lanes`.
    ///
    /// A minute of processor time, and one more for each GiB: a debug build
    /// needs 6 seconds for a GiB, a release build 2, so this ends only what
    /// was made to be slow.
    #[must_use]
    pub fn for_decoding(volume: ByteSize, lanes: usize) -> Self {
        let gib = volume.get().div_ceil(1024 * ByteSize::MIB);
        Self {
            address_space: ByteSize(FIXED + EACH_LANE * lanes as u64),
            processor_seconds: 60 + 60 * gib,
        }
    }

    /// For decoding into memory: the same, and that memory.
    #[must_use]
    pub fn for_filling(volume: ByteSize, lanes: usize) -> Self {
        let limits = Self::for_decoding(volume, lanes);
        let regions = super::frame::SLOTS * EXTENT_SIZE * lanes as u64;
        Self { address_space: ByteSize(limits.address_space.get() + regions), ..limits }
    }

    /// For trying what must not be possible.
    #[must_use]
    pub fn for_attempts() -> Self {
        Self { address_space: ByteSize(FIXED), processor_seconds: 1 }
    }
}

/// Bytes that decoding may read from an object before it must be up to
/// something: each cluster once, with what is read ahead in vain and the
/// tables of each lane. Several entries may share a cluster, which is why the
/// volume counts too.
#[must_use]
pub fn reads(object: u64, volume: u64, lanes: usize) -> u64 {
    let once = object.saturating_add(volume);
    once.saturating_mul(4).saturating_add(64 * ByteSize::MIB * (lanes as u64 + 1))
}
