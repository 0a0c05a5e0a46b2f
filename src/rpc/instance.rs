//! InstanceService.

use futures_util::{StreamExt, stream};
use tonic::{Request, Response, Status};

use super::{convert, peer::Peer, status, to_the_end};
use crate::{
    pb::{self, instance_service_server::InstanceService},
    work::Work,
};

/// Instances that are asked for their state at once: each may take seconds.
const AT_ONCE: usize = 32;

#[derive(Debug)]
pub(super) struct Instances {
    pub work: Work,
}

#[tonic::async_trait]
impl InstanceService for Instances {
    async fn list_instances(
        &self,
        request: Request<pb::ListInstancesRequest>,
    ) -> Result<Response<pb::ListInstancesResponse>, Status> {
        let compartment = &request.get_ref().compartment_id;
        let mut wanted = self.work.instances().await;
        wanted.retain(|instance| {
            compartment.is_empty() || compartment == instance.compartment_id.as_str()
        });
        wanted.sort_by(|a, b| a.name.cmp(&b.name));
        let work = &self.work;
        let items = stream::iter(wanted)
            .map(|instance| async move {
                let power = work.power_state(&instance).await;
                convert::instance(&instance, power)
            })
            .buffered(AT_ONCE)
            .collect()
            .await;
        Ok(Response::new(pb::ListInstancesResponse { items }))
    }

    async fn get_instance(
        &self,
        request: Request<pb::GetInstanceRequest>,
    ) -> Result<Response<pb::Instance>, Status> {
        let wanted = &request.get_ref().instance_id;
        let instance = self.work.instance(wanted).await.map_err(status::from)?;
        let power = self.work.power_state(&instance).await;
        Ok(Response::new(convert::instance(&instance, power)))
    }

    async fn list_iscsi_attachments(
        &self,
        request: Request<pb::ListIscsiAttachmentsRequest>,
    ) -> Result<Response<pb::ListIscsiAttachmentsResponse>, Status> {
        let wanted = &request.get_ref().instance_id;
        let iscsi = self.work.iscsi(wanted).await.map_err(status::from)?;
        Ok(Response::new(convert::iscsi(iscsi)))
    }

    async fn disconnect_iscsi(
        &self,
        request: Request<pb::DisconnectIscsiRequest>,
    ) -> Result<Response<pb::WorkRequest>, Status> {
        let peer = Peer::of(&request).map_err(status::from)?.describe().await;
        let pb::DisconnectIscsiRequest { instance_id, retry_token } = request.into_inner();
        let wanted = convert::guest(instance_id, retry_token, peer).map_err(status::from)?;
        let work = self.work.clone();
        let request = to_the_end(async move { work.disconnect_iscsi(wanted).await }).await?;
        Ok(Response::new(request.into()))
    }

    async fn reconnect_iscsi(
        &self,
        request: Request<pb::ReconnectIscsiRequest>,
    ) -> Result<Response<pb::WorkRequest>, Status> {
        let peer = Peer::of(&request).map_err(status::from)?.describe().await;
        let pb::ReconnectIscsiRequest { instance_id, retry_token } = request.into_inner();
        let wanted = convert::guest(instance_id, retry_token, peer).map_err(status::from)?;
        let work = self.work.clone();
        let request = to_the_end(async move { work.reconnect_iscsi(wanted).await }).await?;
        Ok(Response::new(request.into()))
    }
}
