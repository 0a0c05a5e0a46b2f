//! One extent: digested, and cut into clusters that are compressed.

use crate::{
    format::qcow2::{
        CLUSTER_SIZE,
        cluster::{self, Encoder},
        content,
    },
    model::image::EXTENT_SIZE,
    port::Extent,
};

/// Clusters in an extent.
pub(super) const CLUSTERS: usize = (EXTENT_SIZE / CLUSTER_SIZE) as usize;

/// What is to be appended for some extents.
#[derive(Debug)]
pub(super) enum Encoded {
    /// So many extents of zeroes.
    Zeroes { count: u64 },
    /// One extent with data.
    Data(Box<EncodedExtent>),
}

/// One extent, ready to be laid out.
#[derive(Debug)]
pub(super) struct EncodedExtent {
    /// BLAKE3 of its bytes, padded to whole sectors.
    pub digest: [u8; content::DIGEST_SIZE],
    /// What each cluster became; beyond the volume's end: zero.
    pub clusters: [cluster::Encoded; CLUSTERS],
    /// The compressed clusters, one after the other.
    pub packed: Vec<u8>,
    /// The bytes as read, for raw clusters. Kept until they were appended, so
    /// that the reader's buffers bound what waits to be reordered.
    pub source: Source,
}

/// Where raw clusters are copied from.
#[derive(Debug)]
pub(super) enum Source {
    /// The reader's buffer: whole clusters.
    Extent(Extent),
    /// A copy filled with zeroes to whole clusters: the volume's end.
    Padded(Vec<u8>),
}

impl Source {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Extent(extent) => (*extent.bytes).as_ref(),
            Self::Padded(bytes) => bytes,
        }
    }
}

/// Encodes one extent; `packed`, of an extent's size, gives its memory.
pub(super) fn encode(extent: Extent, encoder: &mut Encoder, mut packed: Vec<u8>) -> Encoded {
    let bytes = (*extent.bytes).as_ref();
    let cluster_size = CLUSTER_SIZE as usize;
    let (digest, source) = if bytes.len().is_multiple_of(cluster_size) {
        (content::extent_digest(bytes), Source::Extent(extent))
    } else {
        // Once in a volume. QEMU presents whole sectors, so they are digested.
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(512), 0);
        let digest = content::extent_digest(&padded);
        padded.resize(padded.len().next_multiple_of(cluster_size), 0);
        (digest, Source::Padded(padded))
    };

    let mut used = 0;
    let mut clusters = [cluster::Encoded::Zero; CLUSTERS];
    for (outcome, bytes) in clusters.iter_mut().zip(source.bytes().chunks_exact(cluster_size)) {
        *outcome = encoder.encode(bytes, &mut packed[used..]);
        if let cluster::Encoded::Compressed(len) = *outcome {
            used += len;
        }
    }
    Encoded::Data(Box::new(EncodedExtent { digest, clusters, packed, source }))
}
