//! `imagectl host`.

use std::time::Duration;

use tokio::time::sleep;

use super::Session;
use crate::{
    ctl::{
        args::{HostVerb, NewRates},
        exit::Exit,
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
        HostVerb::Drain { finish_within } => {
            let request = pb::DrainHostRequest { finish_seconds: finish_within };
            let host = client.call(client.host().drain_host(request)).await?;
            drained(&mut session, host).await?
        }
        HostVerb::Resume => {
            client.call(client.host().resume_host(pb::ResumeHostRequest {})).await?
        }
    };
    session.print(|| json::document(json::host(&host), []), |_, _| table::host(&host))
}

/// Between two looks at a host that is drained.
const LOOK: Duration = Duration::from_millis(500);

/// Waits until nothing runs any more, and says how much still does.
async fn drained(session: &mut Session<'_, '_>, mut host: pb::Host) -> Result<pb::Host, Failure> {
    let client = session.client.clone();
    let mut told = None;
    loop {
        let left = host.work_requests_in_progress + host.work_requests_waiting;
        if left == 0 {
            return Ok(host);
        }
        if !host.drained {
            let message = "somebody has let work begin again on this host: it is not drained";
            return Err(Failure::new(Exit::Failed, message));
        }
        if told != Some(left) {
            session.console.tell(&format!("waiting for {left} work requests"));
            told = Some(left);
        }
        sleep(LOOK).await;
        host = client.call(client.host().get_host(pb::GetHostRequest {})).await?;
    }
}
