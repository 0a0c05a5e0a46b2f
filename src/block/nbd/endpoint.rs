//! Where an export is and what it shows.

use std::{fmt, io, path::PathBuf};

use super::{answer::Asked, fault::Fault};
use crate::{
    error::{Error, Reason},
    model::ByteSize,
};

/// Where an export is, and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The Unix socket of its server.
    pub socket: PathBuf,
    /// Its name; at most 4096 bytes.
    pub export: String,
    /// What it shows, which decides what a refusal means.
    pub role: Role,
}

/// What an export shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A volume in itself: a refusal is a failed read.
    Volume,
    /// The snapshot of a volume that a guest writes to: a refusal means that
    /// it is broken.
    Snapshot,
    /// What copy-before-write saved of a volume.
    Scratch,
}

impl Role {
    /// No request may cross a multiple of so many bytes.
    ///
    /// QEMU 7.1 to 7.2 (and who knows which distribution's 8) take a request
    /// that begins in saved clusters and ends in others for one that is not
    /// saved at all, and answer with what the guest wrote since, or with its
    /// map: `hbitmap_status` in `util/hbitmap.c` returned the wrong value,
    /// corrected by commit a4d5224c2cb6 of February 2023. A request within one
    /// cluster of the filter is answered rightly by all. The filter's clusters
    /// have at least this size (`BLOCK_COPY_CLUSTER_SIZE_DEFAULT`) and are
    /// multiples of it.
    pub(super) fn boundary(self) -> Option<u64> {
        match self {
            Self::Snapshot => Some(64 << 10),
            Self::Volume | Self::Scratch => None,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the NBD export {:?} at {}", self.export, self.socket.display())
    }
}

/// What the map of an export tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// What reads as zeroes: `base:allocation`.
    Content,
    /// What is allocated in the image itself: `qemu:allocation-depth`
    /// (`docs/interop/nbd.txt` of QEMU).
    Depth,
}

impl Context {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Content => "base:allocation",
            Self::Depth => "qemu:allocation-depth",
        }
    }
}

impl Endpoint {
    /// The connection or the handshake failed.
    pub(super) fn unavailable(&self, fault: Fault) -> Error {
        Error::new(Reason::VolumeUnavailable, format!("cannot open {self}")).because(fault)
    }

    /// A request failed.
    pub(super) fn failed(&self, asked: &Asked, fault: Fault) -> Error {
        let (what, range) = match asked {
            Asked::Read(range) => ("read", range),
            Asked::Status(range, _) => ("get the map of", range),
        };
        let (len, at) = (ByteSize(range.end - range.start), range.start);
        let sentence = format!("cannot {what} {len} at offset {at} of {self}");
        let (reason, advice) = match (&fault, self.role) {
            // QEMU hangs up, and lives, where a snapshot breaks between its
            // map and its bytes (nbd/server.c, `nbd_co_send_sparse_read`).
            (Fault::Transport(cause), Role::Snapshot) if is_hung_up(cause) => (
                Reason::SnapshotBroken,
                "the scratch area was full or too slow, or the instance's QEMU has ended: look \
                 into its log, give the scratch area more room or a faster disk, then ask again",
            ),
            (Fault::Refused { .. }, Role::Snapshot) => (
                Reason::SnapshotBroken,
                "the guest wrote faster than the scratch area could save what was there: give it \
                 more room or a faster disk, then ask again",
            ),
            (Fault::Refused { .. }, _) => {
                (Reason::ReadFailed, "look into the log of the instance's QEMU")
            }
            (Fault::Violation(_) | Fault::Lacking(_), _) => {
                (Reason::ReadFailed, "look which program serves this socket")
            }
            _ => (
                Reason::ReadFailed,
                "look whether the instance's QEMU still runs, and into its log",
            ),
        };
        Error::new(reason, sentence).because(fault).advice(advice)
    }

    /// A request that must not be sent.
    pub(super) fn misused(&self, start: u64, end: u64) -> Error {
        let sentence = format!("a request for {start}..{end} does not fit {self}");
        Error::new(Reason::Internal, sentence)
    }

    /// An answer to another kind of request than was waited for.
    pub(super) fn out_of_turn(&self) -> Error {
        Error::new(Reason::Internal, format!("{self} answers out of turn"))
    }
}

fn is_hung_up(cause: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(cause.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// The fault under an error of a [`Client`](super::Client), if it is one.
#[must_use]
pub fn fault(error: &Error) -> Option<&Fault> {
    std::error::Error::source(error)?.downcast_ref()
}
