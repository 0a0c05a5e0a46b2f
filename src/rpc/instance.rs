//! InstanceService.

use futures_util::{StreamExt, stream};
use tonic::{Request, Response, Status};

use super::{convert, status};
use crate::{
    error::{Error, Reason},
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
        let mut wanted: Vec<_> = self.work.instances().to_vec();
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
        let instances = self.work.instances();
        // An id is somebody's for sure; a name could look like another's id.
        let found = instances
            .iter()
            .find(|instance| instance.id.as_str() == wanted)
            .or_else(|| instances.iter().find(|instance| instance.name == *wanted));
        let Some(instance) = found else {
            let message = format!("there is no instance {wanted:?} on this host");
            return Err(status::from(
                Error::new(Reason::InstanceNotFound, message)
                    .advice("imagectl instance list shows those there are"),
            ));
        };
        let power = self.work.power_state(instance).await;
        Ok(Response::new(convert::instance(instance, power)))
    }
}
