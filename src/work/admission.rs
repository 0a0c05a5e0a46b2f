//! Whether a request may run: no lock, no clock, no I/O.

use std::path::PathBuf;

use crate::{
    error::{Error, Reason},
    model::{ImageId, Timestamp, WorkRequestId, work_request::Retry},
};

/// How long a retry token is remembered: OCI's `opc-retry-token`.
pub const RETRY_TOKEN_MILLIS: u64 = 24 * 60 * 60 * 1000;
/// Longest retry token: OCI's.
pub const RETRY_TOKEN_LEN: usize = 64;

/// What a work request keeps others from using.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Lock {
    /// A volume that is imaged, or written over: one at a time.
    Source(PathBuf),
    /// An image that must not be deleted.
    Image(ImageId),
}

/// Whether a work request will have a status for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It keeps others away while it is looked at, and may still be refused.
    Reserved,
    /// It was accepted.
    Accepted,
}

/// What is known of one work request.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// Its OCID.
    pub id: &'a WorkRequestId,
    /// What it holds, until it has ended.
    pub lock: Option<&'a Lock>,
    /// Its retry token.
    pub retry: Option<&'a Retry>,
    /// When it was accepted.
    pub time_accepted: Timestamp,
    /// Whether it was.
    pub standing: Standing,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// It may.
    Accept,
    /// It was asked before: this is its work request.
    Known(WorkRequestId),
    /// It may not.
    Deny(Denial),
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denial {
    /// The retry token belongs to another request.
    TokenReused(WorkRequestId),
    /// The token is too long.
    TokenTooLong,
    /// A work request holds what this one needs.
    Locked {
        /// Who.
        holder: WorkRequestId,
        /// What.
        lock: Lock,
    },
    /// The same request is being looked at.
    Deciding,
    /// Too many are waiting.
    Full(usize),
}

/// A request to be decided on.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// What it would hold.
    pub lock: &'a Lock,
    /// Its retry token.
    pub retry: Option<&'a Retry>,
    /// Now.
    pub now: Timestamp,
}

/// Decides. `max` bounds those that are alive.
pub fn consider<'a>(
    wanted: Wanted<'_>,
    known: impl Iterator<Item = Known<'a>> + Clone,
    max: usize,
) -> Admission {
    match lookup(wanted.retry, wanted.now, known.clone()) {
        Admission::Accept => {}
        other => return other,
    }
    let mut alive = known.filter(|known| known.lock.is_some());
    if let Some(holder) = alive.clone().find(|known| known.lock == Some(wanted.lock)) {
        let (holder, lock) = (holder.id.clone(), wanted.lock.clone());
        return Admission::Deny(Denial::Locked { holder, lock });
    }
    if alive.nth(max.saturating_sub(1)).is_some() {
        return Admission::Deny(Denial::Full(max));
    }
    Admission::Accept
}

/// Whether a retry token was used before: the part of the decision that can
/// be asked before anything is looked at.
pub fn lookup<'a>(
    retry: Option<&Retry>,
    now: Timestamp,
    mut known: impl Iterator<Item = Known<'a>>,
) -> Admission {
    let Some(retry) = retry else { return Admission::Accept };
    if retry.token.len() > RETRY_TOKEN_LEN {
        return Admission::Deny(Denial::TokenTooLong);
    }
    let fresh = |known: &Known<'_>| remembers_token(known.time_accepted, now);
    let equal = |other: &Retry| (&other.user, &other.token) == (&retry.user, &retry.token);
    let same = known.find(|known| known.retry.is_some_and(equal) && fresh(known));
    match same {
        None => Admission::Accept,
        Some(known) if known.retry == Some(retry) => match known.standing {
            Standing::Accepted => Admission::Known(known.id.clone()),
            Standing::Reserved => Admission::Deny(Denial::Deciding),
        },
        Some(known) => Admission::Deny(Denial::TokenReused(known.id.clone())),
    }
}

/// Whether the retry token of a request that was accepted then is valid now.
pub fn remembers_token(time_accepted: Timestamp, now: Timestamp) -> bool {
    now.as_millis().saturating_sub(time_accepted.as_millis()) < RETRY_TOKEN_MILLIS
}

impl From<Denial> for Error {
    fn from(denial: Denial) -> Self {
        match denial {
            Denial::TokenReused(id) => Error::new(
                Reason::RetryTokenReused,
                format!("the retry token was used for another request, work request {id}"),
            )
            .advice("use a new token for each new request")
            .field("retry_token"),
            Denial::TokenTooLong => Error::new(
                Reason::InvalidParameter,
                format!("the retry token is longer than {RETRY_TOKEN_LEN} characters"),
            )
            .advice("shorten it")
            .field("retry_token"),
            Denial::Locked { holder, lock: Lock::Source(path) } => Error::new(
                Reason::SourceLocked,
                format!("work request {holder} uses {}", path.display()),
            )
            .advice("a volume is imaged or written by one at a time: wait for it, or cancel it"),
            Denial::Locked { holder, lock: Lock::Image(id) } => {
                Error::new(Reason::ImageLocked, format!("work request {holder} uses image {id}"))
                    .advice("wait for it, or cancel it")
            }
            Denial::Deciding => Error::new(
                Reason::SourceLocked,
                "the same request was sent before and is being looked at",
            )
            .advice("ask again in a second, with the same retry token"),
            Denial::Full(max) => Error::new(
                Reason::TooManyRequests,
                format!("{max} work requests are waiting or running already"),
            )
            .advice("ask again later; `max_queued` sets the limit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> WorkRequestId {
        text.parse().unwrap()
    }

    fn retry(token: &str, fingerprint: &str) -> Retry {
        Retry { user: "uid 0".into(), token: token.into(), fingerprint: fingerprint.into() }
    }

    #[test]
    fn the_table() {
        let (web, db) = (Lock::Source("/dev/web".into()), Lock::Source("/dev/db".into()));
        let mail = Lock::Source("/dev/mail".into());
        let (running, ended, new) = (id("running"), id("ended"), id("new"));
        let (used, old, fresh) = (retry("used", "a"), retry("old", "a"), retry("fresh", "a"));
        let now = Timestamp::from_millis(RETRY_TOKEN_MILLIS);
        let known = [
            Known {
                id: &running,
                lock: Some(&web),
                retry: Some(&used),
                time_accepted: Timestamp::from_millis(1),
                standing: Standing::Accepted,
            },
            Known {
                id: &ended,
                lock: None,
                retry: Some(&old),
                time_accepted: Timestamp::from_millis(0),
                standing: Standing::Accepted,
            },
            Known {
                id: &new,
                lock: Some(&mail),
                retry: Some(&fresh),
                time_accepted: now,
                standing: Standing::Reserved,
            },
        ];
        let ask = |lock, retry: Option<Retry>, max| {
            consider(Wanted { lock, retry: retry.as_ref(), now }, known.iter().copied(), max)
        };
        let locked = Denial::Locked { holder: running.clone(), lock: web.clone() };

        assert_eq!(ask(&db, None, 3), Admission::Accept);
        assert_eq!(ask(&db, None, 2), Admission::Deny(Denial::Full(2)));
        // What may still be refused is no answer, and keeps others away.
        assert_eq!(ask(&db, Some(retry("fresh", "a")), 9), Admission::Deny(Denial::Deciding));
        let reserved = Denial::Locked { holder: new.clone(), lock: mail.clone() };
        assert_eq!(ask(&mail, None, 9), Admission::Deny(reserved));
        assert_eq!(ask(&web, None, 9), Admission::Deny(locked.clone()));
        // Asking twice is asking once, though the source is locked.
        assert_eq!(ask(&web, Some(retry("used", "a")), 1), Admission::Known(running.clone()));
        assert_eq!(
            ask(&db, Some(retry("used", "b")), 9),
            Admission::Deny(Denial::TokenReused(running.clone()))
        );
        // A day later the token is forgotten.
        assert_eq!(ask(&db, Some(retry("old", "a")), 9), Admission::Accept);
        assert_eq!(ask(&web, Some(retry("new", "a")), 9), Admission::Deny(locked));
        assert_eq!(
            ask(&db, Some(retry(&"x".repeat(65), "a")), 9),
            Admission::Deny(Denial::TokenTooLong)
        );
    }

    #[test]
    fn denials_say_who_and_what_to_do() {
        let error = Error::from(Denial::Locked {
            holder: id("ocid1.workrequest.imaged..01"),
            lock: Lock::Source("/dev/vg0/web-1".into()),
        });
        insta::assert_snapshot!(error.report(), @"
        work request ocid1.workrequest.imaged..01 uses /dev/vg0/web-1
          help: a volume is imaged or written by one at a time: wait for it, or cancel it
        ");
    }
}
