//! Why an invocation did not succeed, as its user reads it.
//!
//! The same form as [`crate::error::Error::report`]: a sentence, its causes,
//! what to do. The causes come from the other side of a socket, so they are
//! text here.

use std::{borrow::Cow, error::Error as StdError, fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{exit::Exit, render::words};
use crate::{error::Reason, pb};

/// An unsuccessful end.
#[derive(Debug)]
pub struct Failure {
    /// What the shell is told.
    pub exit: Exit,
    context: String,
    causes: Vec<String>,
    notes: Vec<Note>,
}

#[derive(Debug)]
struct Note {
    label: Cow<'static, str>,
    text: String,
}

impl Failure {
    /// A failure; `context` is one sentence without a full stop.
    pub(super) fn new(exit: Exit, context: impl Into<String>) -> Self {
        Self { exit, context: context.into(), causes: Vec::new(), notes: Vec::new() }
    }

    /// Adds an error and all that lies under it.
    pub(super) fn cause(mut self, cause: impl StdError) -> Self {
        self.causes.push(cause.to_string());
        let mut next = cause.source();
        while let Some(cause) = next {
            self.causes.push(cause.to_string());
            next = cause.source();
        }
        self
    }

    /// Adds what imaged reported elsewhere: a sentence, its causes and advice,
    /// one a line.
    pub(super) fn report(mut self, report: &str) -> Self {
        for line in report.lines() {
            match line.trim_start().split_once(": ") {
                Some(("help", advice)) => self = self.help(advice),
                Some((depth, cause)) if depth.parse::<u32>().is_ok() => {
                    self.causes.push(cause.to_owned());
                }
                _ => self.causes.push(line.to_owned()),
            }
        }
        self
    }

    /// Adds what to do next.
    pub(super) fn help(self, advice: impl Into<String>) -> Self {
        self.note("help", advice)
    }

    /// Adds a line under the causes.
    pub(super) fn note(
        mut self,
        label: impl Into<Cow<'static, str>>,
        text: impl Into<String>,
    ) -> Self {
        self.notes.push(Note { label: label.into(), text: text.into() });
        self
    }

    /// What imaged answered instead of a result.
    pub(super) fn refused(status: &Status) -> Self {
        let details = status.get_error_details();
        let mut failure = Self::new(Exit::Failed, status.message());
        if status.message().is_empty() {
            failure.context = format!("imaged refused: {}", status.code());
        }
        let info = details.error_info();
        let metadata = |key| info.and_then(|info| info.metadata.get(key)).map(String::as_str);
        failure.causes =
            metadata("causes").unwrap_or_default().lines().map(str::to_owned).collect();
        for violation in details.bad_request().map(|bad| &bad.field_violations[..]).unwrap_or(&[]) {
            let repeated = violation.description.is_empty()
                || violation.description == failure.context
                || failure.causes.contains(&violation.description);
            let text = if repeated { "" } else { &violation.description };
            failure = failure.note(option_of(&violation.field), text);
        }
        if let Some(info) = info {
            failure = failure.note("reason", &info.reason);
        }
        let delay = details.retry_info().and_then(|info| info.retry_delay);
        if let Some(delay) = delay.filter(|delay| !delay.is_zero()) {
            failure = failure.note("retry", format!("in {}", words::duration(delay)));
        }
        if let Some(help) = metadata("help") {
            failure = failure.help(help);
        } else if status.code() == Code::Unimplemented {
            failure = failure.help("imaged is older than imagectl: update it");
        }
        failure
    }

    /// A connection that was there and broke.
    pub(super) fn disconnected(status: &Status) -> Self {
        let mut failure = Self::new(Exit::Unreachable, "the connection to imaged broke");
        // The layers between say no more than "transport error".
        let innermost = std::iter::successors(status.source(), |&error| error.source()).last();
        match innermost {
            Some(error) => failure = failure.cause(error),
            None => failure.causes.push(status.message().to_owned()),
        }
        failure.help("see what imaged says: `journalctl -u imaged`")
    }

    /// imaged takes a call and does not answer.
    pub(super) fn silent(limit: Duration) -> Self {
        Self::new(
            Exit::Unreachable,
            format!("imaged did not answer within {}", words::duration(limit)),
        )
        .help("see what it does: `systemctl status imaged`, `journalctl -u imaged`")
    }

    /// How work that did not succeed ended; `None` when it succeeded or goes
    /// on.
    pub(super) fn of_work(work: &pb::WorkRequest) -> Option<Self> {
        use pb::work_request::OperationType;
        let verifies = matches!(
            work.operation_type(),
            OperationType::VerifyImage | OperationType::ExportImage
        );
        match work.status() {
            pb::work_request::Status::Failed => {}
            pb::work_request::Status::Canceled => {
                return Some(Self::new(Exit::Canceled, "the work request was canceled"));
            }
            _ => return None,
        }
        let Some(first) = work.errors.first() else {
            return Some(Self::new(Exit::Failed, "the work failed, and imaged does not say why"));
        };
        let corrupt = verifies && first.code == Reason::ImageCorrupt.code();
        let exit = if corrupt { Exit::VerificationFailed } else { Exit::Failed };
        let mut lines = first.message.lines().map(str::trim).filter(|line| !line.is_empty());
        let mut failure = Self::new(exit, lines.next().unwrap_or(&first.code));
        let mut help = None;
        for line in lines {
            match line.strip_prefix("help: ") {
                Some(advice) => help = Some(advice),
                None => failure.causes.push(without_number(line).to_owned()),
            }
        }
        failure = failure.note("reason", &first.code);
        for further in &work.errors[1..] {
            failure = failure.note("also", further.message.lines().next().unwrap_or_default());
        }
        if let Some(help) = help {
            failure = failure.help(help);
        }
        Some(failure)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", words::clean(&self.context))?;
        for (depth, cause) in self.causes.iter().enumerate() {
            write!(f, "\n  {depth}: {}", words::clean(cause))?;
        }
        for Note { label, text } in &self.notes {
            let (label, text) = (words::clean(label), words::clean(text));
            if text.is_empty() {
                write!(f, "\n  at {label}")?;
            } else {
                write!(f, "\n  {label}: {text}")?;
            }
        }
        Ok(())
    }
}

/// The option that sets a field of a request: `freeform_tags.env` is set by
/// `--freeform-tags`.
fn option_of(field: &str) -> String {
    let name = field.split(['.', '[']).next().unwrap_or(field);
    format!("--{}", name.replace('_', "-"))
}

/// `0: text` as `text`: the number is written again when the chain is.
fn without_number(line: &str) -> &str {
    match line.split_once(": ") {
        Some((number, rest)) if number.parse::<u8>().is_ok() => rest,
        _ => line,
    }
}
