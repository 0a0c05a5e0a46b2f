//! Faults a test sets up in advance: refusals, broken connections, lost answers, delays.

use super::LoggedRequest;
use super::http::Failure;
use std::time::Duration;

/// What happens to a request a fault hits.
#[derive(Clone, Debug)]
pub enum FaultKind {
    /// The answer is this error and nothing is done. The body is read and thrown away, unless its
    /// sender waits for "100 Continue".
    Refuse {
        /// HTTP status.
        status: u16,
        /// The `code` of the error body.
        code: String,
        /// Seconds for `Retry-After`.
        retry_after: Option<u64>,
    },
    /// The request is carried out, but the answer is this error.
    AnswerAfter {
        /// HTTP status.
        status: u16,
        /// The `code` of the error body.
        code: String,
    },
    /// The connection is closed once so many bytes of the body have arrived; nothing is done.
    CutAfter(u64),
    /// The request is carried out, then the connection is closed without an answer.
    LoseAnswer,
    /// The request is carried out after this pause.
    Delay(Duration),
}

/// A fault for the next requests that match it.
#[derive(Clone, Debug)]
pub struct Fault {
    method: String,
    suffix: String,
    part: Option<u32>,
    object: Option<String>,
    skip: u32,
    times: u32,
    kind: FaultKind,
}

impl Fault {
    /// Hits one request of this method (empty: any) whose path with query ends so (empty: any).
    pub fn new(method: &str, suffix: &str, kind: FaultKind) -> Fault {
        let (method, suffix) = (method.to_string(), suffix.to_string());
        Fault { method, suffix, part: None, object: None, skip: 0, times: 1, kind }
    }

    /// Hits so many requests instead of one.
    pub fn times(mut self, times: u32) -> Fault {
        self.times = times;
        self
    }

    /// Lets so many matching requests pass first.
    pub fn after(mut self, skip: u32) -> Fault {
        self.skip = skip;
        self
    }

    /// Hits only uploads of this part, signed or pre-authenticated.
    pub fn part(mut self, part: u32) -> Fault {
        self.part = Some(part);
        self
    }

    /// Hits only requests that name this object, decoded.
    pub fn object(mut self, object: &str) -> Fault {
        self.object = Some(object.to_string());
        self
    }

    fn matches(&self, request: &LoggedRequest) -> bool {
        (self.method.is_empty() || self.method == request.method)
            && request.path.ends_with(&self.suffix)
            && (self.part.is_none() || self.part == request.part)
            && (self.object.is_none() || self.object == request.object)
    }

    pub(super) fn failure(kind: &FaultKind) -> Failure {
        let (status, code, retry_after) = match kind {
            FaultKind::Refuse { status, code, retry_after } => (*status, code, *retry_after),
            FaultKind::AnswerAfter { status, code } => (*status, code, None),
            _ => unreachable!("the other kinds have no answer of their own"),
        };
        let message = format!("The test asked for this {code}");
        Failure { retry_after, ..Failure::new(status, code.as_str(), message) }
    }
}

/// Finds the first fault that hits, and counts it.
pub(super) fn take(faults: &mut Vec<Fault>, request: &LoggedRequest) -> Option<FaultKind> {
    let index = faults.iter().position(|fault| fault.matches(request))?;
    let fault = &mut faults[index];
    if fault.skip > 0 {
        fault.skip -= 1;
        return None;
    }
    let kind = fault.kind.clone();
    fault.times -= 1;
    if fault.times == 0 {
        faults.remove(index);
    }
    Some(kind)
}
