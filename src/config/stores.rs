//! The tables `[stores.NAME]`: each kind has keys of its own.

use std::path::PathBuf;

use serde::Deserialize;

use super::values::{absolute_if_any, size_if_any};
use crate::model::ByteSize;

/// Region where none is given: what S3 servers outside AWS expect.
const DEFAULT_REGION: &str = "us-east-1";

/// Room that images leave in a directory's filesystem.
pub(super) const DEFAULT_MIN_FREE: ByteSize = ByteSize::gib(1);

/// One store.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "StoreTable")]
pub enum StoreConfig {
    /// A directory of this host.
    Directory {
        /// Where it is.
        path: PathBuf,
        /// Room that images must leave.
        min_free: ByteSize,
    },
    /// A bucket of a service that speaks S3.
    S3 {
        /// Its region, which requests are signed for.
        region: String,
        /// Where it is.
        endpoint: String,
        /// Its name.
        bucket: String,
        /// What all stores in buckets have.
        remote: Remote,
    },
    /// A bucket of OCI Object Storage, by its own API.
    Oci {
        /// Where it is.
        endpoint: String,
        /// The tenancy's; none: the service is asked.
        namespace: Option<String>,
        /// Its name.
        bucket: String,
        /// What all stores in buckets have.
        remote: Remote,
    },
    /// A bucket of OCI Object Storage, by a pre-authenticated request.
    Par {
        /// What all stores in buckets have; what gives access says where.
        remote: Remote,
    },
}

/// What all stores in buckets have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remote {
    /// What all names of objects begin with.
    pub prefix: String,
    /// File with what gives access.
    pub credentials: Option<PathBuf>,
    /// Which section of that file.
    pub profile: Option<String>,
    /// Further authorities that the service's certificate may be of.
    pub ca_file: Option<PathBuf>,
}

impl StoreConfig {
    /// A directory store at `path`.
    pub(super) fn directory(path: PathBuf) -> Self {
        Self::Directory { path, min_free: DEFAULT_MIN_FREE }
    }
}

/// The keys of all kinds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreTable {
    kind: Kind,
    #[serde(default, deserialize_with = "absolute_if_any")]
    path: Option<PathBuf>,
    #[serde(default, deserialize_with = "size_if_any")]
    min_free: Option<ByteSize>,
    endpoint: Option<String>,
    region: Option<String>,
    namespace: Option<String>,
    bucket: Option<String>,
    prefix: Option<String>,
    #[serde(default, deserialize_with = "absolute_if_any")]
    credentials: Option<PathBuf>,
    profile: Option<String>,
    #[serde(default, deserialize_with = "absolute_if_any")]
    ca_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Directory,
    S3,
    Oci,
    Par,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::S3 => "s3",
            Self::Oci => "oci",
            Self::Par => "par",
        }
    }

    /// The keys that such a store may have.
    const fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Directory => &["path", "min_free"],
            Self::S3 => {
                &["endpoint", "region", "bucket", "prefix", "credentials", "profile", "ca_file"]
            }
            Self::Oci => &[
                "region",
                "endpoint",
                "namespace",
                "bucket",
                "prefix",
                "credentials",
                "profile",
                "ca_file",
            ],
            Self::Par => &["credentials", "prefix", "ca_file"],
        }
    }
}

impl StoreTable {
    /// The keys that are set.
    fn set(&self) -> impl Iterator<Item = &'static str> {
        let Self {
            kind: _,
            path,
            min_free,
            endpoint,
            region,
            namespace,
            bucket,
            prefix,
            credentials,
            profile,
            ca_file,
        } = self;
        [
            ("path", path.is_some()),
            ("min_free", min_free.is_some()),
            ("endpoint", endpoint.is_some()),
            ("region", region.is_some()),
            ("namespace", namespace.is_some()),
            ("bucket", bucket.is_some()),
            ("prefix", prefix.is_some()),
            ("credentials", credentials.is_some()),
            ("profile", profile.is_some()),
            ("ca_file", ca_file.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, set)| set.then_some(name))
    }
}

/// Where the Object Storage of `region` is.
fn oci_endpoint(region: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match region.chars().all(plain) && !region.is_empty() {
        true => Ok(format!("https://objectstorage.{region}.oraclecloud.com")),
        false => Err(format!("{region:?} is no region, such as \"eu-frankfurt-1\"")),
    }
}

impl TryFrom<StoreTable> for StoreConfig {
    type Error = String;

    fn try_from(table: StoreTable) -> Result<Self, String> {
        let kind = table.kind;
        if let Some(key) = table.set().find(|key| !kind.keys().contains(key)) {
            let (kind, keys) = (kind.name(), kind.keys().join(", "));
            return Err(format!("a store of kind {kind:?} has no key {key:?}, only {keys}"));
        }
        let missing = |key: &str| format!("missing field `{key}`");
        let remote = Remote {
            prefix: table.prefix.unwrap_or_default(),
            credentials: table.credentials,
            profile: table.profile,
            ca_file: table.ca_file,
        };
        Ok(match kind {
            Kind::Directory => Self::Directory {
                path: table.path.ok_or_else(|| missing("path"))?,
                min_free: table.min_free.unwrap_or(DEFAULT_MIN_FREE),
            },
            Kind::S3 => Self::S3 {
                endpoint: table.endpoint.ok_or_else(|| missing("endpoint"))?,
                region: table.region.unwrap_or_else(|| DEFAULT_REGION.into()),
                bucket: table.bucket.ok_or_else(|| missing("bucket"))?,
                remote,
            },
            Kind::Oci => Self::Oci {
                endpoint: match (table.endpoint, table.region) {
                    (None, Some(region)) => oci_endpoint(&region)?,
                    (Some(endpoint), None) => endpoint,
                    (Some(_), Some(_)) => {
                        return Err("either `region` or `endpoint` says where it is".into());
                    }
                    (None, None) => return Err(missing("region")),
                },
                namespace: table.namespace,
                bucket: table.bucket.ok_or_else(|| missing("bucket"))?,
                remote,
            },
            Kind::Par => Self::Par { remote },
        })
    }
}
