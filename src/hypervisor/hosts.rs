//! All that runs instances on this host, as one: each instance is asked of
//! what runs it.

use std::sync::Arc;

use super::QemuHost;
use crate::{
    error::{Error, Reason, Result},
    model::{
        instance::{Instance, Machine, PowerState},
        live::Undo,
        upload::ResumeSource,
    },
    port::{BoxFuture, Hypervisor, LiveSnapshot, Prepared, SnapshotOrder},
    recorder::Recorder,
};

/// The hypervisors of this host.
#[derive(Debug)]
pub struct Hosts {
    /// Plain QEMU, which is everywhere.
    pub qemu: QemuHost,
}

impl Hosts {
    fn of(&self, machine: &Machine) -> Result<&dyn Hypervisor> {
        match machine {
            Machine::Qemu(_) => Ok(&self.qemu),
            Machine::Domain(domain) => Err(Error::new(
                Reason::HypervisorUnavailable,
                format!("nothing here can speak of the domain {}", domain.domain),
            )),
        }
    }
}

impl Hypervisor for Hosts {
    fn power_state<'a>(&'a self, instance: &'a Instance) -> BoxFuture<'a, PowerState> {
        match self.of(&instance.machine) {
            Ok(host) => host.power_state(instance),
            Err(error) => Box::pin(async move { PowerState::Unknown(error.to_string()) }),
        }
    }

    fn prepare<'a>(
        &'a self,
        instance: &'a Instance,
        order: SnapshotOrder,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn Prepared>>> {
        match self.of(&instance.machine) {
            Ok(host) => host.prepare(instance, order, recorder),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn regain<'a>(
        &'a self,
        undo: &'a Undo,
        source: &'a ResumeSource,
        recorder: Arc<Recorder>,
    ) -> BoxFuture<'a, Result<Box<dyn LiveSnapshot>>> {
        match self.of(&undo.machine) {
            Ok(host) => host.regain(undo, source, recorder),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn undo<'a>(&'a self, undo: &'a Undo, recorder: Arc<Recorder>) -> BoxFuture<'a, Result<()>> {
        match self.of(&undo.machine) {
            Ok(host) => host.undo(undo, recorder),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }
}
