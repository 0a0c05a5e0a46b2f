//! The header: the only part of an image that is parsed before it is known
//! to be one.

use super::CLUSTER_BITS;
use crate::model::image::Compression;

/// Magic number: "QFI" and 0xfb.
const MAGIC: u32 = 0x5146_49fb;
/// Length of the header that imaged writes: with the compression type, and
/// padded to a multiple of eight.
const HEADER_LENGTH: u32 = 112;
/// Bytes to read for [`parse_header`].
pub const HEADER_READ: usize = HEADER_LENGTH as usize;
/// Incompatible feature bit 3: byte 104 tells the compression.
const FEATURE_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature bit 0: refcounts may be stale, which only matters to
/// who allocates.
const FEATURE_DIRTY: u64 = 1 << 0;
/// Largest cluster that QEMU takes: 2 MiB.
const MAX_CLUSTER_BITS: u32 = 21;
/// Largest virtual size that is read: 64 TiB, far above OCI's largest volume
/// (32 TiB), so that hostile headers cannot ask for large tables.
const MAX_VIRTUAL_SIZE: u64 = 64 << 40;

/// Largest L1 table: QEMU's limit (`QCOW_MAX_L1_SIZE`), 32 MiB.
const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;

/// The bytes are no image that imaged reads.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum FormatError {
    /// Too short, or no magic number.
    #[error("not a qcow2 image")]
    NotQcow2,
    /// Something that this version does not read.
    #[error("qcow2 with {0} is not supported")]
    Unsupported(&'static str),
    /// Nothing in the image may name another file.
    #[error("the image names a backing file, which is never opened")]
    BackingFile,
    /// The same, for its data.
    #[error("the image names an external data file, which is never opened")]
    ExternalData,
    /// A field that cannot be right.
    #[error("the image is damaged: {0}")]
    Damaged(&'static str),
    /// A cluster that cannot be decompressed.
    #[error("the cluster at guest offset {guest} is damaged: {what}")]
    BadCluster {
        /// Where the guest sees it.
        guest: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// What a header says, after the checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// log2 of the cluster's size, 9 to 21.
    pub cluster_bits: u32,
    /// Size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Its offset.
    pub l1_offset: u64,
    /// Offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Its length in clusters.
    pub refcount_table_clusters: u32,
    /// How compressed clusters are compressed; never `None`.
    pub compression: Compression,
}

impl Header {
    /// Entries of L1 that the virtual size needs.
    #[must_use]
    pub fn l1_needed(&self) -> u64 {
        self.virtual_size.div_ceil(1 << (2 * self.cluster_bits - 3))
    }

    /// The header as bytes, [`HEADER_READ`] long; what follows in its cluster
    /// is zero, which ends the header extensions.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_READ] {
        let mut bytes = [0; HEADER_READ];
        let zstd = self.compression == Compression::Zstd;
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC.to_be_bytes());
        put(4, &3_u32.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.virtual_size.to_be_bytes());
        put(36, &self.l1_entries.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(72, &if zstd { FEATURE_COMPRESSION } else { 0 }.to_be_bytes());
        // Refcounts have 2^4 bits.
        put(96, &4_u32.to_be_bytes());
        put(100, &HEADER_LENGTH.to_be_bytes());
        put(104, &[u8::from(zstd)]);
        bytes
    }
}

/// Reads a header of version 2 or 3 from the first bytes of an image.
///
/// # Errors
///
/// Everything that would make a reader open another file, and every feature
/// that is not understood.
pub fn parse_header(bytes: &[u8]) -> Result<Header, FormatError> {
    let be32 = |at| array(bytes, at).map(u32::from_be_bytes);
    let be64 = |at| array(bytes, at).map(u64::from_be_bytes);

    if be32(0) != Ok(MAGIC) {
        return Err(FormatError::NotQcow2);
    }
    let version = be32(4)?;
    if !(2..=3).contains(&version) {
        return Err(FormatError::Unsupported("a version other than 2 and 3"));
    }
    if be64(8)? != 0 {
        return Err(FormatError::BackingFile);
    }
    if be32(32)? != 0 {
        return Err(FormatError::Unsupported("encryption"));
    }
    let compression = if version == 2 { Compression::Deflate } else { features(bytes)? };

    let header = Header {
        cluster_bits: be32(20)?,
        virtual_size: be64(24)?,
        l1_entries: be32(36)?,
        l1_offset: be64(40)?,
        refcount_table_offset: be64(48)?,
        refcount_table_clusters: be32(56)?,
        compression,
    };
    if !(9..=MAX_CLUSTER_BITS).contains(&header.cluster_bits) {
        return Err(FormatError::Damaged("its cluster size is not between 512 bytes and 2 MiB"));
    }
    if header.virtual_size > MAX_VIRTUAL_SIZE {
        return Err(FormatError::Unsupported("more than 64 TiB"));
    }
    let needed = header.l1_needed();
    if needed > MAX_L1_ENTRIES {
        return Err(FormatError::Unsupported("an L1 table of more than 32 MiB"));
    }
    if u64::from(header.l1_entries) < needed {
        return Err(FormatError::Damaged("its L1 table is too short for its size"));
    }
    Ok(header)
}

/// The feature bits of version 3, and the compression that they tell.
fn features(bytes: &[u8]) -> Result<Compression, FormatError> {
    const EXTERNAL_DATA: u64 = 1 << 2;
    const EXTENDED_L2: u64 = 1 << 4;
    let incompatible = u64::from_be_bytes(array(bytes, 72)?);
    if incompatible & EXTERNAL_DATA != 0 {
        return Err(FormatError::ExternalData);
    }
    if incompatible & EXTENDED_L2 != 0 {
        return Err(FormatError::Unsupported("extended L2 entries"));
    }
    if incompatible & !(FEATURE_COMPRESSION | FEATURE_DIRTY) != 0 {
        return Err(FormatError::Unsupported("unknown incompatible features"));
    }
    if incompatible & FEATURE_COMPRESSION == 0 {
        return Ok(Compression::Deflate);
    }
    match bytes.get(104) {
        Some(0) => Ok(Compression::Deflate),
        Some(1) => Ok(Compression::Zstd),
        Some(_) => Err(FormatError::Unsupported("an unknown compression")),
        None => Err(FormatError::NotQcow2),
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], FormatError> {
    let field = at.checked_add(N).and_then(|end| bytes.get(at..end));
    field.and_then(|field| field.try_into().ok()).ok_or(FormatError::NotQcow2)
}

/// What imaged writes.
pub(super) fn written(virtual_size: u64, compression: Compression) -> Header {
    Header {
        cluster_bits: CLUSTER_BITS,
        virtual_size,
        l1_entries: 0,
        l1_offset: 0,
        refcount_table_offset: 0,
        refcount_table_clusters: 0,
        // Without compressed clusters the field has no meaning; deflate is
        // its value when no feature bit is set.
        compression: match compression {
            Compression::Zstd => Compression::Zstd,
            Compression::Deflate | Compression::None => Compression::Deflate,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            l1_entries: 8,
            l1_offset: 0x50000,
            refcount_table_offset: 0x60000,
            refcount_table_clusters: 1,
            ..written(4 << 30, Compression::Zstd)
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(parse_header(&sample().to_bytes()), Ok(sample()));
    }

    #[test]
    fn hostile_headers_are_refused() {
        let with = |at: usize, value: &[u8]| {
            let mut bytes = sample().to_bytes();
            bytes[at..at + value.len()].copy_from_slice(value);
            parse_header(&bytes).unwrap_err()
        };
        assert_eq!(parse_header(&[]), Err(FormatError::NotQcow2));
        assert_eq!(parse_header(&sample().to_bytes()[..100]), Err(FormatError::NotQcow2));
        assert_eq!(with(0, b"QFI!"), FormatError::NotQcow2);
        assert_eq!(with(15, &[1]), FormatError::BackingFile);
        assert_eq!(with(79, &[0b1100]), FormatError::ExternalData);
        assert!(matches!(with(79, &[0b11000]), FormatError::Unsupported(_)));
        assert!(matches!(with(72, &[0x80]), FormatError::Unsupported(_)));
        assert!(matches!(with(104, &[9]), FormatError::Unsupported(_)));
        assert!(matches!(with(35, &[1]), FormatError::Unsupported(_)));
        assert!(matches!(with(23, &[63]), FormatError::Damaged(_)));
        assert!(matches!(with(24, &[0xff]), FormatError::Unsupported(_)));
        assert!(matches!(with(39, &[7]), FormatError::Damaged(_)));
    }
}
