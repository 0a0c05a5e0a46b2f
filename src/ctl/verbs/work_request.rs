//! `imagectl work-request`.

use std::time::Duration;

use super::{Page, Session, pages};
use crate::{
    ctl::{
        args::{NewRates, Output, Paging, Until, WorkRequestVerb},
        failure::Failure,
        progress::Progress,
        render::{json, table},
        wait::{FIRST_PAUSE, Wait},
    },
    pb,
};

pub(super) async fn run(
    mut session: Session<'_, '_>,
    verb: WorkRequestVerb,
) -> Result<(), Failure> {
    let client = session.client.clone();
    match verb {
        WorkRequestVerb::List { compartment_id, resource_id, paging } => {
            list(session, compartment_id, resource_id, paging).await
        }
        WorkRequestVerb::Get { work_request_id, trace: true } => {
            let request = pb::GetWorkRequestTraceRequest { work_request_id };
            let trace = client.call(client.work_requests().get_work_request_trace(request)).await?;
            if trace.entries.is_empty() && session.output == Output::Table {
                session.console.tell("it said nothing: its volume was at rest, or not begun with");
                return Ok(());
            }
            session.print(
                || json::document(json::trace(&trace), []),
                |_, width| table::trace(&trace, width),
            )
        }
        WorkRequestVerb::Get { work_request_id, trace: false } => {
            let request = pb::GetWorkRequestRequest { work_request_id };
            let work = client.call(client.work_requests().get_work_request(request)).await?;
            print(&mut session, &work)
        }
        WorkRequestVerb::Watch { work_request_id, max_wait_seconds } => {
            let wait = Wait {
                client: &client,
                work_request_id: &work_request_id,
                until: Until::Ended,
                limit: max_wait_seconds.map(Duration::from_secs),
                first_pause: FIRST_PAUSE,
            };
            let work = wait.run(&mut Progress::on(session.console)).await?;
            print(&mut session, &work)?;
            Failure::of_work(&work).map_or(Ok(()), Err)
        }
        WorkRequestVerb::Update { work_request_id, rates } => {
            let NewRates { max_upload_rate, max_read_rate } = rates;
            let request =
                pb::UpdateWorkRequestRequest { work_request_id, max_upload_rate, max_read_rate };
            let work = client.call(client.work_requests().update_work_request(request)).await?;
            if work.time_finished.is_some() {
                session.console.tell("it had ended before: nothing was changed");
            }
            print(&mut session, &work)
        }
        WorkRequestVerb::Cancel { work_request_id } => {
            let request = pb::CancelWorkRequestRequest { work_request_id };
            let work = client.call(client.work_requests().cancel_work_request(request)).await?;
            let status = work.status();
            if matches!(
                status,
                pb::work_request::Status::Succeeded | pb::work_request::Status::Failed
            ) {
                session.console.tell("it had ended before: nothing was canceled");
            }
            print(&mut session, &work)
        }
    }
}

async fn list(
    mut session: Session<'_, '_>,
    compartment_id: Option<String>,
    resource_id: Option<String>,
    paging: Paging,
) -> Result<(), Failure> {
    let client = session.client.clone();
    let wanted = pb::ListWorkRequestsRequest {
        compartment_id: compartment_id.unwrap_or_default(),
        resource_id: resource_id.unwrap_or_default(),
        ..Default::default()
    };
    let page = pages(paging, async |limit, page| {
        let request = pb::ListWorkRequestsRequest { limit, page, ..wanted.clone() };
        let answer = client.call(client.work_requests().list_work_requests(request)).await?;
        Ok(Page { items: answer.items, next: answer.next_page })
    })
    .await?;
    session.print_list(
        &page,
        "work requests",
        |items| {
            let data = json::list(items, json::work_request);
            json::document(data, [("opc-next-page", &page.next)])
        },
        table::work_requests,
    )
}

/// Prints a work request.
pub(super) fn print(session: &mut Session<'_, '_>, work: &pb::WorkRequest) -> Result<(), Failure> {
    session.print(
        || json::document(json::work_request(work), []),
        |now, _| table::work_request(work, now),
    )
}
