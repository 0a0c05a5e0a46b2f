//! Which bytes of a volume may be anything but zeroes, and in which order to
//! read it.

use std::{io, iter::Peekable, ops::Range, os::fd::AsFd, slice};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

use crate::model::image::EXTENT_SIZE;

/// How many ranges a map has at most: one mebibyte of them. A volume in more
/// pieces gets a coarser map.
const MAX_RANGES: usize = 65_536;

/// Ranges of data, ascending and disjoint, with small gaps filled.
///
/// A gap smaller than an extent hides no whole extent of zeroes, so knowing
/// it saves nothing.
#[derive(Debug)]
pub(super) struct Map {
    ranges: Vec<Range<u64>>,
    gap: u64,
    limit: usize,
}

impl Map {
    pub(super) fn new() -> Self {
        Self::with_limit(MAX_RANGES)
    }

    fn with_limit(limit: usize) -> Self {
        Self { ranges: Vec::new(), gap: EXTENT_SIZE, limit: limit.max(1) }
    }

    /// Adds a range that begins at or after the end of the last one.
    pub(super) fn push(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if range.start.saturating_sub(last.end) < self.gap => last.end = range.end,
            _ => self.ranges.push(range),
        }
        while self.ranges.len() > self.limit {
            self.gap = self.gap.saturating_mul(2);
            let gap = self.gap;
            self.ranges.dedup_by(|next, last| {
                let close = next.start - last.end < gap;
                if close {
                    last.end = next.end;
                }
                close
            });
        }
    }

    pub(super) fn into_ranges(self) -> Vec<Range<u64>> {
        self.ranges
    }
}

/// Where `file` has data within `window`, as offsets from the window's start
/// (`SEEK_DATA` and `SEEK_HOLE`, lseek(2)). The caller has flushed the file.
///
/// A file that changes meanwhile gives a map that is out of date, never one
/// that leaves the window.
pub(super) fn data_of_file(file: impl AsFd, window: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let seek = |at: u64, whence| -> io::Result<Option<u64>> {
        let at = i64::try_from(at).map_err(io::Error::other)?;
        match lseek(&file, at, whence) {
            Ok(found) => u64::try_from(found).map(Some).map_err(io::Error::other),
            // No more data: the rest of the file is a hole.
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    };
    let mut map = Map::new();
    let mut at = window.start;
    while at < window.end {
        let Some(data) = seek(at, Whence::SeekData)?.filter(|&data| data < window.end) else {
            break;
        };
        let hole = seek(data, Whence::SeekHole)?.unwrap_or(window.end).min(window.end);
        if hole <= data || data < at {
            return Err(io::Error::other("the file's map changes while it is read"));
        }
        map.push(data - window.start..hole - window.start);
        at = hole;
    }
    Ok(map.into_ranges())
}

/// The whole of a volume of `size` bytes.
pub(super) fn everything(size: u64) -> Vec<Range<u64>> {
    let mut map = Map::new();
    map.push(0..size);
    map.into_ranges()
}

/// All of both maps.
pub(super) fn united(one: &[Range<u64>], other: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = one.iter().chain(other).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let (mut map, mut end) = (Map::new(), 0);
    for range in ranges {
        map.push(range.start.max(end)..range.end.max(end));
        end = end.max(range.end);
    }
    map.into_ranges()
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// These extents are zeroes.
    Zeroes { first: u64, count: u64 },
    /// Read this extent.
    Read { index: u64 },
}

/// The steps that cover a volume, in order, every extent once.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    next: u64,
    count: u64,
    data: Peekable<slice::Iter<'a, Range<u64>>>,
}

impl<'a> Plan<'a> {
    /// For a volume of `size` bytes with data in `data`, which is ascending.
    pub(super) fn new(size: u64, data: &'a [Range<u64>]) -> Self {
        Self { next: 0, count: size.div_ceil(EXTENT_SIZE), data: data.iter().peekable() }
    }

    /// The same from this extent on.
    pub(super) fn from(mut self, extent: u64) -> Self {
        self.next = extent.min(self.count);
        self
    }
}

impl Iterator for Plan<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let first = self.next;
        if first == self.count {
            return None;
        }
        while self.data.next_if(|range| range.end.div_ceil(EXTENT_SIZE) <= first).is_some() {}
        let data = self.data.peek().map_or(self.count, |range| range.start / EXTENT_SIZE);
        Some(if data > first {
            self.next = data.min(self.count);
            Step::Zeroes { first, count: self.next - first }
        } else {
            self.next = first + 1;
            Step::Read { index: first }
        })
    }
}

/// How many extents hold data, at most `limit`.
pub(super) fn extents_to_read(size: u64, data: &[Range<u64>], limit: usize) -> usize {
    Plan::new(size, data).filter(|step| matches!(step, Step::Read { .. })).take(limit).count()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    const E: u64 = EXTENT_SIZE;

    #[test]
    fn small_gaps_are_filled_and_large_ones_kept() {
        let mut map = Map::new();
        for range in [10..20, 20..30, 30 + E - 1..2 * E, 3 * E..3 * E + 1, 9 * E..9 * E] {
            map.push(range);
        }
        assert_eq!(map.into_ranges(), [10..2 * E, 3 * E..3 * E + 1]);
    }

    #[test]
    fn a_volume_in_too_many_pieces_gets_a_coarser_map() {
        let mut map = Map::with_limit(4);
        for at in 0..40 {
            map.push(at * 3 * E..at * 3 * E + 1);
        }
        let ranges = map.into_ranges();
        assert!(ranges.len() <= 4, "{ranges:?}");
        for at in 0..40 {
            assert!(ranges.iter().any(|range| range.contains(&(at * 3 * E))), "{at}");
        }
    }

    #[test]
    fn holes_of_a_file_are_found_within_a_window() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * E).unwrap();
        file.write_all_at(&[1; 4096], 4 * E).unwrap();
        file.write_all_at(&[1; 4096], 12 * E).unwrap();
        file.sync_data().unwrap();
        assert_eq!(
            data_of_file(&file, 0..16 * E).unwrap(),
            [4 * E..4 * E + 4096, 12 * E..12 * E + 4096]
        );
        // As a loop device with an offset and a limit sees it.
        assert_eq!(
            data_of_file(&file, 4 * E + 1024..12 * E + 512).unwrap(),
            [0..3072, 8 * E - 1024..8 * E - 512]
        );
        assert_eq!(data_of_file(&file, 5 * E..6 * E).unwrap(), []);
    }

    #[test]
    fn steps_follow_the_data() {
        let data = [E + 1..E + 2, 3 * E - 1..4 * E + 1];
        assert_eq!(
            Plan::new(7 * E + 1, &data).collect::<Vec<_>>(),
            [
                Step::Zeroes { first: 0, count: 1 },
                Step::Read { index: 1 },
                Step::Read { index: 2 },
                Step::Read { index: 3 },
                Step::Read { index: 4 },
                Step::Zeroes { first: 5, count: 3 },
            ]
        );
        assert_eq!(extents_to_read(7 * E + 1, &data, 16), 4);
        assert_eq!(extents_to_read(7 * E + 1, &data, 3), 3);
        assert_eq!(Plan::new(1, &[]).collect::<Vec<_>>(), [Step::Zeroes { first: 0, count: 1 }]);
    }

    fn volumes() -> impl Strategy<Value = (u64, Vec<Range<u64>>)> {
        let cuts = prop::collection::vec(0..64 * E, 0..20);
        (1..64 * E, cuts).prop_map(|(size, mut cuts)| {
            cuts.retain(|&cut| cut < size);
            cuts.sort_unstable();
            cuts.dedup();
            (size, cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect())
        })
    }

    proptest! {
        #[test]
        fn every_extent_has_one_step_and_no_data_is_skipped((size, data) in volumes()) {
            let mut next = 0;
            for step in Plan::new(size, &data) {
                match step {
                    Step::Zeroes { first, count } => {
                        prop_assert_eq!(first, next);
                        prop_assert!(count > 0);
                        next += count;
                        let zeroes = first * E..next * E;
                        prop_assert!(data.iter().all(|d| d.end <= zeroes.start || d.start >= zeroes.end));
                    }
                    Step::Read { index } => {
                        prop_assert_eq!(index, next);
                        next += 1;
                        let extent = index * E..next * E;
                        prop_assert!(data.iter().any(|d| d.start < extent.end && d.end > extent.start));
                    }
                }
            }
            prop_assert_eq!(next, size.div_ceil(E));
        }

        #[test]
        fn a_map_covers_what_was_pushed_in_order((_, data) in volumes(), limit in 1..8_usize) {
            let mut map = Map::with_limit(limit);
            data.iter().cloned().for_each(|range| map.push(range));
            let ranges = map.into_ranges();
            prop_assert!(ranges.len() <= limit);
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end + E <= pair[1].start));
            for range in &data {
                prop_assert!(ranges.iter().any(|r| r.start <= range.start && r.end >= range.end));
            }
        }
    }
}
