//! Steps back when a guest's disk gets slow.

use std::time::Duration;

use crate::{model::ByteSize, port::DiskWork};

/// A guest may wait half as long again as it is used to, or this much more:
/// what is very quick has nothing to lose.
const TOLERATED: Duration = Duration::from_millis(2);

/// The least pace, bytes a second: an image must come to its end before its
/// scratch is full.
const LEAST: u64 = 8 << 20;

/// Above this a limit is none.
const MOST: u64 = 4 << 30;

/// Decides how fast a guest's volume may be read, once a second.
#[derive(Debug)]
pub(super) struct Governor {
    /// What an operation took on the average before.
    usual: Duration,
    before: DiskWork,
    limit: Option<u64>,
}

impl Governor {
    /// For a guest whose disk has done `work` up to now.
    pub(super) fn new(work: DiskWork) -> Self {
        Self { usual: average(work).unwrap_or_default(), before: work, limit: None }
    }

    /// The new limit in bytes a second, of a guest whose disk has done `work`
    /// by now, while `per_second` bytes were read for the image.
    pub(super) fn decide(&mut self, work: DiskWork, per_second: u64) -> Option<u64> {
        let since = DiskWork {
            operations: work.operations.saturating_sub(self.before.operations),
            time: work.time.saturating_sub(self.before.time),
            written: ByteSize::default(),
        };
        self.before = work;
        let tolerated = (self.usual * 3 / 2).max(self.usual + TOLERATED);
        self.limit = match (average(since), self.limit) {
            (Some(latency), _) if latency > tolerated => Some((per_second / 2).max(LEAST)),
            (_, Some(limit)) => Some(limit + limit / 4).filter(|limit| *limit <= MOST),
            (_, None) => None,
        };
        self.limit
    }
}

/// Time of one operation; `None` when there was none.
fn average(work: DiskWork) -> Option<Duration> {
    let operations = u32::try_from(work.operations).unwrap_or(u32::MAX);
    work.time.checked_div(operations)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(operations: u64, millis: u64) -> DiskWork {
        DiskWork { operations, time: Duration::from_millis(millis), ..DiskWork::default() }
    }

    #[test]
    fn a_slow_guest_is_read_slower_until_it_is_quick_again() {
        // A millisecond each.
        let mut governor = Governor::new(work(1000, 1000));
        assert_eq!(governor.decide(work(1100, 1200), 400 << 20), None, "2 ms are tolerated");
        assert_eq!(governor.decide(work(1200, 2200), 400 << 20), Some(200 << 20), "10 ms are not");
        assert_eq!(governor.decide(work(1210, 2400), 150 << 20), Some(75 << 20));
        assert_eq!(governor.decide(work(1220, 2600), 1 << 20), Some(LEAST));
        let mut limit = LEAST;
        for second in 1..100 {
            match governor.decide(work(1220 + second, 2600 + second), limit) {
                Some(more) => {
                    assert!(more > limit);
                    limit = more;
                }
                None => return,
            }
        }
        panic!("{limit} after a hundred seconds");
    }

    #[test]
    fn a_guest_that_does_nothing_is_not_slow() {
        let mut governor = Governor::new(DiskWork::default());
        assert_eq!(governor.decide(DiskWork::default(), 1 << 30), None);
    }
}
