//! Names of things inside a QEMU, by whose they are.

use std::{fmt, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};

/// What all names begin with that imaged gives: whoever looks at a QEMU sees
/// whose they are, and imaged deletes nothing else.
pub const PREFIX: &str = "imaged-";

/// QEMU's buffer for a node's name has 32 bytes with its NUL
/// (`BlockDriverState.node_name`). Longer ids would do for exports;
/// one rule is enough.
const MAX_NAME: usize = 31;

/// `sun_path` has 108 bytes with its NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// The text cannot be used as such a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It does not begin with `imaged-`, or nothing follows.
    #[error("{0:?} does not begin with \"imaged-\"")]
    NotOurs(String),
    /// QEMU would refuse or cut it.
    #[error("{0:?} is longer than {1} bytes")]
    TooLong(String, usize),
    /// QEMU would refuse it.
    #[error("{0:?} has characters that a name in QEMU cannot have")]
    Malformed(String),
    /// It is not an absolute path that QEMU takes as it is.
    #[error("{0:?} is not an absolute path in UTF-8 that QEMU takes literally")]
    Path(std::path::PathBuf),
}

macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $check:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                $check(text).map(|()| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                $check(&text).map(|()| Self(text))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text!(
    /// A block node of imaged's own: `imaged-…`, up to 31 letters, digits,
    /// `-`, `.` and `_`. Only these are made and deleted.
    NodeName,
    check_own
);
text!(
    /// An export of imaged's own, also its name on the wire.
    ExportId,
    check_own
);
text!(
    /// Any block node, as QEMU names it, e.g. `#block125`.
    NodeRef,
    check_any
);
text!(
    /// A device that has a disk, as a path in QEMU's object tree, e.g.
    /// `/machine/peripheral/bootdisk/virtio-backend`.
    DevicePath,
    check_device
);

impl From<&NodeName> for NodeRef {
    fn from(own: &NodeName) -> Self {
        Self(own.0.clone())
    }
}

impl DevicePath {
    /// The device that QEMU calls `qdev` in its answers: its id where it has
    /// one, its path otherwise (QEMU, `blk_get_attached_dev_id`).
    ///
    /// # Errors
    ///
    /// [`NameError`] for what can be neither.
    pub fn from_qdev(qdev: &str) -> Result<Self, NameError> {
        match qdev.starts_with('/') {
            true => qdev.parse(),
            false => format!("/machine/peripheral/{qdev}").parse(),
        }
    }
}

/// A file that QEMU opens as it is, e.g. for scratch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct FilePath(String);

/// A socket that QEMU makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct SocketPath(String);

impl FilePath {
    /// # Errors
    ///
    /// [`NameError::Path`] unless `path` is absolute, in UTF-8, and no file
    /// set of QEMU's (`/dev/fdset/…`, which means an open file instead).
    pub fn new(path: &Path) -> Result<Self, NameError> {
        check_path(path).map(Self)
    }
}

impl SocketPath {
    /// # Errors
    ///
    /// [`NameError::Path`] as for a file; [`NameError::TooLong`] for more
    /// than 107 bytes.
    pub fn new(path: &Path) -> Result<Self, NameError> {
        let path = check_path(path)?;
        match path.len() {
            0..=MAX_SOCKET_PATH => Ok(Self(path)),
            _ => Err(NameError::TooLong(path, MAX_SOCKET_PATH)),
        }
    }
}

impl fmt::Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check_path(path: &Path) -> Result<String, NameError> {
    let text = path.to_str().filter(|text| {
        path.is_absolute()
            && !text.contains('\0')
            && !path.components().any(|part| part.as_os_str() == "..")
            && !path.starts_with("/dev/fdset")
    });
    text.map(str::to_owned).ok_or_else(|| NameError::Path(path.to_owned()))
}

/// As QEMU's `id_wellformed`.
fn check_own(text: &str) -> Result<(), NameError> {
    if text.strip_prefix(PREFIX).is_none_or(str::is_empty) {
        return Err(NameError::NotOurs(text.to_owned()));
    }
    if text.len() > MAX_NAME {
        return Err(NameError::TooLong(text.to_owned(), MAX_NAME));
    }
    match text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')) {
        true => Ok(()),
        false => Err(NameError::Malformed(text.to_owned())),
    }
}

fn check_any(text: &str) -> Result<(), NameError> {
    if text.len() > MAX_NAME {
        return Err(NameError::TooLong(text.to_owned(), MAX_NAME));
    }
    match !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic()) {
        true => Ok(()),
        false => Err(NameError::Malformed(text.to_owned())),
    }
}

fn check_device(text: &str) -> Result<(), NameError> {
    // Ids that people gave are in it; a few hundred bytes are plenty.
    const MAX: usize = 512;
    if text.len() > MAX {
        return Err(NameError::TooLong(text.to_owned(), MAX));
    }
    let inside = text.strip_prefix("/machine/").is_some_and(|rest| !rest.is_empty());
    match inside && text.chars().all(|c| c.is_ascii_graphic()) {
        true => Ok(()),
        false => Err(NameError::Malformed(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_others_cannot_be_named_as_ours() {
        for bad in ["", "boot", "imaged-", "Imaged-a", "imaged-a/b", "imaged-ä", "imaged-a b"] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
        assert!(format!("imaged-{}", "x".repeat(24)).parse::<NodeName>().is_ok());
        assert!(format!("imaged-{}", "x".repeat(25)).parse::<NodeName>().is_err());
        assert!(serde_json::from_str::<NodeName>("\"boot\"").is_err(), "nor from a journal");
        assert_eq!("#block125".parse::<NodeRef>().unwrap().as_str(), "#block125");
    }

    #[test]
    fn devices_have_an_id_or_a_path() {
        let of = |qdev| DevicePath::from_qdev(qdev).map(String::from);
        assert_eq!(of("sd").unwrap(), "/machine/peripheral/sd");
        let anonymous = "/machine/peripheral-anon/device[0]/virtio-backend";
        assert_eq!(of(anonymous).unwrap(), anonymous);
        for bad in ["/objects/io0", "/machine/", "a b", "/"] {
            assert!(of(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn paths_are_taken_literally_or_not_at_all() {
        assert!(FilePath::new(Path::new("/var/lib/imaged/scratch/a.qcow2")).is_ok());
        for bad in ["scratch", "/dev/fdset/1", "/dev/./fdset/1", "/a/../etc", "/a\0b", ""] {
            assert!(FilePath::new(Path::new(bad)).is_err(), "{bad:?}");
        }
        let long = format!("/{}", "x".repeat(107));
        assert!(FilePath::new(Path::new(&long)).is_ok());
        assert!(SocketPath::new(Path::new(&long)).is_err());
        assert!(SocketPath::new(Path::new(&long[..107])).is_ok());
    }
}
