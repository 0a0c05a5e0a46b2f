//! HostService.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tonic::{Request, Response, Status};

use super::{convert, status};
use crate::{
    error::Result,
    model::{
        ByteSize,
        host::{Feature, Space, Traffic},
        work_request,
    },
    pb::{self, host_service_server::HostService},
    work::Work,
};

/// What the daemon knows of its host.
#[derive(Clone)]
pub struct HostFacts {
    /// Its name.
    pub hostname: String,
    /// The kernel's release.
    pub kernel_release: String,
    /// `x86_64`, `aarch64`, …
    pub architecture: String,
    /// What it can do, and what each missing part lacks.
    pub features: Vec<Feature>,
    /// Threads that encode.
    pub encode_threads: usize,
    /// Name of the store that images go to.
    pub default_store: String,
    /// Asks the stores. Bounded to some seconds.
    pub stores: Arc<dyn Fn() -> BoxFuture<'static, Vec<StoreState>> + Send + Sync>,
}

impl fmt::Debug for HostFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostFacts").field("hostname", &self.hostname).finish_non_exhaustive()
    }
}

/// A store as it is now.
#[derive(Debug)]
pub struct StoreState {
    /// Its name in the configuration.
    pub name: String,
    /// `directory`, …
    pub kind: &'static str,
    /// Where it is, without any secret.
    pub location: String,
    /// Room, where the store can tell; an error where it does not answer.
    pub space: Result<Option<Space>>,
    /// What went there and came back.
    pub traffic: Traffic,
}

#[derive(Debug)]
pub(super) struct Host {
    pub work: Work,
    pub facts: HostFacts,
}

#[tonic::async_trait]
impl HostService for Host {
    async fn get_host(
        &self,
        _request: Request<pb::GetHostRequest>,
    ) -> Result<Response<pb::Host>, Status> {
        Ok(Response::new(self.get().await))
    }

    async fn update_host(
        &self,
        request: Request<pb::UpdateHostRequest>,
    ) -> Result<Response<pb::Host>, Status> {
        let pb::UpdateHostRequest { max_upload_rate, max_read_rate } = request.into_inner();
        let new = convert::new_rates(max_upload_rate, max_read_rate).map_err(status::from)?;
        self.work.set_host_rates(new);
        Ok(Response::new(self.get().await))
    }

    async fn drain_host(
        &self,
        request: Request<pb::DrainHostRequest>,
    ) -> Result<Response<pb::Host>, Status> {
        self.work.drain(request.into_inner().finish_seconds.map(Duration::from_secs));
        Ok(Response::new(self.get().await))
    }

    async fn resume_host(
        &self,
        _request: Request<pb::ResumeHostRequest>,
    ) -> Result<Response<pb::Host>, Status> {
        self.work.resume();
        Ok(Response::new(self.get().await))
    }
}

impl Host {
    async fn get(&self) -> pb::Host {
        let facts = &self.facts;
        let requests = self.work.work_requests();
        let (mut waiting, mut active) = (0, 0);
        for request in requests {
            use work_request::Status::{Accepted, Canceling, InProgress};
            match request.status {
                Accepted => waiting += 1,
                InProgress | Canceling => active += 1,
                _ => {}
            }
        }
        let rates = self.work.rates();
        let found = self.work.features().await;
        pb::Host {
            hostname: facts.hostname.clone(),
            imaged_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: facts.kernel_release.clone(),
            architecture: facts.architecture.clone(),
            features: facts.features.iter().cloned().chain(found).map(Into::into).collect(),
            stores: stores(facts).await,
            encode_threads: u32::try_from(facts.encode_threads).unwrap_or(u32::MAX),
            work_requests_in_progress: active,
            work_requests_waiting: waiting,
            drained: self.work.is_drained(),
            max_upload_rate: rates.upload.map(ByteSize::get),
            max_read_rate: rates.read.map(ByteSize::get),
        }
    }
}

impl From<Feature> for pb::Feature {
    fn from(feature: Feature) -> Self {
        Self { name: feature.name, available: feature.available, details: feature.details }
    }
}

/// The stores as they are now.
pub(super) async fn stores(facts: &HostFacts) -> Vec<pb::Store> {
    let states = (facts.stores)().await;
    states.into_iter().map(|state| store(state, &facts.default_store)).collect()
}

fn store(state: StoreState, default: &str) -> pb::Store {
    let (space, problem) = match state.space {
        Ok(space) => (space, String::new()),
        Err(error) => (None, error.report()),
    };
    pb::Store {
        is_default: state.name == default,
        name: state.name,
        kind: state.kind.into(),
        location: state.location,
        free_bytes: space.map(|space| space.free.get()),
        total_bytes: space.map(|space| space.total.get()),
        problem,
        bytes_stored: state.traffic.stored.get(),
        bytes_read: state.traffic.read.get(),
        failed_calls: state.traffic.failed,
        retried_requests: state.traffic.retried,
    }
}
