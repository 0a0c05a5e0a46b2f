//! `imagectl image`.

use std::{cell::RefCell, collections::BTreeMap, path::Path, time::Duration};

use super::{
    Page, Session, export,
    long::{self, ask_again, token, waited},
    pages, work_request,
};
use crate::{
    ctl::{
        args::{
            Consistency, ImageCreate, ImageExport, ImageList, ImageVerb, ImageVerify, OnReadError,
            Output, Until, WaitFor,
        },
        console::{Console, Stream},
        exit::Exit,
        failure::Failure,
        progress::Progress,
        render::{json, table, words},
        wait::{FIRST_PAUSE, Wait},
    },
    pb,
};

pub(super) async fn run(mut session: Session<'_, '_>, verb: ImageVerb) -> Result<(), Failure> {
    match verb {
        ImageVerb::Create(args) if args.rehearse => rehearse(session, *args).await,
        ImageVerb::Create(args) => create(session, *args).await,
        ImageVerb::List(args) => list(session, *args).await,
        ImageVerb::Get { image_id } => {
            let image = get(&session, image_id).await?;
            print(&mut session, &image, "")
        }
        // Its question was asked before.
        ImageVerb::Delete { image_id, force: _ } => delete(session, image_id).await,
        ImageVerb::Verify(args) => verify(session, args).await,
        ImageVerb::Export(ImageExport::Object(args)) => export::to_object(session, args).await,
        ImageVerb::Export(ImageExport::ObjectUri(args)) => export::to_uri(session, args).await,
        ImageVerb::Export(ImageExport::File(args)) => export::to_file(session, args).await,
    }
}

/// Asks what must be asked before `verb` is done: this blocks, so it comes
/// before anything asynchronous.
///
/// # Errors
///
/// [`Exit::Canceled`] when the answer is no, [`Exit::Usage`] when nobody can
/// be asked.
pub(in crate::ctl) fn confirm(verb: &ImageVerb, console: &mut Console<'_>) -> Result<(), Failure> {
    match verb {
        ImageVerb::Delete { image_id, force: false } => match console.input_is {
            Stream::Terminal => {
                console.confirm(&format!("Delete the image {image_id}? This cannot be undone."))
            }
            Stream::Other => Err(Failure::new(
                Exit::Usage,
                format!(
                    "the image {image_id} was not deleted: no terminal to ask for confirmation"
                ),
            )
            .help("say --force to delete without being asked")),
        },
        _ => Ok(()),
    }
}

async fn get(session: &Session<'_, '_>, image_id: String) -> Result<pb::Image, Failure> {
    let client = &session.client;
    client.call(client.images().get_image(pb::GetImageRequest { image_id })).await
}

fn print(
    session: &mut Session<'_, '_>,
    image: &pb::Image,
    work_request_id: &str,
) -> Result<(), Failure> {
    session.print(
        || json::document(json::image(image), [("opc-work-request-id", work_request_id)]),
        |now, _| table::image(image, now),
    )
}

async fn create(mut session: Session<'_, '_>, args: ImageCreate) -> Result<(), Failure> {
    let client = session.client.clone();
    let until = WaitFor::earliest(&args.wait.wait_for_state);
    let limit = Duration::from_secs(args.wait.max_wait_seconds);
    let request = create_request(args)?;
    let token = request.retry_token.clone();
    let answer = client
        .call_twice(async || client.images().create_image(request.clone()).await)
        .await
        .map_err(|failure| ask_again(failure, &token))?;
    let image = answer.image.unwrap_or_default();
    let work = answer.work_request.unwrap_or_default();
    let Some(until) = until else {
        session.print(
            || json::document(json::image(&image), [("opc-work-request-id", &work.id)]),
            |_, _| table::accepted(&image, &work),
        )?;
        if session.output == Output::Table {
            let watch =
                client.command(&format!("work-request watch --work-request-id {}", work.id));
            session.console.tell(&format!("watch: {watch}"));
        }
        return Ok(());
    };

    session.console.tell(&format!("work request {}", work.id));
    let wait = Wait {
        client: &client,
        work_request_id: &work.id,
        until,
        limit: Some(limit),
        first_pause: FIRST_PAUSE,
    };
    match wait.run(&mut Progress::on(session.console)).await {
        Ok(ended) => {
            if let Some(failure) = Failure::of_work(&ended) {
                return Err(failure);
            }
            let image = get(&session, image.id).await?;
            print(&mut session, &image, &work.id)
        }
        // As oci does: a script still learns what it asked for.
        Err(failure) => {
            print(&mut session, &image, &work.id)?;
            Err(failure)
        }
    }
}

fn create_request(args: ImageCreate) -> Result<pb::CreateImageRequest, Failure> {
    use pb::create_image_request::Source;
    // The only mode, so it needs no word in the API.
    let OnReadError::Fail = args.on_read_error;
    let source = match (args.instance_id, args.boot_volume) {
        (Some(id), _) => Some(Source::InstanceId(id)),
        (None, Some(path)) => Some(Source::BootVolume(absolute("--boot-volume", &path)?)),
        (None, None) => None,
    };
    Ok(pb::CreateImageRequest {
        compartment_id: args.compartment_id.unwrap_or_default(),
        display_name: args.display_name.unwrap_or_default(),
        freeform_tags: args.freeform_tags.unwrap_or_default(),
        launch_mode: args
            .launch_mode
            .map_or_else(Default::default, |mode| pb::LaunchMode::from(mode).into()),
        compression: args
            .compression
            .map_or_else(Default::default, |method| pb::Compression::from(method).into()),
        snapshot_mode: snapshot_mode(args.consistency, args.force_stop)?,
        iscsi_policy: args.iscsi.map_or_else(Default::default, |policy| {
            pb::create_image_request::IscsiPolicy::from(policy).into()
        }),
        max_upload_rate: args.max_upload_rate.unwrap_or_default(),
        max_read_rate: args.max_read_rate.unwrap_or_default(),
        retry_token: token(args.retry_token)?,
        source,
    })
}

fn snapshot_mode(mode: Option<Consistency>, force_stop: bool) -> Result<i32, Failure> {
    use pb::create_image_request::SnapshotMode;
    let mode = match (mode, force_stop) {
        (Some(Consistency::Stop), true) => SnapshotMode::ForceStop,
        (_, true) => {
            let message = "--force-stop goes with --consistency stop: nothing else stops a guest";
            return Err(Failure::new(Exit::Usage, message));
        }
        (mode, false) => mode.map_or_else(Default::default, SnapshotMode::from),
    };
    Ok(mode.into())
}

/// imaged has another working directory, so it is told whole paths.
pub(super) fn absolute(option: &str, path: &Path) -> Result<String, Failure> {
    let wrong =
        |why: &str| Failure::new(Exit::Usage, format!("{option} {}: {why}", path.display()));
    let path = std::path::absolute(path).map_err(|error| wrong("not a path").cause(error))?;
    path.into_os_string().into_string().map_err(|_| wrong("not UTF-8, which the API needs"))
}

async fn list(mut session: Session<'_, '_>, args: ImageList) -> Result<(), Failure> {
    let client = session.client.clone();
    let wanted = pb::ListImagesRequest {
        compartment_id: args.compartment_id.unwrap_or_default(),
        display_name: args.display_name.unwrap_or_default(),
        operating_system: args.operating_system.unwrap_or_default(),
        operating_system_version: args.operating_system_version.unwrap_or_default(),
        store: args.store.unwrap_or_default(),
        lifecycle_state: args
            .lifecycle_state
            .map_or_else(Default::default, |state| pb::image::LifecycleState::from(state).into()),
        sort_by: args
            .sort_by
            .map_or_else(Default::default, |by| pb::list_images_request::SortBy::from(by).into()),
        sort_order: args.sort_order.map_or_else(Default::default, |order| {
            pb::list_images_request::SortOrder::from(order).into()
        }),
        ..Default::default()
    };
    let silent = RefCell::new(BTreeMap::new());
    let page = pages(args.paging, async |limit, page| {
        let request = pb::ListImagesRequest { limit, page, ..wanted.clone() };
        let answer = client.call(client.images().list_images(request)).await?;
        let stores = answer.silent_stores.into_iter();
        silent.borrow_mut().extend(stores.map(|store| (store.name, store.problem)));
        Ok(Page { items: answer.items, next: answer.next_page })
    })
    .await?;
    for (name, problem) in silent.into_inner() {
        let problem = words::in_one_line(&problem);
        session.console.tell(&format!("the images of store {name:?} are missing: {problem}"));
    }
    session.print_list(
        &page,
        "images",
        |items| json::document(json::list(items, json::image), [("opc-next-page", &page.next)]),
        table::images,
    )
}

async fn delete(session: Session<'_, '_>, image_id: String) -> Result<(), Failure> {
    let client = session.client.clone();
    let request = pb::DeleteImageRequest { image_id: image_id.clone() };
    let answer = client.call(client.images().delete_image(request)).await?;
    if answer.keeps_versions {
        session.console.tell(
            "its store keeps old versions, and with them its bytes: remove them, or give the \
             bucket a lifecycle rule that does",
        );
    }
    // oci prints nothing; a script reads nothing.
    if session.output == Output::Table {
        session.console.print(&format!("deleted {image_id}"))?;
    }
    Ok(())
}

async fn rehearse(mut session: Session<'_, '_>, args: ImageCreate) -> Result<(), Failure> {
    let client = session.client.clone();
    let request = pb::RehearseImageRequest {
        // Required with --rehearse.
        instance_id: args.instance_id.unwrap_or_default(),
        snapshot_mode: snapshot_mode(args.consistency, args.force_stop)?,
        retry_token: token(args.retry_token)?,
    };
    let token = request.retry_token.clone();
    let work = client
        .call_twice(async || client.images().rehearse_image(request.clone()).await)
        .await
        .map_err(|failure| ask_again(failure, &token))?;
    let until = WaitFor::earliest(&args.wait.wait_for_state).unwrap_or(Until::Ended);
    let limit = Some(Duration::from_secs(args.wait.max_wait_seconds));
    let work = waited(&mut session, work, until, limit).await?;
    match Failure::of_work(&work) {
        Some(failure) => Err(failure),
        None => work_request::print(&mut session, &work),
    }
}

async fn verify(session: Session<'_, '_>, args: ImageVerify) -> Result<(), Failure> {
    let (client, image_id) = (session.client.clone(), args.image_id);
    let call = async |retry_token| {
        let request = pb::VerifyImageRequest { image_id: image_id.clone(), retry_token };
        client.images().verify_image(request).await
    };
    let told = |_: &_| {
        format!("{image_id} is intact: its content and its object have the digests of its manifest")
    };
    long::ask(session, args.asking, call, told).await
}
