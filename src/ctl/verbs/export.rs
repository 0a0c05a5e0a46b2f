//! `imagectl image export`.

use std::{
    io::Read,
    path::Path,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use tonic::Code;

use super::{
    Session, long,
    new_file::{NewFile, Replaces},
};
use crate::{
    ctl::{
        args::{ExportOptions, ExportToFile, ExportToObject, ExportToUri, Output, Uri},
        client::{CALL_LIMIT, Client},
        console::Console,
        exit::Exit,
        failure::Failure,
        progress::Progress,
        render::json,
    },
    model::ByteSize,
    pb::{self, export_image_request::Destination, work_request::OperationType},
};

/// Longest URL that is read.
const MAX_URI: u64 = 16 << 10;

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(250);

pub(super) async fn to_object(
    session: Session<'_, '_>,
    args: ExportToObject,
) -> Result<(), Failure> {
    let object = pb::ExportToObject { store: args.store, name: args.name.unwrap_or_default() };
    export(session, args.image_id, Destination::Object(object), args.export).await
}

pub(super) async fn to_uri(session: Session<'_, '_>, args: ExportToUri) -> Result<(), Failure> {
    let uri = secret(args.uri, session.console)?;
    export(session, args.image_id, Destination::Uri(uri), args.export).await
}

/// Reads a secret URL. Blocks.
fn secret(uri: Uri, console: &mut Console<'_>) -> Result<String, Failure> {
    let mut text = String::new();
    let (from, read) = match uri {
        Uri::Given(uri) => {
            console.tell(
                "the URL could be seen by everyone on this host while imagectl runs: give it as \
                 file://PATH, or as - on standard input",
            );
            return Ok(uri);
        }
        Uri::StandardInput => (
            "standard input".to_owned(),
            (&mut *console.input).take(MAX_URI).read_to_string(&mut text),
        ),
        Uri::File(path) => {
            let read = std::fs::File::open(&path)
                .and_then(|file| file.take(MAX_URI).read_to_string(&mut text));
            (path.display().to_string(), read)
        }
    };
    read.map_err(|error| {
        Failure::new(Exit::Usage, format!("the URL cannot be read from {from}")).cause(error)
    })?;
    match text.trim() {
        "" => Err(Failure::new(Exit::Usage, format!("there is no URL in {from}"))),
        uri => Ok(uri.to_owned()),
    }
}

async fn export(
    session: Session<'_, '_>,
    image_id: String,
    destination: Destination,
    options: ExportOptions,
) -> Result<(), Failure> {
    let client = session.client.clone();
    let ExportOptions { overwrite, max_upload_rate, asking } = options;
    let call = async |retry_token| {
        let request = pb::ExportImageRequest {
            image_id: image_id.clone(),
            destination: Some(destination.clone()),
            overwrite,
            max_upload_rate: max_upload_rate.unwrap_or_default(),
            retry_token,
        };
        client.images().export_image(request).await
    };
    // The last thing that the daemon says is where the object is.
    let told = |ended: &pb::WorkRequest| {
        ended.logs.last().map(|told| told.message.clone()).unwrap_or_default()
    };
    long::ask(session, asking, call, told).await
}

pub(super) async fn to_file(session: Session<'_, '_>, args: ExportToFile) -> Result<(), Failure> {
    let replaces = if args.force { Replaces::File } else { Replaces::Nothing };
    let file =
        NewFile::create(&args.file, replaces).map_err(|error| unwritten(&args.file, error))?;
    let client = session.client.clone();
    let mut progress = Progress::on(session.console);
    let copied = tokio::select! {
        biased;
        // Where no signal can be caught, the signal ends the process instead.
        Ok(()) = tokio::signal::ctrl_c() => {
            Err(Failure::new(Exit::Interrupted, "stopped; nothing was written"))
        }
        copied = copy(&client, &args, file, &mut progress) => copied,
    };
    progress.end(None);
    let (size, digest) = copied?;
    let path = args.file.display().to_string();
    let text = match session.output {
        Output::Json => json::document(json::file(&path, size, &digest), []),
        Output::Table => format!("{path} is the image: {:#}, checked", ByteSize(size)),
    };
    session.console.print(&text)
}

fn unwritten(path: &Path, error: std::io::Error) -> Failure {
    let failure =
        Failure::new(Exit::Failed, format!("the file {} cannot be written", path.display()));
    let exists = error.kind() == std::io::ErrorKind::AlreadyExists;
    let failure = failure.cause(error);
    if exists { failure.help("choose another name, or say --force to replace it") } else { failure }
}

/// Writes the image's object. Answers its length and digest.
async fn copy(
    client: &Client,
    args: &ExportToFile,
    mut file: NewFile,
    progress: &mut Progress<'_>,
) -> Result<(u64, String), Failure> {
    let unwritten = |error| unwritten(&args.file, error);
    let request = pb::ReadImageObjectRequest { image_id: args.image_id.clone() };
    let mut images = client.images();
    let reading = tokio::time::timeout(CALL_LIMIT, images.read_image_object(request)).await;
    let mut chunks = match reading {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return Err(client.failure(&status).await),
        Err(_) => return Err(Failure::silent(CALL_LIMIT)),
    };
    let (mut size, mut digest) = (0, String::new());
    let (mut done, mut parts, mut part) = (0, Sha256::new(), Sha256::new());
    let (begin, mut shown) = (Instant::now(), None::<Instant>);
    loop {
        let chunk = match chunks.message().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => break,
            Err(status) => {
                let mut failure = client.failure(&status).await;
                if status.code() == Code::DataLoss {
                    failure.exit = Exit::VerificationFailed;
                }
                return Err(failure);
            }
        };
        if !chunk.object_digest.is_empty() {
            (size, digest) = (chunk.object_size_bytes, chunk.object_digest);
        }
        part.update(&chunk.data);
        if chunk.ends_part {
            parts.update(part.finalize_reset());
        }
        done += chunk.data.len() as u64;
        file.write(&chunk.data).map_err(unwritten)?;
        if shown.is_none_or(|shown| shown.elapsed() >= TICK) {
            progress.show(&so_far(done, size, begin.elapsed()));
            shown = Some(Instant::now());
        }
    }
    progress.show(&so_far(done, size, begin.elapsed()));
    let found: String = parts.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if (done, &found) != (size, &digest) {
        let context = format!("what came is not the image {}", args.image_id);
        return Err(Failure::new(Exit::VerificationFailed, context)
            .note("came", format!("{done} bytes, {found}"))
            .note("wanted", format!("{size} bytes, {digest}")));
    }
    file.finish().map_err(unwritten)?;
    Ok((size, digest))
}

/// The copy as if it were a work request.
#[allow(clippy::cast_precision_loss, reason = "a percentage")]
fn so_far(done: u64, size: u64, elapsed: Duration) -> pb::WorkRequest {
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    let rate = done.saturating_mul(1000).checked_div(millis).unwrap_or(0);
    let left = size.saturating_sub(done);
    pb::WorkRequest {
        operation_type: OperationType::ExportImage.into(),
        status: pb::work_request::Status::InProgress.into(),
        phase: "export".into(),
        percent_complete: if size == 0 { 0.0 } else { done as f32 / size as f32 * 100.0 },
        progress: Some(pb::Progress {
            bytes_total: size,
            bytes_read: done,
            bytes_per_second: rate,
            eta_seconds: left.checked_div(rate),
            ..Default::default()
        }),
        ..Default::default()
    }
}
