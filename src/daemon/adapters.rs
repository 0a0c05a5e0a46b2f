//! The real parts of a host.

use std::{fs, io, sync::Arc};

use super::{Parts, clock::SystemClock};
use crate::{
    block::{self, HostVolumes, ReaderSettings},
    config::{Config, StoreConfig, StoreKind},
    error::{Context, Reason, Result},
    hypervisor::QemuHost,
    model::{host::Feature, instance::Instance},
    port::ObjectStore,
    store::LazyStore,
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
    let mut stores: Vec<Arc<dyn ObjectStore>> = Vec::new();
    for (name, StoreConfig { kind: StoreKind::Directory, path, min_free }) in config.stores {
        stores.push(Arc::new(LazyStore::directory(name, path, min_free, host_id.clone())));
    }
    let workers = Workers::of_this_program();
    let confinement = confinement(workers.clone()).await?;
    Ok(Parts {
        clock: Arc::new(SystemClock::new()?),
        hypervisor: Arc::new(QemuHost::new(config.scratch_dir)),
        volumes: Arc::new(HostVolumes::new(allowed, reader)),
        stores,
        inspector: Arc::new(workers),
        features: vec![io_uring, confinement],
    })
}

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
