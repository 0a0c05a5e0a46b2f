//! Keeps reads to a pace that may change at any time.

use std::time::{Duration, Instant};

use crate::port::Pace;

/// What may be saved up beside what is asked for: so much time of the pace.
/// What is read at once, a guest waits for at once: at 32 MiB/s, bursts of
/// 125 ms made one of twenty writes of a guest 5 ms longer.
const BURST: Duration = Duration::from_millis(8);

/// What may be read by now.
#[derive(Debug)]
pub(super) struct Budget {
    pace: Pace,
    /// Bytes.
    left: u64,
    since: Instant,
}

impl Budget {
    pub(super) fn new(pace: Pace) -> Self {
        Self { pace, left: 0, since: Instant::now() }
    }

    /// Whether `bytes` may be read now; if so, they are spent.
    pub(super) fn take(&mut self, bytes: u64) -> bool {
        self.take_at(bytes, Instant::now())
    }

    /// How long it takes to earn what lacks of `bytes`.
    pub(super) fn due(&self, bytes: u64) -> Duration {
        let Some(per_second) = self.pace.get() else { return Duration::ZERO };
        let lacking = bytes.saturating_sub(self.left);
        let micros = u128::from(lacking) * 1_000_000 / u128::from(per_second.max(1));
        // Twelve days at most, for an extent at a byte a second: no overflow.
        let earned = self.since + Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
        earned.saturating_duration_since(Instant::now())
    }

    fn take_at(&mut self, bytes: u64, now: Instant) -> bool {
        let Some(per_second) = self.pace.get() else { return true };
        let of = |time: Duration| {
            u64::try_from(u128::from(per_second) * time.as_micros() / 1_000_000).unwrap_or(u64::MAX)
        };
        // What is less than a byte is waited for.
        let earned = of(now.saturating_duration_since(self.since));
        if earned > 0 {
            let most = of(BURST).saturating_add(bytes);
            self.left = self.left.saturating_add(earned).min(most);
            self.since = now;
        }
        let enough = self.left >= bytes;
        if enough {
            self.left -= bytes;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Extents that are read in `seconds` by who asks every millisecond.
    fn read(budget: &mut Budget, from: Instant, seconds: u64) -> u64 {
        let times = (0..seconds * 1000).map(|millis| from + Duration::from_millis(millis));
        times.filter(|now| budget.take_at(MIB, *now)).count() as u64
    }

    #[test]
    fn no_more_is_read_than_the_pace_allows_and_not_much_less() {
        for per_second in [MIB, 7 * MIB, 100 * MIB] {
            let pace = Pace::default();
            pace.set(Some(per_second));
            let mut budget = Budget::new(pace);
            let from = budget.since;
            let extents = read(&mut budget, from, 10);
            let most = per_second * 10 / MIB;
            assert!(extents <= most && extents + 1 >= most, "{per_second}: {extents} of {most}");
        }
    }

    #[test]
    fn a_pause_earns_little() {
        let pace = Pace::default();
        pace.set(Some(80 * MIB));
        let mut budget = Budget::new(pace.clone());
        let later = budget.since + Duration::from_secs(100);
        let at_once = (0..100).filter(|_| budget.take_at(MIB, later)).count();
        assert_eq!(at_once, 1);
        pace.set(Some(1000 * MIB));
        let later = later + Duration::from_secs(100);
        assert_eq!((0..100).filter(|_| budget.take_at(MIB, later)).count(), 9);
        // And without a limit there is none.
        pace.set(None);
        assert!((0..1000).all(|_| budget.take_at(MIB, later)));
    }
}
