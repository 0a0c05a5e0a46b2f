//! What of iSCSI an instance has.

use crate::{
    model::iscsi::{Attachment, Device, DeviceKind, Iscsi},
    pb::{self, iscsi_attachment::State, iscsi_device::Kind},
};

pub(in crate::rpc) fn iscsi(iscsi: Iscsi) -> pb::ListIscsiAttachmentsResponse {
    pb::ListIscsiAttachmentsResponse {
        items: iscsi.attachments.into_iter().map(attachment).collect(),
        discovery_portals: iscsi.discoveries.iter().map(ToString::to_string).collect(),
        initiator_name: iscsi.initiator.unwrap_or_default(),
        has_iscsiadm: iscsi.has_tool,
    }
}

fn attachment(attachment: Attachment) -> pb::IscsiAttachment {
    let chap = attachment.has_chap();
    let Attachment { target, session, record } = attachment;
    let state = match &session {
        Some(session) if session.logged_in => State::LoggedIn,
        Some(_) => State::Recovering,
        None => State::LoggedOut,
    };
    pb::IscsiAttachment {
        iqn: target.iqn,
        address: target.portal.address,
        port: target.portal.port.into(),
        state: state.into(),
        chap,
        on_record: record.is_some(),
        at_boot: record.is_some_and(|record| record.at_boot),
        devices: session.into_iter().flat_map(|session| session.devices).map(device).collect(),
    }
}

fn device(device: Device) -> pb::IscsiDevice {
    let (kind, mapper_name) = match device.kind {
        DeviceKind::Disk { .. } => (Kind::Disk, None),
        DeviceKind::Partition { .. } => (Kind::Partition, None),
        DeviceKind::Lvm(name) => (Kind::LogicalVolume, Some(name)),
        DeviceKind::Multipath(name) => (Kind::Multipath, Some(name)),
        DeviceKind::Mapped(name) => (Kind::Mapped, Some(name)),
        DeviceKind::Raid => (Kind::Raid, None),
        DeviceKind::Other => (Kind::Other, None),
    };
    pb::IscsiDevice {
        name: device.name,
        kind: kind.into(),
        mapper_name: mapper_name.unwrap_or_default(),
        size_in_bytes: device.size.get(),
        uses: device.uses.iter().map(ToString::to_string).collect(),
    }
}
