//! Puts the answer to one request together from its chunks.
//!
//! Pure: says where bytes belong, and refuses what the protocol forbids.

use std::ops::Range;

use super::{
    fault::{Fault, Violation},
    protocol::{ChunkKind, Fields},
};

/// How many pieces the answer to a request may have: the 512-byte sectors of
/// an extent of 1 MiB, alternating data and holes, and an end.
const MAX_CHUNKS: u32 = 2049;

/// Longest chunk of block status: QEMU sends at most 2^17 descriptors of 8
/// bytes (`NBD_MAX_BLOCK_STATUS_EXTENTS`).
const MAX_STATUS: u32 = 4 + (1 << 20);

/// Longest error chunk: its message's length has 16 bits.
const MAX_ERROR: u32 = 14 + 0xffff;

/// What was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// The bytes of a range.
    Read(Range<u64>),
    /// The map of a range, in this context.
    Status(Range<u64>, u32),
}

/// An extent of a map: its length, and flags as the context defines them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) len: u32,
    pub(super) flags: u32,
}

/// What follows a chunk's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Payload {
    /// An offset in eight bytes, then so many bytes for the buffer.
    Data(u64),
    /// So many bytes for [`Answer::take`].
    Small(usize),
}

/// The answer so far.
#[derive(Debug)]
pub(super) struct Answer {
    asked: Asked,
    /// What has come of a read: ascending, disjoint, merged.
    covered: Vec<Range<u64>>,
    descriptors: Option<Vec<Descriptor>>,
    error: Option<Fault>,
    chunks: u32,
}

impl Answer {
    pub(super) fn to(asked: Asked) -> Self {
        Self { asked, covered: Vec::new(), descriptors: None, error: None, chunks: 0 }
    }

    pub(super) fn asked(&self) -> &Asked {
        &self.asked
    }

    /// Whether a chunk of `kind` and `len` bytes may come now, and how it is
    /// to be read.
    pub(super) fn expect(&mut self, kind: ChunkKind, len: u32) -> Result<Payload, Violation> {
        self.chunks += 1;
        if self.chunks > MAX_CHUNKS {
            return Err(Violation::Pieces);
        }
        let (minimum, maximum) = match (kind, &self.asked) {
            (ChunkKind::None, _) => (0, 0),
            (ChunkKind::Data, Asked::Read(range)) => {
                let most = (range.end - range.start).saturating_add(8);
                return match u64::from(len) {
                    ..9 => Err(Violation::Short),
                    len if len > most => Err(Violation::Outside),
                    len => Ok(Payload::Data(len - 8)),
                };
            }
            (ChunkKind::Hole, Asked::Read(_)) => (12, 12),
            (ChunkKind::BlockStatus, Asked::Status(..)) if self.descriptors.is_none() => {
                (12, MAX_STATUS)
            }
            (ChunkKind::Error, _) => (6, MAX_ERROR),
            (ChunkKind::ErrorAt, _) => (14, MAX_ERROR),
            _ => return Err(Violation::Unexpected),
        };
        match len {
            len if len < minimum => Err(Violation::Short),
            len if len > maximum => Err(Violation::TooLong(len)),
            len => Ok(Payload::Small(len as usize)),
        }
    }

    /// Where in the request `len` bytes that begin at `offset` belong. They
    /// count as come.
    pub(super) fn place(&mut self, offset: u64, len: u64) -> Result<Range<usize>, Violation> {
        let Asked::Read(asked) = &self.asked else { return Err(Violation::Unexpected) };
        let end = offset.checked_add(len).ok_or(Violation::Outside)?;
        if offset < asked.start || end > asked.end {
            return Err(Violation::Outside);
        }
        let start = asked.start;
        cover(&mut self.covered, offset..end)?;
        let within = |at: u64| usize::try_from(at - start).map_err(|_| Violation::Outside);
        Ok(within(offset)?..within(end)?)
    }

    /// Takes the payload of any chunk but data. Returns which bytes of the
    /// request are zeroes, where that is what it says.
    pub(super) fn take(
        &mut self,
        kind: ChunkKind,
        payload: &[u8],
    ) -> Result<Option<Range<usize>>, Violation> {
        let mut fields = Fields::new(payload);
        match kind {
            ChunkKind::None => {}
            ChunkKind::Data => return Err(Violation::Unexpected),
            ChunkKind::Hole => {
                let (offset, len) = (fields.u64()?, u64::from(fields.u32()?));
                if len == 0 {
                    return Err(Violation::EmptyExtent);
                }
                return self.place(offset, len).map(Some);
            }
            ChunkKind::BlockStatus => self.descriptors = Some(self.descriptors_of(fields)?),
            ChunkKind::Error | ChunkKind::ErrorAt => {
                let (code, len) = (fields.u32()?, fields.u16()?);
                let message = fields.bytes(usize::from(len))?;
                if code == 0 {
                    return Err(Violation::NoError);
                }
                // The first error is the cause; others follow from it.
                self.error.get_or_insert_with(|| Fault::refused(code, message));
            }
        }
        Ok(None)
    }

    fn descriptors_of(&self, mut fields: Fields<'_>) -> Result<Vec<Descriptor>, Violation> {
        let Asked::Status(range, context) = &self.asked else { return Err(Violation::Unexpected) };
        if fields.u32()? != *context {
            return Err(Violation::Context);
        }
        let (descriptors, rest) = fields.rest().as_chunks::<8>();
        if descriptors.is_empty() || !rest.is_empty() {
            return Err(Violation::Short);
        }
        let mut left = range.end - range.start;
        let mut found = Vec::with_capacity(descriptors.len());
        for descriptor in descriptors {
            let mut fields = Fields::new(descriptor);
            let (len, flags) = (fields.u32()?, fields.u32()?);
            if len == 0 {
                return Err(Violation::EmptyExtent);
            }
            // Only the last may go beyond what was asked, so nothing may
            // follow when nothing is left.
            if left == 0 {
                return Err(Violation::Outside);
            }
            let within = u64::from(len).min(left);
            left -= within;
            #[allow(clippy::cast_possible_truncation, reason = "not more than `len`")]
            found.push(Descriptor { len: within as u32, flags });
        }
        Ok(found)
    }

    /// The end of the answer: what was asked is complete, or the server's
    /// error, or it is neither.
    pub(super) fn finish(self) -> Result<Vec<Descriptor>, Fault> {
        if let Some(error) = self.error {
            return Err(error);
        }
        match self.asked {
            Asked::Read(range) if self.covered == [range.clone()] => Ok(Vec::new()),
            Asked::Read(_) => Err(Violation::Incomplete.into()),
            Asked::Status(..) => self.descriptors.ok_or(Fault::Violation(Violation::Incomplete)),
        }
    }
}

/// Adds `range` to disjoint ranges.
fn cover(covered: &mut Vec<Range<u64>>, range: Range<u64>) -> Result<(), Violation> {
    // Answers come in order: the place is the end as a rule.
    let at = covered.partition_point(|before| before.end <= range.start);
    if covered.get(at).is_some_and(|after| after.start < range.end) {
        return Err(Violation::Overlap);
    }
    let joins_before = at > 0 && covered[at - 1].end == range.start;
    let joins_after = covered.get(at).is_some_and(|after| after.start == range.end);
    match (joins_before, joins_after) {
        (true, true) => {
            covered[at - 1].end = covered[at].end;
            covered.remove(at);
        }
        (true, false) => covered[at - 1].end = range.end,
        (false, true) => covered[at].start = range.start,
        (false, false) => covered.insert(at, range),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hole(offset: u64, len: u32) -> Vec<u8> {
        [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()
    }

    fn status(context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
        let numbers = extents.iter().flat_map(|&(len, flags)| [len, flags]);
        std::iter::once(context).chain(numbers).flat_map(u32::to_be_bytes).collect()
    }

    /// Feeds one small chunk, as the client does.
    fn feed(answer: &mut Answer, kind: ChunkKind, payload: &[u8]) -> Result<(), Violation> {
        match answer.expect(kind, payload.len().try_into().unwrap())? {
            Payload::Small(len) => assert_eq!(len, payload.len()),
            Payload::Data(_) => panic!("not a small chunk"),
        }
        answer.take(kind, payload).map(|_| ())
    }

    #[test]
    fn a_read_is_complete_when_every_byte_came_once() {
        let mut answer = Answer::to(Asked::Read(1000..2000));
        assert_eq!(answer.expect(ChunkKind::Data, 308), Ok(Payload::Data(300)));
        assert_eq!(answer.place(1700, 300), Ok(700..1000));
        assert_eq!(answer.place(1000, 300), Ok(0..300));
        assert_eq!(answer.take(ChunkKind::Hole, &hole(1300, 400)), Ok(Some(300..700)));
        assert!(answer.finish().unwrap().is_empty());
    }

    #[test]
    fn what_was_not_asked_or_came_before_is_refused() {
        let mut answer = Answer::to(Asked::Read(1000..2000));
        assert_eq!(answer.place(900, 200), Err(Violation::Outside));
        assert_eq!(answer.place(1900, 101), Err(Violation::Outside));
        assert_eq!(answer.place(u64::MAX, 2), Err(Violation::Outside));
        assert_eq!(answer.place(1200, 100), Ok(200..300));
        for (offset, len) in [(1200, 100), (1299, 1), (1100, 101), (1100, 900), (1250, 10)] {
            assert_eq!(answer.place(offset, len), Err(Violation::Overlap), "{offset} {len}");
        }
        assert_eq!(answer.expect(ChunkKind::Data, 1009), Err(Violation::Outside));
        assert_eq!(answer.expect(ChunkKind::Data, 8), Err(Violation::Short));
        assert_eq!(answer.expect(ChunkKind::Hole, 11), Err(Violation::Short));
        assert_eq!(answer.expect(ChunkKind::None, 1), Err(Violation::TooLong(1)));
        assert_eq!(answer.expect(ChunkKind::BlockStatus, 12), Err(Violation::Unexpected));
        assert_eq!(feed(&mut answer, ChunkKind::Hole, &hole(1500, 0)), Err(Violation::EmptyExtent));
        assert!(matches!(answer.finish(), Err(Fault::Violation(Violation::Incomplete))));
    }

    #[test]
    fn an_answer_has_an_end() {
        let mut answer = Answer::to(Asked::Read(0..1 << 20));
        for _ in 0..MAX_CHUNKS {
            answer.expect(ChunkKind::Data, 9).unwrap();
        }
        assert_eq!(answer.expect(ChunkKind::Data, 9), Err(Violation::Pieces));
    }

    #[test]
    fn an_error_outweighs_data_and_keeps_the_servers_words() {
        let mut answer = Answer::to(Asked::Read(0..10));
        answer.place(0, 10).unwrap();
        let words = b"reading\x1b[2J failed";
        let message = [&[0, 0, 0, 22, 0, 18][..], words];
        feed(&mut answer, ChunkKind::Error, &message.concat()).unwrap();
        feed(&mut answer, ChunkKind::ErrorAt, &[0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]).unwrap();
        let error = answer.finish().unwrap_err();
        assert_eq!(error.to_string(), "the server answers EINVAL: \"reading [2J failed\"");

        let mut answer = Answer::to(Asked::Read(0..10));
        let cut = [0, 0, 0, 5, 0, 4, b'a', b'b'];
        assert_eq!(feed(&mut answer, ChunkKind::Error, &cut), Err(Violation::Short));
        assert_eq!(feed(&mut answer, ChunkKind::Error, &[0; 6]), Err(Violation::NoError));
    }

    #[test]
    fn a_map_has_extents_with_a_length_and_only_its_last_is_cut() {
        let map = |extents: &[(u32, u32)]| {
            let mut answer = Answer::to(Asked::Status(4096..8192, 9));
            feed(&mut answer, ChunkKind::BlockStatus, &status(9, extents))?;
            assert_eq!(
                answer.expect(ChunkKind::BlockStatus, 12),
                Err(Violation::Unexpected),
                "a map comes once"
            );
            Ok(answer.finish().unwrap().into_iter().map(|d| (d.len, d.flags)).collect::<Vec<_>>())
        };
        assert_eq!(map(&[(512, 3), (512, 0)]), Ok(vec![(512, 3), (512, 0)]));
        assert_eq!(map(&[(4000, 1), (u32::MAX, 0)]), Ok(vec![(4000, 1), (96, 0)]));
        assert_eq!(map(&[(4096, 1), (1, 0)]), Err(Violation::Outside));
        assert_eq!(map(&[(512, 1), (0, 0)]), Err(Violation::EmptyExtent));
        assert_eq!(map(&[]), Err(Violation::Short));
        let mut answer = Answer::to(Asked::Status(4096..8192, 9));
        let other = status(8, &[(512, 0)]);
        assert_eq!(feed(&mut answer, ChunkKind::BlockStatus, &other), Err(Violation::Context));
        let ragged = [&status(9, &[(512, 0)])[..], &[0; 4]].concat();
        assert_eq!(feed(&mut answer, ChunkKind::BlockStatus, &ragged), Err(Violation::Short));
        assert!(matches!(answer.finish(), Err(Fault::Violation(Violation::Incomplete))));
    }

    proptest! {
        /// Any pieces in any order: complete if and only if they cover the
        /// request, and never written twice or outside.
        #[test]
        fn pieces_cover_or_are_refused(pieces in prop::collection::vec((0..80_u64, 1..40_u64), 0..12)) {
            let mut answer = Answer::to(Asked::Read(10..70));
            let mut written = [0_u8; 60];
            for (offset, len) in pieces {
                let fits = offset >= 10 && offset + len <= 70;
                let free = (offset..offset + len)
                    .all(|at| fits && written[usize::try_from(at - 10).unwrap()] == 0);
                match answer.place(offset, len) {
                    Ok(place) => {
                        prop_assert!(free);
                        prop_assert_eq!(place.len() as u64, len);
                        written[place].fill(1);
                    }
                    Err(violation) => {
                        prop_assert!(!free);
                        prop_assert_eq!(violation == Violation::Outside, !fits);
                    }
                }
            }
            prop_assert_eq!(answer.finish().is_ok(), written.iter().all(|&b| b == 1));
        }

        #[test]
        fn a_map_never_leaves_its_range(bytes: Vec<u8>, len in 1..1_u64 << 33) {
            let mut answer = Answer::to(Asked::Status(0..len, 0));
            let payload = [&[0; 4][..], &bytes].concat();
            if feed(&mut answer, ChunkKind::BlockStatus, &payload).is_ok() {
                let found = answer.finish().unwrap();
                prop_assert!(found.iter().map(|d| u64::from(d.len)).sum::<u64>() <= len);
            }
        }
    }
}
