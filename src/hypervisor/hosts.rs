//! All that runs instances on this host, as one: each instance is asked of
//! what runs it.

use std::sync::Arc;

use super::{COMMAND, LibvirtHost, QemuHost, agent::Agent, iscsi, within};
use crate::{
    error::{Error, Reason, Result},
    model::{
        host::Feature,
        instance::{Instance, Machine, PowerState},
        iscsi::Iscsi,
        live::Undo,
        upload::ResumeSource,
    },
    port::{BoxFuture, Guests, Hypervisor, LiveSnapshot, Prepared, Secret, SnapshotOrder},
    recorder::Recorder,
};

/// The hypervisors of this host.
#[derive(Debug)]
pub struct Hosts {
    /// Plain QEMU, which is everywhere.
    pub qemu: QemuHost,
    /// libvirt, where it is.
    pub libvirt: LibvirtHost,
}

impl Hosts {
    fn of(&self, machine: &Machine) -> &dyn Hypervisor {
        match machine {
            Machine::Qemu(_) => &self.qemu,
            Machine::Domain(_) => &self.libvirt,
        }
    }
}

impl Hosts {
    /// The agent of a guest. One of a QEMU has answered.
    async fn agent(&self, machine: &Machine, recorder: Arc<Recorder>) -> Result<Agent> {
        let sockets = match machine {
            Machine::Qemu(sockets) => sockets,
            Machine::Domain(_) => return self.libvirt.agent(machine, recorder),
        };
        let Some(socket) = &sockets.agent_socket else {
            let error = Error::new(Reason::GuestAgentUnavailable, "nothing can ask the guest");
            return Err(error
                .because("the instance's file in `instances.d` names no `agent_socket`")
                .advice("start qemu-guest-agent in the guest, and name its socket there"));
        };
        Agent::connect(socket, recorder, within(COMMAND)).await
    }
}

impl Hypervisor for Hosts {
    fn instances(&self) -> BoxFuture<'_, Vec<Instance>> {
        self.libvirt.instances()
    }

    fn features(&self) -> BoxFuture<'_, Vec<Feature>> {
        self.libvirt.features()
    }

    fn power_state<'a>(&'a self, instance: &'a Instance) -> BoxFuture<'a, PowerState> {
        self.of(&instance.machine).power_state(instance)
    }

    fn prepare<'a>(
        &'a self,
        instance: &'a Instance,
        order: SnapshotOrder,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn Prepared>>> {
        self.of(&instance.machine).prepare(instance, order, recorder)
    }

    fn regain<'a>(
        &'a self,
        undo: &'a Undo,
        source: &'a ResumeSource,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn LiveSnapshot>>> {
        self.of(&undo.machine).regain(undo, source, recorder)
    }

    fn undo<'a>(&'a self, undo: &'a Undo, recorder: Arc<Recorder>) -> BoxFuture<'a, Result<()>> {
        self.of(&undo.machine).undo(undo, recorder)
    }
}

impl Guests for Hosts {
    fn iscsi<'a>(&'a self, instance: &'a Instance) -> BoxFuture<'a, Result<Iscsi>> {
        Box::pin(async move {
            let agent = self.agent(&instance.machine, Arc::default()).await?;
            iscsi::survey(&agent, &instance.name).await
        })
    }

    fn keep_iscsi<'a>(
        &'a self,
        instance: &'a Instance,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Option<Secret>>> {
        Box::pin(async move {
            let agent = self.agent(&instance.machine, recorder).await?;
            iscsi::keep(&agent, &instance.name).await
        })
    }

    fn disconnect_iscsi<'a>(
        &'a self,
        machine: &'a Machine,
        kept: &'a Secret,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(
            async move { iscsi::disconnect(&self.agent(machine, recorder).await?, kept).await },
        )
    }

    fn reconnect_iscsi<'a>(
        &'a self,
        machine: &'a Machine,
        kept: &'a Secret,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { iscsi::reconnect(&self.agent(machine, recorder).await?, kept).await })
    }
}
