//! Every command that imaged can send to a guest agent. Nothing else can be
//! encoded.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde::Serialize;

use super::program::{GuestProcess, GuestProgram};
use crate::{
    hypervisor::{allowed::Allowed, keep::Keep},
    recorder::Lane,
};

/// What imaged may send, published in `docs/qemu-commands.md`.
pub const ALLOWED: &[Allowed] = &[
    Allowed {
        name: "guest-sync-delimited",
        why: "before anything else after each connect and each timeout: leaves answers behind that nobody waits for",
    },
    Allowed { name: "guest-ping", why: "whether the agent answers" },
    Allowed { name: "guest-info", why: "its version, and which commands the guest allows" },
    Allowed {
        name: "guest-get-osinfo",
        why: "the guest's operating system, for deadlines and the image's record",
    },
    Allowed { name: "guest-get-host-name", why: "the guest's name, for the image's record" },
    Allowed { name: "guest-get-fsinfo", why: "which filesystems will be frozen, and their disks" },
    Allowed {
        name: "guest-fsfreeze-status",
        why: "whether the guest is frozen, e.g. by an imaged that died",
    },
    Allowed { name: "guest-fsfreeze-freeze", why: "holds the guest's filesystems still" },
    Allowed { name: "guest-fsfreeze-thaw", why: "lets them go" },
    Allowed {
        name: "guest-exec",
        why: "only for shell scripts of imaged's own: the fuse, which thaws the guest after a deadline, its end, the look at the guest's iSCSI, and the steps that take it away and give it back",
    },
    Allowed {
        name: "guest-exec-status",
        why: "whether the fuse has blown, and what the others have found or done",
    },
    Allowed {
        name: "guest-shutdown",
        why: "shuts the guest down for its image, where that was asked for; imaged starts it again",
    },
];

/// The commands as they are encoded.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "execute", content = "arguments")]
pub(super) enum Call {
    #[serde(rename = "guest-sync-delimited")]
    SyncDelimited { id: u32 },
    #[serde(rename = "guest-ping")]
    Ping,
    #[serde(rename = "guest-info")]
    Info,
    #[serde(rename = "guest-get-osinfo")]
    GetOsinfo,
    #[serde(rename = "guest-get-host-name")]
    GetHostName,
    #[serde(rename = "guest-get-fsinfo")]
    GetFsinfo,
    #[serde(rename = "guest-fsfreeze-status")]
    FsfreezeStatus,
    #[serde(rename = "guest-fsfreeze-freeze")]
    FsfreezeFreeze,
    #[serde(rename = "guest-fsfreeze-thaw")]
    FsfreezeThaw,
    #[serde(rename = "guest-exec", serialize_with = "exec")]
    Exec(GuestProgram),
    #[serde(rename = "guest-exec-status")]
    ExecStatus { pid: GuestProcess },
    #[serde(rename = "guest-shutdown")]
    Shutdown { mode: ShutdownMode },
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ShutdownMode {
    Powerdown,
}

fn exec<S: serde::Serializer>(program: &GuestProgram, to: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    struct Exec {
        path: &'static str,
        arg: Vec<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        input_data: Option<String>,
        capture_output: bool,
    }
    let (path, arg, capture_output) = (program.path(), program.arguments(), program.prints());
    let input_data = program.input().map(|input| BASE64.encode(input));
    Exec { path, arg, input_data, capture_output }.serialize(to)
}

impl Call {
    /// Its name on the wire.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::SyncDelimited { .. } => "guest-sync-delimited",
            Self::Ping => "guest-ping",
            Self::Info => "guest-info",
            Self::GetOsinfo => "guest-get-osinfo",
            Self::GetHostName => "guest-get-host-name",
            Self::GetFsinfo => "guest-get-fsinfo",
            Self::FsfreezeStatus => "guest-fsfreeze-status",
            Self::FsfreezeFreeze => "guest-fsfreeze-freeze",
            Self::FsfreezeThaw => "guest-fsfreeze-thaw",
            Self::Exec(_) => "guest-exec",
            Self::ExecStatus { .. } => "guest-exec-status",
            Self::Shutdown { .. } => "guest-shutdown",
        }
    }

    /// What it does, to follow "the guest agent refused to".
    pub(super) fn purpose(&self) -> String {
        match self {
            Self::SyncDelimited { .. } | Self::Ping => "answer".into(),
            Self::Info => "say what it can do".into(),
            Self::GetOsinfo => "name the guest's operating system".into(),
            Self::GetHostName => "name the guest".into(),
            Self::GetFsinfo => "list the guest's filesystems".into(),
            Self::FsfreezeStatus => "say whether the guest is frozen".into(),
            Self::FsfreezeFreeze => "freeze the guest's filesystems".into(),
            Self::FsfreezeThaw => "thaw the guest's filesystems".into(),
            Self::Exec(program) => format!("start {} in the guest", program.name()),
            Self::ExecStatus { pid } => format!("tell of the guest's process {}", pid.0),
            Self::Shutdown { .. } => "shut the guest down".into(),
        }
    }

    /// Where it and its answer are recorded.
    pub(super) const fn lane(&self) -> Lane {
        match self {
            Self::FsfreezeFreeze | Self::FsfreezeThaw | Self::Exec(_) | Self::Shutdown { .. } => {
                Lane::Commands
            }
            _ => Lane::Queries,
        }
    }

    /// Whether it carries what nobody may see.
    pub(super) fn is_secret(&self) -> bool {
        matches!(self, Self::Exec(program) if program.input().is_some())
    }

    /// Its arguments as they may be recorded: of a program, which one it is.
    pub(super) fn recorded(&self) -> Option<serde_json::Value> {
        match self {
            Self::Exec(program) => serde_json::to_value(program).ok(),
            other => Some(serde_json::to_value(other).ok()?.get_mut("arguments")?.take()),
        }
    }

    /// What of its answer may be recorded: nothing that a program in the
    /// guest has said.
    pub(super) const fn keep(&self) -> Keep {
        match self {
            Self::Info => Keep::Members(&["version"]),
            Self::Exec(_) => Keep::Members(&["pid"]),
            Self::ExecStatus { .. } => Keep::Members(&["exited", "exitcode", "signal"]),
            Self::GetFsinfo => Keep::Members(&["mountpoint", "name", "type"]),
            _ => Keep::All,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{collections::BTreeSet, num::NonZeroU32};

    use super::*;
    use crate::hypervisor::agent::{
        codec,
        program::{Input, IscsiStep},
    };

    /// One of each.
    pub fn samples() -> Vec<Call> {
        let after_seconds = NonZeroU32::new(30).unwrap();
        vec![
            Call::SyncDelimited { id: 7 },
            Call::Ping,
            Call::Info,
            Call::GetOsinfo,
            Call::GetHostName,
            Call::GetFsinfo,
            Call::FsfreezeStatus,
            Call::FsfreezeFreeze,
            Call::FsfreezeThaw,
            Call::Exec(GuestProgram::ThawFuse { after_seconds }),
            Call::Exec(GuestProgram::DisarmFuses),
            Call::Exec(GuestProgram::IscsiSurvey),
            Call::Exec(GuestProgram::Iscsi {
                step: IscsiStep::LogOut,
                input: Input(b"session\t1\n".to_vec()),
            }),
            Call::ExecStatus { pid: GuestProcess(42) },
            Call::Shutdown { mode: ShutdownMode::Powerdown },
        ]
    }

    #[test]
    fn every_command_is_encoded_as_the_agent_reads_it() {
        let lines: Vec<_> = samples()
            .iter()
            .map(|call| String::from_utf8_lossy(&codec::encode(call).unwrap()).into_owned())
            .collect();
        let lines = lines.concat();
        let scripts = [
            ("iscsi-survey.sh", include_str!("iscsi-survey.sh")),
            ("iscsi-step.sh", include_str!("iscsi-step.sh")),
        ];
        let lines = scripts.iter().fold(lines, |lines, (name, script)| {
            lines.replace(&serde_json::to_string(script).unwrap(), &format!("<{name}>"))
        });
        insta::assert_snapshot!(lines, @r#"
        �{"execute":"guest-sync-delimited","arguments":{"id":7}}
        {"execute":"guest-ping"}
        {"execute":"guest-info"}
        {"execute":"guest-get-osinfo"}
        {"execute":"guest-get-host-name"}
        {"execute":"guest-get-fsinfo"}
        {"execute":"guest-fsfreeze-status"}
        {"execute":"guest-fsfreeze-freeze"}
        {"execute":"guest-fsfreeze-thaw"}
        {"execute":"guest-exec","arguments":{"path":"/bin/sh","arg":["-c","\ntrap 'kill \"$!\"; exit 0' TERM\nsleep \"$1\" & wait \"$!\"\nblew=0\nwhile read -r device mount rest; do\n    fsfreeze --unfreeze \"$(printf %b \"$mount\")\" 2>/dev/null && blew=10\ndone </proc/self/mounts\nexit \"$blew\"\n","imaged-thaw-fuse","30"],"capture-output":false}}
        {"execute":"guest-exec","arguments":{"path":"/bin/sh","arg":["-c","\nfuses=$(grep -ls 'imaged-thaw-fus[e]' /proc/[0-9]*/cmdline) || exit 1\nfor fuse in $fuses; do\n    fuse=${fuse%/cmdline}\n    kill -s TERM \"${fuse#/proc/}\" 2>/dev/null\ndone\nexit 0\n","imaged-disarm"],"capture-output":false}}
        {"execute":"guest-exec","arguments":{"path":"/bin/sh","arg":["-c",<iscsi-survey.sh>,"imaged-iscsi-survey"],"capture-output":true}}
        {"execute":"guest-exec","arguments":{"path":"/bin/sh","arg":["-c",<iscsi-step.sh>,"imaged-iscsi","logout"],"input-data":"c2Vzc2lvbgkxCg==","capture-output":true}}
        {"execute":"guest-exec-status","arguments":{"pid":42}}
        {"execute":"guest-shutdown","arguments":{"mode":"powerdown"}}
        "#);
    }

    #[test]
    fn the_list_has_every_command_and_no_more() {
        let sent: BTreeSet<_> = samples().iter().map(Call::name).collect();
        let listed: BTreeSet<_> = ALLOWED.iter().map(|allowed| allowed.name).collect();
        assert_eq!(sent, listed);
        for call in samples() {
            let value = serde_json::to_value(&call).unwrap();
            assert_eq!(value["execute"], call.name());
        }
    }

    #[test]
    fn what_is_recorded_has_no_arguments_of_programs() {
        let recorded: Vec<_> =
            samples().iter().filter_map(Call::recorded).map(|value| value.to_string()).collect();
        insta::assert_snapshot!(recorded.join("\n"), @r#"
        {"id":7}
        {"after-seconds":30,"program":"thaw-fuse"}
        {"program":"disarm-fuses"}
        {"program":"iscsi-survey"}
        {"program":"iscsi","step":"log-out"}
        {"pid":42}
        {"mode":"powerdown"}
        "#);
    }
}
