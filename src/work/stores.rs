//! Whether a store can be used, and what lies in it that nobody needs.

use std::sync::Arc;

use super::Work;
use crate::{
    encode::object_digest,
    error::Result,
    model::{
        ByteSize, ImageId,
        work_request::{Action, EntityType},
    },
    port::{Body, ObjectStore, Part},
};

/// A step of a check, and what came of it.
#[derive(Debug)]
pub struct Step {
    /// What was tried.
    pub name: &'static str,
    /// Whether it worked.
    pub outcome: Result<()>,
}

impl Work {
    /// Tries what an image needs of the store `name`: reading, listing, an
    /// upload with a small part, and its removal. The first step that fails
    /// is the last; nothing is left unless that is the removal.
    ///
    /// # Errors
    ///
    /// `STORE_NOT_FOUND`.
    pub async fn check_store(&self, name: &str) -> Result<Vec<Step>> {
        let store = Arc::clone(self.0.catalogue.store(name)?);
        let clock = &self.0.ports.clock;
        let id = ImageId::generate(clock.now(), clock.random());
        let mut steps = Vec::new();
        let mut told = |name, outcome: Result<()>| {
            let works = outcome.is_ok();
            steps.push(Step { name, outcome });
            works
        };
        let tried = async {
            let works = told("read", store.space().await.map(drop))
                && told("list", store.list().await.map(drop));
            if !works {
                return;
            }
            let upload = match store.begin(&id).await {
                Ok(upload) => upload,
                Err(error) => {
                    told("begin an upload", Err(error));
                    return;
                }
            };
            told("begin an upload", Ok(()));
            told("store a part", upload.put(Arc::new(small_part())).await.map(drop));
            told("remove", upload.abort().await);
        };
        tried.await;
        Ok(steps)
    }

    /// Removes what dead uploads of this host left in the store `name`, and
    /// finishes interrupted deletions. Returns how many uploads there were.
    ///
    /// # Errors
    ///
    /// `STORE_NOT_FOUND`, and those of the store.
    pub async fn collect_garbage(&self, name: &str) -> Result<usize> {
        let store: &Arc<dyn ObjectStore> = self.0.catalogue.store(name)?;
        let requests = self.work_requests();
        let unfinished = requests.iter().filter(|request| !request.status.is_final());
        let made = unfinished.flat_map(|request| &request.resources).filter(|resource| {
            resource.entity_type == EntityType::Image && resource.action == Action::InProgress
        });
        let keep: Vec<_> = made.filter_map(|image| image.identifier.parse().ok()).collect();
        Ok(store.sweep(&keep).await? + self.take_back(&**store).await?)
    }

    /// Aborts what exports left in `store` that could not be aborted before.
    async fn take_back(&self, store: &dyn ObjectStore) -> Result<usize> {
        let mut aborted = 0;
        for request in self.work_requests() {
            let sent = request.outgoing.as_ref().and_then(|outgoing| outgoing.upload.as_ref());
            let left = sent.filter(|upload| upload.store.as_deref() == Some(store.name()));
            let Some(upload) = left.filter(|_| request.status.is_final()) else { continue };
            store.abandon(&upload.token).await?;
            if let Some(request) = self.0.registry.taken_back(&request.id) {
                self.0.ports.journal.put(&request).await?;
            }
            aborted += 1;
        }
        Ok(aborted)
    }
}

/// A part of some bytes.
fn small_part() -> Part {
    const BYTES: &[u8] = b"imaged tries whether it can store this";
    let size = ByteSize(BYTES.len() as u64);
    Part {
        number: 1,
        offset: 0,
        size,
        body: Box::new(Constant(BYTES)),
        sha256: object_digest(BYTES),
    }
}

struct Constant(&'static [u8]);

impl Body for Constant {
    fn piece(&self, index: usize) -> Option<&[u8]> {
        (index == 0).then_some(self.0)
    }
}
