//! The real clock, and chance that cannot fail once the daemon runs.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use crate::{
    error::{Context, Reason, Result},
    model::Timestamp,
    port::Clock,
};

/// The host's clock, and a random stream from one secret of the kernel's:
/// BLAKE3 keyed with it, over a counter.
pub struct SystemClock {
    secret: [u8; 32],
    drawn: AtomicU64,
}

impl SystemClock {
    /// # Errors
    ///
    /// `INTERNAL` where the kernel gives no random bytes.
    pub fn new() -> Result<Self> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret)
            .context(Reason::Internal, || "the kernel gives no random bytes")?;
        Ok(Self { secret, drawn: AtomicU64::new(0) })
    }
}

impl fmt::Debug for SystemClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SystemClock")
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        SystemTime::now().into()
    }

    fn random(&self) -> u128 {
        let count = self.drawn.fetch_add(1, Ordering::Relaxed);
        let hash = blake3::keyed_hash(&self.secret, &count.to_le_bytes());
        let mut bits = [0; 16];
        bits.copy_from_slice(&hash.as_bytes()[..16]);
        u128::from_le_bytes(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_draws_are_equal() {
        let (a, b) = (SystemClock::new().unwrap(), SystemClock::new().unwrap());
        let draws = [a.random(), a.random(), b.random(), b.random()];
        for (index, draw) in draws.iter().enumerate() {
            assert!(!draws[..index].contains(draw));
        }
        assert!(a.now() > Timestamp::from_millis(1_600_000_000_000));
    }
}
