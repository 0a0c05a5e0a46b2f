//! A twin of imaged: serves the API over a real socket with canned answers.

use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    thread,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
};
use tokio_stream::{Stream, StreamExt, wrappers::UnixListenerStream};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::Connected},
};

use super::samples;
use crate::pb::{
    self, host_service_server::*, image_service_server::*, instance_service_server::*,
    store_service_server::*, work_request_service_server::*,
};

type Answer<T> = Result<Response<T>, Status>;

/// What the twin does next in a stream of work requests.
pub enum Step {
    Send(Box<pb::WorkRequest>),
    /// The connection breaks.
    Cut,
    /// Nothing more comes, and no end either.
    Hang,
}

impl Step {
    pub fn send(work: pb::WorkRequest) -> Self {
        Self::Send(Box::new(work))
    }
}

/// What the twin was asked and will answer.
#[derive(Default)]
pub struct Script {
    pub creates: Mutex<Vec<pb::CreateImageRequest>>,
    pub lists: Mutex<Vec<pb::ListImagesRequest>>,
    pub deletes: Mutex<Vec<String>>,
    pub exports: Mutex<Vec<pb::ExportImageRequest>>,
    /// What an image's object is read as.
    pub object: Mutex<Vec<Result<pb::ReadImageObjectResponse, Status>>>,
    /// Connections that break instead of carrying the answer to a create.
    pub cut_creates: AtomicU32,
    pub refusal: Mutex<Option<Status>>,
    /// One for each watch; after the last, streams end at once.
    pub watches: Mutex<VecDeque<Vec<Step>>>,
    pub watched: AtomicU32,
    pub cut: AtomicU32,
}

impl Script {
    fn refuse(&self) -> Result<(), Status> {
        self.refusal.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

/// A running twin; it ends with the process.
pub struct Twin {
    pub script: Arc<Script>,
    dir: tempfile::TempDir,
}

impl Twin {
    pub fn start(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let twin = Self { script: Arc::new(script), dir };
        let listener = std::os::unix::net::UnixListener::bind(twin.socket()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let script = Arc::clone(&twin.script);
        thread::spawn(move || serve(listener, script));
        twin
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("imaged.sock")
    }
}

fn serve(listener: std::os::unix::net::UnixListener, script: Arc<Script>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async move {
        let listener = UnixListener::from_std(listener).unwrap();
        let cut = Arc::clone(&script);
        let incoming = UnixListenerStream::new(listener)
            .map(move |stream| stream.map(|stream| Wire { stream, script: Arc::clone(&cut) }));
        let service = Service(script);
        Server::builder()
            .add_service(ImageServiceServer::new(service.clone()))
            .add_service(InstanceServiceServer::new(service.clone()))
            .add_service(WorkRequestServiceServer::new(service.clone()))
            .add_service(HostServiceServer::new(service.clone()))
            .add_service(StoreServiceServer::new(service))
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    });
}

#[derive(Clone)]
struct Service(Arc<Script>);

#[tonic::async_trait]
impl ImageService for Service {
    async fn create_image(
        &self,
        request: Request<pb::CreateImageRequest>,
    ) -> Answer<pb::CreateImageResponse> {
        self.0.refuse()?;
        self.0.creates.lock().unwrap().push(request.into_inner());
        let left = self.0.cut_creates.load(Ordering::SeqCst);
        if left > 0 {
            self.0.cut_creates.store(left - 1, Ordering::SeqCst);
            self.0.cut.store(1, Ordering::SeqCst);
        }
        Ok(Response::new(pb::CreateImageResponse {
            image: Some(samples::provisioning()),
            work_request: Some(samples::accepted()),
        }))
    }

    async fn get_image(&self, _: Request<pb::GetImageRequest>) -> Answer<pb::Image> {
        self.0.refuse()?;
        Ok(Response::new(samples::image()))
    }

    /// Two pages of one image each.
    async fn list_images(
        &self,
        request: Request<pb::ListImagesRequest>,
    ) -> Answer<pb::ListImagesResponse> {
        let request = request.into_inner();
        let (image, next_page) = match request.page.as_str() {
            "" => (samples::image(), "second".to_owned()),
            _ => (samples::provisioning(), String::new()),
        };
        self.0.lists.lock().unwrap().push(request);
        Ok(Response::new(pb::ListImagesResponse {
            items: vec![image],
            next_page,
            ..Default::default()
        }))
    }

    async fn delete_image(
        &self,
        request: Request<pb::DeleteImageRequest>,
    ) -> Answer<pb::DeleteImageResponse> {
        self.0.deletes.lock().unwrap().push(request.into_inner().image_id);
        Ok(Response::new(pb::DeleteImageResponse::default()))
    }

    async fn rehearse_image(
        &self,
        _: Request<pb::RehearseImageRequest>,
    ) -> Answer<pb::WorkRequest> {
        Ok(Response::new(samples::accepted()))
    }

    async fn verify_image(&self, _: Request<pb::VerifyImageRequest>) -> Answer<pb::WorkRequest> {
        Ok(Response::new(samples::accepted()))
    }

    async fn export_image(
        &self,
        request: Request<pb::ExportImageRequest>,
    ) -> Answer<pb::WorkRequest> {
        self.0.refuse()?;
        self.0.exports.lock().unwrap().push(request.into_inner());
        Ok(Response::new(samples::accepted()))
    }

    type ReadImageObjectStream =
        Pin<Box<dyn Stream<Item = Result<pb::ReadImageObjectResponse, Status>> + Send>>;

    async fn read_image_object(
        &self,
        _: Request<pb::ReadImageObjectRequest>,
    ) -> Answer<Self::ReadImageObjectStream> {
        self.0.refuse()?;
        let messages = self.0.object.lock().unwrap().clone();
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }
}

#[tonic::async_trait]
impl InstanceService for Service {
    async fn list_instances(
        &self,
        request: Request<pb::ListInstancesRequest>,
    ) -> Answer<pb::ListInstancesResponse> {
        let all = request.into_inner().compartment_id.is_empty();
        let items = if all { vec![samples::instance()] } else { Vec::new() };
        Ok(Response::new(pb::ListInstancesResponse { items }))
    }

    async fn get_instance(&self, _: Request<pb::GetInstanceRequest>) -> Answer<pb::Instance> {
        self.0.refuse()?;
        Ok(Response::new(samples::instance()))
    }

    async fn list_iscsi_attachments(
        &self,
        _: Request<pb::ListIscsiAttachmentsRequest>,
    ) -> Answer<pb::ListIscsiAttachmentsResponse> {
        self.0.refuse()?;
        Ok(Response::new(samples::iscsi()))
    }

    async fn disconnect_iscsi(
        &self,
        _: Request<pb::DisconnectIscsiRequest>,
    ) -> Answer<pb::WorkRequest> {
        self.0.refuse()?;
        Ok(Response::new(samples::reading()))
    }

    async fn reconnect_iscsi(
        &self,
        _: Request<pb::ReconnectIscsiRequest>,
    ) -> Answer<pb::WorkRequest> {
        self.0.refuse()?;
        Ok(Response::new(samples::reading()))
    }
}

#[tonic::async_trait]
impl WorkRequestService for Service {
    async fn get_work_request(
        &self,
        _: Request<pb::GetWorkRequestRequest>,
    ) -> Answer<pb::WorkRequest> {
        Ok(Response::new(samples::reading()))
    }

    async fn get_work_request_trace(
        &self,
        _: Request<pb::GetWorkRequestTraceRequest>,
    ) -> Answer<pb::WorkRequestTrace> {
        Ok(Response::new(pb::WorkRequestTrace::default()))
    }

    async fn list_work_requests(
        &self,
        _: Request<pb::ListWorkRequestsRequest>,
    ) -> Answer<pb::ListWorkRequestsResponse> {
        let items = vec![samples::reading(), samples::failed()];
        Ok(Response::new(pb::ListWorkRequestsResponse { items, next_page: String::new() }))
    }

    type WatchWorkRequestStream =
        Pin<Box<dyn Stream<Item = Result<pb::WorkRequest, Status>> + Send>>;

    async fn watch_work_request(
        &self,
        _: Request<pb::WatchWorkRequestRequest>,
    ) -> Answer<Self::WatchWorkRequestStream> {
        self.0.refuse()?;
        self.0.watched.fetch_add(1, Ordering::SeqCst);
        let steps = self.0.watches.lock().unwrap().pop_front().unwrap_or_default();
        let script = Arc::clone(&self.0);
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            for step in steps {
                match step {
                    Step::Send(work) => sender.send(Ok(*work)).await.unwrap_or(()),
                    Step::Cut => {
                        // What was sent before is to arrive.
                        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                        script.cut.store(1, Ordering::SeqCst);
                        let _ = sender.send(Ok(samples::accepted())).await;
                    }
                    Step::Hang => std::future::pending().await,
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }

    async fn update_work_request(
        &self,
        _: Request<pb::UpdateWorkRequestRequest>,
    ) -> Answer<pb::WorkRequest> {
        Ok(Response::new(samples::reading()))
    }

    async fn cancel_work_request(
        &self,
        _: Request<pb::CancelWorkRequestRequest>,
    ) -> Answer<pb::WorkRequest> {
        let status = pb::work_request::Status::Canceling.into();
        Ok(Response::new(pb::WorkRequest { status, ..samples::reading() }))
    }
}

#[tonic::async_trait]
impl HostService for Service {
    async fn update_host(&self, _: Request<pb::UpdateHostRequest>) -> Answer<pb::Host> {
        self.get_host(Request::new(pb::GetHostRequest {})).await
    }

    async fn get_host(&self, _: Request<pb::GetHostRequest>) -> Answer<pb::Host> {
        Ok(Response::new(samples::host()))
    }

    /// One waits, and is done at the next look.
    async fn drain_host(&self, _: Request<pb::DrainHostRequest>) -> Answer<pb::Host> {
        let host = pb::Host { drained: true, work_requests_waiting: 1, ..samples::host() };
        Ok(Response::new(host))
    }

    async fn resume_host(&self, _: Request<pb::ResumeHostRequest>) -> Answer<pb::Host> {
        self.get_host(Request::new(pb::GetHostRequest {})).await
    }
}

#[tonic::async_trait]
impl StoreService for Service {
    async fn list_stores(
        &self,
        _: Request<pb::ListStoresRequest>,
    ) -> Answer<pb::ListStoresResponse> {
        Ok(Response::new(pb::ListStoresResponse { items: samples::host().stores }))
    }

    async fn check_store(
        &self,
        request: Request<pb::CheckStoreRequest>,
    ) -> Answer<pb::CheckStoreResponse> {
        let step = |name: &str, problem: &str| pb::StoreStep {
            name: name.into(),
            problem: problem.into(),
        };
        let mut steps = vec![step("read", "")];
        if request.into_inner().name == "bad" {
            steps.push(step(
                "list",
                "it cannot list\n  0: 403 AccessDenied\n  help: give it rights",
            ));
        }
        Ok(Response::new(pb::CheckStoreResponse { steps }))
    }

    async fn collect_garbage(
        &self,
        _: Request<pb::CollectGarbageRequest>,
    ) -> Answer<pb::CollectGarbageResponse> {
        Ok(Response::new(pb::CollectGarbageResponse { uploads: 1 }))
    }
}

/// A connection that breaks at the next write when the script says so.
struct Wire {
    stream: UnixStream,
    script: Arc<Script>,
}

impl Connected for Wire {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.script.cut.swap(0, Ordering::SeqCst) == 1 {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
