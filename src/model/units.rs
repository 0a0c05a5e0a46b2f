//! Sizes as types.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A count of bytes.
///
/// `Display` rounds to three digits with a binary unit, for people; `{:#}`
/// adds the exact count.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// 2^10 bytes.
    pub const KIB: u64 = 1 << 10;
    /// 2^20 bytes.
    pub const MIB: u64 = 1 << 20;
    /// 2^30 bytes.
    pub const GIB: u64 = 1 << 30;

    /// `count` times 2^20 bytes.
    #[must_use]
    pub const fn mib(count: u64) -> Self {
        Self(count * Self::MIB)
    }

    /// `count` times 2^30 bytes.
    #[must_use]
    pub const fn gib(count: u64) -> Self {
        Self(count * Self::GIB)
    }

    /// The bytes as a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// In units of 2^20 bytes, rounded up: OCI's `sizeInMBs`.
    #[must_use]
    pub const fn mib_rounded_up(self) -> u64 {
        self.0.div_ceil(Self::MIB)
    }
}

impl fmt::Display for ByteSize {
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < Self::KIB {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 999.5 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let digits = match value {
            v if v < 9.995 => 2,
            v if v < 99.95 => 1,
            _ => 0,
        };
        write!(f, "{value:.digits$} {}", UNITS[unit])?;
        if f.alternate() {
            write!(f, " ({} bytes)", self.0)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        let shown = [0, 999, 1024, 10 << 20, (4 << 30) + 5, 400_000_000_000]
            .map(|bytes| ByteSize(bytes).to_string());
        assert_eq!(shown, ["0 B", "999 B", "1.00 KiB", "10.0 MiB", "4.00 GiB", "373 GiB"]);
        assert_eq!(format!("{:#}", ByteSize(1536)), "1.50 KiB (1536 bytes)");
    }
}
