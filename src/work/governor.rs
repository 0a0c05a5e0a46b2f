//! Steps back when a guest's disk gets slow.

use std::time::Duration;

use super::Burden;
use crate::{model::ByteSize, port::DiskWork};

/// A guest may always wait this much longer: what is very quick has nothing
/// to lose.
const TOLERATED: Duration = Duration::from_millis(2);

/// The first pace, bytes a second. It doubles with each look that finds the
/// guest well: a small volume is read before anyone could know what it does
/// to the guest.
pub(super) const FIRST: u64 = 128 << 20;

/// The least pace, bytes a second: an image must come to its end before its
/// scratch is full.
const LEAST: u64 = 8 << 20;

/// Above this a limit is none.
const MOST: u64 = 4 << 30;

/// Decides how fast a guest's volume may be read, a few times a second.
#[derive(Debug)]
pub(super) struct Governor {
    burden: Burden,
    /// What an operation took on the average before.
    usual: Duration,
    before: DiskWork,
    limit: Option<u64>,
    /// Whether the guest was ever too slow: from then on the pace grows
    /// slowly.
    careful: bool,
}

impl Governor {
    /// For a guest whose disk has done `work` up to now.
    pub(super) fn new(burden: Burden, work: DiskWork) -> Self {
        let usual = average(work).unwrap_or_default();
        Self { burden, usual, before: work, limit: Some(FIRST), careful: false }
    }

    /// The limit in bytes a second.
    pub(super) fn limit(&self) -> Option<u64> {
        let rate = self.burden.read_rate.map(ByteSize::get);
        self.limit.into_iter().chain(rate).min()
    }

    /// Whether it has ever stepped back.
    pub(super) fn stepped_back(&self) -> bool {
        self.careful
    }

    /// Looks at a guest whose disk has done `work` by now. `per_second` bytes
    /// pass at present: where there was no limit, it begins below that.
    pub(super) fn look(&mut self, work: DiskWork, per_second: u64) {
        let since = DiskWork {
            operations: work.operations.saturating_sub(self.before.operations),
            time: work.time.saturating_sub(self.before.time),
            written: ByteSize::default(),
        };
        self.before = work;
        let percent = u32::from(self.burden.latency_percent);
        let tolerated = (self.usual * percent / 100).max(self.usual + TOLERATED);
        self.limit = match (average(since), self.limit) {
            (Some(latency), limit) if latency > tolerated => {
                self.careful = true;
                Some((limit.unwrap_or(per_second.max(FIRST)) / 2).max(LEAST))
            }
            (_, Some(limit)) => {
                let more = if self.careful { limit / 16 } else { limit };
                Some(limit + more).filter(|limit| *limit <= MOST)
            }
            (_, None) => None,
        };
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

    const BURDEN: Burden = Burden { read_rate: None, latency_percent: 150 };

    #[test]
    fn a_slow_guest_is_read_slower_until_it_is_quick_again() {
        // A millisecond each.
        let mut governor = Governor::new(BURDEN, work(1000, 1000));
        assert_eq!(governor.limit(), Some(FIRST));
        governor.look(work(1100, 1200), FIRST);
        assert_eq!(governor.limit(), Some(2 * FIRST), "2 ms are tolerated");
        assert!(!governor.stepped_back());
        governor.look(work(1200, 2200), 100 << 20);
        assert_eq!(governor.limit(), Some(FIRST), "10 ms are not");
        assert!(governor.stepped_back());
        for more in 1..10 {
            governor.look(work(1200 + more, 2200 + 10 * more), 1 << 20);
        }
        assert_eq!(governor.limit(), Some(LEAST));
        let mut limit = LEAST;
        for more in 1..1000 {
            governor.look(work(1209 + more, 2290 + more), limit);
            match governor.limit() {
                Some(more) => {
                    assert!(more > limit);
                    limit = more;
                }
                None => return,
            }
        }
        panic!("{limit} after a thousand looks");
    }

    #[test]
    fn a_guest_that_does_nothing_is_not_slow() {
        let mut governor = Governor::new(BURDEN, DiskWork::default());
        for _ in 0..7 {
            governor.look(DiskWork::default(), 1 << 30);
        }
        assert_eq!(governor.limit(), None);
    }

    #[test]
    fn no_guest_bears_more_than_the_rate() {
        let burden = Burden { read_rate: Some(ByteSize::mib(200)), ..BURDEN };
        let mut governor = Governor::new(burden, DiskWork::default());
        assert_eq!(governor.limit(), Some(FIRST));
        for _ in 0..100 {
            governor.look(DiskWork::default(), 1 << 30);
            assert_eq!(governor.limit(), Some(200 << 20));
        }
    }
}
