//! The one error of the crate: a closed reason, context for people, a cause.
//!
//! Control flow matches [`Reason`] or [`ErrorKind`], never text. `Display`
//! prints the context alone; [`Error::report`] prints the chain once, at the
//! edge.

use std::{error::Error as StdError, fmt, time::Duration};

/// What went wrong, said by whoever knew what it was doing.
pub struct Error(Box<Inner>);

struct Inner {
    reason: Reason,
    context: String,
    advice: Option<String>,
    field: Option<&'static str>,
    pause: Option<Duration>,
    source: Option<Cause>,
}

/// What lies under an [`Error`].
pub type Cause = Box<dyn StdError + Send + Sync + 'static>;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Classes of errors: what a caller can do about one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request cannot be right, whenever it is asked.
    InvalidRequest,
    /// What was named does not exist.
    NotFound,
    /// Something else uses it now; ask again later.
    Busy,
    /// The caller may not.
    Denied,
    /// A device failed.
    Device,
    /// A store failed or is full.
    Store,
    /// What runs the instance failed, refused or is gone.
    Hypervisor,
    /// The guest, or its agent, failed, refused or does not answer.
    Guest,
    /// This version or this host cannot do it.
    Unsupported,
    /// Someone asked for the end.
    Cancelled,
    /// imaged is at fault.
    Internal,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal: $kind:ident,)+) => {
        /// Every reason for which imaged fails. Codes are part of the API.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $variant,)+ }

        impl Reason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The code that machines read.
            #[must_use]
            pub const fn code(self) -> &'static str {
                match self { $(Self::$variant => $code,)+ }
            }

            /// Its class.
            #[must_use]
            pub const fn kind(self) -> ErrorKind {
                match self { $(Self::$variant => ErrorKind::$kind,)+ }
            }
        }
    };
}

reasons! {
    /// A field of the request is wrong.
    InvalidParameter = "INVALID_PARAMETER": InvalidRequest,
    /// The configuration is wrong.
    InvalidConfiguration = "INVALID_CONFIGURATION": InvalidRequest,
    /// The retry token was used for another request.
    RetryTokenReused = "RETRY_TOKEN_REUSED": InvalidRequest,
    /// The path lies outside the directories that the configuration allows.
    VolumeNotAllowed = "VOLUME_NOT_ALLOWED": InvalidRequest,
    /// The path is neither a block device nor a regular file.
    VolumeUnusable = "VOLUME_UNUSABLE": InvalidRequest,
    /// The volume has no bytes.
    VolumeEmpty = "VOLUME_EMPTY": InvalidRequest,
    /// The volume is smaller than the image that it is to take.
    VolumeTooSmall = "VOLUME_TOO_SMALL": InvalidRequest,
    /// The volume is larger than the configuration allows.
    VolumeTooLarge = "VOLUME_TOO_LARGE": InvalidRequest,
    /// No such volume.
    VolumeNotFound = "VOLUME_NOT_FOUND": NotFound,
    /// No such instance.
    InstanceNotFound = "INSTANCE_NOT_FOUND": NotFound,
    /// No such image.
    ImageNotFound = "IMAGE_NOT_FOUND": NotFound,
    /// No such work request.
    WorkRequestNotFound = "WORK_REQUEST_NOT_FOUND": NotFound,
    /// No such store.
    StoreNotFound = "STORE_NOT_FOUND": NotFound,
    /// Something uses the volume.
    VolumeHeld = "VOLUME_HELD": Busy,
    /// Something stands against a snapshot of the instance.
    SnapshotRefused = "SNAPSHOT_REFUSED": Busy,
    /// The guest does not shut down.
    ShutdownRefused = "SHUTDOWN_REFUSED": Guest,
    /// A work request holds the instance or volume.
    SourceLocked = "SOURCE_LOCKED": Busy,
    /// A work request holds the image.
    ImageLocked = "IMAGE_LOCKED": Busy,
    /// There is an object of that name.
    ObjectExists = "OBJECT_EXISTS": InvalidRequest,
    /// No new work begins on this host.
    HostDrained = "HOST_DRAINED": Busy,
    /// More work than the configuration allows is waiting.
    TooManyRequests = "TOO_MANY_REQUESTS": Busy,
    /// Another imaged serves this socket or state directory.
    DaemonRunning = "DAEMON_RUNNING": Busy,
    /// Another program has QEMU's monitor.
    HypervisorBusy = "HYPERVISOR_BUSY": Busy,
    /// The peer has no right to call.
    PermissionDenied = "PERMISSION_DENIED": Denied,
    /// A volume cannot be opened or measured.
    VolumeUnavailable = "VOLUME_UNAVAILABLE": Device,
    /// A read of the volume failed.
    ReadFailed = "READ_FAILED": Device,
    /// A write to the volume failed.
    WriteFailed = "WRITE_FAILED": Device,
    /// The snapshot of a running instance's volume was given up.
    SnapshotBroken = "SNAPSHOT_BROKEN": Device,
    /// The store has no room.
    StoreFull = "STORE_FULL": Store,
    /// The store cannot be reached, read or written.
    StoreUnavailable = "STORE_UNAVAILABLE": Store,
    /// The store does not know the credentials, or they lack a right.
    StoreDenied = "STORE_DENIED": Store,
    /// The store answers, and will not do it however often it is asked.
    StoreRefused = "STORE_REFUSED": Store,
    /// What the store returns is not what was stored.
    ImageCorrupt = "IMAGE_CORRUPT": Store,
    /// A device or a store stopped answering.
    Stalled = "STALLED": Device,
    /// An image cannot be decoded within the limits, or breaks what decodes it.
    ImageUnreadable = "IMAGE_UNREADABLE": Store,
    /// This host cannot confine what parses foreign bytes.
    ConfinementUnavailable = "CONFINEMENT_UNAVAILABLE": Unsupported,
    /// QEMU has ended, or does not run.
    HypervisorGone = "HYPERVISOR_GONE": Hypervisor,
    /// QEMU did not do in time what it was asked for, and may do it yet.
    HypervisorTimeout = "HYPERVISOR_TIMEOUT": Hypervisor,
    /// QEMU refused what it was asked for.
    HypervisorRefused = "HYPERVISOR_REFUSED": Hypervisor,
    /// QEMU cannot be reached or understood.
    HypervisorUnavailable = "HYPERVISOR_UNAVAILABLE": Hypervisor,
    /// No guest agent answers.
    GuestAgentUnavailable = "GUEST_AGENT_UNAVAILABLE": Guest,
    /// The guest agent did not say in time whether it did what it was asked
    /// for, and may do it yet.
    GuestAgentTimeout = "GUEST_AGENT_TIMEOUT": Guest,
    /// The guest agent refused what it was asked for.
    GuestAgentRefused = "GUEST_AGENT_REFUSED": Guest,
    /// The guest's administrator disabled it, or its agent is too old for it.
    GuestAgentDisabled = "GUEST_AGENT_DISABLED": Guest,
    /// Something in the guest uses what is to be taken away.
    GuestBusy = "GUEST_BUSY": Busy,
    /// imaged cannot do this with such a guest.
    GuestUnsupported = "GUEST_UNSUPPORTED": Unsupported,
    /// This QEMU is too old for it.
    HypervisorUnsupported = "HYPERVISOR_UNSUPPORTED": Unsupported,
    /// The instance runs, which this version cannot image.
    InstanceRunning = "INSTANCE_RUNNING": Unsupported,
    /// Someone cancelled the work request.
    Canceled = "CANCELED": Cancelled,
    /// imaged was stopped meanwhile.
    DaemonStopped = "DAEMON_STOPPED": Cancelled,
    /// The journal cannot be read or written.
    JournalFailed = "JOURNAL_FAILED": Internal,
    /// A defect of imaged.
    Internal = "INTERNAL": Internal,
}

impl Error {
    /// An error for `reason`; `context` is one sentence without a full stop
    /// that names what was being done to what.
    #[must_use]
    pub fn new(reason: Reason, context: impl Into<String>) -> Self {
        let context = context.into();
        Self(Box::new(Inner {
            reason,
            context,
            advice: None,
            field: None,
            pause: None,
            source: None,
        }))
    }

    /// Adds what to do next, one sentence.
    #[must_use]
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// Names the field of the request that is wrong, in `snake_case`.
    #[must_use]
    pub fn field(mut self, field: &'static str) -> Self {
        self.0.field = Some(field);
        self
    }

    /// Adds how long to wait before asking again, as who refused said.
    #[must_use]
    pub fn retry_after(mut self, pause: Duration) -> Self {
        self.0.pause = Some(pause);
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Cause>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Why it failed.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// The class of the reason.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.reason.kind()
    }

    /// What to do next: this error's own word, or its nearest cause's.
    #[must_use]
    pub fn advice_text(&self) -> Option<&str> {
        self.0
            .advice
            .as_deref()
            .or_else(|| self.0.source.as_deref()?.downcast_ref::<Error>()?.advice_text())
    }

    /// How long to wait before asking again, where who refused said so.
    #[must_use]
    pub fn pause(&self) -> Option<Duration> {
        self.0.pause
    }

    /// The field of the request that is wrong.
    #[must_use]
    pub fn field_name(&self) -> Option<&'static str> {
        self.0.field
    }

    /// The causes, nearest first.
    pub fn causes(&self) -> impl Iterator<Item = String> {
        let mut next = self.source();
        std::iter::from_fn(move || {
            let cause = next?;
            next = cause.source();
            Some(cause.to_string())
        })
    }

    /// The sentence, its causes and the advice, one a line.
    #[must_use]
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        for (depth, cause) in self.causes().enumerate() {
            text.push_str(&format!("\n  {depth}: {cause}"));
        }
        if let Some(advice) = self.advice_text() {
            text.push_str(&format!("\n  help: {advice}"));
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.context)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.reason.code(), self.report())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|cause| cause as _)
    }
}

/// Turns any failure into an [`Error`] with what was being done.
pub trait Context<T> {
    /// `context` is only made when there is an error.
    fn context<C: Into<String>>(self, reason: Reason, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T, E: Into<Cause>> Context<T> for std::result::Result<T, E> {
    fn context<C: Into<String>>(self, reason: Reason, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|cause| Error::new(reason, context()).because(cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_prints_the_chain_once_and_ends_with_advice() {
        let cause = Error::new(Reason::StoreFull, "the store \"local\" has 3.00 MiB left")
            .because(std::io::Error::from_raw_os_error(28))
            .advice("free some space or name another store");
        let error = Error::new(Reason::StoreFull, "image \"golden\" was not made").because(cause);
        insta::assert_snapshot!(error.report(), @r#"
        image "golden" was not made
          0: the store "local" has 3.00 MiB left
          1: No space left on device (os error 28)
          help: free some space or name another store
        "#);
    }

    #[test]
    fn codes_are_unique() {
        let mut codes: Vec<_> = Reason::ALL.iter().map(|reason| reason.code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Reason::ALL.len());
    }
}
