//! WorkRequestService.

use std::time::Duration;

use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tonic::{Request, Response, Status};

use super::{
    convert,
    page::{self, Key, Order, Wanted},
    status, to_the_end,
};
use crate::{
    error::Result,
    model::work_request::WorkRequest,
    pb::{self, work_request_service_server::WorkRequestService},
    work::Work,
};

/// The shortest time from one message to the next: enough for a progress bar,
/// and nothing that shows in the load.
const INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(super) struct Requests {
    pub work: Work,
}

#[tonic::async_trait]
impl WorkRequestService for Requests {
    async fn get_work_request(
        &self,
        request: Request<pb::GetWorkRequestRequest>,
    ) -> Result<Response<pb::WorkRequest>, Status> {
        let id = &request.get_ref().work_request_id;
        let id = convert::work_request_id(id).map_err(status::from)?;
        let found = self.work.work_request(&id).map_err(status::from)?;
        Ok(Response::new(found.into()))
    }

    async fn get_work_request_trace(
        &self,
        request: Request<pb::GetWorkRequestTraceRequest>,
    ) -> Result<Response<pb::WorkRequestTrace>, Status> {
        let id = &request.get_ref().work_request_id;
        let id = convert::work_request_id(id).map_err(status::from)?;
        let trace = self.work.trace(&id).await.map_err(status::from)?;
        Ok(Response::new(trace.into()))
    }

    async fn list_work_requests(
        &self,
        request: Request<pb::ListWorkRequestsRequest>,
    ) -> Result<Response<pb::ListWorkRequestsResponse>, Status> {
        list(self.work.work_requests(), request.get_ref()).map(Response::new).map_err(status::from)
    }

    type WatchWorkRequestStream = BoxStream<'static, Result<pb::WorkRequest, Status>>;

    async fn watch_work_request(
        &self,
        request: Request<pb::WatchWorkRequestRequest>,
    ) -> Result<Response<Self::WatchWorkRequestStream>, Status> {
        let id = &request.get_ref().work_request_id;
        let id = convert::work_request_id(id).map_err(status::from)?;
        let changes = self.work.watch(&id).map_err(status::from)?;
        Ok(Response::new(updates(changes).map(|request| Ok(request.into())).boxed()))
    }

    async fn cancel_work_request(
        &self,
        request: Request<pb::CancelWorkRequestRequest>,
    ) -> Result<Response<pb::WorkRequest>, Status> {
        let id = &request.get_ref().work_request_id;
        let id = convert::work_request_id(id).map_err(status::from)?;
        let request = self.work.cancel(&id).map_err(status::from)?;
        Ok(Response::new(request.into()))
    }

    async fn update_work_request(
        &self,
        request: Request<pb::UpdateWorkRequestRequest>,
    ) -> Result<Response<pb::WorkRequest>, Status> {
        let wanted = request.get_ref();
        let id = convert::work_request_id(&wanted.work_request_id).map_err(status::from)?;
        let new = convert::new_rates(wanted.max_upload_rate, wanted.max_read_rate)
            .map_err(status::from)?;
        let work = self.work.clone();
        let request = to_the_end(async move { work.set_rates(&id, new).await }).await?;
        Ok(Response::new(request.into()))
    }
}

/// The state now and then each change, the newest where they come faster than
/// [`INTERVAL`]; a final state at once. Ends after it, or when nobody works on
/// it any more.
fn updates(changes: watch::Receiver<WorkRequest>) -> impl Stream<Item = WorkRequest> {
    enum Next {
        Now,
        After(Instant),
        End,
    }
    stream::unfold((changes, Next::Now), |(mut changes, next)| async move {
        match next {
            Next::Now => {}
            Next::After(last) => {
                changes.changed().await.ok()?;
                tokio::select! {
                    () = sleep_until(last + INTERVAL) => {}
                    _ = changes.wait_for(|request| request.status.is_final()) => {}
                }
            }
            Next::End => return None,
        }
        let request = changes.borrow_and_update().clone();
        let next = match request.status.is_final() {
            true => Next::End,
            false => Next::After(Instant::now()),
        };
        Some((request, (changes, next)))
    })
}

/// The page of `requests` that `wanted` asks for, newest first.
fn list(
    requests: Vec<WorkRequest>,
    wanted: &pb::ListWorkRequestsRequest,
) -> Result<pb::ListWorkRequestsResponse> {
    let (compartment, resource) = (&wanted.compartment_id, &wanted.resource_id);
    let matches = |request: &WorkRequest| {
        (compartment.is_empty() || compartment == request.compartment_id.as_str())
            && (resource.is_empty() || request.resources.iter().any(|r| r.identifier == *resource))
    };
    let items = requests
        .into_iter()
        .filter(matches)
        .map(|request| {
            let key = Key::time(request.time_accepted.as_millis(), request.id.as_str());
            (key, request)
        })
        .collect();
    let wanted = Wanted { order: Order::NewestFirst, limit: wanted.limit, page: &wanted.page };
    let (items, next_page) = page::cut(items, wanted)?;
    Ok(pb::ListWorkRequestsResponse { items, next_page })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        Timestamp, WorkRequestId,
        work_request::{Action, EntityType, Operation, Phase, Progress, Resource, Status},
    };

    fn request(millis: u64) -> WorkRequest {
        let time = Timestamp::from_millis(millis);
        WorkRequest {
            id: WorkRequestId::generate(time, 1),
            operation: Operation::VerifyImage,
            status: Status::InProgress,
            compartment_id: "c1".parse().unwrap(),
            resources: vec![Resource {
                action: Action::Related,
                entity_type: EntityType::Image,
                identifier: format!("image-{millis}"),
            }],
            phase: Phase::Verify,
            progress: Progress::default(),
            time_accepted: time,
            time_started: None,
            time_finished: None,
            errors: Vec::new(),
            logs: Vec::new(),
            requested_by: "uid 0".into(),
            retry: None,
            undo: None,
            iscsi: None,
            rehearsal: None,
            resume: None,
            outgoing: None,
            rates: Default::default(),
        }
    }

    #[test]
    fn newest_first_and_by_resource() {
        let all = vec![request(1), request(3), request(2)];
        let ids = |wanted: &pb::ListWorkRequestsRequest| {
            let listed = list(all.clone(), wanted).unwrap().items;
            listed.iter().map(|r| r.resources[0].identifier.clone()).collect::<Vec<_>>()
        };
        let wanted = pb::ListWorkRequestsRequest::default();
        assert_eq!(ids(&wanted), ["image-3", "image-2", "image-1"]);
        let wanted =
            pb::ListWorkRequestsRequest { resource_id: "image-2".into(), ..Default::default() };
        assert_eq!(ids(&wanted), ["image-2"]);
        let wanted =
            pb::ListWorkRequestsRequest { compartment_id: "c2".into(), ..Default::default() };
        assert!(ids(&wanted).is_empty());
    }

    #[tokio::test]
    async fn a_watch_is_told_the_newest_at_most_four_times_a_second() {
        let (sender, receiver) = watch::channel(request(1));
        let worker = tokio::spawn(async move {
            for read in 1..=200 {
                tokio::time::sleep(Duration::from_millis(4)).await;
                sender.send_modify(|request| request.progress.read = read);
            }
            sender.send_modify(|request| request.status = Status::Succeeded);
            // The daemon keeps finished requests: the end must come by itself.
            std::future::pending::<()>().await;
        });
        let begun = Instant::now();
        let seen: Vec<_> = updates(receiver).collect().await;
        worker.abort();
        let most = 2 + begun.elapsed().as_millis() / INTERVAL.as_millis();
        assert!((3..=most).contains(&(seen.len() as u128)), "{} of {most}", seen.len());
        assert_eq!(seen[0].progress.read, 0);
        let last = seen.last().unwrap();
        assert_eq!((last.status, last.progress.read), (Status::Succeeded, 200));
        assert_eq!(seen.iter().filter(|request| request.status.is_final()).count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_is_told_at_once() {
        let (sender, receiver) = watch::channel(request(1));
        let worker = tokio::spawn(async move {
            for read in 1..=10 {
                tokio::time::sleep(Duration::from_millis(1)).await;
                sender.send_modify(|request| request.progress.read = read);
            }
            sender.send_modify(|request| request.status = Status::Succeeded);
            std::future::pending::<()>().await;
        });
        let begun = Instant::now();
        let seen: Vec<_> = updates(receiver).collect().await;
        worker.abort();
        assert_eq!(seen.last().unwrap().status, Status::Succeeded);
        assert_eq!((seen.len(), begun.elapsed()), (2, Duration::from_millis(10)));
    }

    #[tokio::test]
    async fn a_watch_of_what_has_ended_is_one_message() {
        let mut ended = request(1);
        ended.status = Status::Failed;
        let (_sender, receiver) = watch::channel(ended);
        assert_eq!(updates(receiver).count().await, 1);
    }

    #[tokio::test]
    async fn a_watch_ends_when_nobody_works_on_it() {
        let (sender, receiver) = watch::channel(request(1));
        drop(sender);
        assert_eq!(updates(receiver).count().await, 1);
    }
}
