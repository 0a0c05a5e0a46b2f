//! Steps back when a guest's disk gets slow because of us.
//!
//! What is usual is seen by pausing: for an eighth of a second before anything
//! is read, and again when the guest seems slow and the last pause is long
//! ago. A guest that is as slow without us is slow for reasons of its own.

use std::time::Duration;

use super::Burden;
use crate::{model::ByteSize, port::DiskWork};

/// How long reading pauses to see what the guest's disk does without it.
const PAUSE: Duration = Duration::from_millis(125);

/// How often a guest's latency is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Looks after which it is no longer known what is usual: ten seconds.
const STALE: u32 = 40;

/// A guest may always wait this much longer: less is lost among what the host
/// does otherwise.
const TOLERATED: Duration = Duration::from_micros(100);

/// The first pace, bytes a second. It doubles with each look that finds the
/// guest well: a small volume is read before anyone could know what it does
/// to the guest.
const FIRST: u64 = 128 << 20;

/// The least pace, bytes a second: an image must come to its end before its
/// scratch is full.
const LEAST: u64 = 16 << 20;

/// Above this a limit is none.
const MOST: u64 = 4 << 30;

/// Decides how fast a guest's volume may be read, a few times a second.
#[derive(Debug)]
pub(super) struct Governor {
    burden: Burden,
    before: DiskWork,
    /// What an operation takes on the average while nothing is read, if the
    /// guest did anything then.
    usual: Option<Duration>,
    /// Looks since that was seen.
    age: u32,
    /// While reading pauses: what an operation took before, if that was slow.
    paused: Option<Option<Duration>>,
    limit: Option<u64>,
    /// Whether the guest was ever too slow: from then on the pace grows
    /// slowly.
    careful: bool,
}

impl Governor {
    /// For a guest whose disk has done `work` up to now. Nothing may be read
    /// before the first look.
    pub(super) fn new(burden: Burden, work: DiskWork) -> Self {
        Self {
            burden,
            before: work,
            usual: None,
            age: 0,
            paused: Some(None),
            limit: Some(FIRST),
            careful: false,
        }
    }

    /// The limit in bytes a second: 0 in a pause.
    pub(super) fn limit(&self) -> Option<u64> {
        if self.paused.is_some() {
            return Some(0);
        }
        let rate = self.burden.read_rate.map(ByteSize::get);
        self.limit.into_iter().chain(rate).min()
    }

    /// When to look next.
    pub(super) fn next_look(&self) -> Duration {
        if self.paused.is_some() { PAUSE } else { LOOK }
    }

    /// Whether it has ever stepped back.
    pub(super) fn stepped_back(&self) -> bool {
        self.careful
    }

    /// Looks at a guest whose disk has done `work` by now. `per_second` bytes
    /// pass at present: where there was no limit, it begins below that.
    pub(super) fn look(&mut self, work: DiskWork, per_second: u64) {
        let latency = average(work, self.before);
        self.before = work;
        if let Some(met) = self.paused.take() {
            self.usual = latency;
            self.age = 0;
            if met.is_some_and(|met| self.usual.is_none_or(|usual| self.is_slow(met, usual))) {
                self.step_back(per_second);
            }
            return;
        }
        self.age = self.age.saturating_add(1);
        match (latency, self.usual) {
            (Some(latency), Some(usual)) if !self.is_slow(latency, usual) => self.go_on(),
            (Some(_), Some(_)) if self.age < STALE => self.step_back(per_second),
            (Some(latency), _) => self.paused = Some(Some(latency)),
            (None, _) => self.go_on(),
        }
    }

    fn is_slow(&self, latency: Duration, usual: Duration) -> bool {
        let percent = u32::from(self.burden.latency_percent);
        latency > (usual * percent / 100).max(usual + TOLERATED)
    }

    fn step_back(&mut self, per_second: u64) {
        self.careful = true;
        self.limit = Some((self.limit.unwrap_or(per_second.max(FIRST)) / 2).max(LEAST));
    }

    fn go_on(&mut self) {
        let Some(limit) = self.limit else { return };
        let more = if self.careful { limit / 16 } else { limit };
        self.limit = Some(limit + more).filter(|limit| *limit <= MOST);
    }
}

/// Time of one operation between two looks; `None` when there was none.
fn average(now: DiskWork, before: DiskWork) -> Option<Duration> {
    let operations = now.operations.saturating_sub(before.operations);
    let operations = u32::try_from(operations).unwrap_or(u32::MAX);
    now.time.saturating_sub(before.time).checked_div(operations)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BURDEN: Burden = Burden { read_rate: None, latency_percent: 150 };

    /// A guest with a hundred operations between two looks.
    struct Guest(DiskWork);

    impl Guest {
        fn new() -> (Self, Governor) {
            let begun =
                DiskWork { operations: 7, time: Duration::from_secs(7), ..DiskWork::default() };
            (Self(begun), Governor::new(BURDEN, begun))
        }

        /// Each takes so many microseconds.
        fn takes(&mut self, micros: u64, governor: &mut Governor) {
            self.0.operations += 100;
            self.0.time += Duration::from_micros(100 * micros);
            governor.look(self.0, 1 << 30);
        }
    }

    #[test]
    fn a_slow_guest_is_read_slower_until_it_is_quick_again() {
        let (mut guest, mut governor) = Guest::new();
        assert_eq!((governor.limit(), governor.next_look()), (Some(0), PAUSE));
        // A millisecond is usual.
        guest.takes(1000, &mut governor);
        assert_eq!((governor.limit(), governor.next_look()), (Some(FIRST), LOOK));
        guest.takes(1500, &mut governor);
        assert_eq!(governor.limit(), Some(2 * FIRST), "half as much again is tolerated");
        assert!(!governor.stepped_back());
        guest.takes(1501, &mut governor);
        assert_eq!(governor.limit(), Some(FIRST), "more is not");
        assert!(governor.stepped_back());
        for _ in 0..10 {
            guest.takes(10_000, &mut governor);
        }
        assert_eq!(governor.limit(), Some(LEAST));
        let mut limit = LEAST;
        for _ in 0..1000 {
            guest.takes(1000, &mut governor);
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
    fn what_is_very_quick_may_lose_a_little() {
        let (mut guest, mut governor) = Guest::new();
        guest.takes(10, &mut governor);
        guest.takes(110, &mut governor);
        assert!(!governor.stepped_back());
        guest.takes(111, &mut governor);
        assert!(governor.stepped_back());
    }

    #[test]
    fn a_guest_that_is_as_slow_without_us_is_read_on() {
        let (mut guest, mut governor) = Guest::new();
        guest.takes(1000, &mut governor);
        for _ in 0..STALE {
            guest.takes(1000, &mut governor);
        }
        assert_eq!(governor.limit(), None);
        // It has more to do, and reading pauses to see whether that is it.
        guest.takes(5000, &mut governor);
        assert_eq!(governor.limit(), Some(0));
        guest.takes(5000, &mut governor);
        assert_eq!(governor.limit(), None);
        assert!(!governor.stepped_back());
        guest.takes(5000, &mut governor);
        assert_eq!(governor.limit(), None);
        // It was not.
        for _ in 0..STALE {
            guest.takes(5000, &mut governor);
        }
        guest.takes(9000, &mut governor);
        assert_eq!(governor.limit(), Some(0));
        guest.takes(5000, &mut governor);
        assert_eq!(governor.limit(), Some(1 << 29), "half of what passed");
        assert!(governor.stepped_back());
    }

    #[test]
    fn a_guest_that_does_nothing_is_not_slow() {
        let mut governor = Governor::new(BURDEN, DiskWork::default());
        for _ in 0..8 {
            governor.look(DiskWork::default(), 1 << 30);
        }
        assert_eq!(governor.limit(), None);
        // When it begins, what is usual is seen first.
        let mut guest = Guest(DiskWork::default());
        guest.takes(9000, &mut governor);
        assert_eq!(governor.limit(), Some(0));
        guest.takes(9000, &mut governor);
        assert_eq!(governor.limit(), None);
    }

    #[test]
    fn no_guest_bears_more_than_the_rate() {
        let burden = Burden { read_rate: Some(ByteSize::mib(200)), ..BURDEN };
        let mut governor = Governor::new(burden, DiskWork::default());
        assert_eq!(governor.limit(), Some(0));
        governor.look(DiskWork::default(), 0);
        assert_eq!(governor.limit(), Some(FIRST));
        for _ in 0..100 {
            governor.look(DiskWork::default(), 1 << 30);
            assert_eq!(governor.limit(), Some(200 << 20));
        }
    }
}
