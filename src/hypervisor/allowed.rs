//! The form of the published lists of commands.

/// A command that imaged may send to a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// Its name on the wire.
    pub name: &'static str,
    /// What it is sent for, and with which limits. One phrase.
    pub why: &'static str,
}

/// The entry of `name`.
pub(super) fn find(list: &'static [Allowed], name: &str) -> Option<&'static Allowed> {
    list.iter().find(|allowed| allowed.name == name)
}

/// A program's attempt to send a command that is not on the list: a defect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the command {0} is not on the list of what imaged may send")]
pub struct NotAllowed(pub &'static str);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::{agent, qmp};

    /// The rows of the table below `heading`.
    fn published(heading: &str) -> Vec<&'static str> {
        include_str!("../../docs/qemu-commands.md")
            .lines()
            .skip_while(|line| *line != heading)
            .skip(1)
            .take_while(|line| !line.starts_with("## "))
            .filter(|line| line.starts_with("| `"))
            .collect()
    }

    fn rows(list: &[Allowed]) -> Vec<String> {
        list.iter().map(|allowed| format!("| `{}` | {} |", allowed.name, allowed.why)).collect()
    }

    #[test]
    fn the_document_lists_what_the_codec_lets_through() {
        assert_eq!(published("## To QEMU"), rows(qmp::ALLOWED));
        assert_eq!(published("## To the guest agent"), rows(agent::ALLOWED));
    }

    #[test]
    fn no_command_that_gives_everything_away() {
        for list in [qmp::ALLOWED, agent::ALLOWED] {
            for name in ["human-monitor-command", "quit", "qom-list", "guest-file-open", "migrate"]
            {
                assert_eq!(find(list, name), None);
            }
        }
    }
}
