//! The service: gRPC on a Unix socket.
//!
//! ```text
//! connection ─► peer (who) ─► access (may they) ─► service ─► convert ─► work
//!                                                     └─ errors ─► status
//! ```
//! Handlers convert and ask [`Work`], which owns what goes on: a client that
//! hangs up cancels nothing. Every call is checked against [`Access`], health
//! and reflection too.

mod convert;
mod host;
mod image;
mod instance;
mod page;
pub mod peer;
pub mod status;
mod store;
mod volume;
mod work_request;

use std::{future::Future, time::Duration};

use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Status,
    service::{Routes, interceptor::InterceptorLayer},
    transport::Server,
};

use self::peer::{Connection, Peer};
pub use self::{
    host::{HostFacts, StoreState},
    peer::Access,
};
use crate::{
    error::{Context, Error, Reason, Result},
    pb,
    work::Work,
};

/// A request has some text fields; tags are the largest.
const MAX_REQUEST: usize = 256 << 10;
/// Calls of one connection that are worked on at once; the rest waits.
const MAX_CALLS: usize = 32;
/// Calls and streams of one connection.
const MAX_STREAMS: u32 = 64;
/// No call awaits work, so one that takes this long hangs on a store. It goes
/// on; only its answer is lost.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// A peer that is stopped or hangs does not keep its connection.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Serves the API on `listener` until `stop`, then lets open calls end: the
/// future is ready when the last connection has closed. Dropping it closes
/// them.
///
/// # Errors
///
/// `INTERNAL`: the service could not be built.
pub async fn serve(
    listener: UnixListener,
    work: Work,
    host: HostFacts,
    access: Access,
    stop: CancellationToken,
) -> Result<()> {
    let routes = routes(work, host).await?;
    Server::builder()
        .concurrency_limit_per_connection(MAX_CALLS)
        .max_concurrent_streams(MAX_STREAMS)
        .timeout(CALL_TIMEOUT)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .layer(InterceptorLayer::new(move |request: Request<()>| authorise(access, request)))
        .add_routes(routes)
        .serve_with_incoming_shutdown(Connection::accept(listener), stop.cancelled_owned())
        .await
        .context(Reason::Internal, || "the service ended")
}

fn authorise(access: Access, request: Request<()>) -> Result<Request<()>, Status> {
    Peer::of(&request).and_then(|peer| access.check(&peer)).map_err(status::from)?;
    Ok(request)
}

async fn routes(work: Work, host: HostFacts) -> Result<Routes> {
    use pb::{
        host_service_server::HostServiceServer, image_service_server::ImageServiceServer,
        instance_service_server::InstanceServiceServer, store_service_server::StoreServiceServer,
        volume_service_server::VolumeServiceServer,
        work_request_service_server::WorkRequestServiceServer,
    };
    let images = ImageServiceServer::new(image::Images { work: work.clone() });
    let instances = InstanceServiceServer::new(instance::Instances { work: work.clone() });
    let requests = WorkRequestServiceServer::new(work_request::Requests { work: work.clone() });
    let volumes = VolumeServiceServer::new(volume::Volumes { work: work.clone() });
    let stores = StoreServiceServer::new(store::Stores { work: work.clone(), facts: host.clone() });
    let hosts = HostServiceServer::new(host::Host { work, facts: host });

    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ImageServiceServer<image::Images>>().await;
    health.set_serving::<InstanceServiceServer<instance::Instances>>().await;
    health.set_serving::<WorkRequestServiceServer<work_request::Requests>>().await;
    health.set_serving::<HostServiceServer<host::Host>>().await;
    health.set_serving::<StoreServiceServer<store::Stores>>().await;
    health.set_serving::<VolumeServiceServer<volume::Volumes>>().await;

    let unbuilt = || "the reflection of the API cannot be built";
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Ok(Routes::new(images.max_decoding_message_size(MAX_REQUEST))
        .add_service(instances.max_decoding_message_size(MAX_REQUEST))
        .add_service(requests.max_decoding_message_size(MAX_REQUEST))
        .add_service(hosts.max_decoding_message_size(MAX_REQUEST))
        .add_service(stores.max_decoding_message_size(MAX_REQUEST))
        .add_service(volumes.max_decoding_message_size(MAX_REQUEST))
        .add_service(health_service)
        .add_service(reflection().build_v1().context(Reason::Internal, unbuilt)?)
        // For clients that know the older one alone.
        .add_service(reflection().build_v1alpha().context(Reason::Internal, unbuilt)?))
}

/// Runs `call` to its end even when the client hangs up, which drops the
/// handler's future at any await.
async fn to_the_end<T: Send + 'static>(
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T, Status> {
    let ended = tokio::spawn(call).await.unwrap_or_else(|cause| {
        Err(Error::new(Reason::Internal, "the call ended unexpectedly").because(cause))
    });
    ended.map_err(status::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_that_hangs_up_cancels_nothing() {
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let (ended, end) = tokio::sync::oneshot::channel::<()>();
        let call = to_the_end(async move {
            let _ = wait.await;
            let _ = ended.send(());
            Ok(())
        });
        // What a handler's future sees when the stream is reset.
        tokio::time::timeout(Duration::from_millis(20), call).await.unwrap_err();
        go.send(()).unwrap();
        end.await.unwrap();
    }

    #[tokio::test]
    async fn a_call_that_panics_is_an_internal_error() {
        let status = to_the_end::<()>(async { panic!("a defect") }).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Internal);
    }
}
