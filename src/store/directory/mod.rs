//! Images in a directory of a local or network filesystem.
//!
//! ```text
//! imaged-store.json            the directory is a store, and which
//! images/<image-ocid>/
//!     image.qcow2              the object
//!     extents.blake3           32 bytes for each extent
//!     trace.json               what was said to a running instance
//!     record.json              what may change
//!     manifest.json            appears last: the image exists
//!     upload.json              only while someone uploads
//!     deleted.json             the manifest while someone deletes the image
//! ```
//!
//! Written down for others in `docs/store-format.md`.

mod claim;
mod files;
mod object;
mod reader;
mod removal;
mod root;
#[cfg(test)]
pub(super) mod tests;
mod threads;
mod upload;

use std::{
    collections::BTreeSet,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use serde::de::DeserializeOwned;

use self::{
    files::{Dir, During},
    reader::DirectoryReader,
    root::Root,
    threads::{NAMES, Threads},
    upload::DirectoryUpload,
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::{
        ByteSize, ImageId,
        host::Space,
        image::{Manifest, Record},
    },
    port::{BoxFuture, Delete, ObjectReader, ObjectStore, Upload},
    store::{
        form::{self, EXTENTS, MANIFEST, MAX_MANIFEST, MAX_RECORD, OBJECT, Owner, RECORD},
        skim::Skimmed,
    },
};

/// An [`ObjectStore`] in a directory: the embedded default.
///
/// Calls run on threads of their own; names are waited for at most two
/// minutes, bytes at most ten. A call whose future is dropped runs to its
/// end, but [`seal`](Upload::seal) makes nothing visible then. Any number of
/// stores, processes and hosts may share the directory.
#[derive(Debug)]
pub struct DirectoryStore {
    store: Arc<Store>,
}

#[derive(Debug)]
struct Store {
    name: String,
    root: Root,
    min_free: ByteSize,
    owner: Owner,
    threads: Threads,
    /// Directories of which it was said that they hold no image, so that
    /// each is mentioned once.
    mentioned: Mutex<BTreeSet<String>>,
}

impl DirectoryStore {
    /// Opens the store called `name` at `path`, and makes one there if the
    /// directory is empty or missing; the directory above it must exist.
    ///
    /// Writing stops before less than `min_free` is left in its filesystem.
    /// `host_id` tells this host from others that use the same directory.
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE`: it cannot be made, read or written, or the
    /// directory holds something else.
    pub async fn open(
        name: impl Into<String>,
        path: &Path,
        min_free: ByteSize,
        host_id: impl Into<String>,
    ) -> Result<Self> {
        let (name, host_id) = (name.into(), host_id.into());
        let threads = Threads::new(path);
        let for_store = threads.clone();
        let path = path.to_owned();
        let open = move || Store::open(name, &path, min_free, host_id, for_store);
        Ok(Self { store: Arc::new(threads.run(NAMES, open).await?) })
    }

    /// As [`open`](Self::open), and blocks, however long it takes: whoever
    /// waits for it knows when its thread is free again.
    pub(super) fn open_now(
        name: String,
        path: &Path,
        min_free: ByteSize,
        host_id: String,
    ) -> Result<Self> {
        let store = Store::open(name, path, min_free, host_id, Threads::new(path))?;
        Ok(Self { store: Arc::new(store) })
    }

    /// Runs `job` on the store.
    fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(Arc<Store>) -> Result<T> + Send + 'static,
    ) -> BoxFuture<'_, Result<T>> {
        let store = Arc::clone(&self.store);
        Box::pin(self.store.threads.run(NAMES, move || job(store)))
    }
}

impl ObjectStore for DirectoryStore {
    fn name(&self) -> &str {
        &self.store.name
    }

    fn kind(&self) -> &'static str {
        "directory"
    }

    fn location(&self) -> String {
        self.store.root.path().display().to_string()
    }

    fn space(&self) -> BoxFuture<'_, Result<Option<Space>>> {
        self.run(|store| {
            let images = store.root.images()?;
            let room = files::room(images.handle())
                .during(|| format!("cannot see how full {} is", images.path().display()))?;
            let free = room.free.get().saturating_sub(store.min_free.get());
            Ok(Some(Space { free: ByteSize(free), ..room }))
        })
    }

    fn begin<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        let id = id.clone();
        self.run(|store| Ok(Box::new(DirectoryUpload::begin(store, id)?) as Box<dyn Upload>))
    }

    fn sweep<'a>(&'a self, _: &'a [ImageId]) -> BoxFuture<'a, Result<usize>> {
        self.run(|store| removal::sweep(&store))
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<(Manifest, Record)>>> {
        self.run(|store| store.list())
    }

    fn get<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Option<(Manifest, Record)>>> {
        let id = id.clone();
        self.run(move |store| {
            Ok(store.load::<Manifest>(&store.root.images()?, &id)?.map(|(_, image)| image))
        })
    }

    fn open<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn ObjectReader>>> {
        let id = id.clone();
        self.run(move |store| {
            let (dir, _) = store.existing(&id)?;
            let path = dir.path_of(OBJECT);
            let reader = dir
                .open_regular(OBJECT)
                .and_then(|file| DirectoryReader::new(file, path.clone()))
                .during(|| format!("cannot open {}", path.display()))?;
            Ok(Box::new(reader) as Box<dyn ObjectReader>)
        })
    }

    fn extent_digests<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Vec<u8>>> {
        let id = id.clone();
        self.run(move |store| {
            let (dir, manifest) = store.existing(&id)?;
            let path = dir.path_of(EXTENTS).display().to_string();
            let digests = dir
                .read(EXTENTS, form::extents_size(&manifest))
                .during(|| format!("cannot read {path}"))?;
            form::digests(&path, &manifest, digests)
        })
    }

    fn delete<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Delete>> {
        let id = id.clone();
        self.run(move |store| removal::delete(&store, &id))
    }
}

impl Store {
    fn open(
        name: String,
        path: &Path,
        min_free: ByteSize,
        host_id: String,
        threads: Threads,
    ) -> Result<Self> {
        let root = Root::open(path)?;
        let owner = Owner::new(host_id, form::random_id()?);
        Ok(Self { name, root, min_free, owner, threads, mentioned: Mutex::default() })
    }

    fn full(&self, free: ByteSize, need: String) -> Error {
        let Self { name, min_free, .. } = self;
        Error::new(
            Reason::StoreFull,
            format!("{need}, and the store {name:?} has {free} free of which {min_free} must stay"),
        )
        .advice(
            "delete images from it, lower its min_free, or make another store the default_store",
        )
    }

    fn list(&self) -> Result<Vec<(Manifest, Record)>> {
        let images = self.root.images()?;
        let mut whole = Vec::new();
        let mut bad = BTreeSet::new();
        for name in names(&images)? {
            let image = name
                .parse()
                .context(Reason::ImageCorrupt, || format!("{name:?} is no OCID"))
                .and_then(|id| self.load::<Skimmed>(&images, &id));
            match image {
                Ok(image) => {
                    whole.extend(image.map(|(_, (Skimmed(manifest), record))| (manifest, record)));
                }
                Err(error) => {
                    if !self.lock_mentioned().contains(&name) {
                        tracing::warn!(store = self.name, name, ?error, "left out of the list");
                    }
                    bad.insert(name);
                }
            }
        }
        *self.lock_mentioned() = bad;
        Ok(whole)
    }

    fn lock_mentioned(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.mentioned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image `id` with its directory; `None` if there is no manifest.
    fn load<M: DeserializeOwned + AsRef<Manifest>>(
        &self,
        images: &Dir,
        id: &ImageId,
    ) -> Result<Option<(Dir, (M, Record))>> {
        let path = images.path_of(id.as_str());
        let read = |dir: &Dir, file, limit| match dir.read(file, limit) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some).during(|| format!("cannot read {}/{file}", path.display())),
        };
        let dir = match images.dir(id.as_str()) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.during(|| format!("cannot open {}", path.display()))?,
        };
        let Some(manifest) = read(&dir, MANIFEST, MAX_MANIFEST)? else { return Ok(None) };
        let manifest: M = form::parse(&dir.path_of(MANIFEST).display().to_string(), &manifest)?;
        let named = &manifest.as_ref().id;
        if named != id {
            let context = format!("{}/{MANIFEST} is of image {named}", path.display());
            return Err(Error::new(Reason::ImageCorrupt, context));
        }
        let Some(record) = read(&dir, RECORD, MAX_RECORD)? else {
            // A deletion that began after the manifest was read.
            if !dir.has(MANIFEST).during(|| format!("cannot look into {}", path.display()))? {
                return Ok(None);
            }
            let context = format!("{}/{RECORD} is missing", path.display());
            return Err(Error::new(Reason::ImageCorrupt, context));
        };
        let record = form::parse(&dir.path_of(RECORD).display().to_string(), &record)?;
        Ok(Some((dir, (manifest, record))))
    }

    /// The image `id`, which must be there.
    fn existing(&self, id: &ImageId) -> Result<(Dir, Manifest)> {
        match self.load::<Manifest>(&self.root.images()?, id)? {
            Some((dir, (manifest, _))) => Ok((dir, manifest)),
            None => Err(Error::new(
                Reason::ImageNotFound,
                format!("there is no image {id} in the store {:?}", self.name),
            )),
        }
    }
}

/// Names of what is in `images`. What is not UTF-8 is no image, and shown
/// with replacement characters.
fn names(images: &Dir) -> Result<Vec<String>> {
    let list = || {
        std::fs::read_dir(images.path())?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>()
    };
    list().during(|| format!("cannot list {}", images.path().display()))
}
