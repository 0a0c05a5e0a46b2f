//! Messages of the guest agent: JSON lines. What comes from the agent is the
//! guest's, and hostile.

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::command::{ALLOWED, Call};
use crate::hypervisor::{
    allowed::{self, NotAllowed},
    refusal::Refusal,
};

/// The longest answer that is asked for lists filesystems: a few hundred
/// bytes each, some thousand on a container host.
pub const MAX_MESSAGE: usize = 1 << 20;

/// No UTF-8 has this byte, so it parts what was said before from what is said
/// now, whatever was cut off (`guest-sync-delimited`).
pub const SENTINEL: u8 = 0xff;

/// What an agent answers.
#[derive(Debug)]
pub enum Answer {
    /// It was done; JSON.
    Done(Box<RawValue>),
    /// It was not.
    Refused(Refusal),
}

/// A line that is no answer.
#[derive(Debug, thiserror::Error)]
#[error("a line that is no answer")]
pub struct Malformed;

#[derive(Deserialize)]
struct Envelope<'a> {
    // Even null is an answer.
    #[serde(rename = "return", borrow, default, deserialize_with = "some")]
    done: Option<&'a RawValue>,
    error: Option<Refusal>,
}

fn some<'de, D: Deserializer<'de>>(from: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

/// Reads one line.
///
/// # Errors
///
/// [`Malformed`]: the agent and imaged are out of step, or it is no agent.
pub fn decode(line: &[u8]) -> Result<Answer, Malformed> {
    let envelope: Envelope<'_> = serde_json::from_slice(line).map_err(|_| Malformed)?;
    match (envelope.error, envelope.done) {
        (Some(refusal), _) => Ok(Answer::Refused(refusal)),
        (None, Some(value)) => Ok(Answer::Done(value.to_owned())),
        (None, None) => Err(Malformed),
    }
}

/// Whether `line` ends what was said before: it answers the sync that was
/// sent with `id`.
#[must_use]
pub fn is_synced(line: &[u8], id: u32) -> bool {
    let Some(sentinel) = line.iter().rposition(|&byte| byte == SENTINEL) else { return false };
    match decode(&line[sentinel + 1..]) {
        Ok(Answer::Done(value)) => {
            serde_json::from_str(value.get()).is_ok_and(|got: u32| got == id)
        }
        _ => false,
    }
}

/// The line that asks an agent for `call`.
///
/// # Errors
///
/// [`NotAllowed`] for a command that the published list does not have.
pub(super) fn encode(call: &Call) -> Result<Vec<u8>, NotAllowed> {
    let refused = NotAllowed(call.name());
    let Some(_) = allowed::find(ALLOWED, call.name()) else { return Err(refused) };
    let mut line = match call {
        // Has the agent forget what an earlier client has sent half.
        Call::SyncDelimited { .. } => vec![SENTINEL],
        _ => Vec::new(),
    };
    // Nothing in a call fails to be written: no maps, no foreign types.
    line.extend(serde_json::to_vec(call).map_err(|_| refused)?);
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn answers_and_refusals() {
        assert!(matches!(decode(b"{\"return\": {}}"), Ok(Answer::Done(_))));
        assert!(matches!(decode(b"{\"return\": null}"), Ok(Answer::Done(_))));
        let refused = br#"{"error": {"class": "CommandNotFound", "desc": "no"}}"#;
        assert!(matches!(decode(refused), Ok(Answer::Refused(_))));
        for odd in [&b"{}"[..], b"", b"[]", b"\xff", b"{\"return\": {}} {\"return\": {}}"] {
            assert!(decode(odd).is_err(), "{odd:?}");
        }
    }

    #[test]
    fn only_our_own_sync_counts() {
        assert!(is_synced(b"\xff{\"return\": 7}", 7));
        assert!(is_synced(b"{\"return\": {}\xff{\"return\": 6}\xff{\"return\": 7}", 7));
        for other in [
            &b"{\"return\": 7}"[..],
            b"\xff{\"return\": 6}",
            b"\xff{\"return\": 7}\xff",
            b"\xff{\"return\": \"7\"}",
            b"\xff{\"error\": {\"class\": \"a\", \"desc\": \"b\"}}",
        ] {
            assert!(!is_synced(other, 7), "{}", String::from_utf8_lossy(other));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..300), id: u32) {
            let _ = decode(&bytes);
            let _ = is_synced(&bytes, id);
        }

        #[test]
        fn junk_before_the_sentinel_is_left_behind(junk: Vec<u8>, id: u32) {
            let line = [&junk[..], b"\xff", format!("{{\"return\": {id}}}").as_bytes()].concat();
            prop_assert!(is_synced(&line, id));
        }
    }
}
