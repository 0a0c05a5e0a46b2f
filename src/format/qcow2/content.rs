//! The digest of what a guest sees.
//!
//! content = BLAKE3 over the BLAKE3s of the 1 MiB extents, in order; the last
//! extent is as short as the volume leaves it.

use std::sync::OnceLock;

use crate::model::image::{ContentDigest, EXTENT_SIZE};

/// Bytes of one extent's digest.
pub const DIGEST_SIZE: usize = 32;

/// The digest of one extent.
#[must_use]
pub fn extent_digest(bytes: &[u8]) -> [u8; DIGEST_SIZE] {
    *blake3::hash(bytes).as_bytes()
}

/// The digest of `len` zero bytes, at most an extent. Whole extents cost
/// nothing after the first.
#[must_use]
pub fn zeroes_digest(len: usize) -> [u8; DIGEST_SIZE] {
    static WHOLE: OnceLock<[u8; DIGEST_SIZE]> = OnceLock::new();
    static ZEROES: [u8; EXTENT_SIZE as usize] = [0; EXTENT_SIZE as usize];
    let len = len.min(ZEROES.len());
    if len == ZEROES.len() {
        return *WHOLE.get_or_init(|| extent_digest(&ZEROES));
    }
    extent_digest(&ZEROES[..len])
}

/// The digest of a whole volume from those of its extents.
#[must_use]
pub fn content_digest(extent_digests: &[u8]) -> ContentDigest {
    ContentDigest(extent_digest(extent_digests))
}

/// Extents of a volume of `size` bytes.
#[must_use]
pub const fn extent_count(size: u64) -> u64 {
    size.div_ceil(EXTENT_SIZE)
}

/// Length of extent `index` of a volume of `size` bytes.
#[must_use]
pub const fn extent_len(size: u64, index: u64) -> usize {
    let left = size.saturating_sub(index * EXTENT_SIZE);
    (if left < EXTENT_SIZE { left } else { EXTENT_SIZE }) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_extents_are_constants_of_their_length() {
        for len in [1, 512, 65_536, 1 << 20] {
            assert_eq!(zeroes_digest(len), extent_digest(&vec![0; len]));
        }
    }

    #[test]
    fn the_last_extent_is_what_is_left() {
        assert_eq!((extent_count(0), extent_count(1), extent_count(1 << 20)), (0, 1, 1));
        assert_eq!(extent_len((1 << 20) + 512, 0), 1 << 20);
        assert_eq!(extent_len((1 << 20) + 512, 1), 512);
    }
}
