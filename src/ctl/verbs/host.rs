//! `imagectl host`.

use super::Session;
use crate::{
    ctl::{
        args::HostVerb,
        failure::Failure,
        render::{json, table},
    },
    pb,
};

pub(super) async fn run(mut session: Session<'_, '_>, verb: HostVerb) -> Result<(), Failure> {
    let HostVerb::Get = verb;
    let client = session.client.clone();
    let host = client.call(client.host().get_host(pb::GetHostRequest {})).await?;
    session.print(|| json::document(json::host(&host), []), |_, _| table::host(&host))
}
