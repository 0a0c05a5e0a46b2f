//! Which images there are.
//!
//! The stores are the truth and are asked each time; the catalogue itself
//! knows only the images that are being made, which no store shows.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Semaphore;

use crate::{
    error::{Error, Reason, Result},
    model::{
        ImageId,
        image::{Image, ImageState, Manifest, Record},
    },
    port::{Delete, ObjectStore},
};

/// The images of all stores, and those on their way there.
#[derive(Debug)]
pub struct Catalogue {
    stores: Vec<Arc<dyn ObjectStore>>,
    provisioning: Mutex<BTreeMap<ImageId, Image>>,
    /// Held while the stores are listed.
    listing: Semaphore,
}

/// Lists that are made at once: each is as large as there are images, some
/// KiB of memory for each, however many ask.
const LISTS: usize = 2;

/// A whole image and the store that has it.
#[derive(Debug)]
pub struct Found {
    /// The image.
    pub image: Image,
    /// Where it is.
    pub store: Arc<dyn ObjectStore>,
}

impl Catalogue {
    /// A catalogue of `stores`.
    #[must_use]
    pub fn new(stores: Vec<Arc<dyn ObjectStore>>) -> Self {
        Self { stores, provisioning: Mutex::default(), listing: Semaphore::new(LISTS) }
    }

    /// All stores, in the order of the configuration.
    #[must_use]
    pub fn stores(&self) -> &[Arc<dyn ObjectStore>] {
        &self.stores
    }

    /// The store `name`.
    ///
    /// # Errors
    ///
    /// `STORE_NOT_FOUND`.
    pub fn store(&self, name: &str) -> Result<&Arc<dyn ObjectStore>> {
        self.stores.iter().find(|store| store.name() == name).ok_or_else(|| {
            Error::new(Reason::StoreNotFound, format!("there is no store {name:?}"))
                .advice("`imagectl host get` lists the stores")
        })
    }

    /// Shows `image` as being made.
    pub fn begin(&self, image: Image) {
        self.lock().insert(image.id.clone(), image);
    }

    /// Ends that: the image is in its store, or nowhere.
    pub fn end(&self, id: &ImageId) {
        self.lock().remove(id);
    }

    /// All images, those being made included, by id; without their parts.
    /// Two callers are answered at once, others wait.
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE` when no store answers.
    pub async fn list(&self) -> Result<Listed> {
        // Never closed.
        let _place = self.listing.acquire().await;
        // First what is being made: what is sealed meanwhile then replaces it.
        let mut images = self.lock().clone();
        let mut silent = Vec::new();
        for store in &self.stores {
            match store.list().await {
                Ok(found) => images.extend(found.into_iter().map(|(manifest, record)| {
                    (manifest.id.clone(), image_in(&**store, manifest, record))
                })),
                Err(error) => silent.push((store.name().to_owned(), error)),
            }
        }
        if silent.len() == self.stores.len()
            && let Some((_, error)) = silent.pop()
        {
            return Err(error);
        }
        Ok(Listed { images: images.into_values().collect(), silent })
    }

    /// The image `id`, in whatever state.
    ///
    /// # Errors
    ///
    /// `IMAGE_NOT_FOUND`, `STORE_UNAVAILABLE`.
    pub async fn get(&self, id: &ImageId) -> Result<Image> {
        // First what is being made: it may be sealed while the stores answer.
        let provisioning = self.lock().get(id).cloned();
        match self.find(id).await {
            Ok(found) => Ok(found.image),
            Err(error) => provisioning.ok_or(error),
        }
    }

    /// The whole image `id` and its store.
    ///
    /// # Errors
    ///
    /// `IMAGE_NOT_FOUND`, `STORE_UNAVAILABLE`.
    pub async fn find(&self, id: &ImageId) -> Result<Found> {
        let mut unavailable = None;
        for store in &self.stores {
            match store.get(id).await {
                Ok(Some((manifest, record))) => {
                    let image = image_in(&**store, manifest, record);
                    return Ok(Found { image, store: Arc::clone(store) });
                }
                Ok(None) => {}
                Err(error) => unavailable = Some(error),
            }
        }
        Err(unavailable.unwrap_or_else(|| not_found(id)))
    }

    /// Removes the whole image `id`.
    ///
    /// # Errors
    ///
    /// `IMAGE_NOT_FOUND`, `STORE_UNAVAILABLE`.
    pub async fn delete(&self, id: &ImageId) -> Result<Delete> {
        let found = self.find(id).await?;
        debug_assert!(matches!(found.image.state, ImageState::Available(_)));
        found.store.delete(id).await
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ImageId, Image>> {
        self.provisioning.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A whole image. Another host may have made it, where the store has another
/// name.
fn image_in(store: &dyn ObjectStore, manifest: Manifest, record: Record) -> Image {
    let mut image = manifest.into_image(record);
    image.origin.store = store.name().to_owned();
    image
}

/// The images of all stores that answered.
#[derive(Debug)]
pub struct Listed {
    /// They.
    pub images: Vec<Image>,
    /// Stores that did not, whose images are missing, and why.
    pub silent: Vec<(String, Error)>,
}

fn not_found(id: &ImageId) -> Error {
    Error::new(Reason::ImageNotFound, format!("there is no image {id}"))
        .advice("`imagectl image list` shows the images of this host's stores")
}
