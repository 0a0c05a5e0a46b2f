//! StoreService.

use tonic::{Request, Response, Status};

use super::{HostFacts, host, status, to_the_end};
use crate::{
    pb::{self, store_service_server::StoreService},
    work::{Step, Work},
};

#[derive(Debug)]
pub(super) struct Stores {
    pub work: Work,
    pub facts: HostFacts,
}

#[tonic::async_trait]
impl StoreService for Stores {
    async fn list_stores(
        &self,
        _request: Request<pb::ListStoresRequest>,
    ) -> Result<Response<pb::ListStoresResponse>, Status> {
        let items = host::stores(&self.facts).await;
        Ok(Response::new(pb::ListStoresResponse { items }))
    }

    async fn check_store(
        &self,
        request: Request<pb::CheckStoreRequest>,
    ) -> Result<Response<pb::CheckStoreResponse>, Status> {
        let (work, name) = (self.work.clone(), request.into_inner().name);
        let steps = to_the_end(async move { work.check_store(&name).await }).await?;
        let step = |Step { name, outcome }| pb::StoreStep {
            name: String::from(name),
            problem: outcome.err().map(|error| error.report()).unwrap_or_default(),
        };
        Ok(Response::new(pb::CheckStoreResponse { steps: steps.into_iter().map(step).collect() }))
    }

    async fn collect_garbage(
        &self,
        request: Request<pb::CollectGarbageRequest>,
    ) -> Result<Response<pb::CollectGarbageResponse>, Status> {
        let name = request.into_inner().name;
        let uploads = self.work.collect_garbage(&name).await.map_err(status::from)?;
        let uploads = u32::try_from(uploads).unwrap_or(u32::MAX);
        Ok(Response::new(pb::CollectGarbageResponse { uploads }))
    }
}
