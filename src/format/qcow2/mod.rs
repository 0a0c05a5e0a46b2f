//! qcow2, version 3: QEMU's image format.
//!
//! Source of every number here: QEMU, `docs/interop/qcow2.txt`. Written with
//! 64 KiB clusters and 16-bit refcounts, QEMU's defaults.
//!
//! ```text
//! ┌────────┬──────┬────┬──────┬────┬──────────┬──────┬────┬────┬──────────┬───────┐
//! │ header │ data │ L2 │ data │ L2 │ refcount │ data │ L2 │ L1 │ refcount │ table │
//! │        │      │    │      │    │  block   │      │    │    │  block   │       │
//! └────────┴──────┴────┴──────┴────┴──────────┴──────┴────┴────┴──────────┴───────┘
//!     ▲ written last: it alone points to L1 and the refcount table, at the end
//! ```

#![allow(clippy::cast_possible_truncation, reason = "usize has 64 bits: see lib.rs")]

pub mod cluster;
pub mod content;
mod empty;
mod header;
pub mod image;
pub mod layout;

pub use empty::empty;
pub use header::{FormatError, HEADER_READ, Header, parse_header};

/// log2 of [`CLUSTER_SIZE`].
pub const CLUSTER_BITS: u32 = 16;
/// Bytes of a cluster as imaged writes them: QEMU's default, which every
/// importer is known to take.
pub const CLUSTER_SIZE: u64 = 1 << CLUSTER_BITS;
/// Guest clusters that one L2 table of 8-byte entries maps: 512 MiB.
const L2_ENTRIES: u64 = CLUSTER_SIZE / 8;
/// Host clusters that one block of 16-bit refcounts covers: 2 GiB.
const REFCOUNTS_PER_BLOCK: u64 = CLUSTER_SIZE / 2;

/// Bit 63 of L1 and L2 entries: the cluster's refcount is exactly one.
const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bits 9 to 55 of L1 and standard L2 entries: a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Unit in which compressed lengths are counted.
const SECTOR: u64 = 512;

/// Size of a volume as QEMU presents it: whole 512-byte sectors, the last
/// filled with zeroes.
#[must_use]
pub const fn virtual_size(volume: u64) -> u64 {
    volume.next_multiple_of(SECTOR)
}
