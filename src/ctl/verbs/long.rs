//! Work that takes its time: asked for once, waited for, told of.

use std::{fmt::Write as _, time::Duration};

use tonic::{Response, Status};

use super::{Session, work_request};
use crate::{
    ctl::{
        args::{Asking, Output, Until, WaitFor},
        exit::Exit,
        failure::Failure,
        progress::Progress,
        wait::{FIRST_PAUSE, Wait},
    },
    pb,
};

/// Asks for work by `call`, which takes a retry token, waits for it as
/// `asking` says, and tells people of a good end by `told`.
pub(super) async fn ask(
    mut session: Session<'_, '_>,
    asking: Asking,
    call: impl AsyncFn(String) -> Result<Response<pb::WorkRequest>, Status>,
    told: impl FnOnce(&pb::WorkRequest) -> String,
) -> Result<(), Failure> {
    let (client, token) = (session.client.clone(), token(asking.retry_token)?);
    let work = client
        .call_twice(async || call(token.clone()).await)
        .await
        .map_err(|failure| ask_again(failure, &token))?;
    let until = WaitFor::earliest(&asking.wait_for_state).unwrap_or(Until::Ended);
    let limit = asking.max_wait_seconds.map(Duration::from_secs);
    let ended = waited(&mut session, work, until, limit).await?;
    let failure = Failure::of_work(&ended);
    if session.output == Output::Json || until != Until::Ended {
        work_request::print(&mut session, &ended)?;
    } else if failure.is_none() {
        session.console.print(&told(&ended))?;
    }
    failure.map_or(Ok(()), Err)
}

/// Waits for `work`, and returns it as it is then.
pub(super) async fn waited(
    session: &mut Session<'_, '_>,
    work: pb::WorkRequest,
    until: Until,
    limit: Option<Duration>,
) -> Result<pb::WorkRequest, Failure> {
    if until == Until::Accepted {
        return Ok(work);
    }
    session.console.tell(&format!("work request {}", work.id));
    let client = session.client.clone();
    let wait =
        Wait { client: &client, work_request_id: &work.id, until, limit, first_pause: FIRST_PAUSE };
    match wait.run(&mut Progress::on(session.console)).await {
        Ok(ended) => Ok(ended),
        // A script still learns what it asked for; a person has seen how far
        // it got.
        Err(failure) => {
            if session.output == Output::Json {
                work_request::print(session, &work)?;
            }
            Err(failure)
        }
    }
}

/// The token that was given, or a new one: 128 random bits.
pub(super) fn token(given: Option<String>) -> Result<String, Failure> {
    if let Some(token) = given {
        return Ok(token);
    }
    let mut bits = [0; 16];
    getrandom::fill(&mut bits)
        .map_err(|error| Failure::new(Exit::Failed, "no retry token could be made").cause(error))?;
    let mut token = String::from("imagectl-");
    for byte in bits {
        // Writing to a String cannot fail.
        let _ = write!(token, "{byte:02x}");
    }
    Ok(token)
}

/// Whether imaged took the request is not known: the token finds out.
pub(super) fn ask_again(failure: Failure, token: &str) -> Failure {
    match failure.exit {
        Exit::Unreachable => failure.help(format!(
            "ask again with --retry-token {token}: what imaged took already is not done twice"
        )),
        _ => failure,
    }
}
