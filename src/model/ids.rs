//! Identifiers: OCIDs of what imaged makes, names of what it is told of.
//!
//! An OCID is `ocid1.<type>.<realm>.[region][.future].<unique>` (OCI,
//! "Resource Identifiers"). The realm of what imaged makes is `imaged`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::Timestamp;

/// Longest identifier that is taken from outside.
const MAX_LEN: usize = 255;

/// The text is no identifier.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// Nothing there.
    #[error("it is empty")]
    Empty,
    /// More than 255 characters.
    #[error("it is longer than 255 characters")]
    TooLong,
    /// A character that no identifier has. Ids become file names, so a slash
    /// or a leading dot must never get through.
    #[error(
        "{0:?} is not among the letters, digits, '.', '-' and '_' that an identifier is made of"
    )]
    BadCharacter(char),
    /// Starts with a dot or a dash.
    #[error("it begins with {0:?}")]
    BadStart(char),
}

fn check(text: &str) -> Result<(), IdError> {
    let first = text.chars().next().ok_or(IdError::Empty)?;
    if text.len() > MAX_LEN {
        return Err(IdError::TooLong);
    }
    if matches!(first, '.' | '-') {
        return Err(IdError::BadStart(first));
    }
    match text.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))) {
        Some(bad) => Err(IdError::BadCharacter(bad)),
        None => Ok(()),
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                check(text).map(|()| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                check(&text).map(|()| Self(text))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// OCID of an image.
    ImageId
);
id!(
    /// OCID of a work request.
    WorkRequestId
);
id!(
    /// OCID of an instance.
    InstanceId
);
id!(
    /// OCID, or any name, of a compartment: imaged is told of compartments
    /// and does not make them.
    CompartmentId
);

impl Default for CompartmentId {
    /// `default`: where things are that nobody placed.
    fn default() -> Self {
        Self("default".into())
    }
}

impl ImageId {
    /// A new one: sorts by `now`, unique by 80 random bits.
    #[must_use]
    pub fn generate(now: Timestamp, random: u128) -> Self {
        Self(ocid("image", now, random))
    }
}

impl WorkRequestId {
    /// A new one: sorts by `now`, unique by 80 random bits.
    #[must_use]
    pub fn generate(now: Timestamp, random: u128) -> Self {
        Self(ocid("workrequest", now, random))
    }
}

impl InstanceId {
    /// The OCID of the instance `name` of host `host`, for an instance file
    /// that gives none: the same pair gives the same id.
    #[must_use]
    pub fn derive(host: &str, name: &str) -> Self {
        let hash =
            blake3::derive_key("imaged 2026 instance id", format!("{host}\0{name}").as_bytes());
        let mut bits = [0; 16];
        bits.copy_from_slice(&hash[..16]);
        Self(format!("ocid1.instance.imaged..{}", base32(u128::from_be_bytes(bits))))
    }
}

/// 48 bits of time before 80 bits of chance, so that ids sort by age.
fn ocid(kind: &str, now: Timestamp, random: u128) -> String {
    let bits = (u128::from(now.as_millis()) << 80) | (random & ((1 << 80) - 1));
    format!("ocid1.{kind}.imaged..{}", base32(bits))
}

/// 26 digits of Crockford's alphabet, most significant first.
fn base32(bits: u128) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    (0..26).rev().map(|digit| char::from(ALPHABET[(bits >> (digit * 5)) as usize & 31])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_are_valid_and_sort_by_time() {
        let early = ImageId::generate(Timestamp::from_millis(1_700_000_000_000), u128::MAX);
        let late = ImageId::generate(Timestamp::from_millis(1_700_000_000_001), 0);
        assert!(early < late);
        assert_eq!(early.as_str().parse::<ImageId>().unwrap(), early);
        assert_eq!(early.as_str(), "ocid1.image.imaged..01hf7yat00zzzzzzzzzzzzzzzz");
    }

    #[test]
    fn what_could_leave_a_directory_is_no_id() {
        for bad in ["", "..", "../etc", "a/b", "-rf", ".hidden", "a\0b", "ä"] {
            assert!(bad.parse::<ImageId>().is_err(), "{bad:?}");
        }
    }
}
