//! Values that check themselves, so that an error has their place.

use std::{
    fmt,
    num::{NonZeroU16, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Deserializer, de};

use crate::model::ByteSize;
use crate::model::size::parse as parse_size;

pub(super) const DEFAULT_CAPTURES: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);
pub(super) const DEFAULT_READ_DEPTH: NonZeroU16 = NonZeroU16::MIN.saturating_add(15);
/// Buffers of 1 MiB each: more would break the bound on memory.
const MAX_READ_DEPTH: u16 = 256;

/// imaged's promise: no instance stays locked longer without progress.
pub(super) const MAX_PROGRESS_TIMEOUT: Duration = Duration::from_secs(1200);

/// How many threads encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncodeThreads {
    /// An eighth of the cores, at least one.
    Share,
    /// One for each core.
    All,
    /// So many.
    Count(NonZeroUsize),
}

impl<'de> Deserialize<'de> for EncodeThreads {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = EncodeThreads;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of threads from 1 on, or \"all\"")
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<EncodeThreads, E> {
                let count = usize::try_from(value).ok().and_then(NonZeroUsize::new);
                count
                    .map(EncodeThreads::Count)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(value), &self))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<EncodeThreads, E> {
                match value {
                    "all" => Ok(EncodeThreads::All),
                    _ => Err(E::invalid_value(de::Unexpected::Str(value), &self)),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A size, where one is given.
pub(super) fn size_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<ByteSize>, D::Error> {
    size(deserializer).map(Some)
}

/// Percent of what is usual: 110 to 1000.
pub(super) fn latency_percent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let percent = u16::deserialize(deserializer)?;
    match percent {
        110..=1000 => Ok(percent),
        _ => Err(de::Error::custom("a latency of 110 to 1000 percent of the usual can be kept")),
    }
}

pub(super) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
    struct Visitor;
    impl de::Visitor<'_> for Visitor {
        type Value = ByteSize;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a size with its unit, such as \"400GiB\"")
        }
        fn visit_str<E: de::Error>(self, value: &str) -> Result<ByteSize, E> {
            parse_size(value).map_err(E::custom)
        }
    }
    deserializer.deserialize_str(Visitor)
}

pub(super) fn read_depth<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<NonZeroU16, D::Error> {
    let depth = i64::deserialize(deserializer)?;
    u16::try_from(depth)
        .ok()
        .filter(|depth| *depth <= MAX_READ_DEPTH)
        .and_then(NonZeroU16::new)
        .ok_or_else(|| de::Error::custom(format!("{depth} is not from 1 to {MAX_READ_DEPTH}")))
}

pub(super) fn progress_timeout<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Duration, D::Error> {
    let seconds = i64::deserialize(deserializer)?;
    let max = MAX_PROGRESS_TIMEOUT.as_secs();
    u64::try_from(seconds)
        .ok()
        .filter(|seconds| (1..=max).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| de::Error::custom(format!("{seconds} is not from 1 to {max} seconds")))
}

/// A relative path would depend on where the daemon was started.
fn check_absolute<E: de::Error>(path: PathBuf) -> Result<PathBuf, E> {
    match path.is_absolute() {
        true => Ok(path),
        false => Err(E::custom(format!("{path:?} is not an absolute path"))),
    }
}

pub(super) fn absolute<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    check_absolute(PathBuf::deserialize(deserializer)?)
}

pub(super) fn absolute_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    absolute(deserializer).map(Some)
}

pub(super) fn absolute_paths<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<PathBuf>, D::Error> {
    let paths = Vec::<PathBuf>::deserialize(deserializer)?;
    paths.into_iter().map(check_absolute).collect()
}
