//! The daemon on a socket of its own, over parts that hold nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use imaged::{
    config::Config,
    daemon::{Parts, SystemClock, run},
    error::{Error, Reason, Result},
    hypervisor::{Hosts, LibvirtHost, QemuHost},
    model::{
        ByteSize, ImageId,
        host::{Feature, Space},
        image::{Manifest, Record},
        instance::Instance,
        live::LiveSource,
    },
    pb::{
        self, host_service_client::HostServiceClient, image_service_client::ImageServiceClient,
        instance_service_client::InstanceServiceClient,
        work_request_service_client::WorkRequestServiceClient,
    },
    port::{
        BoxFuture, Delete, HeldVolume, NamedBy, ObjectReader, ObjectStore, Offer, Pace, Target,
        Upload, Volumes, Writer,
    },
    store::ParOutlets,
    vault::SystemdVault,
    worker::Workers,
};

use nix::unistd::{Group, getegid};
use tokio::{net::UnixStream, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::{v1, v1alpha};
use tonic_types::StatusExt;

#[derive(Debug)]
struct NoVolumes;

impl Volumes for NoVolumes {
    fn hold<'a>(
        &'a self,
        path: &'a Path,
        _: NamedBy,
    ) -> BoxFuture<'a, Result<Box<dyn HeldVolume>>> {
        let error = Error::new(Reason::VolumeNotFound, format!("no volume {}", path.display()));
        Box::pin(async { Err(error) })
    }
    fn host_snapshot<'a>(
        &'a self,
        path: &'a Path,
        _: NamedBy,
        _: Writer,
        _: Pace,
    ) -> BoxFuture<'a, Result<Offer>> {
        Box::pin(async { Ok(Offer::Nothing(format!("there is no {}", path.display()))) })
    }
    fn live<'a>(
        &'a self,
        source: &'a LiveSource,
        _: Pace,
    ) -> BoxFuture<'a, Result<Box<dyn HeldVolume>>> {
        self.hold(source.volume(), NamedBy::Instance)
    }
    fn target<'a>(&'a self, path: &'a Path, _: ByteSize) -> BoxFuture<'a, Result<Box<dyn Target>>> {
        let error = Error::new(Reason::VolumeNotFound, format!("no volume {}", path.display()));
        Box::pin(async { Err(error) })
    }
}

#[derive(Debug)]
struct EmptyStore {
    name: &'static str,
    space: Option<Space>,
}

impl EmptyStore {
    fn refused<T>(&self) -> BoxFuture<'_, Result<T>> {
        Box::pin(async { Err(Error::new(Reason::StoreUnavailable, "the store keeps nothing")) })
    }
}

impl ObjectStore for EmptyStore {
    fn name(&self) -> &str {
        self.name
    }
    fn kind(&self) -> &'static str {
        "empty"
    }
    fn location(&self) -> String {
        "nowhere".into()
    }
    fn space(&self) -> BoxFuture<'_, Result<Option<Space>>> {
        match self.space {
            Some(space) => Box::pin(async move { Ok(Some(space)) }),
            None => self.refused(),
        }
    }
    fn begin<'a>(&'a self, _: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        self.refused()
    }
    fn sweep<'a>(&'a self, _: &'a [ImageId]) -> BoxFuture<'a, Result<usize>> {
        Box::pin(async { Ok(0) })
    }
    fn list(&self) -> BoxFuture<'_, Result<Vec<(Manifest, Record)>>> {
        Box::pin(async { Ok(Vec::new()) })
    }
    fn get<'a>(&'a self, _: &'a ImageId) -> BoxFuture<'a, Result<Option<(Manifest, Record)>>> {
        Box::pin(async { Ok(None) })
    }
    fn open<'a>(&'a self, _: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn ObjectReader>>> {
        self.refused()
    }
    fn extent_digests<'a>(&'a self, _: &'a ImageId) -> BoxFuture<'a, Result<Vec<u8>>> {
        self.refused()
    }
    fn delete<'a>(&'a self, _: &'a ImageId) -> BoxFuture<'a, Result<Delete>> {
        Box::pin(async { Ok(Delete::AlreadyDeleted) })
    }
}

#[allow(clippy::unused_async, reason = "as the real one")]
async fn empty(_: Config, _: Vec<Instance>) -> Result<Parts> {
    let (uri, nowhere) = ("test:///".to_owned(), std::path::PathBuf::from("/nowhere"));
    let compartment = "test".parse().unwrap();
    let hosts = Hosts {
        qemu: QemuHost::new(nowhere.clone(), Arc::default()),
        libvirt: LibvirtHost::new(uri, "test".into(), compartment, nowhere, Arc::default()),
    };
    let space = Space { free: ByteSize::gib(1), total: ByteSize::gib(4) };
    Ok(Parts {
        clock: Arc::new(SystemClock::new()?),
        hypervisor: Arc::new(QemuHost::new("/nowhere".into(), Arc::default())),
        guests: Arc::new(hosts),
        volumes: Arc::new(NoVolumes),
        stores: vec![
            Arc::new(EmptyStore { name: "local", space: Some(space) }),
            Arc::new(EmptyStore { name: "far", space: None }),
        ],
        outlets: Arc::new(ParOutlets::new(
            "test".into(),
            Arc::new(SystemdVault::new("/nowhere".into())),
        )),
        inspector: Arc::new(Workers::of(env!("CARGO_BIN_EXE_imaged").into())),
        vault: Arc::new(SystemdVault::new("/nowhere".into())),
        features: vec![Feature {
            name: "io_uring".into(),
            available: false,
            details: "the kernel forbids it".into(),
        }],
        optional: Vec::new(),
    })
}

/// A daemon in a directory of its own.
struct Daemon {
    dir: tempfile::TempDir,
    stop: CancellationToken,
    running: JoinHandle<Result<()>>,
}

fn config(dir: &Path) -> Config {
    Config {
        socket: dir.join("imaged.sock"),
        state_dir: dir.join("state"),
        instances_dir: dir.join("instances.d"),
        socket_group: Group::from_gid(getegid()).unwrap().map(|group| group.name),
        default_store: "local".into(),
        ..Config::default()
    }
}

impl Daemon {
    async fn start(prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let stop = CancellationToken::new();
        let running = tokio::spawn(run(config(dir.path()), empty, stop.clone()));
        let daemon = Self { dir, stop, running };
        for _ in 0..500 {
            if daemon.socket().exists() || daemon.running.is_finished() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("imaged.sock")
    }

    async fn client(&self) -> Channel {
        let uri = format!("unix://{}", self.socket().display());
        tonic::transport::Endpoint::try_from(uri).unwrap().connect().await.unwrap()
    }

    async fn stop(self) -> Result<()> {
        self.stop.cancel();
        self.running.await.unwrap()
    }
}

#[tokio::test]
async fn health_and_reflection_answer() {
    let daemon = Daemon::start(|_| {}).await;
    let channel = daemon.client().await;
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "imaged.v1.ImageService", "imaged.v1.HostService"] {
        let request = HealthCheckRequest { service: service.into() };
        assert_eq!(health.check(request).await.unwrap().into_inner().status, 1, "{service}");
    }

    use v1::{
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let ask = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut answers =
        client.server_reflection_info(tokio_stream::once(ask)).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services");
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["Image", "Instance", "WorkRequest", "Host"] {
        assert!(names.contains(&format!("imaged.v1.{name}Service")), "{names:?}");
    }

    let ask = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
                "imaged.v1.ImageService".into(),
            ),
        ),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers =
        client.server_reflection_info(tokio_stream::once(ask)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    assert!(matches!(
        answer,
        Some(v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_))
    ));
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn errors_arrive_with_their_details() {
    let daemon = Daemon::start(|_| {}).await;
    let mut images = ImageServiceClient::new(daemon.client().await);

    let image_id = "ocid1.image.imaged..nowhere".to_owned();
    let status = images.get_image(pb::GetImageRequest { image_id }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let info = status.get_error_details().error_info().unwrap().clone();
    assert_eq!((info.reason.as_str(), info.domain.as_str()), ("IMAGE_NOT_FOUND", "imaged"));

    let status = images.create_image(pb::CreateImageRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = status.get_error_details();
    assert_eq!(details.bad_request().unwrap().field_violations[0].field, "instance_id");

    let source = pb::create_image_request::Source::InstanceId("nobody".into());
    let request = pb::CreateImageRequest { source: Some(source), ..Default::default() };
    let status = images.create_image(request).await.unwrap_err();
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "INSTANCE_NOT_FOUND");

    let mut requests = WorkRequestServiceClient::new(daemon.client().await);
    let work_request_id = "ocid1.workrequest.imaged..nothing".to_owned();
    let request = pb::WatchWorkRequestRequest { work_request_id };
    let status = requests.watch_work_request(request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn the_host_tells_what_is_missing_and_instances_are_found() {
    let daemon = Daemon::start(|dir| {
        let instances = dir.join("instances.d");
        fs::create_dir(&instances).unwrap();
        let good = "id = \"ocid1.instance.x\"\nboot_volume = \"/disks/a\"\nqmp_socket = \"/gone\"";
        fs::write(instances.join("web-1.toml"), good).unwrap();
        fs::write(instances.join("web-3.toml"), "boot_volume = 3").unwrap();
    })
    .await;
    let mut hosts = HostServiceClient::new(daemon.client().await);
    let host = hosts.get_host(pb::GetHostRequest {}).await.unwrap().into_inner();
    let features: Vec<_> = host.features.iter().map(|f| (f.name.as_str(), f.available)).collect();
    assert_eq!(features, [("io_uring", false), ("instances", true), ("instance web-3", false)]);
    assert!(host.features[2].details.contains("web-3.toml, line 1: boot_volume"), "{host:?}");
    assert!(host.stores[0].is_default && !host.stores[1].is_default);
    assert_eq!(host.stores[0].free_bytes, Some(1 << 30));
    assert_eq!((host.stores[1].free_bytes, host.stores[1].problem.is_empty()), (None, false));
    assert!(host.encode_threads >= 1);

    let mut instances = InstanceServiceClient::new(daemon.client().await);
    let listed = instances.list_instances(pb::ListInstancesRequest::default()).await.unwrap();
    assert_eq!(listed.into_inner().items[0].name, "web-1");
    for instance_id in ["web-1", "ocid1.instance.x"] {
        let request = pb::GetInstanceRequest { instance_id: instance_id.into() };
        let found = instances.get_instance(request).await.unwrap().into_inner();
        assert_eq!(found.lifecycle_state(), pb::instance::LifecycleState::Stopped);
    }
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn two_daemons_are_refused_and_the_first_goes_on() {
    let daemon = Daemon::start(|_| {}).await;
    let again = run(config(daemon.dir.path()), empty, CancellationToken::new()).await.unwrap_err();
    assert_eq!(again.reason(), Reason::DaemonRunning);
    let mut hosts = HostServiceClient::new(daemon.client().await);
    hosts.get_host(pb::GetHostRequest {}).await.unwrap();
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn a_dead_daemons_socket_is_taken_over_and_removed_at_the_end() {
    let daemon = Daemon::start(|dir| {
        drop(std::os::unix::net::UnixListener::bind(dir.join("imaged.sock")).unwrap());
    })
    .await;
    // The stale socket is there before the daemon: wait for an answer.
    let mut connected = UnixStream::connect(daemon.socket()).await;
    for _ in 0..500 {
        if connected.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        connected = UnixStream::connect(daemon.socket()).await;
    }
    connected.unwrap();
    let socket = daemon.socket();
    let (dir, stop, running) = (daemon.dir, daemon.stop, daemon.running);
    stop.cancel();
    running.await.unwrap().unwrap();
    assert!(!socket.exists());
    drop(dir);
}

#[tokio::test]
async fn a_client_that_stays_does_not_keep_the_daemon() {
    let daemon = Daemon::start(|_| {}).await;
    let mut health = HealthClient::new(daemon.client().await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, 1);
    let silent = UnixStream::connect(daemon.socket()).await.unwrap();
    timeout(Duration::from_secs(10), daemon.stop()).await.unwrap().unwrap();
    drop(silent);
}

/// A group that nobody gave the socket to.
const OTHER_GROUP: u32 = 54_321;

/// Not a test of its own: what the test below runs as somebody else.
#[tokio::test]
#[ignore = "needs a daemon to call; run by the test below"]
async fn root_calls_as_somebody_else() {
    let Ok(socket) = std::env::var("IMAGED_TEST_SOCKET") else { return };
    let endpoint = tonic::transport::Endpoint::try_from(format!("unix://{socket}")).unwrap();
    let mut health = HealthClient::new(endpoint.connect().await.unwrap());
    let answer = health.check(HealthCheckRequest::default()).await;
    println!("code={:?}", answer.map_or_else(|status| status.code(), |_| Code::Ok));
}

#[tokio::test]
#[ignore = "needs root, to call as somebody else"]
async fn root_strangers_are_refused_and_supplementary_groups_count() {
    let daemon = Daemon::start(|_| {}).await;
    let dir = daemon.dir.path();
    // Let everybody through to the daemon's own check.
    let open = |path: &Path, mode| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    let client = dir.join("client");
    fs::copy(std::env::current_exe().unwrap(), &client).unwrap();
    open(dir, 0o755);
    open(&daemon.socket(), 0o666);
    let code = async |user: &str, groups: &str| {
        let output = tokio::task::spawn_blocking({
            let mut command = std::process::Command::new("setpriv");
            command
                .args(["--reuid", user, "--regid", "65534", groups, "--"])
                .arg(&client)
                .args(["--ignored", "--nocapture", "--exact"])
                .arg("service::root_calls_as_somebody_else")
                .env("IMAGED_TEST_SOCKET", daemon.socket());
            move || command.output().unwrap()
        })
        .await
        .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let code = text.split("code=").nth(1).map(|rest| rest.lines().next().unwrap().to_owned());
        code.unwrap_or(text)
    };
    assert_eq!(code("0", "--clear-groups").await, "Ok");
    assert_eq!(code("65534", "--clear-groups").await, "PermissionDenied");
    let group = getegid().to_string();
    assert_eq!(code("65534", &format!("--groups=4,{group},5")).await, "Ok");
    assert_eq!(code("65534", &format!("--groups=4,{OTHER_GROUP}")).await, "PermissionDenied");
    daemon.stop().await.unwrap();
}
