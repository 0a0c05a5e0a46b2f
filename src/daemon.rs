//! The daemon: claims its directories, wires the parts, serves, drains.
//!
//! ```text
//! claim ─► journal ─► parts ─► recover ─► serve ── stop ─► undo ─► close
//!   │ state lock, socket           │         │ READY=1        │ STOPPING=1
//!   └ connections wait from here ──┘─────────┘                └ socket gone
//! ```
//! Nothing is recovered before the state directory is ours alone, and nobody
//! is answered before everything is recovered.

mod adapters;
mod claim;
mod clock;
pub mod logging;
mod notify;

use std::{future::Future, num::NonZeroUsize, path::Path, sync::Arc, time::Duration};

use futures_util::future::{BoxFuture, join_all};
use tokio::{net::UnixListener, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use self::claim::Claim;
pub use self::{adapters::wire, clock::SystemClock};
use crate::{
    config::{
        Config,
        instances::{self, Instances},
    },
    error::{Context, Error, Reason, Result},
    journal::Journal,
    model::{host::Feature, instance::Instance, work_request::Rates},
    port::{Clock, Guests, Hypervisor, Inspector, ObjectStore, Outlets, Vault, Volumes},
    rpc::{self, HostFacts, StoreState},
    steps,
    work::{Burden, Ports, Settings, Work},
};

/// How long clients may take to read the end of what they watch.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// How long `host get` waits for a store.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// What the daemon is made of, besides its own state.
#[derive(Debug)]
pub struct Parts {
    /// Time and chance.
    pub clock: Arc<dyn Clock>,
    /// What runs the instances.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Their guests.
    pub guests: Arc<dyn Guests>,
    /// The volumes of this host.
    pub volumes: Arc<dyn Volumes>,
    /// Where images are kept; the configuration's default store among them.
    pub stores: Vec<Arc<dyn ObjectStore>>,
    /// What finds objects by URLs.
    pub outlets: Arc<dyn Outlets>,
    /// What looks into images.
    pub inspector: Arc<dyn Inspector>,
    /// What keeps the iSCSI of guests.
    pub vault: Arc<dyn Vault>,
    /// What the parts found on this host.
    pub features: Vec<Feature>,
    /// What a host may well be without: nobody is warned of that.
    pub optional: Vec<Feature>,
}

/// Runs the daemon until `stop`. `wire` makes the parts once the state
/// directory is ours; its arguments are the configuration and the usable
/// instances.
///
/// After `stop` no connection is accepted, running work is cancelled and
/// undone, and then the socket is removed. What began before `stop`, also the
/// recovery, is never cut short: cancelling twice changes nothing. Dropping
/// the future leaves work as a crash would.
///
/// # Errors
///
/// `DAEMON_RUNNING`, `INVALID_CONFIGURATION`, `JOURNAL_FAILED`, and what
/// `wire` and the recovery say.
pub async fn run<W, F>(config: Config, wire: W, stop: CancellationToken) -> Result<()>
where
    W: FnOnce(Config, Vec<Instance>) -> F,
    F: Future<Output = Result<Parts>>,
{
    notify::status("starting");
    let wanted = config.clone();
    let (claim, journal, found) = blocking(move || prepare(&wanted)).await?;
    let (host, instances, mut features) = found;
    let listener = UnixListener::from_std(claim.listener()?)
        .context(Reason::Internal, || "the socket cannot be served")?;

    let parts = wire(config.clone(), instances.clone()).await?;
    features.splice(0..0, parts.features);
    for missing in features.iter().filter(|feature| !feature.available) {
        tracing::warn!("{}: {}", missing.name, missing.details);
    }
    features.extend(parts.optional);
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let encode_threads = config.encode_threads(cores);
    let facts = HostFacts {
        hostname: host.name,
        kernel_release: host.kernel,
        architecture: std::env::consts::ARCH.into(),
        features,
        encode_threads: encode_threads.get(),
        default_store: config.default_store.clone(),
        stores: store_probe(parts.stores.clone()),
    };
    let ports = Ports {
        clock: parts.clock,
        hypervisor: parts.hypervisor,
        guests: parts.guests,
        volumes: parts.volumes,
        stores: parts.stores,
        outlets: parts.outlets,
        inspector: parts.inspector,
        journal: Arc::new(journal),
        vault: parts.vault,
    };
    let settings = Settings {
        instances,
        default_store: config.default_store,
        default_compartment: config.default_compartment,
        encode_threads,
        max_volume: config.max_volume_size,
        warn_volume: config.warn_volume_size,
        max_captures: config.max_captures,
        max_queued: config.max_queued,
        scratch_size: config.scratch_size,
        burden: Burden { read_rate: config.read_rate, latency_percent: config.latency_percent },
        rates: Rates { read: config.max_read_rate, upload: config.max_upload_rate },
        progress_timeout: config.progress_timeout,
        architecture: std::env::consts::ARCH.into(),
    };
    notify::status("recovering");
    steps::recovering(true);
    let work = Work::start(ports, settings).await?;
    steps::recovering(false);

    let closing = CancellationToken::new();
    let access = claim.access();
    let server = tokio::spawn(rpc::serve(listener, work.clone(), facts, access, closing.clone()));
    notify::ready();
    tracing::info!("imaged {} serves {}", env!("CARGO_PKG_VERSION"), config.socket.display());
    let ended = drain(server, &work, &stop, &closing).await;
    drop(claim);
    ended
}

/// Checks what [`run`] would be given, without touching anything: `config`
/// has been read already, so the instances' files remain. Blocks.
///
/// # Errors
///
/// `INVALID_CONFIGURATION`, naming every file that cannot be used.
pub fn check(config: &Config) -> Result<()> {
    let host = uname()?.name;
    let found = instances::load(&config.instances_dir, &host, &config.default_compartment)?;
    let refused = found.refused.len();
    let problems: Vec<_> = found.refused.iter().map(|(_, error)| error.report()).collect();
    match refused {
        0 => Ok(()),
        1 => Err(Error::new(Reason::InvalidConfiguration, problems.concat())),
        _ => Err(Error::new(
            Reason::InvalidConfiguration,
            format!("{refused} instances cannot be used\n{}", problems.join("\n")),
        )),
    }
}

/// Waits for `stop`, or for the server's unexpected end, and undoes the work.
async fn drain(
    mut server: JoinHandle<Result<()>>,
    work: &Work,
    stop: &CancellationToken,
    closing: &CancellationToken,
) -> Result<()> {
    let ended = tokio::select! {
        () = stop.cancelled() => None,
        ended = &mut server => Some(ended),
    };
    notify::stopping();
    tracing::info!("imaged stops; what runs is undone first");
    closing.cancel();
    work.shutdown().await;
    let ended = match ended {
        Some(ended) => ended,
        None => match timeout(CLOSE_PATIENCE, &mut server).await {
            Ok(ended) => ended,
            // A client that keeps its connection does not keep the daemon.
            Err(_) => {
                server.abort();
                Ok(Ok(()))
            }
        },
    };
    ended.context(Reason::Internal, || "the service ended unexpectedly")?
}

/// What the kernel calls this host.
struct Host {
    name: String,
    kernel: String,
}

fn uname() -> Result<Host> {
    let uname = nix::sys::utsname::uname()
        .context(Reason::Internal, || "the kernel does not tell the host's name")?;
    Ok(Host {
        name: uname.nodename().to_string_lossy().into_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
    })
}

type Found = (Host, Vec<Instance>, Vec<Feature>);

/// Everything that blocks and comes before the parts.
fn prepare(config: &Config) -> Result<(Claim, Journal, Found)> {
    let claim = Claim::new(config)?;
    let journal = Journal::open(&config.state_dir.join("journal.redb"))?;
    let host = uname()?;
    let (instances, mut features) = load_instances(config, &host.name);
    features.extend(claim.problem().map(|problem| Feature {
        name: "socket_group".into(),
        available: false,
        details: in_one_line(problem),
    }));
    Ok((claim, journal, (host, instances, features)))
}

/// The instances, and what is wrong with the others: the daemon serves those
/// that it understands.
fn load_instances(config: &Config, host: &str) -> (Vec<Instance>, Vec<Feature>) {
    let missing =
        |name: String, error: Error| Feature { name, available: false, details: error.report() };
    let loaded = instances::load(&config.instances_dir, host, &config.default_compartment);
    let Instances { usable, refused } = match loaded {
        Ok(instances) => instances,
        Err(error) => return (Vec::new(), vec![missing("instances".into(), error)]),
    };
    let mut features = vec![Feature {
        name: "instances".into(),
        available: true,
        details: count(usable.len(), &config.instances_dir),
    }];
    let refused =
        refused.into_iter().map(|(name, error)| missing(format!("instance {name}"), error));
    features.extend(refused);
    (usable, features)
}

/// An error as a cell of a table.
fn in_one_line(error: &Error) -> String {
    let mut line = error.to_string();
    for cause in error.causes() {
        line = format!("{line}: {cause}");
    }
    match error.advice_text() {
        Some(advice) => format!("{line}; {advice}"),
        None => line,
    }
}

fn count(number: usize, dir: &Path) -> String {
    let noun = if number == 1 { "instance" } else { "instances" };
    format!("{number} {noun} in {}", dir.display())
}

type StoreProbe = Arc<dyn Fn() -> BoxFuture<'static, Vec<StoreState>> + Send + Sync>;

fn store_probe(stores: Vec<Arc<dyn ObjectStore>>) -> StoreProbe {
    Arc::new(move || Box::pin(join_all(stores.clone().into_iter().map(store_state))))
}

async fn store_state(store: Arc<dyn ObjectStore>) -> StoreState {
    let space = timeout(STORE_PATIENCE, store.space()).await.unwrap_or_else(|_| {
        let message = format!(
            "the store {:?} did not answer within {} s",
            store.name(),
            STORE_PATIENCE.as_secs()
        );
        Err(Error::new(Reason::StoreUnavailable, message))
    });
    StoreState {
        name: store.name().to_owned(),
        kind: store.kind(),
        location: store.location(),
        space,
        traffic: store.traffic(),
    }
}

async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(job)
        .await
        .context(Reason::Internal, || "the daemon could not be prepared")?
}
