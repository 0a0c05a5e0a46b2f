//! Single values in words, as people and OCI write them.

use std::{borrow::Cow, time::Duration};

use prost_types::Timestamp as ProtoTime;

use crate::{model::Timestamp, pb};

/// What the OCI SDKs write for a value that they are too old to know.
const NEWER_VALUE: &str = "UNKNOWN_ENUM_VALUE";

/// `text` without what would move a cursor or change a colour. Names come
/// from guests and from other users.
pub(in crate::ctl) fn clean(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let escape = |c: char| {
        if c.is_control() { c.escape_default().to_string() } else { c.to_string() }
    };
    Cow::Owned(text.chars().map(escape).collect())
}

/// `None` for an empty text.
pub(in crate::ctl) fn known(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// A point in time, if it can be one.
pub(in crate::ctl) fn time(time: Option<&ProtoTime>) -> Option<Timestamp> {
    let time = time?;
    let seconds = u64::try_from(time.seconds).ok()?;
    let millis = u64::try_from(time.nanos).ok()? / 1_000_000;
    // The last second that RFC 3339 can write.
    (seconds <= 253_402_300_799).then(|| Timestamp::from_millis(seconds * 1000 + millis))
}

/// `3s`, `2m10s`, `1h02m`, `3d04h`.
pub(in crate::ctl) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 if !duration.is_zero() => format!("{}ms", duration.as_millis()),
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}

/// Time since then in one unit: `3s`, `2m`, `5h`, `12d`.
pub(in crate::ctl) fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.since(then).as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// How long work took, if it has begun and ended.
pub(in crate::ctl) fn took(work: &pb::WorkRequest) -> Option<String> {
    let started = time(work.time_started.as_ref())?;
    let finished = time(work.time_finished.as_ref())?;
    Some(duration(finished.since(started)))
}

/// `create image`.
pub(in crate::ctl) fn operation(work: &pb::WorkRequest) -> String {
    match operation_type(work) {
        Some(word) if word != NEWER_VALUE => word.to_ascii_lowercase().replace('_', " "),
        _ => "the work".into(),
    }
}

/// `IN_PROGRESS`; `UNKNOWN` where imaged does not say.
pub(in crate::ctl) fn work_status(work: &pb::WorkRequest) -> &'static str {
    status(work).unwrap_or("UNKNOWN")
}

/// OCI's word for a value of the API: `None` where it is not given.
macro_rules! api_word {
    ($($(#[$doc:meta])* $name:ident($message:ty).$field:ident: $api:ty,)+) => {
        $($(#[$doc])* pub(in crate::ctl) fn $name(message: &$message) -> Option<&'static str> {
            match <$api>::try_from(message.$field) {
                Ok(value) if message.$field != 0 => Some(value.as_str_name()),
                Ok(_) => None,
                Err(_) => Some(NEWER_VALUE),
            }
        })+
    };
}

api_word! {
    /// Of a work request.
    status(pb::WorkRequest).status: pb::work_request::Status,
    /// Of a work request.
    operation_type(pb::WorkRequest).operation_type: pb::work_request::OperationType,
    /// Of a work request's resource.
    action_type(pb::WorkRequestResource).action_type: pb::work_request_resource::ActionType,
    /// Of an entry of a trace.
    trace_channel(pb::TraceEntry).channel: pb::trace_entry::Channel,
    /// Of an entry of a trace.
    trace_kind(pb::TraceEntry).kind: pb::trace_entry::Kind,
    /// Of an image.
    image_state(pb::Image).lifecycle_state: pb::image::LifecycleState,
    /// Of an image.
    launch_mode(pb::Image).launch_mode: pb::LaunchMode,
    /// Of an image.
    compression(pb::Image).compression: pb::Compression,
    /// Of an image.
    snapshot(pb::Image).snapshot: pb::Snapshot,
    /// Of an instance.
    instance_state(pb::Instance).lifecycle_state: pb::instance::LifecycleState,
    /// Of an iSCSI attachment.
    iscsi_state(pb::IscsiAttachment).state: pb::iscsi_attachment::State,
    /// Of a guest's block device.
    iscsi_device(pb::IscsiDevice).kind: pb::iscsi_device::Kind,
}

/// `APPLICATION`, `FILESYSTEM`, `CLEAN` or `CRASH`.
pub(in crate::ctl) fn consistency(image: &pb::Image) -> Option<&'static str> {
    consistency_word(image.consistency)
}

/// The same of a rehearsal.
pub(in crate::ctl) fn rehearsed(rehearsal: &pb::Rehearsal) -> Option<&'static str> {
    consistency_word(rehearsal.consistency)
}

fn consistency_word(value: i32) -> Option<&'static str> {
    Some(match pb::Consistency::try_from(value) {
        Ok(pb::Consistency::Unspecified) => return None,
        Ok(pb::Consistency::ApplicationConsistent) => "APPLICATION",
        Ok(pb::Consistency::FilesystemConsistent) => "FILESYSTEM",
        Ok(pb::Consistency::Clean) => "CLEAN",
        Ok(pb::Consistency::CrashConsistent) => "CRASH",
        Err(_) => NEWER_VALUE,
    })
}

/// A sentence with its causes and advice, one a line, as one line.
pub(in crate::ctl) fn in_one_line(problem: &str) -> String {
    problem.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        let shown = [0, 59, 60, 3599, 3600, 86_399, 86_400, 1_000_000]
            .map(|seconds| duration(Duration::from_secs(seconds)));
        assert_eq!(shown, ["0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d00h", "11d13h"]);
        assert_eq!(duration(Duration::from_millis(250)), "250ms");
    }

    #[test]
    fn impossible_times_are_not_known() {
        for (seconds, nanos) in [(-1, 0), (i64::MAX, 0), (0, -1), (253_402_300_800, 0)] {
            assert_eq!(time(Some(&ProtoTime { seconds, nanos })), None, "{seconds} {nanos}");
        }
        let last = ProtoTime { seconds: 253_402_300_799, nanos: 999_999_999 };
        assert_eq!(time(Some(&last)).unwrap().to_string(), "9999-12-31T23:59:59.999Z");
    }
}
