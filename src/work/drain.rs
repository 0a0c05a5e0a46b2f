//! No new work, for a host that is to be maintained.
//!
//! ```text
//! open ── drain ─► drained ── time is over ─► what is left is cancelled, and undone
//!   ▲                 │
//!   └──── resume ─────┘  (also: imaged is started again)
//! ```

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Work;
use crate::error::{Error, Reason, Result};

/// Whether orders are taken; `Some`: no, and what ends the wait for those
/// that were.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<Option<CancellationToken>>);

impl Gate {
    /// # Errors
    ///
    /// `HOST_DRAINED`.
    pub(super) fn check(&self) -> Result<()> {
        match self.is_closed() {
            false => Ok(()),
            true => {
                Err(Error::new(Reason::HostDrained, "this host is drained: no new work begins")
                    .advice("`imagectl host resume` ends that, and so does a restart of imaged"))
            }
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().is_some()
    }

    /// Closes it or opens it; what waited for the time of an earlier drain
    /// waits no more.
    fn set(&self, drain: Option<CancellationToken>) {
        if let Some(before) = std::mem::replace(&mut *self.lock(), drain) {
            before.cancel();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<CancellationToken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work {
    /// Takes no more orders. What is not done after `finish` is cancelled;
    /// `None`: it is waited for.
    pub fn drain(&self, finish: Option<Duration>) {
        tracing::warn!(?finish, "drained: no new work begins");
        let ended = CancellationToken::new();
        self.0.gate.set(Some(ended.clone()));
        let Some(finish) = finish else { return };
        let work = self.clone();
        self.0.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = ended.cancelled() => return,
                () = work.0.closing.cancelled() => return,
                () = sleep(finish) => {}
            }
            for request in work.work_requests() {
                if !request.status.is_final() && work.cancel(&request.id).is_ok() {
                    tracing::warn!(work_request = %request.id, "cancelled: the host is drained");
                }
            }
        });
    }

    /// Takes orders again.
    pub fn resume(&self) {
        self.0.gate.set(None);
        tracing::warn!("resumed: work may begin");
    }

    /// Whether no more orders are taken.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.0.gate.is_closed()
    }
}
