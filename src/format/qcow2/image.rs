//! Reading a qcow2: for verification, for restore, and of images that others
//! made. Everything in it is hostile until it was checked.

use std::sync::Arc;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::bulk::Decompressor as ZstdDecompressor;

use super::{
    CLUSTER_SIZE, COMPRESSED, FormatError, HEADER_READ, Header, OFFSET_MASK, SECTOR, parse_header,
};
use crate::{model::image::Compression, port::ReadAt};

/// Bit 0 of a standard L2 entry: the cluster reads as zeroes.
const ZERO: u64 = 1;

/// Reading an image failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The image is at fault.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// What it lies on is.
    #[error("the object cannot be read at offset {offset}")]
    Io {
        /// Where.
        offset: u64,
        /// What the device said.
        source: std::io::Error,
    },
}

/// Where an image's tables are. Several threads that read one image share it.
#[derive(Debug)]
pub struct Map {
    header: Header,
    l1: Vec<u64>,
}

impl Map {
    /// Reads the header and L1 of the image in `object`.
    ///
    /// Memory is bounded by 32 MiB for L1, as the header's checks demand, and
    /// twice that while it is read.
    ///
    /// # Errors
    ///
    /// When it is none, or one that is not understood.
    pub fn read(object: &dyn ReadAt) -> Result<Self, ReadError> {
        let mut start = [0; HEADER_READ];
        let length = HEADER_READ.min(usize::try_from(object.len()).unwrap_or(HEADER_READ));
        read(object, &mut start[..length], 0)?;
        let header = parse_header(&start[..length])?;

        let l1_bytes = u64::from(header.l1_entries) * 8;
        let l1_end = header.l1_offset.checked_add(l1_bytes);
        if l1_end.is_none_or(|end| end > object.len()) {
            return Err(FormatError::Damaged("its L1 table lies beyond its end").into());
        }
        let l1 = read_table(object, header.l1_offset, header.l1_needed() as usize)?;
        Ok(Self { header, l1 })
    }

    /// What the header says.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }
}

/// An open image. Reads ascend in the common case: one L2 table is kept.
pub struct Image<'a> {
    object: &'a dyn ReadAt,
    map: Arc<Map>,
    l2: Vec<u64>,
    /// Which entry of L1 `l2` belongs to.
    l2_index: Option<usize>,
    decoder: Decoder,
    /// Room for the compressed bytes of one cluster.
    packed: Vec<u8>,
}

impl std::fmt::Debug for Image<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("header", &self.map.header).finish_non_exhaustive()
    }
}

impl<'a> Image<'a> {
    /// Opens the image in `object`, for one thread.
    ///
    /// # Errors
    ///
    /// Those of [`Map::read`].
    pub fn open(object: &'a dyn ReadAt) -> Result<Self, ReadError> {
        Self::with_map(object, Arc::new(Map::read(object)?))
    }

    /// Opens the image in `object`, whose `map` was read before. Beside the
    /// map it takes three clusters.
    ///
    /// # Errors
    ///
    /// `Io` when zstd cannot get its memory.
    pub fn with_map(object: &'a dyn ReadAt, map: Arc<Map>) -> Result<Self, ReadError> {
        let decoder = Decoder::new(map.header.compression)
            .map_err(|source| ReadError::Io { offset: 0, source })?;
        Ok(Self { object, map, l2: Vec::new(), l2_index: None, decoder, packed: Vec::new() })
    }

    /// What the header says.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.map.header
    }

    /// Fills `buf` with what the guest sees from `offset` on, unless that is
    /// [`Content::Zeroes`]: then it is left as it was. `offset` is a multiple
    /// of the cluster's size; `buf` ends at one, or at the end.
    ///
    /// # Errors
    ///
    /// A damaged image or an object that cannot be read.
    pub fn read_at(&mut self, buf: &mut [u8], offset: u64) -> Result<Content, ReadError> {
        let cluster_size = 1 << self.map.header.cluster_bits;
        let mut content = Content::Zeroes;
        for start in (0..buf.len()).step_by(cluster_size) {
            let end = buf.len().min(start + cluster_size);
            match (self.read_cluster(&mut buf[start..end], offset + start as u64)?, content) {
                (Content::Data, Content::Data) | (Content::Zeroes, Content::Zeroes) => {}
                (Content::Zeroes, Content::Data) => buf[start..end].fill(0),
                (Content::Data, Content::Zeroes) => {
                    buf[..start].fill(0);
                    content = Content::Data;
                }
            }
        }
        Ok(content)
    }

    /// As [`Self::read_at`], of one cluster.
    fn read_cluster(&mut self, buf: &mut [u8], guest: u64) -> Result<Content, ReadError> {
        let entry = self.entry(guest)?;
        if entry & COMPRESSED != 0 {
            self.read_compressed(buf, guest, entry & !(COMPRESSED | super::COPIED))?;
            return Ok(Content::Data);
        }
        let host = entry & OFFSET_MASK;
        if host == 0 || entry & ZERO != 0 {
            return Ok(Content::Zeroes);
        }
        read(self.object, buf, host)?;
        Ok(Content::Data)
    }

    /// The L2 entry of the cluster at guest offset `guest`.
    fn entry(&mut self, guest: u64) -> Result<u64, ReadError> {
        let entries = 1_usize << (self.map.header.cluster_bits - 3);
        let cluster = usize::try_from(guest >> self.map.header.cluster_bits).unwrap_or(usize::MAX);
        let index = cluster / entries;
        if self.l2_index != Some(index) {
            let l1_entry = self.map.l1.get(index).copied().unwrap_or(0);
            let offset = l1_entry & OFFSET_MASK;
            self.l2_index = None;
            self.l2 =
                if offset == 0 { Vec::new() } else { read_table(self.object, offset, entries)? };
            self.l2_index = Some(index);
        }
        Ok(self.l2.get(cluster % entries).copied().unwrap_or(0))
    }

    fn read_compressed(&mut self, buf: &mut [u8], guest: u64, entry: u64) -> Result<(), ReadError> {
        let offset_bits = 62 - (self.map.header.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry >> offset_bits) + 1;
        // The last sector may end with the object.
        let end = (offset - offset % SECTOR + sectors * SECTOR).min(self.object.len());
        if offset >= end {
            let what = "its bytes lie beyond the end of the object";
            return Err(FormatError::BadCluster { guest, what }.into());
        }
        self.packed.resize((end - offset) as usize, 0);
        read(self.object, &mut self.packed, offset)?;

        let cluster_size = 1_usize << self.map.header.cluster_bits;
        let decoded = if buf.len() == cluster_size {
            self.decoder.decode(&self.packed, buf)
        } else {
            let mut whole = vec![0; cluster_size];
            let decoded = self.decoder.decode(&self.packed, &mut whole);
            buf.copy_from_slice(&whole[..buf.len()]);
            decoded
        };
        decoded.map_err(|what| FormatError::BadCluster { guest, what }.into())
    }
}

/// What was found in a stretch of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The image holds bytes for it.
    Data,
    /// It holds none: zeroes.
    Zeroes,
}

/// Decompresses clusters; keeps its tables between them.
pub struct Decoder(Codec);

enum Codec {
    Zstd(Box<ZstdDecompressor<'static>>),
    Deflate(Box<Decompress>),
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoder")
    }
}

impl Decoder {
    /// A decoder for one thread.
    ///
    /// # Errors
    ///
    /// When zstd cannot get its memory.
    pub fn new(compression: Compression) -> std::io::Result<Self> {
        Ok(Self(match compression {
            Compression::Zstd => Codec::Zstd(Box::new(ZstdDecompressor::new()?)),
            Compression::Deflate | Compression::None => {
                Codec::Deflate(Box::new(Decompress::new_with_window_bits(false, 12)))
            }
        }))
    }

    /// Fills `out`, a whole cluster, from `packed`, which may have anything
    /// behind the stream. Never writes more than `out` holds, whatever the
    /// stream says.
    ///
    /// # Errors
    ///
    /// What is wrong with the stream.
    pub fn decode(&mut self, packed: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
        match &mut self.0 {
            Codec::Zstd(zstd) => {
                let frame = zstd::zstd_safe::find_frame_compressed_size(packed)
                    .map_err(|_| "its zstd frame is broken")?;
                match zstd.decompress_to_buffer(&packed[..frame], &mut out[..]) {
                    Ok(length) if length == out.len() => Ok(()),
                    Ok(_) => Err("its zstd frame holds less than a cluster"),
                    Err(_) => Err("its zstd frame is broken"),
                }
            }
            Codec::Deflate(deflate) => {
                deflate.reset(false);
                let status = deflate
                    .decompress(packed, out, FlushDecompress::Finish)
                    .map_err(|_| "its deflate stream is broken")?;
                let complete = deflate.total_out() == out.len() as u64;
                match status {
                    Status::StreamEnd | Status::BufError | Status::Ok if complete => Ok(()),
                    _ => Err("its deflate stream holds less than a cluster"),
                }
            }
        }
    }
}

fn read(object: &dyn ReadAt, buf: &mut [u8], offset: u64) -> Result<(), ReadError> {
    object.read_at(buf, offset).map_err(|source| match source.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            FormatError::Damaged("it names bytes beyond its end").into()
        }
        _ => ReadError::Io { offset, source },
    })
}

fn read_table(object: &dyn ReadAt, offset: u64, entries: usize) -> Result<Vec<u64>, ReadError> {
    let mut bytes = vec![0; entries * 8];
    read(object, &mut bytes, offset)?;
    Ok(bytes.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

const _: () = assert!(CLUSTER_SIZE as usize > HEADER_READ);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::qcow2::layout::{Emit, Layout, Placed};

    impl ReadAt for Vec<u8> {
        fn len(&self) -> u64 {
            self.len() as u64
        }

        fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let bytes = start.checked_add(buf.len()).and_then(|end| self.get(start..end));
            buf.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }

    impl Emit for Vec<u8> {
        fn emit(&mut self, offset: u64, bytes: &[u8]) {
            let end = offset as usize + bytes.len();
            self.resize(self.len().max(end), 0);
            self[offset as usize..end].copy_from_slice(bytes);
        }
    }

    /// Four clusters: zeroes, text compressed, bytes as they are, zeroes.
    fn image(compression: Compression) -> Vec<u8> {
        let text = b"never trust a guest ".repeat(3277);
        let mut packed = vec![0; 65_536];
        let mut encoder = super::super::cluster::Encoder::new(compression).unwrap();
        let super::super::cluster::Encoded::Compressed(len) =
            encoder.encode(&text[..65_536], &mut packed)
        else {
            panic!("text does not compress")
        };
        let mut bytes = Vec::new();
        let mut layout = Layout::new(4 * CLUSTER_SIZE, compression);
        let offset = layout.place(1, Placed::Compressed(len), &mut bytes);
        bytes.emit(offset, &packed[..len]);
        let offset = layout.place(2, Placed::Raw, &mut bytes);
        bytes.emit(offset, &[7; 65_536]);
        let finished = layout.finish(&mut bytes);
        bytes.emit(0, &finished.header.to_bytes());
        bytes
    }

    fn read_all(bytes: &Vec<u8>) -> Result<Vec<u8>, ReadError> {
        let mut image = Image::open(bytes)?;
        let size = image.header().virtual_size.min(1 << 20);
        let mut guest = vec![0; size as usize];
        let cluster = 1 << image.header().cluster_bits;
        for (index, buf) in guest.chunks_mut(cluster).enumerate() {
            image.read_at(buf, (index * cluster) as u64)?;
        }
        Ok(guest)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Damage anywhere is an error or other bytes: never a panic, never
        /// more than the size.
        #[test]
        fn damage_is_survived(
            zstd in any::<bool>(),
            at in prop_oneof![0_usize..112, 65_536_usize..70_000, 0_usize..400_000],
            value in any::<[u8; 8]>(),
            cut in prop_oneof![9 => Just(usize::MAX), 1 => 0_usize..400_000],
        ) {
            let mut bytes = image(if zstd { Compression::Zstd } else { Compression::Deflate });
            let whole = read_all(&bytes).unwrap();
            prop_assert!(whole[65_536..].starts_with(b"never trust a guest"));
            for (byte, value) in bytes.iter_mut().skip(at).zip(value) {
                *byte = value;
            }
            bytes.truncate(cut);
            let _ = read_all(&bytes);
        }
    }
}
