//! A stand-in for the core while it is being written: it keeps nothing and
//! makes nothing.

use std::{collections::BTreeMap, num::NonZeroUsize, path::PathBuf, sync::Arc};

use tokio::sync::watch;

use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize, CompartmentId, ImageId, WorkRequestId,
        image::{Compression, Image, LaunchMode},
        instance::{Instance, PowerState},
        work_request::WorkRequest,
    },
    port::{Clock, Hypervisor, Journal, ObjectStore, Volumes},
};

/// The core.
#[derive(Debug, Clone)]
pub struct Work(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ports: Ports,
    settings: Settings,
}

/// What an image is made of, and how.
#[derive(Debug)]
#[allow(missing_docs, reason = "a stand-in")]
pub struct CreateImage {
    pub source: Source,
    pub compartment_id: Option<CompartmentId>,
    pub display_name: Option<String>,
    pub freeform_tags: BTreeMap<String, String>,
    pub launch_mode: LaunchMode,
    pub compression: Compression,
    pub retry_token: Option<String>,
    pub requested_by: String,
}

/// What is imaged.
#[derive(Debug)]
pub enum Source {
    /// OCID or name.
    Instance(String),
    /// Its path.
    BootVolume(PathBuf),
}

/// Which image is verified.
#[derive(Debug)]
#[allow(missing_docs, reason = "a stand-in")]
pub struct VerifyImage {
    pub image_id: ImageId,
    pub retry_token: Option<String>,
    pub requested_by: String,
}

/// The world.
#[derive(Debug)]
#[allow(missing_docs, reason = "a stand-in")]
pub struct Ports {
    pub clock: Arc<dyn Clock>,
    pub hypervisor: Arc<dyn Hypervisor>,
    pub volumes: Arc<dyn Volumes>,
    pub stores: Vec<Arc<dyn ObjectStore>>,
    pub journal: Arc<dyn Journal>,
}

/// What an operator sets.
#[derive(Debug)]
#[allow(missing_docs, reason = "a stand-in")]
pub struct Settings {
    pub instances: Vec<Instance>,
    pub default_store: String,
    pub default_compartment: CompartmentId,
    pub encode_threads: NonZeroUsize,
    pub max_volume: ByteSize,
    pub warn_volume: ByteSize,
    pub max_captures: NonZeroUsize,
    pub max_queued: usize,
    pub architecture: String,
}

#[allow(missing_docs, clippy::unused_async, clippy::missing_errors_doc, reason = "a stand-in")]
impl Work {
    pub async fn start(ports: Ports, settings: Settings) -> Result<Self> {
        ports.journal.load().await?;
        Ok(Self(Arc::new(Inner { ports, settings })))
    }

    pub async fn create_image(&self, wanted: CreateImage) -> Result<(Image, WorkRequest)> {
        let missing = format!("there is no {:?}", wanted.source);
        Err(Error::new(Reason::InstanceNotFound, missing))
    }

    pub async fn verify_image(&self, wanted: VerifyImage) -> Result<WorkRequest> {
        self.image(&wanted.image_id).await?;
        Err(Error::new(Reason::Internal, "the stand-in verifies nothing"))
    }

    pub async fn delete_image(&self, id: &ImageId) -> Result<()> {
        self.image(id).await.map(drop)
    }

    pub async fn image(&self, id: &ImageId) -> Result<Image> {
        Err(Error::new(Reason::ImageNotFound, format!("there is no image {id}")))
    }

    pub async fn images(&self) -> Result<Vec<Image>> {
        Ok(Vec::new())
    }

    pub fn instances(&self) -> &[Instance] {
        &self.0.settings.instances
    }

    pub async fn power_state(&self, instance: &Instance) -> PowerState {
        self.0.ports.hypervisor.power_state(instance).await
    }

    pub fn work_request(&self, id: &WorkRequestId) -> Result<WorkRequest> {
        Err(Error::new(Reason::WorkRequestNotFound, format!("there is no work request {id}")))
    }

    pub fn work_requests(&self) -> Vec<WorkRequest> {
        Vec::new()
    }

    pub fn watch(&self, id: &WorkRequestId) -> Result<watch::Receiver<WorkRequest>> {
        self.work_request(id).map(|request| watch::channel(request).1)
    }

    pub fn cancel(&self, id: &WorkRequestId) -> Result<WorkRequest> {
        self.work_request(id)
    }

    pub async fn shutdown(&self) {}
}
