//! One image's upload into a bucket.
//!
//! ```text
//! claim ─► begin ─► parts, in any order ─► complete ─► documents ─► manifest ─► no claim
//! ```
//! The claim is there before anything else, so that a sweep finds whatever a
//! dead daemon began. Where nothing can be removed there is none: it would
//! stay for ever, and no sweep could do anything about what it finds.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use md5::{Digest, Md5};

use super::{
    Bucket, Complete, ETag, Facts, ListedPart, Over, Put, Removal, StoredAs, UploadId,
    store::{Reading, Store},
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::{
        ByteSize, ImageId,
        image::StoredPart,
        upload::{KeptPart, Receipt, UploadToken},
    },
    port::{BoxFuture, Part, Sealed, Upload},
    store::form::{self, EXTENTS, MAX_MANIFEST, OBJECT, RECORD, TRACE, Written},
};

/// An upload under way.
pub struct BucketUpload {
    store: Arc<Store>,
    id: ImageId,
    key: String,
    upload: UploadId,
    parts: Mutex<BTreeMap<u32, (Written, ETag)>>,
    /// What the service had when it was gone on with. The journal may lack the
    /// last of them.
    listed: Vec<ListedPart>,
    /// Whether anything may be there that aborting does not remove.
    sealing: AtomicBool,
}

impl BucketUpload {
    /// Claims the image and begins its object.
    pub async fn begin(store: Arc<Store>, id: ImageId) -> Result<Self> {
        // Known before the claim is there: a sweep must not take it.
        store.living().insert(id.clone());
        let begun = async {
            let claim = store.layout.claim(&store.owner.host_id, &id);
            let owner = form::json(&id, &store.owner)?;
            if store.brief.removal() == Removal::Possible {
                let _ = store.brief.put(&claim, owner.into(), Over::Anything).await?;
            }
            let key = store.layout.file(&id, OBJECT);
            let upload = store.brief.begin(&key, &store.owner.host_id).await?;
            Ok((key, upload))
        };
        match begun.await {
            Ok((key, upload)) => Ok(Self {
                store,
                id,
                key,
                upload,
                parts: Mutex::default(),
                listed: Vec::new(),
                sealing: AtomicBool::new(false),
            }),
            Err(error) => {
                store.living().remove(&id);
                Err(error)
            }
        }
    }

    /// Goes on with the upload that `token` names, which has these parts.
    pub async fn resume(
        store: Arc<Store>,
        id: ImageId,
        token: &UploadToken,
        parts: Vec<KeptPart>,
    ) -> Result<Self> {
        let upload: UploadId = serde_json::from_str(&token.0)
            .context(Reason::JournalFailed, || {
                format!("the journal's words for the upload of image {id} are odd")
            })?;
        let mut offset = 0;
        let mut known = BTreeMap::new();
        let mut last = 0;
        for KeptPart { number, stored, receipt, .. } in parts {
            let written = Written { offset, part: stored.clone() };
            offset += stored.size.get();
            // Behind a gap the offset is not known, nor of use: who puts it
            // tells it again.
            if let Some(Receipt(etag)) = receipt {
                known.insert(number, (written, ETag(etag)));
            }
            last = number;
        }
        let key = store.layout.file(&id, OBJECT);
        let listed = match store.brief.parts(&key, &upload).await {
            // Who may not look has the journal's word alone.
            Err(error) if error.reason() == Reason::StoreDenied => Vec::new(),
            listed => listed?,
        };
        tracing::info!(%id, parts = known.len(), last, "going on with an upload");
        store.living().insert(id.clone());
        let (parts, sealing) = (Mutex::new(known), AtomicBool::new(false));
        Ok(Self { store, id, key, upload, parts, listed, sealing })
    }

    /// What the service calls `part`, if it has it.
    fn stored(&self, part: &Part) -> Option<ETag> {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((written, etag)) = parts.get(&part.number)
            && (written.part.sha256, written.part.size) == (part.sha256, part.size)
        {
            return Some(etag.clone());
        }
        drop(parts);
        let alike = |listed: &&ListedPart| {
            (listed.number, listed.size) == (part.number, part.size) && listed.md5.is_some()
        };
        let mut alike = self.listed.iter().filter(alike).peekable();
        alike.peek()?;
        let mut md5 = Md5::new();
        part.pieces().for_each(|piece| md5.update(piece));
        let md5: String = md5.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        alike.find(|listed| listed.md5.as_ref() == Some(&md5)).map(|listed| listed.etag.clone())
    }

    /// Whether the completed object is there and came of this upload: a
    /// completion whose answer was lost is done.
    async fn completed(&self, outcome: Complete, size: ByteSize) -> Result<()> {
        // Who may not look has the service's word alone.
        if self.store.reading == Reading::Denied && outcome == Complete::Done {
            return Ok(());
        }
        let facts = self.store.patient.head(&self.key).await?;
        let ours = |facts: &Facts| {
            facts.size == size && (facts.mark.is_empty() || facts.mark == self.store.owner.host_id)
        };
        facts.filter(ours).map(drop).ok_or_else(|| {
            let location = self.store.patient.location();
            let context = format!("{location} has lost the upload of image {}", self.id);
            Error::new(Reason::StoreRefused, context).advice(
                "someone aborted it, or a lifecycle rule of the bucket did: look for rules that \
                 abort uploads, then ask again",
            )
        })
    }

    /// The parts in order, if they are what the manifest says.
    fn whole(&self, sealed: &Sealed) -> Result<Vec<StoredAs>> {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        // One that went on with another encoder may have made fewer.
        let last = u32::try_from(sealed.manifest.stored.parts.len()).unwrap_or(u32::MAX);
        let parts = || parts.range(..=last);
        let written: BTreeMap<_, Written> =
            parts().map(|(number, (part, _))| (*number, part.clone())).collect();
        let len = written.values().map(|part| part.part.size.get()).sum();
        form::check(&self.id, sealed, &written, len)?;
        let stored_as = |(&number, (written, etag)): (&u32, &(Written, ETag))| StoredAs {
            number,
            etag: etag.clone(),
            sha256: written.part.sha256,
        };
        Ok(parts().map(stored_as).collect())
    }

    /// Makes the image exist, also when the answer to an earlier try was lost.
    async fn reveal(&self, manifest: Bytes) -> Result<()> {
        let (store, key) = (&self.store, self.store.layout.manifest(&self.id));
        match store.patient.put(&key, manifest.clone(), Over::Nothing).await? {
            Put::Stored => Ok(()),
            // Nobody else makes an image of this name: an earlier try did.
            Put::Exists if store.reading == Reading::Denied => Ok(()),
            Put::Exists => match store.patient.get(&key, MAX_MANIFEST).await? {
                Some(there) if there == manifest => Ok(()),
                _ => {
                    let context = format!("{}/{key} is another image's", store.patient.location());
                    Err(Error::new(Reason::Internal, context))
                }
            },
        }
    }

    /// Aborts the upload where nothing can be removed, and says what stays.
    async fn leave(&self) {
        let (store, id) = (&self.store, &self.id);
        let name = &store.name;
        if let Err(error) = store.brief.abort(&self.key, &self.upload).await {
            tracing::warn!(store = name, %id, ?error, "the upload stays until a lifecycle rule of the bucket, or somebody, aborts it");
        }
        if self.sealing.load(Ordering::Relaxed) {
            let stays = store.layout.image(id);
            tracing::warn!(
                store = name,
                "what was stored under {stays} may stay: this store can remove nothing"
            );
        }
    }

    /// Ends the claim; one that stays is swept.
    async fn unclaim(&self) {
        let store = &self.store;
        if store.brief.removal() == Removal::Impossible {
            return;
        }
        let claim = store.layout.claim(&store.owner.host_id, &self.id);
        let ended = async {
            store.abort_uploads(&self.id).await?;
            store.brief.delete(&claim).await
        };
        if let Err(error) = ended.await {
            tracing::warn!(id = %self.id, ?error, "the claim of an image stays");
        }
    }
}

impl Upload for BucketUpload {
    fn token(&self) -> Option<UploadToken> {
        serde_json::to_string(&self.upload).ok().map(UploadToken)
    }

    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<Receipt>> {
        Box::pin(async move {
            let etag = match self.stored(&part) {
                Some(etag) => etag,
                None => {
                    let patient = &self.store.patient;
                    patient.put_part(&self.key, &self.upload, Arc::clone(&part)).await?
                }
            };
            let stored = StoredPart { size: part.size, sha256: part.sha256 };
            let written = Written { offset: part.offset, part: stored };
            let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            let receipt = Receipt(etag.0.clone());
            parts.insert(part.number, (written, etag));
            Ok(receipt)
        })
    }

    fn seal(&self, sealed: Arc<Sealed>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let parts = self.whole(&sealed)?;
            let record = form::json(&self.id, &sealed.record)?;
            let manifest = form::manifest(&self.id, &sealed.manifest)?;
            let (store, id) = (&self.store, &self.id);

            self.sealing.store(true, Ordering::Relaxed);
            let outcome = store.patient.complete(&self.key, &self.upload, &parts).await?;
            self.completed(outcome, sealed.manifest.stored.object_size).await?;
            let digests = Bytes::copy_from_slice(&sealed.extent_digests);
            let trace = sealed.trace.as_deref().map(|trace| (TRACE, Bytes::copy_from_slice(trace)));
            let documents = [(EXTENTS, digests), (RECORD, record.into())];
            for (file, bytes) in documents.into_iter().chain(trace) {
                let key = store.layout.file(id, file);
                let _ = store.patient.put(&key, bytes, Over::Anything).await?;
            }
            self.reveal(manifest.into()).await?;
            if store.reading == Reading::Denied {
                store.made(sealed.manifest.clone(), sealed.record.clone());
            }
            self.unclaim().await;
            Ok(())
        })
    }

    fn abort(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let store = &self.store;
            if store.brief.removal() == Removal::Impossible {
                self.leave().await;
                return Ok(());
            }
            store.brief.abort(&self.key, &self.upload).await?;
            let _ = store.clear(&self.id).await?;
            self.unclaim().await;
            Ok(())
        })
    }
}

impl Drop for BucketUpload {
    fn drop(&mut self) {
        self.store.living().remove(&self.id);
    }
}

impl fmt::Debug for BucketUpload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketUpload({} into {})", self.id, self.store.patient.location())
    }
}
