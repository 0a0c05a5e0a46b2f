//! The domains of libvirt's `qemu:///system`.
//!
//! ```text
//! virsh     one process for each thing that is asked, with a deadline
//! domain    what libvirt's XML says, and the order for a backup (pure)
//! prepare   whether a snapshot can be taken
//! snapshot  takes it by a backup in pull mode, holds it, gives it back
//! stop      shuts a domain down for it
//! undo      takes it back from wherever it stands; what a guard does
//! ```
//! A backup of libvirt's is QEMU's older `blockdev-backup`: a scratch that
//! has no room stops the guest, not the backup. So the image is given
//! up at four fifths of the room, by imaged, and by its guard when it is dead.
//!
//! The backup is known by its export's name, which nobody else has chosen;
//! nothing is ever done to another one. No checkpoint is made.

mod domain;
mod prepare;
mod snapshot;
mod stop;
mod undo;
mod virsh;

use std::{path::PathBuf, sync::Arc, time::Duration};

pub(super) use virsh::{Failed, Line};

use self::{
    domain::{Described, Odd},
    virsh::{State, Virsh},
};
use super::{COMMAND, agent::Agent, guard::Guards, within};
use crate::{
    error::{Context, Error, Reason, Result},
    model::{
        CompartmentId,
        host::Feature,
        instance::{Instance, Machine, PowerState},
        live::{Backup, OfHost, Run, SnapshotUndo, Undo},
        upload::ResumeSource,
    },
    port::{BoxFuture, Hypervisor, LiveSnapshot, Prepared, SnapshotOrder},
    recorder::Recorder,
};

/// For a caller that waits for a list, whatever libvirtd does.
const PATIENCE: Duration = Duration::from_secs(3);

/// Domains that are described by one virsh: its line has a bound.
const AT_ONCE: usize = 500;

/// In a snapshot's directory: what libvirt is told, and what it makes.
const BACKUP_FILE: &str = "backup.xml";
const SCRATCH_FILE: &str = "scratch.qcow2";
const SOCKET_FILE: &str = "nbd.sock";

/// The domains of this host.
#[derive(Debug)]
pub struct LibvirtHost {
    /// None where virsh is not installed.
    virsh: Option<Virsh>,
    uri: String,
    host: String,
    compartment: CompartmentId,
    scratch_dir: PathBuf,
    guards: Arc<Guards>,
}

impl LibvirtHost {
    /// The domains of the libvirtd at `uri`, on the host called `host`;
    /// `compartment` is that of those that name none. What running ones
    /// overwrite while they are imaged goes to `scratch_dir`.
    #[must_use]
    pub fn new(
        uri: String,
        host: String,
        compartment: CompartmentId,
        scratch_dir: PathBuf,
        guards: Arc<Guards>,
    ) -> Self {
        let virsh = Virsh::find(&uri).ok();
        Self { virsh, uri, host, compartment, scratch_dir, guards }
    }

    fn virsh(&self) -> Result<Virsh> {
        match &self.virsh {
            Some(virsh) => Ok(virsh.clone()),
            None => Virsh::find(&self.uri),
        }
    }

    fn line(&self, machine: &Machine, recorder: Arc<Recorder>) -> Result<Line> {
        match machine {
            Machine::Domain(domain) => {
                Ok(Line { virsh: self.virsh()?, domain: domain.domain.clone(), recorder })
            }
            Machine::Qemu(_) => Err(Error::new(Reason::Internal, "it is no domain of libvirt's")),
        }
    }

    /// The agent of a domain's guest.
    ///
    /// # Errors
    ///
    /// `HYPERVISOR_UNAVAILABLE`.
    pub(super) fn agent(&self, machine: &Machine, recorder: Arc<Recorder>) -> Result<Agent> {
        Ok(Agent::of_domain(self.line(machine, recorder)?))
    }

    /// Every domain, and those that can be no instance.
    async fn domains(&self) -> Result<Vec<Result<Described, Odd>>> {
        let (virsh, deadline) = (self.virsh()?, within(PATIENCE));
        let all = virsh.ask("list its domains", &["list", "--all", "--uuid"], deadline).await?;
        let all: Vec<_> = all.lines().map(str::trim).filter(|uuid| !uuid.is_empty()).collect();
        let mut found = Vec::new();
        for some in all.chunks(AT_ONCE) {
            // One that is gone by now does not keep virsh from the others.
            let ask: Vec<_> = some.iter().map(|uuid| format!("dumpxml {uuid}")).collect();
            let answers = virsh.ask("describe its domains", &[&ask.join("; ")], deadline).await?;
            found.extend(domain::each(&answers).map(Described::read));
        }
        Ok(found)
    }

    async fn power(&self, instance: &Instance) -> Result<State> {
        let line = self.line(&instance.machine, Arc::new(Recorder::new()))?;
        line.state(within(PATIENCE)).await
    }

    async fn look(&self) -> Vec<Feature> {
        let feature = |name: String, available, details| Feature { name, available, details };
        match self.domains().await {
            Err(error) => vec![feature("libvirt".into(), false, error.report())],
            Ok(found) => {
                let count = found.iter().flatten().count();
                let noun = if count == 1 { "instance" } else { "instances" };
                let details = format!("{count} {noun} at {}", self.uri);
                let odd = found.into_iter().filter_map(Result::err);
                let odd = odd.map(|odd| feature(format!("instance {}", odd.name), false, odd.why));
                std::iter::once(feature("libvirt".into(), true, details)).chain(odd).collect()
            }
        }
    }
}

/// What was done to a domain.
enum Done<'a> {
    Backup(&'a Backup),
    /// Nothing: the host took the snapshot.
    Nothing(&'a Run),
}

impl<'a> Done<'a> {
    fn of(undo: &'a Undo) -> Result<Self> {
        match &undo.snapshot {
            SnapshotUndo::Backup(backup) => Ok(Self::Backup(backup)),
            SnapshotUndo::OfHost(OfHost { run: Some(run), .. }) => Ok(Self::Nothing(run)),
            SnapshotUndo::OfHost(OfHost { run: None, .. }) | SnapshotUndo::Filter(_) => {
                let context = format!("the undo of instance {:?} is not libvirt's", undo.instance);
                Err(Error::new(Reason::Internal, context))
            }
        }
    }

    fn run(&self) -> &'a Run {
        match self {
            Self::Backup(backup) => &backup.run,
            Self::Nothing(run) => run,
        }
    }
}

/// What a guard does when its imaged has died.
///
/// # Errors
///
/// It is to be tried again.
pub(super) async fn stand_by(undo: &Undo, recorder: &Arc<Recorder>) -> Result<()> {
    let done = Done::of(undo)?;
    let Machine::Domain(domain) = &undo.machine else {
        return Err(Error::new(Reason::Internal, "it is no domain of libvirt's"));
    };
    let virsh = Virsh::find(&done.run().uri)?;
    let recorder = Arc::clone(recorder);
    let line = Line { virsh, domain: domain.domain.clone(), recorder };
    match done {
        Done::Backup(backup) => undo::stand_by(&line, undo, backup).await,
        Done::Nothing(run) => undo::let_go(&line, undo, run).await,
    }
}

impl Hypervisor for LibvirtHost {
    fn instances(&self) -> BoxFuture<'_, Vec<Instance>> {
        Box::pin(async move {
            let found = match self.domains().await {
                Ok(found) => found,
                // A host without libvirt has no domains; of another one,
                // `host get` tells.
                Err(error) => {
                    tracing::debug!("{error:?}");
                    return Vec::new();
                }
            };
            let usable = found.into_iter().flatten();
            usable.map(|domain| domain.instance(&self.host, &self.compartment)).collect()
        })
    }

    fn features(&self) -> BoxFuture<'_, Vec<Feature>> {
        Box::pin(self.look())
    }

    fn power_state<'a>(&'a self, instance: &'a Instance) -> BoxFuture<'a, PowerState> {
        Box::pin(async move {
            match self.power(instance).await {
                Ok(State::Running | State::Paused) => PowerState::Running,
                Ok(State::Off | State::Gone) => PowerState::Stopped,
                Err(error) => {
                    let why: Vec<_> =
                        std::iter::once(error.to_string()).chain(error.causes()).collect();
                    PowerState::Unknown(why.join(": "))
                }
            }
        })
    }

    fn prepare<'a>(
        &'a self,
        instance: &'a Instance,
        order: SnapshotOrder,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async move {
            let random = getrandom::u64()
                .context(Reason::Internal, || "the kernel gives no random numbers")?;
            let tag = format!("{:012x}", random >> 16);
            let line = self.line(&instance.machine, recorder)?;
            let guards = Arc::clone(&self.guards);
            prepare::prepare(line, instance, order, &self.scratch_dir, tag, guards).await
        })
    }

    fn regain<'a>(
        &'a self,
        undo: &'a Undo,
        source: &'a ResumeSource,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn LiveSnapshot>>> {
        Box::pin(async move {
            let line = self.line(&undo.machine, recorder)?;
            let guards = Arc::clone(&self.guards);
            match Done::of(undo)? {
                Done::Backup(backup) => snapshot::regain(line, undo, backup, source, guards).await,
                Done::Nothing(_) => Err(snapshot::gone(&undo.instance)),
            }
        })
    }

    fn undo<'a>(&'a self, undo: &'a Undo, recorder: Arc<Recorder>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let line = self.line(&undo.machine, recorder)?;
            match Done::of(undo)? {
                Done::Backup(backup) => undo::undo(&line, undo, backup).await?,
                Done::Nothing(run) => undo::let_go(&line, undo, run).await?,
            }
            self.guards.lift(undo).await;
            Ok(())
        })
    }
}
