//! The core: what a work request does, step by step.
//!
//! [`Work`] is what the API calls. It decides by [`admission`], gives each
//! accepted request a task of its own (`driver`) and shows what the task
//! publishes. A caller that hangs up cancels nothing.
//!
//! ```text
//! create_image ─► resolve ─► preflight ─► admission ─► journal ─► task
//!                                                                  │
//!        GetWorkRequest, WatchWorkRequest ◄── watch channel ◄──────┘
//! ```

pub mod admission;
mod aside;
mod capture;
mod drain;
mod driver;
mod export;
mod governor;
mod iscsi;
mod live;
mod object;
mod order;
mod orders;
mod preflight;
mod rates;
mod reading;
mod recover;
mod registry;
mod rehearse;
mod restore;
mod resume;
mod stores;
mod tracker;
mod verify;
mod watchdog;

use std::{collections::BTreeSet, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::{Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::order::{
    CreateImage, Destination, ExportImage, Guest, RehearseImage, RestoreVolume, Source, VerifyImage,
};
pub use self::reading::{Chunk, Reading};
use self::registry::Registry;
pub use self::stores::Step;
pub use crate::catalogue::Listed;
pub use crate::port::{Delete, Over, Secret};
use crate::{
    catalogue::Catalogue,
    encode::SpareMemory,
    error::{Error, Reason, Result},
    model::{
        ByteSize, CompartmentId, ImageId, WorkRequestId,
        host::Feature,
        image::{Image, ImageState},
        instance::{Instance, PowerState},
        iscsi::Policy,
        live::Mode,
        trace::Trace,
        work_request::{NewRates, Operation, Rates, Resource, Retry, WorkRequest},
    },
    port::{Clock, Guests, Hypervisor, Inspector, Journal, ObjectStore, Outlets, Vault, Volumes},
};

/// Everything that the work needs from the world.
#[derive(Debug, Clone)]
pub struct Ports {
    /// Time and chance.
    pub clock: Arc<dyn Clock>,
    /// What runs the instances.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Their guests.
    pub guests: Arc<dyn Guests>,
    /// The volumes of this host.
    pub volumes: Arc<dyn Volumes>,
    /// Where images are kept.
    pub stores: Vec<Arc<dyn ObjectStore>>,
    /// What finds objects by URLs.
    pub outlets: Arc<dyn Outlets>,
    /// What looks into images.
    pub inspector: Arc<dyn Inspector>,
    /// What survives a restart.
    pub journal: Arc<dyn Journal>,
    /// What of it is secret: the iSCSI of guests.
    pub vault: Arc<dyn Vault>,
}

/// What the configuration says about the work.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The instances of this host, by name.
    pub instances: Vec<Instance>,
    /// Store of images whose request names none.
    pub default_store: String,
    /// Compartment of images of volumes that belong to no instance.
    pub default_compartment: CompartmentId,
    /// Threads of one capture's encoder.
    pub encode_threads: NonZeroUsize,
    /// Volumes above this are refused.
    pub max_volume: ByteSize,
    /// Volumes above this are imaged with a warning: OCI takes no larger ones.
    pub warn_volume: ByteSize,
    /// Captures and verifications that run at once.
    pub max_captures: NonZeroUsize,
    /// Work requests that wait or run at once.
    pub max_queued: usize,
    /// Bytes that a running instance may overwrite while it is imaged.
    pub scratch_size: ByteSize,
    /// What the guest of a volume that is read has to bear.
    pub burden: Burden,
    /// How fast all work together may go, until that is changed.
    pub rates: Rates,
    /// Work that gets no further for so long is ended.
    pub progress_timeout: Duration,
    /// This host's, e.g. `x86_64`.
    pub architecture: String,
}

/// What the guest of a volume that is read has to bear.
#[derive(Debug, Clone, Copy)]
pub struct Burden {
    /// Bytes a second at most.
    pub read_rate: Option<ByteSize>,
    /// How long its disk's operations may take, in percent of what is usual.
    pub latency_percent: u16,
}

/// The work of one daemon. Clones share it.
#[derive(Debug, Clone)]
pub struct Work(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ports: Ports,
    settings: Settings,
    catalogue: Catalogue,
    registry: Registry,
    /// Places for work that runs.
    places: Arc<Semaphore>,
    /// How fast all work together may go.
    limits: rates::Limits,
    /// Images that are read by clients.
    readers: reading::Readers,
    /// Whether orders are taken.
    gate: drain::Gate,
    /// Memory that captures share.
    spare: SpareMemory,
    tasks: TaskTracker,
    /// Cancelled when the daemon stops.
    closing: CancellationToken,
}

/// Work that waits longer than this for its undoing is left to the next
/// start, which sweeps.
const SHUTDOWN: Duration = Duration::from_secs(60);

/// Longer than any directory takes that can be read at all.
const RESOLVE: Duration = Duration::from_secs(10);

impl Work {
    /// Cleans up after a daemon that died, then is ready for orders.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`, `STORE_NOT_FOUND` when the default store is none. A
    /// store that does not answer is only warned of.
    pub async fn start(ports: Ports, settings: Settings) -> Result<Self> {
        let catalogue = Catalogue::new(ports.stores.clone());
        catalogue.store(&settings.default_store)?;
        let (interrupted, ended): (Vec<_>, Vec<_>) = (recover::recover(&ports).await?.into_iter())
            .partition(|request| !request.status.is_final());
        let registry = Registry::new(ended);
        let work = Self(Arc::new(Inner {
            catalogue,
            registry,
            places: Arc::new(Semaphore::new(settings.max_captures.get())),
            limits: rates::Limits::new(settings.rates),
            readers: reading::Readers::default(),
            gate: drain::Gate::default(),
            spare: SpareMemory::default(),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            ports,
            settings,
        }));
        for request in interrupted {
            work.go_on(request).await?;
        }
        for request in work.0.registry.all() {
            work.goes_on_giving_back(&request);
        }
        Ok(work)
    }

    /// Goes on with a capture that another process of imaged began.
    async fn go_on(&self, request: WorkRequest) -> Result<()> {
        let Some(resume) = request.resume.clone() else {
            let context = format!("{} can neither be ended nor gone on with", request.id);
            return Err(Error::new(Reason::Internal, context));
        };
        tracing::info!(work_request = %request.id, "going on with it");
        // Without what is known of them they are stored again.
        let parts = self.0.ports.journal.parts(&request.id).await.unwrap_or_else(|error| {
            tracing::error!(work_request = %request.id, "{error:?}");
            Vec::new()
        });
        let instance = match &resume.instance {
            Some(name) => self.instance(name).await.ok(),
            None => None,
        };
        let interrupted =
            resume::Interrupted { resume: *resume.clone(), undo: request.undo.clone(), parts };
        let capture = capture::Capture {
            image: interrupted.image(),
            instance,
            mode: Mode::Crash,
            iscsi: Policy::NotAsked,
            interrupted: Some(interrupted),
        };
        self.0.catalogue.begin(capture.image.clone());
        let lock = admission::Lock::Source(resolve(resume.origin.source_volume.clone()).await);
        let job = self.0.registry.readmit(request, lock, self.0.closing.child_token());
        driver::spawn_job(self, job, driver::Task::Capture(Box::new(capture)));
        Ok(())
    }

    /// Removes an image from its store.
    ///
    /// # Errors
    ///
    /// `IMAGE_NOT_FOUND`, `IMAGE_LOCKED`, `STORE_UNAVAILABLE`.
    pub async fn delete_image(&self, id: &ImageId) -> Result<Delete> {
        let image = self.0.catalogue.get(id).await?;
        self.0.registry.check_unused(id)?;
        self.0.readers.check_unused(id)?;
        let deleted = self.0.catalogue.delete(id).await?;
        let name = image.record.display_name;
        tracing::info!(image = %id, name, ?deleted, "image deleted");
        Ok(deleted)
    }

    /// One image.
    ///
    /// # Errors
    ///
    /// `IMAGE_NOT_FOUND`, `STORE_UNAVAILABLE`.
    pub async fn image(&self, id: &ImageId) -> Result<Image> {
        let image = self.0.catalogue.get(id).await?;
        Ok(shown(image, &self.0.registry.exporting()))
    }

    /// All images, by id.
    ///
    /// # Errors
    ///
    /// `STORE_UNAVAILABLE` when no store answers.
    pub async fn images(&self) -> Result<Listed> {
        let Listed { images, silent } = self.0.catalogue.list().await?;
        let exporting = self.0.registry.exporting();
        let images = images.into_iter().map(|image| shown(image, &exporting)).collect();
        Ok(Listed { images, silent })
    }

    /// The instances of this host: those of its files, and those that its
    /// hypervisor tells of. Bounded to some seconds.
    pub async fn instances(&self) -> Vec<Instance> {
        let mut instances = self.0.settings.instances.clone();
        let told = self.0.ports.hypervisor.instances().await;
        // One that has a file is the file's.
        let new = |instance: &Instance| {
            !self.0.settings.instances.iter().any(|known| known.name == instance.name)
        };
        instances.extend(told.into_iter().filter(new));
        instances
    }

    /// What its hypervisors can do on this host. Bounded to some seconds.
    pub async fn features(&self) -> Vec<Feature> {
        self.0.ports.hypervisor.features().await
    }

    /// The instance with this OCID or name.
    ///
    /// # Errors
    ///
    /// `INSTANCE_NOT_FOUND`.
    pub async fn instance(&self, id_or_name: &str) -> Result<Instance> {
        let matches =
            |instance: &Instance| instance.name == id_or_name || instance.id.as_str() == id_or_name;
        // A file says it at once.
        let told = self.0.settings.instances.iter().find(|instance| matches(instance));
        if let Some(instance) = told {
            return Ok(instance.clone());
        }
        self.0.ports.hypervisor.instances().await.into_iter().find(matches).ok_or_else(|| {
            let context = format!("there is no instance {id_or_name:?} on this host");
            Error::new(Reason::InstanceNotFound, context)
                .advice("`imagectl instance list` shows the instances that imaged knows of")
                .field("instance_id")
        })
    }

    /// Whether an instance runs.
    pub async fn power_state(&self, instance: &Instance) -> PowerState {
        self.0.ports.hypervisor.power_state(instance).await
    }

    /// One work request as it is now.
    ///
    /// # Errors
    ///
    /// `WORK_REQUEST_NOT_FOUND`.
    pub fn work_request(&self, id: &WorkRequestId) -> Result<WorkRequest> {
        Ok(self.watch(id)?.borrow().clone())
    }

    /// What a work request said to its instance so far, and what it heard;
    /// empty where it said nothing.
    ///
    /// # Errors
    ///
    /// `WORK_REQUEST_NOT_FOUND`, `JOURNAL_FAILED`.
    pub async fn trace(&self, id: &WorkRequestId) -> Result<Trace> {
        drop(self.watch(id)?);
        Ok(self.0.ports.journal.trace(id).await?.unwrap_or_default())
    }

    /// All work requests that are remembered, newest first.
    #[must_use]
    pub fn work_requests(&self) -> Vec<WorkRequest> {
        self.0.registry.all()
    }

    /// Follows a work request. After a final status nothing comes any more.
    ///
    /// # Errors
    ///
    /// `WORK_REQUEST_NOT_FOUND`.
    pub fn watch(&self, id: &WorkRequestId) -> Result<watch::Receiver<WorkRequest>> {
        self.0.registry.watch(id)
    }

    /// Asks for the end of a work request. One that has ended stays as it is.
    ///
    /// # Errors
    ///
    /// `WORK_REQUEST_NOT_FOUND`.
    pub fn cancel(&self, id: &WorkRequestId) -> Result<WorkRequest> {
        self.0.registry.cancel(id)
    }

    /// Changes how fast a work request may go. One that has ended stays as it
    /// is.
    ///
    /// # Errors
    ///
    /// `WORK_REQUEST_NOT_FOUND`, `JOURNAL_FAILED`.
    pub async fn set_rates(&self, id: &WorkRequestId, new: NewRates) -> Result<WorkRequest> {
        drop(self.watch(id)?);
        let request = self.0.registry.set_rates(id, new)?;
        tracing::info!(work_request = %id, rates = ?request.rates, "its limits were changed");
        if !request.status.is_final() {
            self.0.ports.journal.put(&request).await?;
        }
        Ok(request)
    }

    /// How fast all work together may go.
    #[must_use]
    pub fn rates(&self) -> Rates {
        self.0.limits.get()
    }

    /// Changes that, until the daemon ends.
    pub fn set_host_rates(&self, new: NewRates) {
        self.0.limits.set(new);
        tracing::info!(rates = ?self.rates(), "the limits of all work were changed");
    }

    /// Takes no more orders, ends what runs and waits for its undoing, a
    /// minute at most.
    pub async fn shutdown(&self) {
        self.0.closing.cancel();
        self.0.tasks.close();
        if tokio::time::timeout(SHUTDOWN, self.0.tasks.wait()).await.is_err() {
            tracing::error!("work is still being undone; the next start finishes that");
        }
    }
}

impl Inner {
    fn new_request(
        &self,
        operation: Operation,
        compartment_id: CompartmentId,
        resources: Vec<Resource>,
        requested_by: String,
        retry: Option<Retry>,
    ) -> WorkRequest {
        let now = self.ports.clock.now();
        let id = WorkRequestId::generate(now, self.ports.clock.random());
        WorkRequest::accepted(id, operation, compartment_id, resources, now, requested_by, retry)
    }

    /// The work request that this token belongs to.
    fn known(&self, retry: Option<&Retry>) -> Result<Option<WorkRequest>> {
        self.registry.known(retry, self.ports.clock.now())
    }

    /// Registers a request, unless it must not run. From here on others are
    /// told of it.
    fn reserve(&self, request: WorkRequest, lock: admission::Lock) -> Result<registry::Admitted> {
        if self.closing.is_cancelled() {
            return Err(Error::new(Reason::DaemonStopped, "imaged is being stopped"));
        }
        // What was taken is given back also before a maintenance.
        if request.operation != Operation::ReconnectIscsi {
            self.gate.check()?;
        }
        self.registry.admit(request, lock, self.settings.max_queued, self.closing.child_token())
    }

    /// Makes a new request durable, and forgets what is too old.
    async fn keep(&self, request: &WorkRequest) -> Result<()> {
        self.ports.journal.put(request).await?;
        let evicted = self.registry.evict(self.ports.clock.now());
        if !evicted.is_empty()
            && let Err(error) = self.ports.journal.forget(&evicted).await
        {
            tracing::error!("{error:?}");
        }
        Ok(())
    }
}

/// `image` as it is shown while the objects of `exporting` are sent elsewhere.
fn shown(mut image: Image, exporting: &BTreeSet<String>) -> Image {
    if exporting.contains(image.id.as_str())
        && let ImageState::Available(stored) = image.state
    {
        image.state = ImageState::Exporting(stored);
    }
    image
}

/// Symbolic links resolved where they can be, so that one volume has one
/// lock. What does not exist fails in preflight with a better word.
async fn resolve(path: PathBuf) -> PathBuf {
    match tokio::time::timeout(RESOLVE, tokio::fs::canonicalize(&path)).await {
        Ok(Ok(resolved)) => resolved,
        _ => path,
    }
}
