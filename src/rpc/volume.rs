//! VolumeService.

use tonic::{Request, Response, Status};

use super::{convert, peer::Peer, status, to_the_end};
use crate::{
    pb::{self, volume_service_server::VolumeService},
    work::Work,
};

#[derive(Debug)]
pub(super) struct Volumes {
    pub work: Work,
}

#[tonic::async_trait]
impl VolumeService for Volumes {
    async fn restore_volume(
        &self,
        request: Request<pb::RestoreVolumeRequest>,
    ) -> Result<Response<pb::WorkRequest>, Status> {
        let peer = Peer::of(&request).map_err(status::from)?.describe().await;
        let wanted = convert::restore_volume(request.into_inner(), peer).map_err(status::from)?;
        let work = self.work.clone();
        let request = to_the_end(async move { work.restore_volume(wanted).await }).await?;
        Ok(Response::new(request.into()))
    }
}
