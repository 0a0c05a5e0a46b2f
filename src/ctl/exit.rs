//! Exit codes: what a script learns without reading a word.

use std::{fmt::Write as _, process::ExitCode};

/// How an invocation ended. The numbers are part of imagectl's interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// What was asked is done.
    Success = 0,
    /// imaged refused, or the work failed.
    Failed = 1,
    /// The command line is wrong. As clap and the `oci` CLI have it.
    Usage = 2,
    /// imaged did not answer.
    Unreachable = 3,
    /// The time to wait is over; the work goes on.
    TimedOut = 4,
    /// The work was canceled, or a question was answered with no.
    Canceled = 5,
    /// The stored image is not what was stored.
    VerificationFailed = 6,
    /// Ctrl-C while waiting; the work goes on. As a shell counts: 128 and
    /// the number of SIGINT.
    Interrupted = 130,
}

impl Exit {
    /// All of them, in order.
    pub const ALL: [Self; 8] = [
        Self::Success,
        Self::Failed,
        Self::Usage,
        Self::Unreachable,
        Self::TimedOut,
        Self::Canceled,
        Self::VerificationFailed,
        Self::Interrupted,
    ];

    /// The number that the shell sees.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// What it means, for `--help` and the man pages.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Success => "done",
            Self::Failed => "imaged refused, or the work failed",
            Self::Usage => "the command line is wrong",
            Self::Unreachable => "imaged cannot be reached",
            Self::TimedOut => "waited as long as allowed; the work goes on",
            Self::Canceled => "the work was canceled, or you answered no",
            Self::VerificationFailed => "the stored image is not what was stored",
            Self::Interrupted => "Ctrl-C while waiting; the work goes on",
        }
    }

    /// The list for `--help`.
    pub(super) fn list() -> String {
        let mut text = String::from("Exit codes:");
        for exit in Self::ALL {
            // Writing to a String cannot fail.
            let _ = write!(text, "\n  {:<3}  {}", exit.code(), exit.meaning());
        }
        text
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}
