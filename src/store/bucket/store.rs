//! Images in a bucket.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{StreamExt, TryStreamExt, stream};
use serde::de::DeserializeOwned;
use tokio::runtime::Handle;

use super::{
    Bucket, Over, Put, Removal, Retry,
    delivery::{self, BucketOutlet},
    layout::Layout,
    reader::BucketReader,
    retry::{BRIEF, PATIENT},
    sweep,
    upload::BucketUpload,
};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize, ImageId,
        host::Space,
        image::{Manifest, Record},
        upload::{KeptPart, UploadToken},
    },
    port::{BoxFuture, Delete, ObjectReader, ObjectStore, Outlet, Upload},
    store::{
        Counters,
        form::{
            self, EXTENTS, MANIFEST, MAX_MANIFEST, MAX_RECORD, MAX_SMALL, Marker, OBJECT, Owner,
            RECORD,
        },
        skim::Skimmed,
    },
};

/// Documents that a list reads at once.
const READS: usize = 16;

/// An [`ObjectStore`] in a bucket of an object service. Any number of hosts
/// may share it. Calls are repeated for seconds, an upload's for minutes.
#[derive(Debug)]
pub struct BucketStore {
    store: Arc<Store>,
}

/// What uploads share with their store.
#[derive(Debug)]
pub(super) struct Store {
    pub name: String,
    pub layout: Layout,
    pub owner: Owner,
    /// For those who wait.
    pub brief: Retry,
    /// For uploads.
    pub patient: Retry,
    /// Images that this process uploads now.
    pub living: Mutex<BTreeSet<ImageId>>,
    /// Whether what is stored can be looked at.
    pub reading: Reading,
    /// Images that this process has made, without their parts, where nobody
    /// can read them: who made one is to see that.
    made: Mutex<BTreeMap<ImageId, (Manifest, Record)>>,
}

/// Whether objects can be read with the access that there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// As far as anybody knows.
    Allowed,
    /// It was refused, and writing was not.
    Denied,
}

impl Store {
    /// Remembers an image that cannot be read.
    pub fn made(&self, mut manifest: Manifest, record: Record) {
        manifest.stored.parts = Vec::new();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.insert(manifest.id.clone(), (manifest, record));
    }

    pub fn living(&self) -> MutexGuard<'_, BTreeSet<ImageId>> {
        self.living.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BucketStore {
    /// Opens the store called `name` in `bucket`, under `prefix`, and makes
    /// one there if there is none. `host_id` tells this host, and this
    /// daemon, from others that use the same bucket. `counters` learn what is
    /// asked again.
    ///
    /// # Errors
    ///
    /// Those of [`Bucket`]; `STORE_REFUSED` when something else is there.
    pub async fn open(
        name: String,
        bucket: Arc<dyn Bucket>,
        prefix: &str,
        host_id: String,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let brief = Retry::new(Arc::clone(&bucket), BRIEF, Arc::clone(&counters));
        let patient = Retry::new(bucket, PATIENT, counters);
        let layout = Layout::new(prefix);
        let owner = Owner::new(host_id, form::random_id()?);
        let mut store = Store {
            name,
            layout,
            owner,
            brief,
            patient,
            living: Mutex::default(),
            reading: Reading::Allowed,
            made: Mutex::default(),
        };
        store.reading = store.adopt().await?;
        Ok(Self { store: Arc::new(store) })
    }
}

impl Store {
    /// Finds the marker, or makes one.
    async fn adopt(&self) -> Result<Reading> {
        let denied = match self.marker(&self.layout.marker()).await {
            Ok(true) => return Ok(Reading::Allowed),
            Ok(false) => None,
            // Who may only write can still make sure that it is there.
            Err(error) if error.reason() == Reason::StoreDenied => Some(error),
            Err(error) => return Err(error),
        };
        match (self.mark().await, denied) {
            (Ok(()), None) => Ok(Reading::Allowed),
            (Ok(()), Some(denied)) => {
                tracing::warn!(store = self.name, "images can be written, not read: {denied}");
                Ok(Reading::Denied)
            }
            (Err(_), Some(denied)) => Err(denied),
            (Err(error), None) => Err(error),
        }
    }

    /// Makes the marker, if there is none.
    async fn mark(&self) -> Result<()> {
        let marker = serde_json::to_vec_pretty(&Marker::new(form::random_id()?));
        let marker = marker.map_err(|cause| {
            Error::new(Reason::Internal, "cannot write the store's marker").because(cause)
        })?;
        match self.brief.put(&self.layout.marker(), marker.into(), Over::Nothing).await? {
            // Another host was quicker.
            Put::Stored | Put::Exists => Ok(()),
        }
    }

    /// Whether the marker is there, and of a version that is understood.
    async fn marker(&self, key: &str) -> Result<bool> {
        let Some(bytes) = self.brief.get(key, MAX_SMALL).await? else { return Ok(false) };
        let known = form::parse::<Marker>(&format!("{}/{key}", self.brief.location()), &bytes);
        known.map(|_| true).map_err(|error| {
            let context = format!("what answers is not the store {:?}", self.name);
            Error::new(Reason::StoreRefused, context).because(error).advice(
                "is it the right endpoint and bucket? Where a newer imaged made the store, update \
                 this one",
            )
        })
    }

    /// The image `id`; `None` if there is no manifest.
    pub async fn load<M: DeserializeOwned + AsRef<Manifest>>(
        &self,
        id: &ImageId,
    ) -> Result<Option<(M, Record)>> {
        let path = |file| format!("{}/{}", self.brief.location(), self.layout.file(id, file));
        let key = self.layout.manifest(id);
        let Some(bytes) = self.brief.get(&key, MAX_MANIFEST).await? else { return Ok(None) };
        let manifest: M = form::parse(&path(MANIFEST), &bytes)?;
        let named = &manifest.as_ref().id;
        if named != id {
            let context = format!("{} is of image {named}", path(MANIFEST));
            return Err(Error::new(Reason::ImageCorrupt, context));
        }
        let record = self.layout.file(id, RECORD);
        let Some(record) = self.brief.get(&record, MAX_RECORD).await? else {
            // A deletion that began after the manifest was read.
            if self.brief.head(&key).await?.is_none() {
                return Ok(None);
            }
            return Err(missing(path(RECORD)));
        };
        Ok(Some((manifest, form::parse(&path(RECORD), &record)?)))
    }

    /// The image `id`, which must be there.
    async fn existing(&self, id: &ImageId) -> Result<Manifest> {
        match self.load::<Manifest>(id).await? {
            Some((manifest, _)) => Ok(manifest),
            None => Err(Error::new(
                Reason::ImageNotFound,
                format!("there is no image {id} in the store {:?}", self.name),
            )),
        }
    }

    /// All names that begin with `prefix`.
    pub async fn keys(&self, prefix: &str) -> Result<Vec<String>> {
        let mut keys = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let page = self.brief.list(prefix, next.as_deref()).await?;
            keys.extend(page.keys);
            match page.next {
                Some(more) if next.as_ref() != Some(&more) => next = Some(more),
                _ => return Ok(keys),
            }
        }
    }

    async fn list(&self) -> Result<Vec<(Manifest, Record)>> {
        let keys = self.keys(&self.layout.images()).await?;
        let files = keys.iter().filter_map(|key| self.layout.parse(key));
        let ids: Vec<_> = files.filter(|(_, file)| *file == MANIFEST).map(|(id, _)| id).collect();
        let loaded = stream::iter(ids).map(|id| async move {
            match self.load::<Skimmed>(&id).await {
                Err(error) if error.reason() == Reason::ImageCorrupt => {
                    tracing::warn!(store = self.name, %id, ?error, "left out of the list");
                    Ok(None)
                }
                loaded => loaded,
            }
        });
        let whole = loaded.buffer_unordered(READS).try_filter_map(async |found| Ok(found));
        whole.map_ok(|(Skimmed(manifest), record)| (manifest, record)).try_collect().await
    }

    /// Aborts every upload of the image `id`. One whose beginning was answered
    /// too late has a name that nobody knows.
    pub async fn abort_uploads(&self, id: &ImageId) -> Result<()> {
        let uploads = match self.brief.uploads(&self.layout.image(id)).await {
            // Listing them is a right of its own, which making images is not.
            Err(error) if matches!(error.reason(), Reason::StoreDenied | Reason::StoreRefused) => {
                tracing::warn!(store = self.name, %id, ?error, "uploads may be left");
                return Ok(());
            }
            uploads => uploads?,
        };
        for (key, upload) in uploads {
            self.brief.abort(&key, &upload).await?;
        }
        Ok(())
    }

    /// Removes everything of the image `id`: the manifest first, and last
    /// what says that the rest may be removed.
    pub async fn clear(&self, id: &ImageId) -> Result<Delete> {
        let was = self.brief.delete(&self.layout.manifest(id)).await?;
        for key in self.layout.rest(id) {
            let _ = self.brief.delete(&key).await?;
        }
        let _ = self.brief.delete(&self.layout.tombstone(id)).await?;
        Ok(was)
    }
}

/// An object of an image that somebody else has removed.
fn missing(path: String) -> Error {
    Error::new(Reason::ImageCorrupt, format!("{path} is missing"))
        .advice("bring it back if the bucket keeps old versions; else make the image again")
}

impl ObjectStore for BucketStore {
    fn name(&self) -> &str {
        &self.store.name
    }

    fn kind(&self) -> &'static str {
        self.store.brief.kind()
    }

    fn location(&self) -> String {
        self.store.brief.location()
    }

    fn space(&self) -> BoxFuture<'_, Result<Option<Space>>> {
        Box::pin(async {
            let store = &self.store;
            if store.reading == Reading::Denied {
                return store.mark().await.map(|()| None);
            }
            match store.marker(&store.layout.marker()).await? {
                true => Ok(None),
                false => {
                    let context = format!("the store {:?} is gone from its bucket", store.name);
                    Err(Error::new(Reason::StoreUnavailable, context)
                        .advice("restart imaged to begin a new store there"))
                }
            }
        })
    }

    fn begin<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        Box::pin(async move {
            let upload = BucketUpload::begin(Arc::clone(&self.store), id.clone()).await?;
            Ok(Box::new(upload) as Box<dyn Upload>)
        })
    }

    fn resume<'a>(
        &'a self,
        id: &'a ImageId,
        token: &'a UploadToken,
        parts: Vec<KeptPart>,
    ) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        Box::pin(async move {
            let store = Arc::clone(&self.store);
            let upload = BucketUpload::resume(store, id.clone(), token, parts).await?;
            Ok(Box::new(upload) as Box<dyn Upload>)
        })
    }

    fn sweep<'a>(&'a self, keep: &'a [ImageId]) -> BoxFuture<'a, Result<usize>> {
        Box::pin(sweep::sweep(&self.store, keep))
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<(Manifest, Record)>>> {
        Box::pin(self.store.list())
    }

    fn get<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Option<(Manifest, Record)>>> {
        Box::pin(async {
            match self.store.load(id).await {
                Err(error) if self.store.reading == Reading::Denied => {
                    let made = self.store.made.lock().unwrap_or_else(PoisonError::into_inner);
                    made.get(id).cloned().map(Some).ok_or(error)
                }
                loaded => loaded,
            }
        })
    }

    fn open<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn ObjectReader>>> {
        Box::pin(async move {
            let manifest = self.store.existing(id).await?;
            let key = self.store.layout.file(id, OBJECT);
            let Some(facts) = self.store.brief.head(&key).await? else {
                return Err(missing(format!("{}/{key}", self.location())));
            };
            let (bucket, parts) = (self.store.patient.clone(), manifest.part_sizes());
            let reader = BucketReader::new(bucket, key, facts, parts, Handle::current());
            Ok(Box::new(reader) as Box<dyn ObjectReader>)
        })
    }

    fn extent_digests<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Vec<u8>>> {
        Box::pin(async move {
            let manifest = self.store.existing(id).await?;
            let key = self.store.layout.file(id, EXTENTS);
            let path = format!("{}/{key}", self.location());
            let limit = ByteSize(form::extents_size(&manifest).get() + 1);
            let Some(bytes) = self.store.brief.get(&key, limit).await? else {
                return Err(missing(path));
            };
            form::digests(&path, &manifest, bytes.into())
        })
    }

    fn delete<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Delete>> {
        Box::pin(async move {
            let store = &self.store;
            if store.brief.removal() == Removal::Impossible {
                // It says so. Nothing may say before that the image is gone.
                return store.brief.delete(&store.layout.manifest(id)).await;
            }
            let Some(manifest) = store.brief.get(&store.layout.manifest(id), MAX_MANIFEST).await?
            else {
                return Ok(Delete::AlreadyDeleted);
            };
            // What is left after a crash says so to every sweep.
            let _ = store.brief.put(&store.layout.tombstone(id), manifest, Over::Anything).await?;
            store.clear(id).await
        })
    }

    fn outlet<'a>(&'a self, name: &'a str, over: Over) -> BoxFuture<'a, Result<Box<dyn Outlet>>> {
        Box::pin(async move {
            let outlet = BucketOutlet::find(Arc::clone(&self.store), name, over).await?;
            Ok(Box::new(outlet) as Box<dyn Outlet>)
        })
    }

    fn abandon<'a>(&'a self, token: &'a UploadToken) -> BoxFuture<'a, Result<()>> {
        Box::pin(delivery::abandon(&self.store, token))
    }
}
