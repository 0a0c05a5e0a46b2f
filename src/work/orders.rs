//! Accepting orders: what is wrong with one is told before it becomes a work
//! request.
//!
//! ```text
//! asked before? ─► look ─► reserve ─► look again, alone ─► journal ─► task
//! ```

use std::{path::PathBuf, sync::Arc};

use super::{
    Work,
    admission::Lock,
    capture::Capture,
    driver::{self, Task},
    export::Export,
    order::{
        CreateImage, Destination, ExportImage, RehearseImage, RestoreVolume, Source, VerifyImage,
        check_iscsi, check_name, check_path, compact, fingerprint, retry,
    },
    preflight,
    registry::Admitted,
    rehearse::{self, Rehearse},
    resolve,
    restore::Restore,
};
use crate::{
    catalogue::Found,
    error::{Reason, Result},
    model::{
        ImageId,
        image::{Consistency, Image, ImageState, Origin, Record},
        instance::{Instance, OperatingSystem},
        live::Mode,
        work_request::{Action, EntityType, Operation, Resource, WorkRequest},
    },
};

impl Work {
    /// Accepts an order for an image; answers when it is in the journal. The
    /// image is missing when the order was known and its image is gone.
    ///
    /// # Errors
    ///
    /// What makes the order impossible now: `INSTANCE_NOT_FOUND`,
    /// `INSTANCE_RUNNING`, `INVALID_PARAMETER`, those of [`Volumes::hold`](crate::port::Volumes::hold),
    /// `VOLUME_TOO_LARGE`, `SOURCE_LOCKED`, `TOO_MANY_REQUESTS`,
    /// `RETRY_TOKEN_REUSED`.
    pub async fn create_image(&self, wanted: CreateImage) -> Result<(Option<Image>, WorkRequest)> {
        let retry = retry(&wanted.retry_token, &wanted.requested_by, &fingerprint(&wanted));
        if let Some(known) = self.0.known(retry.as_ref())? {
            return Ok((self.image_of(&known).await?, known));
        }
        check_name(wanted.display_name.as_deref())?;
        check_iscsi(&wanted)?;
        let (origin, instance) = self.origin(&wanted).await?;
        let now = self.0.ports.clock.now();
        let id = ImageId::generate(now, self.0.ports.clock.random());
        let compartment_id = wanted
            .compartment_id
            .or_else(|| instance.as_ref().map(|instance| instance.compartment_id.clone()))
            .unwrap_or_else(|| self.0.settings.default_compartment.clone());
        let display_name =
            wanted.display_name.unwrap_or_else(|| format!("image-{}", compact(&now.to_string())));
        let record = Record { compartment_id, display_name, freeform_tags: wanted.freeform_tags };

        let resource =
            |action, entity_type, identifier: String| Resource { action, entity_type, identifier };
        let mut resources = vec![resource(Action::InProgress, EntityType::Image, id.to_string())];
        if let Some(instance) = &instance {
            let identifier = instance.id.to_string();
            resources.push(resource(Action::Related, EntityType::Instance, identifier));
        }
        let volume = origin.source_volume.display().to_string();
        resources.push(resource(Action::Related, EntityType::Volume, volume));

        let compartment_id = record.compartment_id.clone();
        let image = Image { id, record, origin, state: ImageState::Provisioning };
        let request = self.0.new_request(
            Operation::CreateImage,
            compartment_id,
            resources,
            wanted.requested_by,
            retry,
        );
        let request = WorkRequest { rates: wanted.rates, ..request };
        // The volume is opened by the path that was asked for: by the time its
        // turn comes, /dev/dm-3 may be another's.
        let lock = Lock::Source(resolve(image.origin.source_volume.clone()).await);
        let (request, reservation) = match self.0.reserve(request, lock)? {
            Admitted::Known(known) => {
                return Ok((self.image_of(&known).await?, known));
            }
            Admitted::New(request, reservation) => (request, reservation),
        };
        let image = self.accept(&request, instance.as_ref(), image, wanted.mode).await?;
        self.0.catalogue.begin(image.clone());
        let capture = Capture {
            image: image.clone(),
            instance,
            mode: wanted.mode,
            iscsi: wanted.iscsi,
            interrupted: None,
        };
        driver::spawn(self, reservation, Task::Capture(Box::new(capture)));
        Ok((Some(image), request))
    }

    /// The last look at an order that nobody else can make now. Wrong orders
    /// fail at once, not when their turn comes. The volume is let go again: a
    /// queue must not keep a VM from starting.
    async fn accept(
        &self,
        request: &WorkRequest,
        instance: Option<&Instance>,
        mut image: Image,
        mode: Mode,
    ) -> Result<Image> {
        let volume = &image.origin.source_volume;
        let found = self.preflight(instance, volume, mode, Arc::default()).await?;
        if let preflight::Found::Running { .. } = found {
            // Until the point in time was taken, no better than it may become.
            image.origin.consistency = Consistency::Crash;
        }
        drop(found);
        self.0.keep(request).await?;
        Ok(image)
    }

    /// Accepts an order to verify an image.
    ///
    /// # Errors
    ///
    /// `IMAGE_NOT_FOUND`, `IMAGE_LOCKED`, `TOO_MANY_REQUESTS`,
    /// `RETRY_TOKEN_REUSED`, `STORE_UNAVAILABLE`.
    pub async fn verify_image(&self, wanted: VerifyImage) -> Result<WorkRequest> {
        let words = format!("verify {}", wanted.image_id);
        let retry = retry(&wanted.retry_token, &wanted.requested_by, &words);
        if let Some(known) = self.0.known(retry.as_ref())? {
            return Ok(known);
        }
        let found = self.whole(&wanted.image_id).await?;
        let resources = vec![Resource {
            action: Action::Related,
            entity_type: EntityType::Image,
            identifier: wanted.image_id.to_string(),
        }];
        let request = self.0.new_request(
            Operation::VerifyImage,
            found.image.record.compartment_id.clone(),
            resources,
            wanted.requested_by,
            retry,
        );
        let lock = Lock::Image(wanted.image_id);
        self.admitted(request, lock, async { Ok(Task::Verify(Box::new(found))) }).await
    }

    /// Accepts an order to write an image over a volume, which is not touched
    /// before its turn comes.
    ///
    /// # Errors
    ///
    /// As [`verify_image`](Self::verify_image), but for `IMAGE_LOCKED` by a
    /// verification; `INVALID_PARAMETER`, `SOURCE_LOCKED`, and those of
    /// [`Volumes::target`](crate::port::Volumes::target).
    pub async fn restore_volume(&self, wanted: RestoreVolume) -> Result<WorkRequest> {
        let RestoreVolume { image_id, path, retry_token, requested_by } = wanted;
        let words = format!("restore {image_id} {}", path.display());
        let retry = retry(&retry_token, &requested_by, &words);
        if let Some(known) = self.0.known(retry.as_ref())? {
            return Ok(known);
        }
        let path = check_path(&path, "to")?;
        let found = self.whole(&image_id).await?;
        let resource =
            |action, entity_type, identifier| Resource { action, entity_type, identifier };
        let volume = path.display().to_string();
        let resources = vec![
            resource(Action::InProgress, EntityType::Volume, volume),
            resource(Action::Related, EntityType::Image, image_id.to_string()),
        ];
        let request = self.0.new_request(
            Operation::RestoreVolume,
            found.image.record.compartment_id.clone(),
            resources,
            requested_by,
            retry,
        );
        let lock = Lock::Source(resolve(path.clone()).await);
        let task = async {
            let restore = Box::new(Restore { found, path });
            drop(restore.target(self).await?);
            Ok(Task::Restore(restore))
        };
        self.admitted(request, lock, task).await
    }

    /// Accepts an order to send an image's object elsewhere.
    ///
    /// # Errors
    ///
    /// As [`verify_image`](Self::verify_image); `STORE_NOT_FOUND`,
    /// `INVALID_PARAMETER`, `OBJECT_EXISTS` and what the store says.
    pub async fn export_image(&self, wanted: ExportImage) -> Result<WorkRequest> {
        // Only its digest is kept.
        let words = format!("export {} {}", wanted.image_id, wanted.words());
        let retry = retry(&wanted.retry_token, &wanted.requested_by, &words);
        if let Some(known) = self.0.known(retry.as_ref())? {
            return Ok(known);
        }
        let found = self.whole(&wanted.image_id).await?;
        let resources = vec![Resource {
            action: Action::Related,
            entity_type: EntityType::Image,
            identifier: wanted.image_id.to_string(),
        }];
        let request = self.0.new_request(
            Operation::ExportImage,
            found.image.record.compartment_id.clone(),
            resources,
            wanted.requested_by,
            retry,
        );
        let request = WorkRequest { rates: wanted.rates, ..request };
        let lock = Lock::Image(wanted.image_id.clone());
        let task = async {
            let (outlet, store) = match wanted.destination {
                Destination::Uri(uri) => (self.0.ports.outlets.by_uri(&uri, wanted.over)?, None),
                Destination::Object { store, name } => {
                    let name = name.unwrap_or_else(|| format!("{}.qcow2", wanted.image_id));
                    let to = self.0.catalogue.store(&store)?;
                    (to.outlet(&name, wanted.over).await?, Some(store))
                }
            };
            Ok(Task::Export(Box::new(Export { found, outlet, store })))
        };
        self.admitted(request, lock, task).await
    }

    /// Reserves what `request` needs, prepares its task, which is the last
    /// look at the order, and begins; or answers with the request that was
    /// asked for before.
    pub(super) async fn admitted(
        &self,
        request: WorkRequest,
        lock: Lock,
        task: impl Future<Output = Result<Task>>,
    ) -> Result<WorkRequest> {
        match self.0.reserve(request, lock)? {
            Admitted::Known(known) => Ok(known),
            Admitted::New(request, reservation) => {
                let task = task.await?;
                self.0.keep(&request).await?;
                driver::spawn(self, reservation, task);
                Ok(request)
            }
        }
    }

    /// An image that is whole.
    pub(super) async fn whole(&self, id: &ImageId) -> Result<Found> {
        match self.0.catalogue.find(id).await {
            Err(error) if error.reason() == Reason::ImageNotFound => {
                // One that is being made is there, and locked.
                self.0.registry.check_unused(id)?;
                Err(error)
            }
            found => found,
        }
    }

    /// Accepts an order to rehearse an image of a running instance.
    ///
    /// # Errors
    ///
    /// As [`create_image`](Self::create_image); `INVALID_PARAMETER` for an
    /// instance that does not run.
    pub async fn rehearse_image(&self, wanted: RehearseImage) -> Result<WorkRequest> {
        let RehearseImage { instance, mode, retry_token, requested_by } = wanted;
        let words = format!("rehearse {instance} {mode:?}");
        let retry = retry(&retry_token, &requested_by, &words);
        if let Some(known) = self.0.known(retry.as_ref())? {
            return Ok(known);
        }
        let instance = self.instance(&instance).await?;
        let related =
            |entity_type, identifier| Resource { action: Action::Related, entity_type, identifier };
        let resources = vec![
            related(EntityType::Instance, instance.id.to_string()),
            related(EntityType::Volume, instance.boot_volume.display().to_string()),
        ];
        let request = self.0.new_request(
            Operation::RehearseImage,
            instance.compartment_id.clone(),
            resources,
            requested_by,
            retry,
        );
        let lock = Lock::Source(resolve(instance.boot_volume.clone()).await);
        let task = async {
            let volume = &instance.boot_volume;
            let found = self.preflight(Some(&instance), volume, mode, Arc::default()).await?;
            if let preflight::Found::AtRest(..) = found {
                return Err(rehearse::at_rest(&instance));
            }
            drop(found);
            Ok(Task::Rehearse(Box::new(Rehearse { instance, mode })))
        };
        self.admitted(request, lock, task).await
    }

    /// What is settled about the image, and its instance.
    async fn origin(&self, wanted: &CreateImage) -> Result<(Origin, Option<Instance>)> {
        let instance = match &wanted.source {
            Source::Instance(id) => Some(self.instance(id).await?),
            Source::BootVolume(_) => None,
        };
        let source_volume = match (&wanted.source, &instance) {
            (Source::BootVolume(path), _) => check_path(path, "boot_volume")?,
            (_, Some(instance)) => instance.boot_volume.clone(),
            (Source::Instance(_), None) => PathBuf::new(),
        };
        let of_instance = instance.as_ref();
        let origin = Origin {
            time_created: self.0.ports.clock.now(),
            source_instance_id: of_instance.map(|instance| instance.id.clone()),
            source_volume,
            base_image_id: of_instance.and_then(|instance| instance.base_image_id.clone()),
            os: of_instance.map_or_else(OperatingSystem::default, |instance| instance.os.clone()),
            architecture: self.0.settings.architecture.clone(),
            launch_mode: wanted.launch_mode,
            create_image_allowed: true,
            compression: wanted.compression,
            consistency: Consistency::Clean,
            store: self.0.settings.default_store.clone(),
        };
        Ok((origin, instance))
    }

    /// The image that `request` made or makes, if it is still there.
    async fn image_of(&self, request: &WorkRequest) -> Result<Option<Image>> {
        let mut resources = request.resources.iter();
        let image = resources.find(|resource| resource.entity_type == EntityType::Image);
        let Some(id) = image.and_then(|image| image.identifier.parse().ok()) else {
            return Ok(None);
        };
        match self.image(&id).await {
            Ok(image) => Ok(Some(image)),
            Err(error) if error.reason() == Reason::ImageNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}
