//! An object beside the images, for somebody else.
//!
//! ```text
//! begin ─► parts, in any order ─► is the name still free? ─► complete
//! ```
//! There is no claim in the bucket: the journal has the upload's name before
//! its first part is sent.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{
    Bucket, Checksums, Complete, Facts, StoredAs, UploadId,
    store::{Reading, Store},
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::{ByteSize, upload::UploadToken},
    port::{BoxFuture, Delivery, Outlet, Over, Part},
};

/// The place of an object.
pub struct BucketOutlet {
    store: Arc<Store>,
    key: String,
    over: Over,
}

/// What a later process needs to abort a delivery.
#[derive(Debug, Serialize, Deserialize)]
struct Token {
    key: String,
    upload: UploadId,
}

impl BucketOutlet {
    /// The place called `name`, if there may be one.
    pub async fn find(store: Arc<Store>, name: &str, over: Over) -> Result<Self> {
        let key = store.layout.object(name)?;
        let outlet = Self { store, key, over };
        outlet.check_free().await?;
        Ok(outlet)
    }

    async fn check_free(&self) -> Result<()> {
        check_free(&self.store, &self.key, self.over).await
    }
}

/// Fails when there is an object that may not be replaced.
async fn check_free(store: &Store, key: &str, over: Over) -> Result<()> {
    if over == Over::Anything {
        return Ok(());
    }
    let place = || format!("{}/{key}", store.brief.location());
    match store.brief.head(key).await {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(exists(&place())),
        Err(error) if error.reason() == Reason::StoreDenied => {
            let context = format!("nobody may look whether there is an object {}", place());
            Err(Error::new(Reason::StoreDenied, context)
                .because(error)
                .advice("say --overwrite to replace it if there is one"))
        }
        Err(error) => Err(error),
    }
}

/// The error about an object that is in the way.
pub fn exists(place: &str) -> Error {
    Error::new(Reason::ObjectExists, format!("there is an object {place}"))
        .advice("choose another name, or say --overwrite to replace it")
}

/// Names of the uploads of `key`; `None` where nobody may list them.
async fn uploads(store: &Store, key: &str) -> Option<BTreeSet<String>> {
    let listed = store.brief.uploads(key).await.ok()?;
    Some(listed.into_iter().filter(|(of, _)| of == key).map(|(_, upload)| upload.name).collect())
}

/// Aborts the uploads of `key` that came with `begun` and are not it: their
/// beginnings were done and the answers lost. Services list uploads without
/// their marks, so one that somebody else began for the same name while the
/// store did not answer goes, too: one of the two objects would have been lost
/// anyway.
async fn abort_strays(
    store: &Store,
    key: &str,
    before: &BTreeSet<String>,
    begun: Option<&UploadId>,
) {
    let Some(after) = uploads(store, key).await else { return };
    let known = begun.map(|upload| &upload.name);
    for name in after.difference(before).filter(|name| Some(*name) != known) {
        let stray = UploadId { name: name.clone(), checksums: Checksums::Untold };
        if let Err(error) = store.brief.abort(key, &stray).await {
            tracing::warn!(store = store.name, key, ?error, "an empty upload stays");
        }
    }
}

/// Aborts what `token` names.
pub async fn abandon(store: &Store, token: &UploadToken) -> Result<()> {
    let token: Token = serde_json::from_str(&token.0)
        .context(Reason::JournalFailed, || "the journal's words for an upload are odd")?;
    store.brief.abort(&token.key, &token.upload).await
}

impl Outlet for BucketOutlet {
    fn location(&self) -> String {
        format!("{}/{}", self.store.brief.location(), self.key)
    }

    fn begin(&self) -> BoxFuture<'_, Result<Box<dyn Delivery>>> {
        Box::pin(async {
            let (store, key) = (Arc::clone(&self.store), self.key.clone());
            let before = uploads(&store, &key).await;
            let mark = &store.owner.host_id;
            let begun = match store.brief.once().begin(&key, mark).await {
                Err(lost) if lost.reason() == Reason::StoreUnavailable => {
                    let begun = store.brief.begin(&key, mark).await;
                    if let Some(before) = before {
                        abort_strays(&store, &key, &before, begun.as_ref().ok()).await;
                    }
                    begun
                }
                begun => begun,
            };
            let upload = begun?;
            let parts = Mutex::default();
            let delivery = BucketDelivery { store, key, over: self.over, upload, parts };
            Ok(Box::new(delivery) as Box<dyn Delivery>)
        })
    }
}

impl fmt::Debug for BucketOutlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketOutlet({})", self.location())
    }
}

/// An object on its way.
struct BucketDelivery {
    store: Arc<Store>,
    key: String,
    over: Over,
    upload: UploadId,
    parts: Mutex<BTreeMap<u32, (StoredAs, ByteSize)>>,
}

impl BucketDelivery {
    /// What its service calls the completed object, which must have come of
    /// this upload: a completion whose answer was lost is done.
    async fn completed(&self, outcome: Complete, size: ByteSize) -> Result<Option<String>> {
        let looked = self.store.patient.head(&self.key).await;
        let denied = looked.as_ref().is_err_and(|error| error.reason() == Reason::StoreDenied);
        if (self.store.reading == Reading::Denied || denied) && outcome == Complete::Done {
            // Who may not look has the service's word alone.
            return Ok(None);
        }
        let host = &self.store.owner.host_id;
        let ours =
            |facts: &Facts| facts.size == size && (facts.mark.is_empty() || facts.mark == *host);
        match looked?.filter(ours) {
            Some(facts) => Ok(Some(facts.etag.0)),
            None => {
                let context = format!("{} has lost the upload of {}", self.place(), self.key);
                Err(Error::new(Reason::StoreRefused, context).advice(
                    "someone aborted it, or a lifecycle rule of the bucket did: look for rules \
                     that abort uploads, then ask again",
                ))
            }
        }
    }

    fn place(&self) -> String {
        self.store.patient.location()
    }
}

impl Delivery for BucketDelivery {
    fn token(&self) -> BoxFuture<'_, Result<UploadToken>> {
        Box::pin(async {
            let token = Token { key: self.key.clone(), upload: self.upload.clone() };
            let token = serde_json::to_string(&token)
                .context(Reason::JournalFailed, || "the journal takes no name of an upload")?;
            Ok(UploadToken(token))
        })
    }

    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let (number, sha256, size) = (part.number, part.sha256, part.size);
            let etag = self.store.patient.put_part(&self.key, &self.upload, part).await?;
            let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            parts.insert(number, (StoredAs { number, etag, sha256 }, size));
            Ok(())
        })
    }

    fn complete(&self) -> BoxFuture<'_, Result<Option<String>>> {
        Box::pin(async {
            let (parts, size) = {
                let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
                let size = parts.values().map(|(_, size)| size.get()).sum();
                (parts.values().map(|(part, _)| part.clone()).collect::<Vec<_>>(), ByteSize(size))
            };
            check_free(&self.store, &self.key, self.over).await?;
            let outcome = self.store.patient.complete(&self.key, &self.upload, &parts).await?;
            self.completed(outcome, size).await
        })
    }

    fn abort(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.store.brief.abort(&self.key, &self.upload))
    }
}

impl fmt::Debug for BucketDelivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketDelivery({}/{})", self.place(), self.key)
    }
}
