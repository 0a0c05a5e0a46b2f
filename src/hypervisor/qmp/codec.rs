//! Messages of QEMU's machine protocol: one JSON object a line.
//!
//! Tolerant: members and events that imaged does not know pass. Bounded: a
//! line has at most [`MAX_MESSAGE`] bytes, and an answer stays text until its
//! reader takes from it what it knows, so that no answer grows in memory.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::{call::Call, command::ALLOWED, event::Event};
use crate::hypervisor::{
    allowed::{self, NotAllowed},
    refusal::Refusal,
};

/// The longest known message, the schema, has 207 KB in QEMU 7.2.
pub const MAX_MESSAGE: usize = 4 << 20;

/// What QEMU sends.
#[derive(Debug)]
pub enum Message {
    /// The first one: QEMU is ready for a client.
    Greeting(Version),
    /// What was asked for is done.
    Answer {
        /// Of the command.
        id: u64,
        /// JSON.
        value: Box<RawValue>,
    },
    /// What was asked for is not done.
    Refused {
        /// Of the command; none when QEMU could not read it.
        id: Option<u64>,
        /// Why.
        refusal: Refusal,
    },
    /// Something happened.
    Event(Event),
}

/// Which QEMU it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 7 in 7.2.22.
    pub major: u32,
    /// 2 in 7.2.22.
    pub minor: u32,
    /// 22 in 7.2.22.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A line that is no message of QEMU's machine protocol.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// Not JSON, or not such an object.
    #[error("a line that is not a QMP message")]
    Json(#[from] serde_json::Error),
    /// An object of no known kind.
    #[error("a message of no known kind")]
    Kind,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    // Even null is an answer.
    #[serde(rename = "return", borrow, default, deserialize_with = "some")]
    answer: Option<&'a RawValue>,
    error: Option<Refusal>,
    #[serde(borrow)]
    event: Option<std::borrow::Cow<'a, str>>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct Greeting {
    version: Option<Versions>,
}

#[derive(Deserialize)]
struct Versions {
    qemu: Numbers,
}

#[derive(Deserialize)]
struct Numbers {
    major: u32,
    minor: u32,
    micro: u32,
}

fn some<'de, D: Deserializer<'de>>(from: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

/// Reads one line.
///
/// # Errors
///
/// [`Malformed`], after which nothing of this connection can be trusted.
pub fn decode(line: &[u8]) -> Result<Message, Malformed> {
    let envelope: Envelope<'_> = serde_json::from_slice(line)?;
    if let Some(name) = envelope.event {
        return Ok(Message::Event(Event::read(&name, envelope.data)));
    }
    if let Some(refusal) = envelope.error {
        return Ok(Message::Refused { id: envelope.id, refusal });
    }
    if let Some(greeting) = envelope.greeting {
        let Some(Versions { qemu }) = greeting.version else { return Err(Malformed::Kind) };
        let version = Version { major: qemu.major, minor: qemu.minor, micro: qemu.micro };
        return Ok(Message::Greeting(version));
    }
    match (envelope.answer, envelope.id) {
        (Some(value), Some(id)) => Ok(Message::Answer { id, value: value.to_owned() }),
        _ => Err(Malformed::Kind),
    }
}

/// The line that asks QEMU for `call`.
///
/// # Errors
///
/// [`NotAllowed`] for a command that the published list does not have.
pub(super) fn encode(call: &Call, id: u64) -> Result<Vec<u8>, NotAllowed> {
    #[derive(Serialize)]
    struct Line<'a> {
        #[serde(flatten)]
        call: &'a Call,
        id: u64,
    }
    let refused = NotAllowed(call.name());
    let Some(_) = allowed::find(ALLOWED, call.name()) else { return Err(refused) };
    // Nothing in a call fails to be written: no maps, no foreign types.
    let mut line = serde_json::to_vec(&Line { call, id }).map_err(|_| refused)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hypervisor::qmp::{command::tests::samples, event::EventKind};

    fn shown(line: &str) -> String {
        match decode(line.as_bytes()) {
            Ok(message) => format!("{message:?}"),
            Err(cause) => format!("{cause}"),
        }
    }

    #[test]
    fn what_qemu_sends_is_read() {
        let lines = [
            r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#,
            r#"{"return": {}, "id": 3}"#,
            r#"{"return": null, "id": 4, "later": [1]}"#,
            r#"{"id": 5, "error": {"class": "GenericError", "desc": "Node imaged-c is in use"}}"#,
            r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#,
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#,
            r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "NEW_THING", "data": {"x": 1}}"#,
            r#"{"return": {}}"#,
            r#"{"QMP": {}}"#,
            r#"{}"#,
            "[]",
            "SSH-2.0",
        ];
        let shown: Vec<_> = lines.into_iter().map(shown).collect();
        insta::assert_snapshot!(shown.join("\n"), @r#"
        Greeting(Version { major: 7, minor: 2, micro: 22 })
        Answer { id: 3, value: RawValue({}) }
        Answer { id: 4, value: RawValue(null) }
        Refused { id: Some(5), refusal: Refusal { class: "GenericError", description: "Node imaged-c is in use" } }
        Refused { id: None, refusal: Refusal { class: "GenericError", description: "JSON parse error" } }
        Event(Event { kind: Stop, details: Details { id: None, device: None, path: None, node_name: None, reason: None, action: None, operation: None, status: None, error: None, guest: None, nospace: None, open: None } })
        Event(Event { kind: Other("NEW_THING"), details: Details { id: None, device: None, path: None, node_name: None, reason: None, action: None, operation: None, status: None, error: None, guest: None, nospace: None, open: None } })
        a message of no known kind
        a message of no known kind
        a message of no known kind
        a line that is not a QMP message
        a line that is not a QMP message
        "#);
    }

    #[test]
    fn events_keep_what_matters() {
        let line = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}, "timestamp": {}}"#;
        let Ok(Message::Event(event)) = decode(line.as_bytes()) else { panic!() };
        assert_eq!(event.kind, EventKind::Shutdown);
        assert_eq!(event.details.reason.as_deref(), Some("guest-shutdown"));
    }

    #[test]
    fn depth_is_bounded() {
        let deep = format!("{{\"return\": {}, \"id\": 1}}", "[".repeat(100_000));
        assert!(decode(deep.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
        }

        /// Damage anywhere gives an error or another message, never a panic.
        #[test]
        fn damaged_messages_are_no_danger(which in 0_usize..4, at in 0_usize..60, byte: u8) {
            let lines = [
                r#"{"return": {"status": "running"}, "id": 3}"#,
                r#"{"id": 5, "error": {"class": "GenericError", "desc": "x"}}"#,
                r#"{"event": "SHUTDOWN", "data": {"guest": true}}"#,
                r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 2, "major": 7}}}}"#,
            ];
            let mut line = lines[which].as_bytes().to_vec();
            let at = at % line.len();
            line[at] = byte;
            let _ = decode(&line);
        }

        #[test]
        fn a_command_is_one_line_that_names_itself(which in any::<prop::sample::Index>(), id: u64) {
            let samples = samples();
            let call = which.get(&samples);
            let line = encode(call, id).unwrap();
            prop_assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
            let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(&value["execute"], call.name());
            prop_assert_eq!(&value["id"], id);
        }
    }
}
