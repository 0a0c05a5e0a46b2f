//! What all stores have in common: the names of an image's files, the limits
//! of its documents, and what must hold before it is sealed. Written down for
//! others in `docs/store-format.md`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    error::{Context, Error, Reason, Result},
    model::{
        ByteSize, ImageId,
        image::{EXTENT_SIZE, Manifest, StoredPart},
    },
    port::Sealed,
};

/// The object.
pub const OBJECT: &str = "image.qcow2";
/// The digests of the extents.
pub const EXTENTS: &str = "extents.blake3";
/// What was said to an instance.
pub const TRACE: &str = "trace.json";
/// What may change.
pub const RECORD: &str = "record.json";
/// What makes the image exist.
pub const MANIFEST: &str = "manifest.json";
/// What says that the rest of an image is to be removed.
pub const TOMBSTONE: &str = "deleted.json";
/// All documents but the last two.
pub const DOCUMENTS: &[&str] = &[EXTENTS, TRACE, RECORD];

/// Bytes of a BLAKE3.
const DIGEST_SIZE: u64 = 32;

/// Largest manifest that is read: 10,000 parts take 125 bytes each; those of
/// images that older versions made, of 8 MiB, up to 15 MiB.
pub const MAX_MANIFEST: ByteSize = ByteSize::mib(16);
/// Largest record that is read: a name and some tags.
pub const MAX_RECORD: ByteSize = ByteSize::mib(1);
/// Largest claim or marker: some short fields.
pub const MAX_SMALL: ByteSize = ByteSize(4096);

/// The document that makes a directory or a prefix of a bucket a store.
#[derive(Debug, Serialize, Deserialize)]
pub struct Marker {
    schema: MarkerSchema,
    /// Tells this store from another at the same place.
    pub id: String,
}

#[derive(Debug, Serialize, Deserialize)]
enum MarkerSchema {
    #[serde(rename = "imaged.store/1")]
    V1,
}

impl Marker {
    /// A new store's.
    pub fn new(id: String) -> Self {
        Self { schema: MarkerSchema::V1, id }
    }
}

/// Who uploads: the claim's contents.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    schema: ClaimSchema,
    /// Names the host for ever.
    pub host_id: String,
    /// Chosen anew whenever a store is opened.
    pub instance: String,
    /// The daemon's process, for people.
    pub pid: u32,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum ClaimSchema {
    #[serde(rename = "imaged.upload/1")]
    V1,
}

impl Owner {
    /// This process on the host `host_id`.
    pub fn new(host_id: String, instance: String) -> Self {
        Self { schema: ClaimSchema::V1, host_id, instance, pid: std::process::id() }
    }
}

/// 128 random bits in hex.
pub fn random_id() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context(Reason::Internal, || "the kernel gives no chance")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A part that a store has.
#[derive(Debug, Clone)]
pub struct Written {
    /// Of its first byte.
    pub offset: u64,
    /// Size and digest.
    pub part: StoredPart,
}

/// Whether what was put, `len` bytes in all, is what the manifest says.
///
/// # Errors
///
/// `INTERNAL`: why not.
pub fn check(id: &ImageId, sealed: &Sealed, put: &BTreeMap<u32, Written>, len: u64) -> Result<()> {
    checked(id, sealed, put, len)
        .map_err(|why| Error::new(Reason::Internal, format!("image {id} is not whole: {why}")))
}

fn checked(
    id: &ImageId,
    sealed: &Sealed,
    put: &BTreeMap<u32, Written>,
    len: u64,
) -> Result<(), String> {
    let manifest = &sealed.manifest;
    let stored = &manifest.stored;
    if manifest.id != *id {
        return Err(format!("its manifest is of {}", manifest.id));
    }
    let mut offset = 0;
    for (number, part) in (1..).zip(&stored.parts) {
        match put.get(&number) {
            None => return Err(format!("part {number} was not stored")),
            Some(there) if there.offset != offset || there.part != *part => {
                return Err(format!("part {number} is not the one in the manifest"));
            }
            Some(_) => offset += part.size.get(),
        }
    }
    if put.len() != stored.parts.len() {
        return Err(format!(
            "{} parts were stored and its manifest has {}",
            put.len(),
            stored.parts.len()
        ));
    }
    if [offset, len].iter().any(|bytes| *bytes != stored.object_size.get()) {
        return Err(format!(
            "its parts have {offset} bytes, its object {len}, and its manifest says {}",
            stored.object_size.get()
        ));
    }
    let extents = stored.virtual_size.get().div_ceil(EXTENT_SIZE);
    if sealed.extent_digests.len() as u64 != extents * DIGEST_SIZE {
        let digests = sealed.extent_digests.len();
        return Err(format!("{digests} bytes of digests are not those of {extents} extents"));
    }
    Ok(())
}

/// Bytes of the file of extent digests of the image of `manifest`.
pub fn extents_size(manifest: &Manifest) -> ByteSize {
    let extents = manifest.stored.virtual_size.get().div_ceil(EXTENT_SIZE);
    ByteSize(extents.saturating_mul(DIGEST_SIZE))
}

/// The file of extent digests, `path` for messages, if it is as long as the
/// manifest demands.
///
/// # Errors
///
/// `IMAGE_CORRUPT`.
pub fn digests(path: &str, manifest: &Manifest, digests: Vec<u8>) -> Result<Vec<u8>> {
    let wanted = extents_size(manifest);
    if digests.len() as u64 == wanted.get() {
        return Ok(digests);
    }
    let (len, extents) = (digests.len(), wanted.get() / DIGEST_SIZE);
    let context = format!("{path} has {len} bytes where {extents} extents have {wanted}");
    Err(Error::new(Reason::ImageCorrupt, context))
}

/// A document as it is stored.
///
/// # Errors
///
/// `INTERNAL`.
pub fn json(id: &ImageId, document: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(document)
        .context(Reason::Internal, || format!("cannot write a document of image {id} as JSON"))
}

/// The manifest as it is stored, if readers take one so long.
///
/// # Errors
///
/// `VOLUME_TOO_LARGE`, `INTERNAL`.
pub fn manifest(id: &ImageId, manifest: &Manifest) -> Result<Vec<u8>> {
    let bytes = json(id, manifest)?;
    if bytes.len() as u64 > MAX_MANIFEST.get() {
        let context = format!(
            "the manifest of image {id} has {} and no reader takes more than {MAX_MANIFEST}",
            ByteSize(bytes.len() as u64)
        );
        return Err(Error::new(Reason::VolumeTooLarge, context)
            .advice("image a smaller volume, and lower max_volume_size"));
    }
    Ok(bytes)
}

/// A stored document, `path` for messages.
///
/// # Errors
///
/// `IMAGE_CORRUPT`.
pub fn parse<T: DeserializeOwned>(path: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .context(Reason::ImageCorrupt, || format!("{path} cannot be understood"))
        .map_err(|error| {
            error.advice("a newer imaged may have written it: update imaged, or restore the file")
        })
}
