//! How an object is cut into parts.
//!
//! Object stores take at most 10,000 parts of an object, and none but the
//! last below some MiB. Small parts are better while they suffice: each is
//! held in memory until the store has it. So they grow with their number, and
//! only where the object may become so large.

use crate::{
    format::qcow2,
    model::{ByteSize, image::MAX_VOLUME_SIZE},
};

/// Parts that an object may have: the limit of S3 and of OCI.
pub const MAX_PARTS: u32 = 10_000;

/// Least bytes of every part but the last: the least that OCI takes. S3 takes
/// 5 MiB.
pub const SMALL: u64 = 10 * ByteSize::MIB;
/// Least bytes of the parts after [`SMALL_PARTS`]: what lets the rest be
/// [`LARGE`] when 80 GB are stored, and three of them fit in the 128 MiB that
/// an image may take until then.
const MEDIUM: u64 = 18 * ByteSize::MIB;
/// Least bytes of the parts after [`MEDIUM_PARTS`], in a volume of up to 400
/// GB. Three of these, one being filled and two on their way, are most of the
/// 256 MiB that such an image may take.
const LARGE: u64 = 58 * ByteSize::MIB;
/// The last part that is [`SMALL`].
const SMALL_PARTS: u32 = 1_024;
/// The last part that is not [`LARGE`]: 80 GB are stored by then.
const MEDIUM_PARTS: u32 = 4_694;

/// Least size of each part of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartPlan {
    small_parts: u32,
    large: u64,
}

impl PartPlan {
    /// The plan for an image of a volume of so many bytes, up to
    /// [`MAX_VOLUME_SIZE`].
    #[must_use]
    pub fn for_volume(size: ByteSize) -> Self {
        let most = qcow2::layout::largest_object(size.get().min(MAX_VOLUME_SIZE.get()));
        if most <= u64::from(MAX_PARTS) * SMALL {
            return Self { small_parts: MAX_PARTS, large: LARGE };
        }
        let before =
            u64::from(SMALL_PARTS) * SMALL + u64::from(MEDIUM_PARTS - SMALL_PARTS) * MEDIUM;
        let each = (most - before).div_ceil(u64::from(MAX_PARTS - MEDIUM_PARTS));
        let large = each.next_multiple_of(ByteSize::MIB).max(LARGE);
        Self { small_parts: SMALL_PARTS, large }
    }

    /// Least bytes of part `number`, unless it is the last.
    #[must_use]
    pub fn size(&self, number: u32) -> u64 {
        match number {
            number if number <= self.small_parts => SMALL,
            number if number <= MEDIUM_PARTS => MEDIUM,
            _ => self.large,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    /// The largest object that the plan has parts for.
    fn room(plan: PartPlan) -> u64 {
        (1..=MAX_PARTS).map(|number| plan.size(number)).sum()
    }

    #[test]
    fn every_volume_fits_in_ten_thousand_parts() {
        for size in [1, GB, 97 * GB, 105 * GB, 400 * GB, 400 << 30, 1 << 40] {
            let plan = PartPlan::for_volume(ByteSize(size));
            let most = qcow2::layout::largest_object(size);
            assert!(most > size && most < size + size / 4096 + (1 << 20), "{size}: {most}");
            assert!(room(plan) >= most, "{size}: {} of {most}", room(plan));
        }
    }

    #[test]
    fn parts_stay_small_while_they_can() {
        let sizes = |volume| {
            let plan = PartPlan::for_volume(ByteSize(volume));
            [1, 1_024, 1_025, 4_694, 4_695, 10_000].map(|n| plan.size(n) / ByteSize::MIB)
        };
        assert_eq!(sizes(100 * GB), [10; 6]);
        assert_eq!(sizes(400 * GB), [10, 10, 18, 18, 58, 58]);
        assert_eq!(sizes(400 << 30), [10, 10, 18, 18, 63, 63]);
        assert_eq!(sizes(1 << 40), [10, 10, 18, 18, 184, 184]);
        let medium: u64 = (1..=MEDIUM_PARTS)
            .map(|number| PartPlan::for_volume(ByteSize(400 * GB)).size(number))
            .sum();
        assert!(medium >= 80 * GB, "{medium} bytes are stored before parts are large");
    }
}
