//! `imagectl host`.

use super::Session;
use crate::{
    ctl::{
        args::{HostVerb, NewRates},
        failure::Failure,
        render::{json, table},
    },
    pb,
};

pub(super) async fn run(mut session: Session<'_, '_>, verb: HostVerb) -> Result<(), Failure> {
    let client = session.client.clone();
    let host = match verb {
        HostVerb::Get => client.call(client.host().get_host(pb::GetHostRequest {})).await?,
        HostVerb::Update(NewRates { max_upload_rate, max_read_rate }) => {
            let request = pb::UpdateHostRequest { max_upload_rate, max_read_rate };
            client.call(client.host().update_host(request)).await?
        }
    };
    session.print(|| json::document(json::host(&host), []), |_, _| table::host(&host))
}
