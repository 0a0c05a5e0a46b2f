//! `imagectl volume`.

use std::{fs, io::ErrorKind, time::Duration};

use super::{
    Session,
    image::{absolute, ask_again, token, waited},
    work_request,
};
use crate::{
    ctl::{
        args::{Output, Until, VolumeRestore, VolumeVerb, WaitFor},
        console::{Console, Stream},
        exit::Exit,
        failure::Failure,
    },
    pb,
};

pub(super) async fn run(session: Session<'_, '_>, verb: VolumeVerb) -> Result<(), Failure> {
    let VolumeVerb::Restore(args) = verb;
    restore(session, args).await
}

/// As [`super::image::confirm`].
pub(in crate::ctl) fn confirm(verb: &VolumeVerb, console: &mut Console<'_>) -> Result<(), Failure> {
    let VolumeVerb::Restore(args) = verb;
    let is_new = fs::metadata(&args.to).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    if args.force || is_new {
        return Ok(());
    }
    let to = args.to.display();
    match console.input_is {
        Stream::Terminal => console.confirm(&format!(
            "Write the image {} over {to}? All that it holds is lost.",
            args.image_id
        )),
        Stream::Other => Err(Failure::new(
            Exit::Usage,
            format!("{to} was not written: no terminal to ask for confirmation"),
        )
        .help("say --force to write over it without being asked")),
    }
}

async fn restore(mut session: Session<'_, '_>, args: VolumeRestore) -> Result<(), Failure> {
    let client = session.client.clone();
    let path = absolute("--to", &args.to)?;
    let request = pb::RestoreVolumeRequest {
        image_id: args.image_id.clone(),
        to: path.clone(),
        retry_token: token(args.retry_token)?,
    };
    let token = request.retry_token.clone();
    let work = client
        .call_twice(async || client.volumes().restore_volume(request.clone()).await)
        .await
        .map_err(|failure| ask_again(failure, &token))?;
    let until = WaitFor::earliest(&args.wait_for_state).unwrap_or(Until::Ended);
    let limit = args.max_wait_seconds.map(Duration::from_secs);
    let ended = waited(&mut session, work, until, limit).await?;
    let failure = Failure::of_work(&ended);
    if session.output == Output::Json || until != Until::Ended {
        work_request::print(&mut session, &ended)?;
    } else if failure.is_none() {
        session.console.print(&format!("{path} is {}, as its digests say", args.image_id))?;
    }
    failure.map_or(Ok(()), Err)
}
