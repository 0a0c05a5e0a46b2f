//! The programs that imaged starts in a guest. There are no others: a guest
//! never runs what a request says.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

/// Waits, then thaws every mount. Exit status 0: nothing was frozen any more;
/// 10: the fuse blew, it has thawed something. Ended early, it leaves at once
/// and without a trace.
///
/// While it runs everything may be frozen: it writes nothing, and reads only
/// programs.
const THAW_FUSE: &str = r#"
trap 'kill "$!"; exit 0' TERM
sleep "$1" & wait "$!"
blew=0
while read -r device mount rest; do
    fsfreeze --unfreeze "$(printf %b "$mount")" 2>/dev/null && blew=10
done </proc/self/mounts
exit "$blew"
"#;

/// Ends every fuse that there is, also those of an imaged that died. The
/// pattern does not find itself. A fuse that is just about to sleep is found
/// twice, and once of it has gone.
const DISARM: &str = r#"
fuses=$(grep -ls 'imaged-thaw-fus[e]' /proc/[0-9]*/cmdline) || exit 1
for fuse in $fuses; do
    fuse=${fuse%/cmdline}
    kill -s TERM "${fuse#/proc/}" 2>/dev/null
done
exit 0
"#;

/// Tells what of iSCSI there is.
const ISCSI_SURVEY: &str = include_str!("iscsi-survey.sh");

/// Does one step of taking iSCSI away, or of giving it back.
const ISCSI_STEP: &str = include_str!("iscsi-step.sh");

/// A step of it, in the order in which they are done; the latter half undoes
/// the former. Repeating one changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IscsiStep {
    /// Prints all records, a tar archive. Changes nothing.
    Save,
    /// Unmounts what lies on disks of sessions, and lets them go.
    Unmount,
    /// Logs out.
    LogOut,
    /// Overwrites and removes all records.
    Forget,
    /// Writes all records, from a tar archive.
    Restore,
    /// Logs in.
    LogIn,
    /// Mounts what was unmounted.
    Mount,
}

impl IscsiStep {
    /// What its script calls it.
    const fn word(self) -> &'static str {
        match self {
            Self::Save => "save",
            Self::Unmount => "unmount",
            Self::LogOut => "logout",
            Self::Forget => "forget",
            Self::Restore => "restore",
            Self::LogIn => "login",
            Self::Mount => "mount",
        }
    }

    /// What it does, to follow "the guest did not".
    #[must_use]
    pub const fn purpose(self) -> &'static str {
        match self {
            Self::Save => "tell its iSCSI records",
            Self::Unmount => "unmount its iSCSI disks",
            Self::LogOut => "log out of its iSCSI targets",
            Self::Forget => "remove its iSCSI records",
            Self::Restore => "write its iSCSI records",
            Self::LogIn => "log in to its iSCSI targets",
            Self::Mount => "mount its iSCSI disks",
        }
    }
}

/// What a program reads from its standard input: shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Input(pub Vec<u8>);

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Input({} bytes)", self.0.len())
    }
}

/// A program that imaged can start in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "program", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum GuestProgram {
    /// Linux: thaws every mount after so many seconds, unless it is disarmed.
    /// Needs `sh`, `sleep` and `fsfreeze`.
    ThawFuse {
        /// From when it starts.
        after_seconds: NonZeroU32,
    },
    /// Linux: ends all fuses before they blow. Exit status 1: there was none.
    DisarmFuses,
    /// Linux: prints what of iSCSI there is, and changes nothing.
    IscsiSurvey,
    /// Linux: does something about it. Exit status 10: something is in use,
    /// and what it printed tells by whom.
    Iscsi {
        /// What.
        step: IscsiStep,
        /// To what; not recorded.
        #[serde(skip)]
        input: Input,
    },
}

/// A process that the agent has started in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GuestProcess(pub(super) u32);

impl GuestProgram {
    /// Exit status of a fuse that has blown.
    pub const BLEW: i64 = 10;

    /// Exit status of a step that found something in use.
    pub(super) const IN_USE: i64 = 10;

    pub(super) const fn path(&self) -> &'static str {
        "/bin/sh"
    }

    pub(super) fn arguments(&self) -> Vec<String> {
        let words = |script: &str, name: &str| vec!["-c".into(), script.into(), name.into()];
        match self {
            Self::ThawFuse { after_seconds } => {
                let mut words = words(THAW_FUSE, "imaged-thaw-fuse");
                words.push(after_seconds.to_string());
                words
            }
            Self::DisarmFuses => words(DISARM, "imaged-disarm"),
            Self::IscsiSurvey => words(ISCSI_SURVEY, "imaged-iscsi-survey"),
            Self::Iscsi { step, .. } => {
                let mut words = words(ISCSI_STEP, "imaged-iscsi");
                words.push(step.word().into());
                words
            }
        }
    }

    /// Whether what it prints is wanted. The agent keeps what a fuse would
    /// print until somebody asks.
    pub(super) const fn prints(&self) -> bool {
        match self {
            Self::ThawFuse { .. } | Self::DisarmFuses => false,
            Self::IscsiSurvey | Self::Iscsi { .. } => true,
        }
    }

    /// What it reads.
    pub(super) fn input(&self) -> Option<&[u8]> {
        match self {
            Self::Iscsi { input, .. } => Some(&input.0),
            _ => None,
        }
    }

    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::ThawFuse { .. } => "the fuse that thaws",
            Self::DisarmFuses => "the end of its fuses",
            Self::IscsiSurvey => "the look at its iSCSI",
            Self::Iscsi { .. } => "a step of its iSCSI",
        }
    }
}
