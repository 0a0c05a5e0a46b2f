//! Where everything of a store lies in its bucket.
//!
//! ```text
//! <prefix>imaged-store.json              makes it a store
//! <prefix>images/<image-ocid>/…          as in a directory store
//! <prefix>uploads/<host>/<image-ocid>    only while that host uploads
//! ```

use crate::{
    model::ImageId,
    store::form::{DOCUMENTS, MANIFEST, OBJECT, TOMBSTONE},
};

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
