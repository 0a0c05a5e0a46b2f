//! An error that QEMU or the guest agent sent, and how errors are worded.

use std::time::Duration;

use serde::Deserialize;

use crate::error::Error;

/// Longest text of a refusal; QEMU's have some hundred characters.
const MAX_TEXT: usize = 500;

/// What QEMU or the guest agent said instead of doing what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Deserialize)]
#[error("{description} ({class})")]
pub struct Refusal {
    /// `GenericError` for nearly everything; `CommandNotFound`,
    /// `DeviceNotFound` (QEMU, "QAPI error classes").
    #[serde(deserialize_with = "harmless")]
    pub class: String,
    /// For people. It has no control characters: a guest may have written it.
    #[serde(rename = "desc", deserialize_with = "harmless")]
    pub description: String,
}

impl Refusal {
    /// The refusal that is the cause of `error`.
    #[must_use]
    pub fn behind(error: &Error) -> Option<&Self> {
        std::error::Error::source(error)?.downcast_ref()
    }

    /// Whether the other side does not know the command, or was told not to
    /// run it.
    #[must_use]
    pub fn is_unknown_command(&self) -> bool {
        // An agent whose guest is frozen refuses most commands with the same
        // class; which it is, it says in words only.
        self.class == "CommandNotFound" && !self.description.contains("frozen state")
    }
}

fn harmless<'de, D: serde::Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    Ok(printable(&text))
}

/// `text` as it can be shown to people: bounded, and no control characters.
pub(super) fn printable(text: &str) -> String {
    let shown = &text[..text.floor_char_boundary(MAX_TEXT)];
    let mut shown: String = shown.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.len() > MAX_TEXT {
        shown.push('…');
    }
    shown
}

/// How long was waited, for errors.
pub(super) fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_write_to_a_terminal() {
        let text = r#"{"class": "GenericError", "desc": "no\u001b[2Jsuch\nfile", "more": 1}"#;
        let refusal: Refusal = serde_json::from_str(text).unwrap();
        assert_eq!(refusal.to_string(), "no [2Jsuch file (GenericError)");
        assert!(printable(&"ü".repeat(1000)).len() <= MAX_TEXT + 4);
    }
}
