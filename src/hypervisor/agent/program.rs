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
/// pattern does not find itself.
const DISARM: &str = r#"
fuses=$(grep -ls 'imaged-thaw-fus[e]' /proc/[0-9]*/cmdline) || exit 1
for fuse in $fuses; do
    fuse=${fuse%/cmdline}
    kill -s TERM "${fuse#/proc/}"
done
"#;

/// A program that imaged can start in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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
}

/// A process that the agent has started in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GuestProcess(pub(super) u32);

impl GuestProgram {
    /// Exit status of a fuse that has blown.
    pub const BLEW: i64 = 10;

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
        }
    }

    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::ThawFuse { .. } => "the fuse that thaws",
            Self::DisarmFuses => "the end of its fuses",
        }
    }
}
