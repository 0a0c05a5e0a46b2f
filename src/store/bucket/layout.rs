//! Where everything of a store lies in its bucket.
//!
//! ```text
//! <prefix>imaged-store.json              makes it a store
//! <prefix>images/<image-ocid>/…          as in a directory store
//! <prefix>uploads/<host>/<image-ocid>    only while that host uploads
//! <prefix>…                              everything else is somebody else's
//! ```

use crate::{
    error::{Error, Reason, Result},
    model::ImageId,
    store::form::{DOCUMENTS, MANIFEST, OBJECT, TOMBSTONE},
};

/// Longest name of an object, with S3 and OCI alike.
const MAX_KEY: usize = 1024;

/// The names of one store.
#[derive(Debug, Clone)]
pub struct Layout {
    prefix: String,
}

impl Layout {
    /// Everything begins with `prefix`, which is empty or ends with a slash.
    pub fn new(prefix: &str) -> Self {
        let prefix = prefix.trim_matches('/');
        Self { prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") } }
    }

    pub fn marker(&self) -> String {
        format!("{}imaged-store.json", self.prefix)
    }

    pub fn images(&self) -> String {
        format!("{}images/", self.prefix)
    }

    pub fn image(&self, id: &ImageId) -> String {
        format!("{}{id}/", self.images())
    }

    pub fn file(&self, id: &ImageId, file: &str) -> String {
        format!("{}{file}", self.image(id))
    }

    /// The object called `name`, which is none of the store's own. A store that
    /// is given a prefix writes nowhere else.
    ///
    /// # Errors
    ///
    /// `INVALID_PARAMETER`.
    pub fn object(&self, name: &str) -> Result<String> {
        let key = format!("{}{name}", self.prefix);
        let own = [self.images(), format!("{}uploads/", self.prefix)];
        let segments = || name.split('/');
        let wrong = if name.is_empty() {
            "is empty"
        } else if key.len() > MAX_KEY {
            "is longer than 1024 bytes"
        } else if name.chars().any(char::is_control) {
            "has control characters"
        } else if segments().any(str::is_empty) {
            "has an empty part: it begins or ends with a slash, or has two in a row"
        } else if segments().any(|segment| matches!(segment, "." | "..")) {
            "has \".\" or \"..\" between its slashes, which is lost on the way"
        } else if key == self.marker() || own.iter().any(|own| key.starts_with(own)) {
            "is among the store's own"
        } else {
            return Ok(key);
        };
        let context = format!("the object's name {name:?} {wrong}");
        Err(Error::new(Reason::InvalidParameter, context)
            .advice("choose another, such as exports/web-1.qcow2")
            .field("name"))
    }

    /// The image and the file that `key` names.
    pub fn parse<'a>(&self, key: &'a str) -> Option<(ImageId, &'a str)> {
        let (id, file) = key.strip_prefix(&self.images())?.split_once('/')?;
        Some((id.parse().ok()?, file))
    }

    /// All that may be there of an image but its manifest and what says that
    /// the rest may be removed, in the order in which it is removed.
    pub fn rest(&self, id: &ImageId) -> impl Iterator<Item = String> {
        [OBJECT]
            .iter()
            .chain(DOCUMENTS)
            .map(|file| self.file(id, file))
            .collect::<Vec<_>>()
            .into_iter()
    }

    pub fn manifest(&self, id: &ImageId) -> String {
        self.file(id, MANIFEST)
    }

    pub fn tombstone(&self, id: &ImageId) -> String {
        self.file(id, TOMBSTONE)
    }

    pub fn claims(&self, host: &str) -> String {
        format!("{}uploads/{host}/", self.prefix)
    }

    pub fn claim(&self, host: &str, id: &ImageId) -> String {
        format!("{}{id}", self.claims(host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_have_all_names_but_the_stores_own() {
        let layout = Layout::new("hosts/a");
        for name in ["disk", "vm/disk 1.qcow2", "images", "\u{fc}bung/\u{1f4be}", "uploads.old/x"] {
            assert_eq!(layout.object(name).unwrap(), format!("hosts/a/{name}"));
        }
        let long = "x".repeat(1020);
        let wrong = [
            "",
            "/a",
            "a/",
            "a//b",
            "../a",
            "a/./b",
            "a\nb",
            "images/x",
            "uploads/x",
            "imaged-store.json",
            &long,
        ];
        let said = wrong.map(|name| layout.object(name).unwrap_err().to_string()).join("\n");
        insta::assert_snapshot!(said.replace(&long, "x…"), @r#"
        the object's name "" is empty
        the object's name "/a" has an empty part: it begins or ends with a slash, or has two in a row
        the object's name "a/" has an empty part: it begins or ends with a slash, or has two in a row
        the object's name "a//b" has an empty part: it begins or ends with a slash, or has two in a row
        the object's name "../a" has "." or ".." between its slashes, which is lost on the way
        the object's name "a/./b" has "." or ".." between its slashes, which is lost on the way
        the object's name "a\nb" has control characters
        the object's name "images/x" is among the store's own
        the object's name "uploads/x" is among the store's own
        the object's name "imaged-store.json" is among the store's own
        the object's name "x…" is longer than 1024 bytes
        "#);
    }

    #[test]
    fn keys_name_their_image() {
        let id: ImageId = "ocid1.image.imaged..test1".parse().unwrap();
        for prefix in ["", "hosts/a", "/hosts/a/"] {
            let layout = Layout::new(prefix);
            let key = layout.manifest(&id);
            assert_eq!(layout.parse(&key), Some((id.clone(), MANIFEST)));
            assert!(!key.starts_with('/') && !key.contains("//"), "{key}");
            assert_eq!(layout.parse(&layout.marker()), None);
        }
    }
}
