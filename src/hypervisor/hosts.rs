//! All that runs instances on this host, as one: each instance is asked of
//! what runs it.

use std::sync::Arc;

use super::{LibvirtHost, QemuHost};
use crate::{
    error::Result,
    model::{
        host::Feature,
        instance::{Instance, Machine, PowerState},
        iscsi::Iscsi,
        live::Undo,
        upload::ResumeSource,
    },
    port::{BoxFuture, Hypervisor, LiveSnapshot, Prepared, Secret, SnapshotOrder},
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

    fn iscsi<'a>(&'a self, instance: &'a Instance) -> BoxFuture<'a, Result<Iscsi>> {
        self.of(&instance.machine).iscsi(instance)
    }

    fn keep_iscsi<'a>(
        &'a self,
        instance: &'a Instance,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Option<Secret>>> {
        self.of(&instance.machine).keep_iscsi(instance, recorder)
    }

    fn disconnect_iscsi<'a>(
        &'a self,
        machine: &'a Machine,
        kept: &'a Secret,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<()>> {
        self.of(machine).disconnect_iscsi(machine, kept, recorder)
    }

    fn reconnect_iscsi<'a>(
        &'a self,
        machine: &'a Machine,
        kept: &'a Secret,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<()>> {
        self.of(machine).reconnect_iscsi(machine, kept, recorder)
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
