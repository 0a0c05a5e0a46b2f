//! An [`Error`] as a gRPC status with `google.rpc` details.
//!
//! The status's message is the error's own sentence. `ErrorInfo` carries the
//! reason's code, the causes (nearest first, one a line) and the advice;
//! `BadRequest` the field that is wrong; `RetryInfo` when it is worth asking
//! again.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::error::{Error, ErrorKind, Reason};

/// `ErrorInfo.domain` of every error.
pub const DOMAIN: &str = "imaged";

/// Details travel in a header, for which clients have little room (8 KiB is
/// common).
const MAX_TEXT: usize = 2000;

/// The status that tells a client of `error`.
#[must_use]
pub fn from(error: Error) -> Status {
    if error.kind() == ErrorKind::Internal {
        tracing::error!("{}", error.report());
    }
    let mut metadata = HashMap::new();
    let causes: Vec<_> = error.causes().collect();
    if !causes.is_empty() {
        metadata.insert("causes".to_owned(), cut(&causes.join("\n")));
    }
    if let Some(advice) = error.advice_text() {
        metadata.insert("help".to_owned(), cut(advice));
    }
    let message = cut(&error.to_string());
    let mut details = ErrorDetails::with_error_info(error.reason().code(), DOMAIN, metadata);
    if let Some(field) = error.field_name() {
        details.add_bad_request_violation(field, message.clone());
    }
    if let Some(delay) = retry_delay(error.reason()) {
        details.set_retry_info(Some(delay));
    }
    Status::with_error_details(code(error.reason()), message, details)
}

const fn code(reason: Reason) -> Code {
    match reason {
        Reason::TooManyRequests | Reason::StoreFull => Code::ResourceExhausted,
        // Another work request is in the way: the same call succeeds later.
        Reason::SourceLocked | Reason::ImageLocked => Code::Aborted,
        Reason::ObjectExists => Code::AlreadyExists,
        Reason::ImageCorrupt | Reason::ImageUnreadable => Code::DataLoss,
        // They work, and said no.
        Reason::HypervisorRefused
        | Reason::GuestAgentRefused
        | Reason::GuestAgentDisabled
        | Reason::StoreDenied
        | Reason::StoreRefused => Code::FailedPrecondition,
        other => match other.kind() {
            ErrorKind::InvalidRequest => Code::InvalidArgument,
            ErrorKind::NotFound => Code::NotFound,
            ErrorKind::Busy => Code::FailedPrecondition,
            ErrorKind::Denied => Code::PermissionDenied,
            ErrorKind::Device | ErrorKind::Store | ErrorKind::Hypervisor | ErrorKind::Guest => {
                Code::Unavailable
            }
            ErrorKind::Unsupported => Code::Unimplemented,
            ErrorKind::Cancelled => Code::Cancelled,
            ErrorKind::Internal => Code::Internal,
        },
    }
}

/// When to ask again. Work takes minutes, so seconds would only be noise.
const fn retry_delay(reason: Reason) -> Option<Duration> {
    match reason.kind() {
        ErrorKind::Busy => Some(Duration::from_secs(30)),
        _ => None,
    }
}

/// `text` without what a header has no room for.
fn cut(text: &str) -> String {
    if text.len() <= MAX_TEXT {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(MAX_TEXT);
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_an_error_arrives() {
        let error = Error::new(Reason::VolumeHeld, "the volume /dev/loop7 is in use")
            .because(
                Error::new(Reason::VolumeHeld, "qemu-system-x86 (pid 42) holds it")
                    .because("lock byte 100"),
            )
            .advice("stop the instance and ask again");
        let status = from(error);
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(status.message(), "the volume /dev/loop7 is in use");
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("VOLUME_HELD", "imaged"));
        assert_eq!(info.metadata["causes"], "qemu-system-x86 (pid 42) holds it\nlock byte 100");
        assert_eq!(info.metadata["help"], "stop the instance and ask again");
        assert_eq!(details.retry_info().unwrap().retry_delay, Some(Duration::from_secs(30)));
        assert!(details.bad_request().is_none());
    }

    #[test]
    fn a_wrong_field_is_named() {
        let status = from(Error::new(Reason::InvalidParameter, "too long").field("display_name"));
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "display_name");
        assert_eq!(violations[0].description, "too long");
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let cut = cut(&"ü".repeat(MAX_TEXT));
        assert!(cut.ends_with("ü…") && cut.len() <= MAX_TEXT + 3);
    }

    #[test]
    fn codes() {
        let codes: Vec<_> =
            Reason::ALL.iter().map(|r| format!("{}: {:?}", r.code(), code(*r))).collect();
        insta::assert_snapshot!(codes.join("\n"), @"
        INVALID_PARAMETER: InvalidArgument
        INVALID_CONFIGURATION: InvalidArgument
        RETRY_TOKEN_REUSED: InvalidArgument
        VOLUME_NOT_ALLOWED: InvalidArgument
        VOLUME_UNUSABLE: InvalidArgument
        VOLUME_EMPTY: InvalidArgument
        VOLUME_TOO_SMALL: InvalidArgument
        VOLUME_TOO_LARGE: InvalidArgument
        VOLUME_NOT_FOUND: NotFound
        INSTANCE_NOT_FOUND: NotFound
        IMAGE_NOT_FOUND: NotFound
        WORK_REQUEST_NOT_FOUND: NotFound
        STORE_NOT_FOUND: NotFound
        VOLUME_HELD: FailedPrecondition
        SNAPSHOT_REFUSED: FailedPrecondition
        SHUTDOWN_REFUSED: Unavailable
        SOURCE_LOCKED: Aborted
        IMAGE_LOCKED: Aborted
        OBJECT_EXISTS: AlreadyExists
        HOST_DRAINED: FailedPrecondition
        TOO_MANY_REQUESTS: ResourceExhausted
        DAEMON_RUNNING: FailedPrecondition
        HYPERVISOR_BUSY: FailedPrecondition
        PERMISSION_DENIED: PermissionDenied
        VOLUME_UNAVAILABLE: Unavailable
        READ_FAILED: Unavailable
        WRITE_FAILED: Unavailable
        SNAPSHOT_BROKEN: Unavailable
        STORE_FULL: ResourceExhausted
        STORE_UNAVAILABLE: Unavailable
        STORE_DENIED: FailedPrecondition
        STORE_REFUSED: FailedPrecondition
        IMAGE_CORRUPT: DataLoss
        STALLED: Unavailable
        IMAGE_UNREADABLE: DataLoss
        CONFINEMENT_UNAVAILABLE: Unimplemented
        HYPERVISOR_GONE: Unavailable
        HYPERVISOR_TIMEOUT: Unavailable
        HYPERVISOR_REFUSED: FailedPrecondition
        HYPERVISOR_UNAVAILABLE: Unavailable
        GUEST_AGENT_UNAVAILABLE: Unavailable
        GUEST_AGENT_TIMEOUT: Unavailable
        GUEST_AGENT_REFUSED: FailedPrecondition
        GUEST_AGENT_DISABLED: FailedPrecondition
        GUEST_BUSY: FailedPrecondition
        GUEST_UNSUPPORTED: Unimplemented
        HYPERVISOR_UNSUPPORTED: Unimplemented
        INSTANCE_RUNNING: Unimplemented
        CANCELED: Cancelled
        DAEMON_STOPPED: Cancelled
        JOURNAL_FAILED: Internal
        INTERNAL: Internal
        ");
    }
}
