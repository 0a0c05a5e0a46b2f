//! One cluster: zeroes, raw bytes or a compressed stream.

use flate2::{Compress, FlushCompress, Status};
use zstd::{bulk::Compressor as ZstdCompressor, zstd_safe::CParameter};

use super::CLUSTER_SIZE;
use crate::model::image::Compression;

/// Level for zstd: QEMU's own, so that sizes compare.
const ZSTD_LEVEL: i32 = 3;
/// Level for deflate: the fastest of zlib-rs whose output stays within two
/// hundredths of QEMU's (measured on a Debian root filesystem).
const DEFLATE_LEVEL: u32 = 5;
/// QEMU inflates with a 4 KiB window (`inflateInit2(-12)`, block/qcow2-threads.c);
/// a stream that reaches further back fails there.
const DEFLATE_WINDOW_BITS: u8 = 12;
/// A compressed cluster must save at least one sector: qcow2 counts in
/// sectors, and raw clusters are cheaper to read.
const MAX_COMPRESSED: usize = CLUSTER_SIZE as usize - 512;

/// What a cluster became.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoded {
    /// Nothing but zeroes: not stored.
    Zero,
    /// Stored as it is.
    Raw,
    /// Stored compressed, in so many bytes.
    Compressed(usize),
}

/// Compresses clusters; keeps its tables between them.
pub struct Encoder(Codec);

enum Codec {
    Zstd(Box<ZstdCompressor<'static>>),
    Deflate(Box<Compress>),
    None,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Codec::Zstd(_) => "Encoder(zstd)",
            Codec::Deflate(_) => "Encoder(deflate)",
            Codec::None => "Encoder(none)",
        })
    }
}

impl Encoder {
    /// An encoder for one thread.
    ///
    /// # Errors
    ///
    /// When zstd cannot get its memory.
    pub fn new(compression: Compression) -> std::io::Result<Self> {
        Ok(Self(match compression {
            Compression::Zstd => {
                let mut zstd = ZstdCompressor::new(ZSTD_LEVEL)?;
                // The cluster's size is known to the reader: a byte saved.
                zstd.set_parameter(CParameter::ContentSizeFlag(false))?;
                Codec::Zstd(Box::new(zstd))
            }
            Compression::Deflate => {
                let level = flate2::Compression::new(DEFLATE_LEVEL);
                let deflate = Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS);
                Codec::Deflate(Box::new(deflate))
            }
            Compression::None => Codec::None,
        }))
    }

    /// Encodes one whole cluster into the start of `out`, which has room for
    /// a cluster.
    pub fn encode(&mut self, cluster: &[u8], out: &mut [u8]) -> Encoded {
        if is_zero(cluster) {
            return Encoded::Zero;
        }
        if matches!(self.0, Codec::None) || looks_random(cluster) {
            return Encoded::Raw;
        }
        let out = &mut out[..MAX_COMPRESSED];
        let length = match &mut self.0 {
            // An error is a cluster that does not fit: stored raw.
            Codec::Zstd(zstd) => zstd.compress_to_buffer(cluster, out).ok(),
            Codec::Deflate(deflate) => {
                deflate.reset();
                match deflate.compress(cluster, out, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => usize::try_from(deflate.total_out()).ok(),
                    _ => None,
                }
            }
            Codec::None => None,
        };
        length.map_or(Encoded::Raw, Encoded::Compressed)
    }
}

/// Whether all bytes are zero. Reads no further than the first that is not,
/// to the nearest 256.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<256>();
    blocks.iter().all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Whether compressing would be a waste: bytes in samples across the cluster
/// are spread as evenly as chance would have it, which is how compressed and
/// encrypted data look. A chi-square test with 255 degrees of freedom (mean
/// 255, deviation 23); text and machine code are in the thousands.
fn looks_random(cluster: &[u8]) -> bool {
    /// One sample in each KiB, so that nothing compressible of some KiB hides
    /// between two.
    const STRIDE: usize = 1024;
    /// An eighth of the bytes, for an eighth of the cost of looking at all.
    const SAMPLE_SIZE: usize = 128;
    /// Samples between two looks at the counts: most clusters are told apart
    /// by the first.
    const LOOK: usize = 16;
    /// Above the mean by more than six deviations.
    const LIMIT: u64 = 400;

    let mut counts = [[0_u16; 256]; 2];
    let mut seen = 0;
    for samples in cluster.chunks(STRIDE * LOOK) {
        for sample in samples.chunks(STRIDE) {
            // Two tables, so that equal neighbours do not wait for each other.
            for pair in sample[..SAMPLE_SIZE.min(sample.len())].as_chunks::<2>().0 {
                counts[0][usize::from(pair[0])] += 1;
                counts[1][usize::from(pair[1])] += 1;
                seen += 2;
            }
        }
        if seen > 0 && chi_square(&counts, seen) > LIMIT {
            return false;
        }
    }
    true
}

/// How far `seen` counted bytes are from an even spread.
fn chi_square(counts: &[[u16; 256]; 2], seen: u64) -> u64 {
    let squares: u64 = (counts[0].iter().zip(&counts[1]))
        .map(|(even, odd)| u64::from(even + odd) * u64::from(even + odd))
        .sum();
    (squares * 256 / seen).saturating_sub(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(len: usize, mut seed: u64) -> Vec<u8> {
        std::iter::repeat_with(|| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 24).to_le_bytes()[0]
        })
        .take(len)
        .collect()
    }

    #[test]
    fn zeroes_are_seen_to_the_last_byte() {
        for len in [0, 1, 255, 256, 257, 65_536] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in [0, len / 2, len.wrapping_sub(1)] {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = 1;
                    assert!(!is_zero(&bytes), "{len} {at}");
                    bytes[at] = 0;
                }
            }
        }
    }

    #[test]
    fn random_bytes_are_not_compressed_and_text_is() {
        let noise = random(65_536, 42);
        assert!(looks_random(&noise));
        let text = b"All happy families are alike. ".repeat(3000);
        assert!(!looks_random(&text[..65_536]));
        // A cluster that is random but for its middle is tried.
        let mut mixed = noise;
        mixed[20_000..50_000].fill(b'a');
        assert!(!looks_random(&mixed));
    }

    #[test]
    fn every_codec_gives_the_bytes_back() {
        let mut out = vec![0; 65_536];
        let text: Vec<u8> = (0..65_536_u32).map(|i| ((i * i) >> 9) as u8).collect();
        for compression in [Compression::Zstd, Compression::Deflate] {
            let mut encoder = Encoder::new(compression).unwrap();
            for _ in 0..2 {
                let Encoded::Compressed(len) = encoder.encode(&text, &mut out) else {
                    panic!("{compression} did not compress")
                };
                let mut decoder = super::super::image::Decoder::new(compression).unwrap();
                let mut back = vec![1; 65_536];
                decoder.decode(&out[..len], &mut back).unwrap();
                assert_eq!(back, text);
            }
            assert_eq!(encoder.encode(&[0; 65_536], &mut out), Encoded::Zero);
            assert_eq!(encoder.encode(&random(65_536, 7), &mut out), Encoded::Raw);
        }
        let mut none = Encoder::new(Compression::None).unwrap();
        assert_eq!(none.encode(&text, &mut out), Encoded::Raw);
    }
}
