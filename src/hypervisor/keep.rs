//! What of a message may be recorded: secrets stay out.

use serde_json::{Value, json};

use crate::recorder::MAX_DATA;

/// Which parts of a message may be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Everything: imaged made it, or it holds numbers and states only.
    All,
    /// The members of these names, at any depth, and what is in them.
    Members(&'static [&'static str]),
    /// How long it was.
    Length,
}

impl Keep {
    /// What may be recorded of `text`, a JSON value.
    pub(super) fn of_text(self, text: &str) -> Value {
        // A long answer is not parsed a second time only to be left out.
        if self == Self::Length || text.len() > 16 * MAX_DATA {
            return json!({ "omittedBytes": text.len() });
        }
        self.of(serde_json::from_str(text).unwrap_or_default())
    }

    /// What may be recorded of `value`.
    pub(super) fn of(self, value: Value) -> Value {
        let Self::Members(kept) = self else { return value };
        match value {
            Value::Object(members) => members
                .into_iter()
                .filter(|(name, _)| kept.contains(&name.as_str()))
                .map(|(name, value)| (name, self.of(value)))
                .collect(),
            Value::Array(values) => values.into_iter().map(|value| self.of(value)).collect(),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_is_kept() {
        let value =
            json!([{"device": "d0", "inserted": {"node-name": "boot", "file": "https://u:p@h/"}}]);
        let kept = Keep::Members(&["device", "inserted", "node-name"]).of(value.clone());
        assert_eq!(kept, json!([{"device": "d0", "inserted": {"node-name": "boot"}}]));
        assert_eq!(Keep::All.of_text("{\"a\": 1}"), json!({"a": 1}));
        assert_eq!(Keep::Length.of_text("{\"a\": 1}"), json!({"omittedBytes": 8}));
    }
}
