//! The real parts of a host.

use std::{fs, io, path::PathBuf, sync::Arc};

use super::{Parts, clock::SystemClock};
use crate::{
    block::{self, HostVolumes, Lvm, ReaderSettings},
    config::{Config, StoreConfig},
    error::{Context, Reason, Result},
    hypervisor::{Hosts, LibvirtHost, QemuHost},
    model::{host::Feature, instance::Instance},
    port::{BoxFuture, Clock, ObjectStore},
    store::{
        Bucket, BucketStore, Counters, Http, LazyStore, Metered, OciBucket, ParBucket, ParOutlets,
        Place, S3Bucket,
    },
    vault::SystemdVault,
    worker::{Attempt, Workers},
};

/// Names this host for ever, other than its name (machine-id(5)).
const MACHINE_ID: &str = "/etc/machine-id";

/// Makes the parts of this host. Boot volumes of `instances` may be read
/// wherever they are. Stores are opened when they are first used, which the
/// recovery does: one that is away must not keep the others, and what is to
/// be undone, waiting.
///
/// # Errors
///
/// `INTERNAL`: this host cannot be told from others.
#[allow(clippy::unused_async, reason = "as every way to make the parts")]
pub async fn wire(config: Config, instances: Vec<Instance>) -> Result<Parts> {
    let (engine, io_uring) = engine();
    let mut allowed = config.boot_volume_dirs;
    allowed.extend(instances.into_iter().map(|instance| instance.boot_volume));
    // Buffers are the readers' memory, which all captures share.
    let captures = u16::try_from(config.max_captures.get()).unwrap_or(u16::MAX);
    let reader = ReaderSettings { engine, depth: (config.read_depth.get() / captures).max(1) };
    let host_id = host_id()?;
    let guards = Arc::default();
    let hosts = Arc::new(Hosts {
        qemu: QemuHost::new(config.scratch_dir.clone(), Arc::clone(&guards)),
        libvirt: LibvirtHost::new(
            config.libvirt_uri,
            super::uname()?.name,
            config.default_compartment,
            config.scratch_dir,
            guards,
        ),
    });
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new()?);
    let owner = Owner { state_dir: config.state_dir, host_id };
    let vault = SystemdVault::new(owner.state_dir.join("sealed"));
    let sealing = vault.feature().await;
    let outlets = Arc::new(ParOutlets::new(owner.name(), Arc::new(vault)));
    // Each sweeps what it does not know.
    let vault = Arc::new(SystemdVault::new(owner.state_dir.join("sealed-iscsi")));
    let stores = config.stores.into_iter().map(|(name, store)| owner.store(name, store, &clock));
    let workers = Workers::of_this_program();
    let (lvm, thin_snapshots) = lvm(owner.name()).await;
    let confinement = confinement(workers.clone()).await?;
    Ok(Parts {
        clock: Arc::clone(&clock),
        hypervisor: Arc::clone(&hosts) as _,
        guests: hosts,
        volumes: Arc::new(
            HostVolumes::new(allowed, reader).restoring_to(config.restore_dirs).snapshotting(lvm),
        ),
        stores: stores.collect(),
        outlets,
        inspector: Arc::new(workers),
        vault,
        features: vec![io_uring, confinement],
        optional: vec![thin_snapshots, sealing],
    })
}

/// LVM, where it is there and this process may use it.
async fn lvm(owner: String) -> (Option<Lvm>, Feature) {
    let found = tokio::task::spawn_blocking(move || Lvm::find(&owner)).await;
    let found = found.unwrap_or_else(|panic| Err(panic.to_string()));
    let (available, details) = match &found {
        Ok(_) => (true, "thin logical volumes are snapshotted".into()),
        Err(why) => {
            (false, format!("{why}; logical volumes are imaged without snapshots of the host"))
        }
    };
    (found.ok(), Feature { name: "lvm".into(), available, details })
}

/// Whose uploads and snapshots are this daemon's.
struct Owner {
    state_dir: PathBuf,
    host_id: String,
}

impl Owner {
    /// A name for this daemon among those of this host and of others: what is
    /// in a bucket has no lock that would tell a living daemon from a dead one.
    fn name(&self) -> String {
        let words = format!("{} {}", self.host_id, self.state_dir.display());
        blake3::hash(words.as_bytes()).to_hex()[..32].to_owned()
    }

    /// The store called `name`, not opened yet.
    fn store(
        &self,
        name: String,
        store: StoreConfig,
        clock: &Arc<dyn Clock>,
    ) -> Arc<dyn ObjectStore> {
        let counters = Arc::new(Counters::default());
        let (kind, location, remote, make): (_, _, _, Box<Make>) = match store {
            StoreConfig::Directory { path, min_free } => {
                let host_id = self.host_id.clone();
                let store = LazyStore::directory(name, path, min_free, host_id);
                return Arc::new(Metered::new(store, counters));
            }
            StoreConfig::S3 { region, endpoint, bucket, remote } => {
                let (location, clock) = (format!("{endpoint}/{bucket}"), Arc::clone(clock));
                let ca_file = remote.ca_file.clone();
                let make = move |place: &Place| {
                    let http = Http::new(&endpoint, ca_file.as_deref())?;
                    let (region, bucket) = (region.clone(), bucket.clone());
                    let bucket = S3Bucket::new(http, region, bucket, place.s3()?, clock.clone());
                    Ok(Arc::new(bucket) as Arc<dyn Bucket>)
                };
                ("s3", location, remote, Box::new(make))
            }
            StoreConfig::Oci { endpoint, namespace, bucket, remote } => {
                let (location, clock) = (format!("{endpoint}/{bucket}"), Arc::clone(clock));
                let ca_file = remote.ca_file.clone();
                let make = move |place: &Place| {
                    let http = Http::new(&endpoint, ca_file.as_deref())?;
                    let (namespace, bucket) = (namespace.clone(), bucket.clone());
                    let credentials = place.oci()?;
                    let bucket =
                        OciBucket::new(http, namespace, bucket, credentials, clock.clone());
                    Ok(Arc::new(bucket) as Arc<dyn Bucket>)
                };
                ("oci", location, remote, Box::new(make))
            }
            StoreConfig::Par { remote } => {
                // Where it leads is in the secret.
                let location = match &remote.credentials {
                    Some(file) => format!("the pre-authenticated request in {}", file.display()),
                    None => format!("the pre-authenticated request in the credential store.{name}"),
                };
                let ca_file = remote.ca_file.clone();
                let make = move |place: &Place| {
                    let bucket = ParBucket::new(place.par()?, ca_file.as_deref())?;
                    Ok(Arc::new(bucket) as Arc<dyn Bucket>)
                };
                ("par", location, remote, Box::new(make))
            }
        };
        let place =
            Place { store: name.clone(), file: remote.credentials, profile: remote.profile };
        let (called, owner, make) = (name.clone(), self.name(), Arc::new(make));
        let counted = Arc::clone(&counters);
        let open = move || -> BoxFuture<'static, Result<Arc<dyn ObjectStore>>> {
            let (name, owner) = (called.clone(), owner.clone());
            let (place, make, prefix) = (place.clone(), Arc::clone(&make), remote.prefix.clone());
            let counters = Arc::clone(&counted);
            Box::pin(async move {
                let bucket = super::blocking(move || make(&place)).await?;
                let store = BucketStore::open(name, bucket, &prefix, owner, counters).await?;
                Ok(Arc::new(store) as Arc<dyn ObjectStore>)
            })
        };
        let store = LazyStore::new(name, kind, location, Box::new(open));
        Arc::new(Metered::new(store, counters))
    }
}

/// Makes the bucket of a store, with what gives access to it.
type Make = dyn Fn(&Place) -> Result<Arc<dyn Bucket>> + Send + Sync;

/// How volumes are read here: some distributions forbid io_uring.
fn engine() -> (block::Engine, Feature) {
    let feature = |available, details| Feature { name: "io_uring".into(), available, details };
    match block::uring_available() {
        Ok(mode) => (block::Engine::Uring, feature(true, mode.to_string())),
        Err(cause) => {
            let details = format!(
                "volumes are read by threads, which is slower: {cause}; see the sysctl \
                 kernel.io_uring_disabled"
            );
            (block::Engine::Threads, feature(false, details))
        }
    }
}

/// Whether what is foreign can be decoded here: never without confinement.
async fn confinement(workers: Workers) -> Result<Feature> {
    let tried = super::blocking(move || Ok(workers.attempt(Attempt::Nothing))).await?;
    let (available, details) = match tried {
        Ok(tried) => (true, tried.how),
        Err(error) => (false, super::in_one_line(&error)),
    };
    Ok(Feature { name: "confinement".into(), available, details })
}

/// What tells this host from others that share a store: a digest of the
/// machine's id, which itself is not to be shown around, or of its name where
/// it has none.
fn host_id() -> Result<String> {
    let id = match fs::read_to_string(MACHINE_ID) {
        Ok(id) if !id.trim().is_empty() => id,
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            return Err(cause)
                .context(Reason::Internal, || format!("the file {MACHINE_ID} cannot be read"));
        }
        _ => super::uname()?.name,
    };
    let digest = blake3::derive_key("imaged 2026 host id", id.trim().as_bytes());
    Ok(blake3::Hash::from_bytes(digest).to_hex()[..32].to_owned())
}
