//! A configuration file as text: where in it an error is.

use std::{fmt::Display, ops::Range, path::Path};

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use crate::error::{Error, Reason, Result};

/// The text of a file and its name.
pub(super) struct Source<'a> {
    pub text: &'a str,
    pub origin: &'a Path,
}

impl Source<'_> {
    /// What the file says.
    pub fn deserialize<T: DeserializeOwned>(&self) -> Result<T> {
        toml::from_str(self.text).map_err(|cause| {
            let at = cause.span().map_or(0, |span| span.start);
            let missing = cause.message().starts_with("missing field");
            let key = DeTable::parse(self.text)
                .ok()
                .and_then(|table| key_at(table.get_ref(), at))
                // What is missing is missing in a table, not in the key that
                // happens to stand first.
                .filter(|(_, value)| !missing || *value == Kind::Table)
                .map(|(path, _)| path.join("."));
            self.error(at, key.as_deref(), &in_our_words(cause.message()))
        })
    }

    /// Whether the file sets the key with this path.
    pub fn has(&self, path: &[&str]) -> bool {
        self.find(path).is_some()
    }

    /// An error about the value of the key with this path.
    pub fn refuse(&self, path: &[&str], message: impl Display) -> Error {
        let at = self.find(path).map_or(0, |span| span.start);
        self.error(at, Some(&path.join(".")), &message)
    }

    fn error(&self, at: usize, key: Option<&str>, message: &dyn Display) -> Error {
        let before = self.text.as_bytes().iter().take(at);
        let line = 1 + before.filter(|byte| **byte == b'\n').count();
        let origin = self.origin.display();
        let context = match key {
            Some(key) => format!("{origin}, line {line}: {key}: {message}"),
            None => format!("{origin}, line {line}: {message}"),
        };
        Error::new(Reason::InvalidConfiguration, context)
    }

    /// Where the key with this path stands.
    fn find(&self, path: &[&str]) -> Option<Range<usize>> {
        let (last, tables) = path.split_last()?;
        let root = DeTable::parse(self.text).ok()?;
        let mut table = root.get_ref();
        for name in tables {
            table = table.get(*name)?.get_ref().as_table()?;
        }
        table.get_key_value(*last).map(|(key, _)| key.span())
    }
}

/// Serde speaks of fields and Rust's types, and repeats the name of the key.
fn in_our_words(message: &str) -> String {
    let unknown = message.strip_prefix("unknown field `").and_then(|rest| rest.split_once("`, "));
    match unknown {
        Some((_, expected)) => format!("unknown key, {expected}"),
        None => message
            .replace("missing field", "missing key")
            .replace("a nonzero usize", "a number from 1 on")
            .replace("path string", "a path"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Table,
    Other,
}

/// The innermost key whose name or value covers offset `at`: its path, and
/// what its value is.
fn key_at(table: &DeTable<'_>, at: usize) -> Option<(Vec<String>, Kind)> {
    table.iter().find_map(|(key, value)| {
        let (below, kind) = match value.get_ref() {
            DeValue::Table(below) => (key_at(below, at), Kind::Table),
            _ => (None, Kind::Other),
        };
        let mut path = vec![key.get_ref().clone().into_owned()];
        match below {
            Some((below, kind)) => {
                path.extend(below);
                Some((path, kind))
            }
            None if key.span().contains(&at) || value.span().contains(&at) => Some((path, kind)),
            None => None,
        }
    })
}
