//! What it takes to go on encoding after a part, by another process.
//!
//! At the end of a part nothing below it changes any more, so little is left:
//! where the layout stands, its open tables, and the digests of the extents
//! that came since the checkpoint before.

use std::io;

use super::assembler::Standing;
use crate::{
    error::{Context, Reason, Result},
    format::qcow2::layout,
    model::image::{EXTENT_SIZE, StoredPart},
};

/// Form of the bytes; another is not understood.
const VERSION: u64 = 1;

/// zstd's level: tables of a part are 200 KiB, and 30 KiB packed.
const LEVEL: i32 = 1;

/// Largest checkpoint that is unpacked: the digests of 1 TiB, with tables.
#[allow(clippy::cast_possible_truncation, reason = "64 MiB fit every usize")]
const LARGEST: usize = (64 * EXTENT_SIZE) as usize;

/// A point from which encoding can go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// How everything stands.
    pub(super) standing: Standing,
    /// Digests of the extents since the checkpoint before.
    pub(super) digests: Vec<u8>,
}

impl Checkpoint {
    /// How everything stands, as bytes for the journal. Only the newest are
    /// of use.
    ///
    /// # Errors
    ///
    /// `INTERNAL` when they cannot be packed.
    pub fn standing(&self) -> Result<Vec<u8>> {
        let Standing { next, number, start, carry, layout } = &self.standing;
        let layout::State { next_guest, tail, packs, l1, l2, l2_index, table, open } = layout;
        let mut out = Writer::default();
        for number in [VERSION, *next, u64::from(*number), *start, *next_guest, *tail, *l2_index] {
            out.number(number);
        }
        out.bytes(carry);
        let packs: Vec<u64> = packs.iter().flat_map(|pack| [pack.start, pack.end]).collect();
        for numbers in [&packs, l1, l2, table] {
            out.numbers(numbers);
        }
        out.number(open.len() as u64);
        for block in open {
            let bytes: Vec<u8> = block.iter().flat_map(|count| count.to_le_bytes()).collect();
            out.bytes(&bytes);
        }
        packed(&out.0)
    }

    /// The digests of the extents since the checkpoint before, as bytes for
    /// the journal.
    ///
    /// # Errors
    ///
    /// `INTERNAL` when they cannot be packed.
    pub fn digests(&self) -> Result<Vec<u8>> {
        packed(&self.digests)
    }
}

fn packed(bytes: &[u8]) -> Result<Vec<u8>> {
    zstd::bulk::compress(bytes, LEVEL).context(Reason::Internal, || "a checkpoint cannot be packed")
}

impl Standing {
    fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        let unpacked = zstd::bulk::decompress(bytes, LARGEST)?;
        let mut from = Reader(&unpacked);
        if from.number()? != VERSION {
            return Err(io::Error::other("it is of another version"));
        }
        let (next, number, start) = (from.number()?, from.number()?, from.number()?);
        let (next_guest, tail, l2_index) = (from.number()?, from.number()?, from.number()?);
        let carry = from.bytes()?.to_vec();
        let packs = from.numbers()?.chunks_exact(2).map(|pack| pack[0]..pack[1]).collect();
        let (l1, l2, table) = (from.numbers()?, from.numbers()?, from.numbers()?);
        let open = (0..from.number()?).map(|_| {
            let counts = from.bytes()?.as_chunks().0.iter();
            Ok(counts.map(|count| u16::from_le_bytes(*count)).collect())
        });
        let open = open.collect::<io::Result<_>>()?;
        let layout = layout::State { next_guest, tail, packs, l1, l2, l2_index, table, open };
        let number = u32::try_from(number).map_err(io::Error::other)?;
        Ok(Self { next, number, start, carry, layout })
    }
}

/// Where an interrupted encoding goes on.
#[derive(Debug)]
pub struct Resumed {
    /// After which part.
    pub(super) standing: Standing,
    /// Digests of all extents before.
    pub(super) digests: Vec<u8>,
    /// The first part's bytes; the header lacks.
    pub(super) first: Vec<u8>,
    /// Size and digest of the parts from 2 on.
    pub(super) parts: Vec<StoredPart>,
}

impl Resumed {
    /// Bytes of the object that are stored.
    #[must_use]
    pub fn stored(&self) -> u64 {
        self.parts.iter().map(|part| part.size.get()).sum()
    }

    /// From what the journal kept: how everything stood after the last part,
    /// the digests after each part, from the first on, the first part's bytes,
    /// and size and digest of the others.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED` when it is not understood.
    pub fn new<'a>(
        standing: &[u8],
        digests: impl IntoIterator<Item = &'a [u8]>,
        first: Vec<u8>,
        parts: Vec<StoredPart>,
    ) -> Result<Self> {
        let read = || -> io::Result<(Standing, Vec<u8>)> {
            let standing = Standing::from_bytes(standing)?;
            let mut all = Vec::new();
            for digests in digests {
                all.extend(zstd::bulk::decompress(digests, LARGEST)?);
            }
            Ok((standing, all))
        };
        let (standing, digests) = read().context(
            Reason::JournalFailed,
            || "what the journal kept of an upload is not understood",
        )?;
        Ok(Self { standing, digests, first, parts })
    }

    /// The extent that comes next.
    #[must_use]
    pub fn next_extent(&self) -> u64 {
        self.standing.next
    }
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, number: u64) {
        self.0.extend(number.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn numbers(&mut self, numbers: &[u64]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.bytes(&bytes);
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self) -> io::Result<u64> {
        let bytes = self.take(8)?.try_into().map_err(io::Error::other)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn bytes(&mut self) -> io::Result<&'a [u8]> {
        let len = usize::try_from(self.number()?).map_err(io::Error::other)?;
        self.take(len)
    }

    fn numbers(&mut self) -> io::Result<Vec<u64>> {
        let bytes = self.bytes()?;
        Ok(bytes.as_chunks().0.iter().map(|number| u64::from_le_bytes(*number)).collect())
    }
}
