//! One image's upload.
//!
//! ```text
//! Open ──seal──► Sealed
//!   └──abort──► Aborted
//! ```
//!
//! A put holds the stage for reading until its bytes are written, even if
//! its caller went away; seal and abort hold it for writing. So nothing is
//! sealed or removed under a write.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::RwLock;
use tokio_util::sync::CancellationToken;

use super::{
    Store,
    claim::{CLAIM, Claim, Claimed},
    files::{self, Dir, During},
    object::ObjectFile,
    removal,
    threads::BYTES,
};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize, ImageId,
        image::StoredPart,
        upload::{Receipt, UploadToken},
    },
    port::{BoxFuture, Part, Sealed, Upload},
    store::form::{self, EXTENTS, MANIFEST, OBJECT, RECORD, TRACE, Written},
};

/// Room that must be left over the minimum before an upload begins: the
/// object's first part.
const FIRST_PART: ByteSize = ByteSize::mib(16);

/// An upload into a directory store.
pub struct DirectoryUpload {
    store: Arc<Store>,
    id: ImageId,
    stage: Arc<RwLock<Stage>>,
}

enum Stage {
    Open(Box<Open>),
    Sealed,
    Aborted,
}

/// What an upload holds; dropping it closes the files and gives up the claim.
struct Open {
    images: Dir,
    dir: Dir,
    object: ObjectFile,
    parts: Mutex<BTreeMap<u32, Written>>,
    _claim: Claim,
}

impl DirectoryUpload {
    /// Makes the image's directory, claims it, and makes the object's file.
    pub fn begin(store: Arc<Store>, id: ImageId) -> Result<Self> {
        let images = store.root.images()?;
        let path = images.path_of(id.as_str());
        let room = files::room(images.handle())
            .during(|| format!("cannot see how full {} is", images.path().display()))?;
        if room.free < ByteSize(store.min_free.get().saturating_add(FIRST_PART.get())) {
            return Err(store.full(room.free, format!("image {id} needs at least {FIRST_PART}")));
        }
        match images.make_dir(id.as_str()) {
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {
                let context = format!("{} is there already", path.display());
                return Err(Error::new(Reason::Internal, context));
            }
            made => made.during(|| format!("cannot make {}", path.display()))?,
        }
        let dir = images
            .dir(id.as_str())
            .during(|| format!("cannot open {}", path.display()))
            .inspect_err(|_| drop(images.remove_dir(id.as_str())))?;
        match Self::fill(&store, &images, &dir) {
            Ok((claim, object)) => {
                let open = Open { images, dir, object, parts: Mutex::default(), _claim: claim };
                let stage = Arc::new(RwLock::new(Stage::Open(Box::new(open))));
                Ok(Self { store, id, stage })
            }
            Err(error) => {
                if let Err(left) = removal::clear(&images, &dir, id.as_str()) {
                    tracing::warn!(%id, error = ?left, "an upload that did not begin left files");
                }
                Err(error)
            }
        }
    }

    fn fill(store: &Store, images: &Dir, dir: &Dir) -> Result<(Claim, ObjectFile)> {
        let path = dir.path().display();
        let claimed =
            Claim::take(dir, &store.owner).during(|| format!("cannot make {path}/{CLAIM}"))?;
        let Claimed::Taken(claim) = claimed else {
            let context = format!("someone else claimed {path} as soon as it was made");
            return Err(Error::new(Reason::Internal, context));
        };
        // The claim is durable in its directory; now the directory in its own.
        images.sync().during(|| format!("cannot make {path} durable"))?;
        let object =
            ObjectFile::create(dir, OBJECT).during(|| format!("cannot make {path}/{OBJECT}"))?;
        Ok((claim, object))
    }
}

impl Upload for DirectoryUpload {
    fn token(&self) -> Option<UploadToken> {
        None
    }

    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<Receipt>> {
        Box::pin(async move {
            let threads = &self.store.threads;
            let stage = threads.within(BYTES, Arc::clone(&self.stage).read_owned()).await?;
            let (store, id) = (Arc::clone(&self.store), self.id.clone());
            threads.run(BYTES, move || stage.open(&id)?.put(&store, &id, &part)).await?;
            Ok(Receipt::default())
        })
    }

    fn seal(&self, sealed: Arc<Sealed>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let threads = &self.store.threads;
            let stage = threads.within(BYTES, Arc::clone(&self.stage).write_owned()).await?;
            let (store, id) = (Arc::clone(&self.store), self.id.clone());
            // When the caller stops waiting the image must not appear later.
            let abandoned = CancellationToken::new();
            let _waiting = abandoned.clone().drop_guard();
            let seal = move || {
                stage.open(&id)?.seal(&store, &id, &sealed, &abandoned)?;
                Ok(stage)
            };
            let mut stage = threads.run(BYTES, seal).await?;
            *stage = Stage::Sealed;
            Ok(())
        })
    }

    fn abort(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let threads = &self.store.threads;
            let mut stage = threads.within(BYTES, Arc::clone(&self.stage).write_owned()).await?;
            let id = self.id.clone();
            let abort = move || {
                match &*stage {
                    Stage::Aborted => {}
                    Stage::Sealed => {
                        let context = format!("the upload of image {id} was sealed before");
                        return Err(Error::new(Reason::Internal, context));
                    }
                    Stage::Open(open) => removal::clear(&open.images, &open.dir, id.as_str())?,
                }
                *stage = Stage::Aborted;
                Ok(())
            };
            threads.run(BYTES, abort).await
        })
    }
}

impl Stage {
    fn open(&self, id: &ImageId) -> Result<&Open> {
        let over = match self {
            Self::Open(open) => return Ok(open),
            Self::Sealed => "sealed",
            Self::Aborted => "aborted",
        };
        let context = format!("the upload of image {id} was {over} before");
        Err(Error::new(Reason::Internal, context))
    }
}

impl Open {
    fn put(&self, store: &Store, id: &ImageId, part: &Part) -> Result<()> {
        let (number, size) = (part.number, part.size);
        let path = self.dir.path_of(OBJECT);
        let context = || format!("cannot write part {number} of {}", path.display());
        // A filesystem that went away, or an object that was removed, would
        // take the bytes without a word.
        store.root.images()?;
        self.object.len().during(context)?;
        let free = self.object.room().during(context)?.free;
        if free.get().saturating_sub(size.get()) < store.min_free.get() {
            return Err(store.full(free, format!("part {number} of image {id} needs {size}")));
        }
        let mut offset = part.offset;
        for piece in part.pieces() {
            part.body.admit(piece.len());
            self.object.write(piece, offset).during(context)?;
            offset += piece.len() as u64;
        }
        let written =
            Written { offset: part.offset, part: StoredPart { size, sha256: part.sha256 } };
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).insert(number, written);
        Ok(())
    }

    /// Every step is durable before the next; the manifest's name is last.
    fn seal(
        &self,
        store: &Store,
        id: &ImageId,
        sealed: &Sealed,
        abandoned: &CancellationToken,
    ) -> Result<()> {
        let path = self.dir.path().display();
        store.root.images()?;
        let len = self.object.len().during(|| format!("cannot measure {path}/{OBJECT}"))?;
        let put = self.parts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        form::check(id, sealed, &put, len)?;
        let record = form::json(id, &sealed.record)?;
        let manifest = form::manifest(id, &sealed.manifest)?;

        self.object.sync().during(|| format!("cannot make {path}/{OBJECT} durable"))?;
        let trace = sealed.trace.as_ref().map(|trace| (TRACE, trace));
        let files = [(EXTENTS, &sealed.extent_digests), (RECORD, &record)];
        for (name, bytes) in files.into_iter().chain(trace) {
            self.dir.publish(name, bytes).during(|| format!("cannot write {path}/{name}"))?;
        }
        let context = || format!("cannot write {path}/{MANIFEST}");
        self.dir.prepare(MANIFEST, &manifest).during(context)?;
        if abandoned.is_cancelled() {
            let context = format!("nobody waits for image {id} any more");
            return Err(Error::new(Reason::Canceled, context));
        }
        if let Err(cause) = self.dir.reveal(MANIFEST) {
            let hidden = self.dir.remove(MANIFEST).and_then(|_| self.dir.sync());
            if let Err(left) = hidden {
                tracing::warn!(%id, %left, "a manifest that is not durable may be seen");
            }
            return Err(cause).during(context);
        }
        // The image exists now; a claim that stays is swept.
        if let Err(left) = self.dir.remove(CLAIM) {
            tracing::warn!(%id, %left, "the claim of a sealed image stays");
        }
        Ok(())
    }
}

impl fmt::Debug for DirectoryUpload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirectoryUpload({} into {})", self.id, self.store.root.path().display())
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{Bench, id, parts, sealed},
        *,
    };

    #[tokio::test]
    async fn an_abandoned_seal_shows_nothing() {
        let bench = Bench::new();
        let store = bench.store().await.store;
        let upload = DirectoryUpload::begin(Arc::clone(&store), id(1)).unwrap();
        let sealed = sealed(&id(1), &parts(&[100]));
        upload.put(parts(&[100]).remove(0)).await.unwrap();
        let stage = upload.stage.read().await;
        let open = stage.open(&id(1)).unwrap();
        let abandoned = CancellationToken::new();
        abandoned.cancel();
        let error = open.seal(&store, &id(1), &sealed, &abandoned).unwrap_err();
        assert_eq!(error.reason(), Reason::Canceled);
        assert!(!open.dir.has(MANIFEST).unwrap());
    }
}
