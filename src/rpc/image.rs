//! ImageService.

use futures_util::stream::{self, BoxStream, StreamExt};
use tonic::{Request, Response, Status};

use super::{
    convert,
    page::{self, Key, Order, Wanted},
    peer::Peer,
    status, to_the_end,
};
use crate::{
    error::{Error, Reason, Result},
    model::image::Image,
    pb::{
        self,
        image_service_server::ImageService,
        list_images_request::{SortBy, SortOrder},
    },
    work::{Chunk, Delete, Listed, Reading, Work},
};

#[derive(Debug)]
pub(super) struct Images {
    pub work: Work,
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn create_image(
        &self,
        request: Request<pb::CreateImageRequest>,
    ) -> Result<Response<pb::CreateImageResponse>, Status> {
        let peer = Peer::of(&request).map_err(status::from)?.describe().await;
        let wanted = convert::create_image(request.into_inner(), peer).map_err(status::from)?;
        let work = self.work.clone();
        let (image, request) = to_the_end(async move { work.create_image(wanted).await }).await?;
        Ok(Response::new(pb::CreateImageResponse {
            image: image.map(Into::into),
            work_request: Some(request.into()),
        }))
    }

    async fn rehearse_image(
        &self,
        request: Request<pb::RehearseImageRequest>,
    ) -> Result<Response<pb::WorkRequest>, Status> {
        let peer = Peer::of(&request).map_err(status::from)?.describe().await;
        let wanted = convert::rehearse_image(request.into_inner(), peer).map_err(status::from)?;
        let work = self.work.clone();
        let request = to_the_end(async move { work.rehearse_image(wanted).await }).await?;
        Ok(Response::new(request.into()))
    }

    async fn get_image(
        &self,
        request: Request<pb::GetImageRequest>,
    ) -> Result<Response<pb::Image>, Status> {
        let id = convert::image_id(&request.get_ref().image_id).map_err(status::from)?;
        let image = self.work.image(&id).await.map_err(status::from)?;
        Ok(Response::new(image.into()))
    }

    async fn list_images(
        &self,
        request: Request<pb::ListImagesRequest>,
    ) -> Result<Response<pb::ListImagesResponse>, Status> {
        let Listed { images, silent } = self.work.images().await.map_err(status::from)?;
        let mut page = list(images, request.get_ref()).map_err(status::from)?;
        page.silent_stores = silent
            .into_iter()
            .map(|(name, error)| pb::SilentStore { name, problem: error.report() })
            .collect();
        Ok(Response::new(page))
    }

    async fn delete_image(
        &self,
        request: Request<pb::DeleteImageRequest>,
    ) -> Result<Response<pb::DeleteImageResponse>, Status> {
        let id = convert::image_id(&request.get_ref().image_id).map_err(status::from)?;
        let work = self.work.clone();
        let deleted = to_the_end(async move { work.delete_image(&id).await }).await?;
        let keeps_versions = deleted == Delete::Hidden;
        Ok(Response::new(pb::DeleteImageResponse { keeps_versions }))
    }

    async fn verify_image(
        &self,
        request: Request<pb::VerifyImageRequest>,
    ) -> Result<Response<pb::WorkRequest>, Status> {
        let peer = Peer::of(&request).map_err(status::from)?.describe().await;
        let wanted = convert::verify_image(request.into_inner(), peer).map_err(status::from)?;
        let work = self.work.clone();
        let request = to_the_end(async move { work.verify_image(wanted).await }).await?;
        Ok(Response::new(request.into()))
    }

    async fn export_image(
        &self,
        request: Request<pb::ExportImageRequest>,
    ) -> Result<Response<pb::WorkRequest>, Status> {
        let peer = Peer::of(&request).map_err(status::from)?.describe().await;
        let wanted = convert::export_image(request.into_inner(), peer).map_err(status::from)?;
        let work = self.work.clone();
        let request = to_the_end(async move { work.export_image(wanted).await }).await?;
        Ok(Response::new(request.into()))
    }

    type ReadImageObjectStream = BoxStream<'static, Result<pb::ReadImageObjectResponse, Status>>;

    async fn read_image_object(
        &self,
        request: Request<pb::ReadImageObjectRequest>,
    ) -> Result<Response<Self::ReadImageObjectStream>, Status> {
        let id = convert::image_id(&request.get_ref().image_id).map_err(status::from)?;
        let Reading { size, digest, chunks } =
            self.work.read_object(&id).await.map_err(status::from)?;
        let first = pb::ReadImageObjectResponse {
            object_size_bytes: size.get(),
            object_digest: digest.to_string(),
            ..Default::default()
        };
        let further = chunks.map(|chunk| match chunk {
            Ok(Chunk { bytes, ends_part }) => Ok(pb::ReadImageObjectResponse {
                data: bytes.into(),
                ends_part,
                ..Default::default()
            }),
            Err(error) => Err(status::from(error)),
        });
        Ok(Response::new(stream::once(async { Ok(first) }).chain(further).boxed()))
    }
}

/// The page of `images` that `wanted` asks for.
fn list(images: Vec<Image>, wanted: &pb::ListImagesRequest) -> Result<pb::ListImagesResponse> {
    let order = order(wanted)?;
    let state = pb::image::LifecycleState::try_from(wanted.lifecycle_state).map_err(|cause| {
        Error::new(Reason::InvalidParameter, "lifecycle_state is none that is known here")
            .field("lifecycle_state")
            .because(cause)
    })?;
    let is = |filter: &str, value: &str| filter.is_empty() || filter == value;
    let matches = |image: &Image| {
        is(&wanted.compartment_id, image.record.compartment_id.as_str())
            && is(&wanted.display_name, &image.record.display_name)
            && is(&wanted.store, &image.origin.store)
            && is(&wanted.operating_system, &image.origin.os.name)
            && is(&wanted.operating_system_version, &image.origin.os.version)
            && (state == pb::image::LifecycleState::Unspecified
                || state == convert::lifecycle_state(&image.state))
    };
    let keyed = |image: Image| {
        let key = match order {
            Order::NewestFirst | Order::OldestFirst => {
                Key::time(image.origin.time_created.as_millis(), image.id.as_str())
            }
            Order::NameUp | Order::NameDown => {
                Key::name(&image.record.display_name, image.id.as_str())
            }
        };
        (key, image)
    };
    let items = images.into_iter().filter(matches).map(keyed).collect();
    let (items, next_page) =
        page::cut(items, Wanted { order, limit: wanted.limit, page: &wanted.page })?;
    Ok(pb::ListImagesResponse { items, next_page, silent_stores: Vec::new() })
}

/// OCI's defaults: newest first, names upwards.
fn order(wanted: &pb::ListImagesRequest) -> Result<Order> {
    let unknown = |field, cause: prost::UnknownEnumValue| {
        Error::new(Reason::InvalidParameter, format!("{field} is none that is known here"))
            .field(field)
            .because(cause)
    };
    let by = SortBy::try_from(wanted.sort_by).map_err(|cause| unknown("sort_by", cause))?;
    let direction =
        SortOrder::try_from(wanted.sort_order).map_err(|cause| unknown("sort_order", cause))?;
    Ok(match (by, direction) {
        (SortBy::Displayname, SortOrder::Desc) => Order::NameDown,
        (SortBy::Displayname, _) => Order::NameUp,
        (_, SortOrder::Asc) => Order::OldestFirst,
        _ => Order::NewestFirst,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        ImageId, Timestamp,
        image::{Compression, Consistency, ImageState, LaunchMode, Origin, Record},
        instance::OperatingSystem,
    };

    fn image(millis: u64, name: &str, compartment: &str) -> Image {
        let now = Timestamp::from_millis(millis);
        Image {
            id: ImageId::generate(now, 1),
            record: Record {
                compartment_id: compartment.parse().unwrap(),
                display_name: name.into(),
                freeform_tags: Default::default(),
            },
            origin: Origin {
                time_created: now,
                source_instance_id: None,
                source_volume: "/dev/vg0/x".into(),
                base_image_id: None,
                os: OperatingSystem::default(),
                architecture: "x86_64".into(),
                launch_mode: LaunchMode::Native,
                create_image_allowed: true,
                compression: Compression::Zstd,
                consistency: Consistency::Clean,
                store: "local".into(),
            },
            state: ImageState::Provisioning,
        }
    }

    fn names(wanted: pb::ListImagesRequest) -> Vec<String> {
        let images = vec![image(2, "b", "c1"), image(1, "c", "c1"), image(3, "a", "c2")];
        let listed = list(images, &wanted).unwrap();
        listed.items.into_iter().map(|image| image.display_name).collect()
    }

    #[test]
    fn sorting_follows_oci() {
        let sorted = |by: SortBy, order: SortOrder| {
            names(pb::ListImagesRequest {
                sort_by: by.into(),
                sort_order: order.into(),
                ..Default::default()
            })
        };
        assert_eq!(sorted(SortBy::Unspecified, SortOrder::Unspecified), ["a", "b", "c"]);
        assert_eq!(sorted(SortBy::Timecreated, SortOrder::Asc), ["c", "b", "a"]);
        assert_eq!(sorted(SortBy::Displayname, SortOrder::Unspecified), ["a", "b", "c"]);
        assert_eq!(sorted(SortBy::Displayname, SortOrder::Desc), ["c", "b", "a"]);
    }

    #[test]
    fn filters_are_exact_and_add_up() {
        let filter = |compartment: &str, name: &str| {
            names(pb::ListImagesRequest {
                compartment_id: compartment.into(),
                display_name: name.into(),
                ..Default::default()
            })
        };
        assert_eq!(filter("c1", ""), ["b", "c"]);
        assert_eq!(filter("c1", "b"), ["b"]);
        assert!(filter("c2", "b").is_empty());
        let state = |state: pb::image::LifecycleState| {
            names(pb::ListImagesRequest { lifecycle_state: state.into(), ..Default::default() })
        };
        assert_eq!(state(pb::image::LifecycleState::Provisioning).len(), 3);
        assert!(state(pb::image::LifecycleState::Available).is_empty());
    }

    #[test]
    fn unknown_values_are_refused_by_name() {
        let field = |wanted| list(Vec::new(), &wanted).unwrap_err().field_name().unwrap();
        let default = pb::ListImagesRequest::default;
        assert_eq!(field(pb::ListImagesRequest { sort_by: 9, ..default() }), "sort_by");
        assert_eq!(field(pb::ListImagesRequest { sort_order: 9, ..default() }), "sort_order");
        let wanted = pb::ListImagesRequest { lifecycle_state: 99, ..default() };
        assert_eq!(field(wanted), "lifecycle_state");
    }
}
