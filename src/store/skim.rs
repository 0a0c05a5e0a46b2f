//! A manifest without its parts, for lists.
//!
//! A manifest of 400 GiB has 51,200 parts: read whole it takes tens of
//! megabytes, of which a list shows nothing.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Map, Value};

use crate::model::image::Manifest;

/// Where a manifest has its parts.
const PARTS: &str = "parts";

/// A [`Manifest`] whose parts were never in memory: there are none.
#[derive(Debug)]
pub struct Skimmed(pub Manifest);

impl AsRef<Manifest> for Skimmed {
    fn as_ref(&self) -> &Manifest {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Skimmed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = deserializer.deserialize_map(Fields)?;
        if let Some(parts) = fields.get_mut(PARTS) {
            *parts = Value::Array(Vec::new());
        }
        Manifest::deserialize(Value::Object(fields)).map(Self).map_err(D::Error::custom)
    }
}

struct Fields;

impl<'de> Visitor<'de> for Fields {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a manifest")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            let value = match name.as_str() {
                PARTS => map.next_value::<IgnoredAny>().map(|_| Value::Null)?,
                _ => map.next_value()?,
            };
            fields.insert(name, value);
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::directory::tests::{id, parts, sealed};

    #[test]
    fn everything_but_the_parts_is_there() {
        let mut manifest = sealed(&id(1), &parts(&[8192, 100])).manifest;
        let text = serde_json::to_string(&manifest).unwrap();
        let skimmed: Skimmed = serde_json::from_str(&text).unwrap();
        manifest.stored.parts.clear();
        assert_eq!(skimmed.0, manifest);
    }

    #[test]
    fn what_is_no_manifest_is_none_here() {
        let manifest = sealed(&id(1), &parts(&[100])).manifest;
        let text = serde_json::to_string(&manifest).unwrap();
        for (what, by) in [("imaged.manifest/1", "imaged.manifest/9"), ("\"parts\"", "\"part\"")] {
            serde_json::from_str::<Skimmed>(&text.replace(what, by)).unwrap_err();
        }
        serde_json::from_str::<Skimmed>("[]").unwrap_err();
    }
}
