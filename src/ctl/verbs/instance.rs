//! `imagectl instance`.

use super::{Page, Session};
use crate::{
    ctl::{
        args::InstanceVerb,
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
    }
}
