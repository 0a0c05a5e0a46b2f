//! What imaged calls what it adds to a QEMU.

use crate::{
    error::{Context, Reason, Result},
    hypervisor::qmp::{ExportId, NodeName, PREFIX},
};

/// The names of one snapshot. Its tag tells it from others of this QEMU.
#[derive(Debug, Clone)]
pub(super) struct Names {
    /// The file that takes what the guest overwrites.
    pub scratch: NodeName,
    /// The same, with an end.
    pub bound: NodeName,
    /// The same, as an image.
    pub overlay: NodeName,
    /// What copies before the guest writes.
    pub filter: NodeName,
    /// What shows the volume as it was.
    pub access: NodeName,
    /// Says that the guest is to be started again.
    pub mark: NodeName,
    /// Export of the access.
    pub snapshot: ExportId,
    /// Export of the overlay.
    pub saved: ExportId,
    /// Export of the filter: the volume as it is.
    pub live: ExportId,
}

impl Names {
    /// # Errors
    ///
    /// `INTERNAL` for a tag that QEMU would not take.
    pub fn of(tag: &str) -> Result<Self> {
        let node = |part: &str| format!("{PREFIX}{tag}-{part}").parse::<NodeName>();
        let export = |part: &str| format!("{PREFIX}{tag}-{part}").parse::<ExportId>();
        let names = || {
            Ok::<_, crate::hypervisor::qmp::NameError>(Self {
                scratch: node("scratch")?,
                bound: node("bound")?,
                overlay: node("overlay")?,
                filter: node("filter")?,
                access: node("access")?,
                mark: node("stopped")?,
                snapshot: export("snapshot")?,
                saved: export("saved")?,
                live: export("live")?,
            })
        };
        names().context(Reason::Internal, || format!("{tag:?} cannot be part of a name in QEMU"))
    }
}
