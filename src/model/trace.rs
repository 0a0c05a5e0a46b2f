//! What a capture said to a virtual machine, and what it heard.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Every command and answer of a capture, in order, without secrets.
///
/// Bounded: of a long recording the beginning and the end are kept, and what
/// is missing between them is counted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trace {
    /// In the order in which they happened.
    pub entries: Vec<Entry>,
    /// How many entries were left out.
    pub dropped: Dropped,
}

impl Trace {
    /// Whether nothing was said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// This and what a later recording has, with its times counted on from
    /// the end of this.
    #[must_use]
    pub fn then(mut self, later: Self) -> Self {
        let end = self.entries.last().map_or(0, |entry| entry.at_micros);
        self.entries.extend(
            later
                .entries
                .into_iter()
                .map(|entry| Entry { at_micros: end.saturating_add(entry.at_micros), ..entry }),
        );
        self.dropped.commands += later.dropped.commands;
        self.dropped.queries += later.dropped.queries;
        self.dropped.events += later.dropped.events;
        self
    }
}

/// One thing that was said, heard or noted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Microseconds since the recording began, by a clock that never jumps.
    pub at_micros: u64,
    /// With whom.
    pub channel: Channel,
    /// What it is.
    pub kind: Kind,
    /// Name of the command or event; of a note, its text.
    pub name: String,
    /// What answers have in common with their command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Arguments, answer or error, without what is secret or of no use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
}

/// Whom an entry concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// QEMU's machine protocol.
    Qmp,
    /// The agent in the guest.
    Agent,
    /// imaged itself.
    Imaged,
    /// libvirt, by virsh.
    Libvirt,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Sent.
    Command,
    /// Received: it was done.
    Answer,
    /// Received: it was refused.
    Refusal,
    /// Received without having been asked for.
    Event,
    /// A remark of imaged.
    Note,
}

/// How many entries a trace leaves out, by what they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Commands that change something, their answers, and notes.
    pub commands: u64,
    /// Questions and their answers.
    pub queries: u64,
    /// Events.
    pub events: u64,
}
