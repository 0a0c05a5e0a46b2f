//! What the server holds: buckets, objects, uploads in progress.

use super::content::{Algorithm, Blob, Received};
use super::encode::uuid;
use super::http::{Call, Failure};
use super::par::Par;
use hyper::HeaderMap;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Whether a bucket keeps the former versions of its objects.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Versioning {
    /// Never enabled.
    Disabled,
    /// Every write makes a version.
    Enabled,
    /// Enabled once, now off.
    Suspended,
}

/// Request headers kept with an object and sent back with it, besides `opc-meta-*`.
const KEPT: [&str; 6] = [
    "content-type",
    "content-language",
    "content-encoding",
    "content-disposition",
    "cache-control",
    "storage-tier",
];

#[derive(Clone, Debug)]
pub(super) struct Object {
    pub etag: String,
    pub version_id: Option<String>,
    pub size: u64,
    pub modified: i64,
    /// Content headers and metadata.
    pub headers: Vec<(String, String)>,
    /// Checksum headers as HEAD shows them.
    pub checksums: Vec<(String, String)>,
    /// The value of `md5` in listings.
    pub md5: String,
    pub blobs: Vec<Arc<Blob>>,
}

#[derive(Clone, Debug)]
pub(super) struct Part {
    pub etag: String,
    pub received: Received,
}

#[derive(Debug)]
pub(super) struct Multipart {
    pub object: String,
    pub created: i64,
    pub headers: Vec<(String, String)>,
    pub algorithm: Option<Algorithm>,
    pub parts: BTreeMap<u32, Part>,
}

#[derive(Debug)]
pub(super) struct Bucket {
    pub name: String,
    pub etag: String,
    pub created: i64,
    pub versioning: Versioning,
    pub retention: bool,
    pub quota: Option<u64>,
    pub objects: BTreeMap<String, Object>,
    /// Former versions, by name.
    pub former: Vec<(String, Object)>,
    pub uploads: BTreeMap<String, Multipart>,
    pub pars: Vec<Par>,
}

/// The conditions of a request on the present object.
#[derive(Clone, Debug, Default)]
pub(super) struct Conditions {
    pub if_match: Option<String>,
    pub if_none_match: Option<String>,
}

impl Conditions {
    pub fn from_headers(headers: &HeaderMap) -> Result<Conditions, Failure> {
        let header = |name: &str| {
            headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_string)
        };
        Ok(Conditions { if_match: header("if-match"), if_none_match: header("if-none-match") })
    }

    /// For writes, where `If-None-Match` knows only the asterisk.
    pub fn check_write(&self, present: Option<&Object>) -> Result<(), Failure> {
        match (self.if_none_match.as_deref(), present) {
            (None, _) | (Some("*"), None) => {}
            (Some("*"), Some(_)) => {
                let text = "The If-None-Match header is '*' but there is an existing entity";
                return Err(Failure::new(412, "IfNoneMatchFailed", text));
            }
            (Some(_), _) => return Err(Failure::invalid("The If-None-Match header must be '*'")),
        }
        self.check_match(present)
    }

    pub fn check_match(&self, present: Option<&Object>) -> Result<(), Failure> {
        match &self.if_match {
            Some(etag) if etag != "*" && present.is_none_or(|object| object.etag != *etag) => {
                let text = "The If-Match header does not match the ETag of the existing entity";
                Err(Failure::new(412, "IfMatchFailed", text))
            }
            _ => Ok(()),
        }
    }
}

/// The headers of a write that the object keeps.
pub(super) fn kept_headers(headers: &HeaderMap) -> Vec<(String, String)> {
    let kept = |name: &str| KEPT.contains(&name) || name.starts_with("opc-meta-");
    headers
        .iter()
        .filter(|(name, _)| kept(name.as_str()))
        .map(|(name, value)| {
            (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
        })
        .collect()
}

impl Bucket {
    pub fn new(name: &str, created: i64) -> Bucket {
        Bucket {
            name: name.to_string(),
            etag: uuid(),
            created,
            versioning: Versioning::Disabled,
            retention: false,
            quota: None,
            objects: BTreeMap::new(),
            former: Vec::new(),
            uploads: BTreeMap::new(),
            pars: Vec::new(),
        }
    }

    pub fn check_retention(&self, name: &str) -> Result<(), Failure> {
        if self.retention && self.objects.contains_key(name) {
            let message = format!(
                "The object '{name}' in bucket '{}' is protected by a retention rule",
                self.name
            );
            return Err(Failure::new(403, "RetentionRuleViolation", message));
        }
        Ok(())
    }

    /// Refuses what would not fit any more.
    pub fn check_quota(&self, more: u64) -> Result<(), Failure> {
        let objects = self.objects.values().chain(self.former.iter().map(|(_, object)| object));
        let parts = self.uploads.values().flat_map(|upload| upload.parts.values());
        let used = objects.map(|object| object.size).sum::<u64>()
            + parts.map(|part| part.received.blob.len).sum::<u64>();
        match self.quota {
            Some(quota) if used + more > quota => {
                let text = "Fulfilling this request exceeds the quota of the compartment";
                Err(Failure::new(400, "QuotaExceeded", text))
            }
            _ => Ok(()),
        }
    }

    /// Stores the object if the conditions still hold, and answers it as stored.
    pub fn store(
        &mut self,
        name: &str,
        mut object: Object,
        conditions: &Conditions,
    ) -> Result<Object, Failure> {
        conditions.check_write(self.objects.get(name))?;
        self.check_retention(name)?;
        object.version_id = (self.versioning == Versioning::Enabled).then(uuid);
        let before = self.objects.insert(name.to_string(), object.clone());
        self.keep_former(name, before);
        Ok(object)
    }

    /// Takes the object out, into the former versions if the bucket keeps them.
    pub fn remove(&mut self, name: &str) -> Option<Object> {
        let object = self.objects.remove(name)?;
        self.keep_former(name, Some(object.clone()));
        Some(object)
    }

    fn keep_former(&mut self, name: &str, object: Option<Object>) {
        if self.versioning == Versioning::Enabled {
            self.former.extend(object.map(|object| (name.to_string(), object)));
        }
    }

    /// The upload, if it is for this object.
    pub fn upload(&mut self, call: &Call, id: &str) -> Result<&mut Multipart, Failure> {
        let upload = self.uploads.get_mut(id).filter(|upload| upload.object == call.object());
        upload.ok_or_else(|| Failure::new(404, "NoSuchUpload", "No such upload"))
    }
}
