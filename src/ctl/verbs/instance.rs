//! `imagectl instance`.

use super::{Page, Session, long};
use crate::{
    ctl::{
        args::{InstanceVerb, IscsiOrder, IscsiVerb, Output},
        failure::Failure,
        render::{json, table},
    },
    pb,
};

pub(super) async fn run(mut session: Session<'_, '_>, verb: InstanceVerb) -> Result<(), Failure> {
    let client = session.client.clone();
    match verb {
        InstanceVerb::List { compartment_id } => {
            let request =
                pb::ListInstancesRequest { compartment_id: compartment_id.unwrap_or_default() };
            let answer = client.call(client.instances().list_instances(request)).await?;
            let page = Page { items: answer.items, next: String::new() };
            session.print_list(
                &page,
                "instances: imaged reads their files when it starts, see `imagectl host get`",
                |items| json::document(json::list(items, json::instance), []),
                |items, _, width| table::instances(items, width),
            )
        }
        InstanceVerb::Get { instance_id } => {
            let request = pb::GetInstanceRequest { instance_id };
            let instance = client.call(client.instances().get_instance(request)).await?;
            session.print(
                || json::document(json::instance(&instance), []),
                |_, _| table::instance(&instance),
            )
        }
        InstanceVerb::Iscsi(IscsiVerb::List { instance_id }) => {
            let request = pb::ListIscsiAttachmentsRequest { instance_id };
            let iscsi = client.call(client.instances().list_iscsi_attachments(request)).await?;
            if session.output == Output::Table {
                for portal in &iscsi.discovery_portals {
                    session.console.tell(&format!("the guest remembers the targets of {portal}"));
                }
                if iscsi.items.is_empty() {
                    session.console.tell("no iSCSI attachments in this guest");
                    return Ok(());
                }
            }
            session.print(
                || json::document(json::iscsi(&iscsi), []),
                |_, width| table::iscsi(&iscsi, width),
            )
        }
        InstanceVerb::Iscsi(IscsiVerb::Disconnect(order)) => {
            let IscsiOrder { instance_id, asking } = *order;
            let call = async |retry_token| {
                let instance_id = instance_id.clone();
                let request = pb::DisconnectIscsiRequest { instance_id, retry_token };
                client.instances().disconnect_iscsi(request).await
            };
            let told = |_: &_| {
                format!(
                    "{instance_id} has no iSCSI; `imagectl instance iscsi reconnect` gives back \
                     what it had"
                )
            };
            long::ask(session, asking, call, told).await
        }
        InstanceVerb::Iscsi(IscsiVerb::Reconnect(order)) => {
            let IscsiOrder { instance_id, asking } = *order;
            let call = async |retry_token| {
                let instance_id = instance_id.clone();
                let request = pb::ReconnectIscsiRequest { instance_id, retry_token };
                client.instances().reconnect_iscsi(request).await
            };
            let told = |_: &_| format!("{instance_id} has its iSCSI back");
            long::ask(session, asking, call, told).await
        }
    }
}
