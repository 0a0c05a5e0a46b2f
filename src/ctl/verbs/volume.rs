//! `imagectl volume`.

use std::{fs, io::ErrorKind};

use super::{Session, image::absolute, long};
use crate::{
    ctl::{
        args::{VolumeRestore, VolumeVerb},
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

async fn restore(session: Session<'_, '_>, args: VolumeRestore) -> Result<(), Failure> {
    let (client, image_id) = (session.client.clone(), args.image_id);
    let to = absolute("--to", &args.to)?;
    let call = async |retry_token| {
        let (image_id, to) = (image_id.clone(), to.clone());
        let request = pb::RestoreVolumeRequest { image_id, to, retry_token };
        client.volumes().restore_volume(request).await
    };
    let told = |_: &_| format!("{to} is {image_id}, as its digests say");
    long::ask(session, args.asking, call, told).await
}
