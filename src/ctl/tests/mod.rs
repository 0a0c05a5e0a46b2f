//! Whole invocations against a twin of imaged.

mod samples;
mod twin;

pub(super) use samples::*;

use std::{collections::HashMap, io, path::Path, sync::atomic::Ordering, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::{Console, Exit, Stream};
use crate::pb;
pub(super) use twin::{Script, Step, Twin};

struct Ran {
    exit: Exit,
    out: String,
    err: String,
}

fn run_with(socket: &Path, line: &str, answer: &str, input_is: Stream) -> Ran {
    let socket = socket.to_str().unwrap();
    let mut args = vec!["imagectl".into(), "--socket".into(), socket.into()];
    args.extend(line.split_whitespace().map(Into::into));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut input = io::Cursor::new(answer.to_owned());
    let exit = super::run(
        args,
        &mut Console {
            input: &mut input,
            out: &mut out,
            err: &mut err,
            input_is,
            err_is: Stream::Other,
            width: None,
        },
    );
    let text = |bytes| String::from_utf8(bytes).unwrap().replace(socket, "SOCKET");
    Ran { exit, out: text(out), err: text(err) }
}

fn run(socket: &Path, line: &str) -> Ran {
    run_with(socket, line, "", Stream::Other)
}

fn twin() -> Twin {
    Twin::start(Script::default())
}

fn watching(watches: impl IntoIterator<Item = Vec<Step>>) -> Twin {
    let script = Script::default();
    script.watches.lock().unwrap().extend(watches);
    Twin::start(script)
}

fn refusing(status: Status) -> Twin {
    let script = Script::default();
    *script.refusal.lock().unwrap() = Some(status);
    Twin::start(script)
}

#[test]
fn create_without_waiting_names_the_image_and_its_work_request() {
    let twin = twin();
    let ran = run(&twin.socket(), "image create --instance-id web-3 --display-name golden");
    assert_eq!(ran.exit, Exit::Success);
    insta::assert_snapshot!(ran.out, @"
    display-name     golden
    id               ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa
    lifecycle-state  PROVISIONING
    work-request-id  ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
    ");
    insta::assert_snapshot!(ran.err, @"watch: imagectl --socket SOCKET work-request watch --work-request-id ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb");
}

#[test]
fn create_passes_on_what_was_asked() {
    let twin = twin();
    let line = "image create --boot-volume disk.img --freeform-tags {\"env\":\"prod\"} \
                --launch-mode emulated --compression DEFLATE --compartment-id c --output json";
    let ran = run(&twin.socket(), line);
    assert_eq!(ran.exit, Exit::Success, "{}", ran.err);
    let answer: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(answer["data"]["lifecycle-state"], "PROVISIONING");
    assert_eq!(answer["opc-work-request-id"], WORK_ID);

    let creates = twin.script.creates.lock().unwrap();
    let [request] = &creates[..] else { panic!("{creates:?}") };
    let path = std::env::current_dir().unwrap().join("disk.img");
    let path = path.into_os_string().into_string().unwrap();
    assert_eq!(request.source, Some(pb::create_image_request::Source::BootVolume(path)));
    assert_eq!(request.freeform_tags, HashMap::from([("env".into(), "prod".into())]));
    assert_eq!(request.launch_mode(), pb::LaunchMode::Emulated);
    assert_eq!(request.compression(), pb::Compression::Deflate);
    assert_eq!(request.compartment_id, "c");
    assert!((20..=64).contains(&request.retry_token.len()), "{}", request.retry_token);
}

#[test]
fn each_invocation_has_a_token_of_its_own_unless_one_is_given() {
    let twin = twin();
    for end in ["", "", " --retry-token mine"] {
        run(&twin.socket(), &format!("image create --instance-id web-3{end}"));
    }
    let creates = twin.script.creates.lock().unwrap();
    assert_ne!(creates[0].retry_token, creates[1].retry_token);
    assert_eq!(creates[2].retry_token, "mine");
}

#[test]
fn a_create_whose_connection_breaks_is_asked_once_more_with_the_same_token() {
    let script = Script { cut_creates: 1.into(), ..Default::default() };
    let twin = Twin::start(script);
    let ran = run(&twin.socket(), "image create --instance-id web-3");
    assert_eq!(ran.exit, Exit::Success, "{}", ran.err);
    let creates = twin.script.creates.lock().unwrap();
    assert_eq!(creates.len(), 2);
    assert_eq!(creates[0], creates[1]);
}

#[test]
fn a_create_whose_connection_breaks_twice_tells_its_token() {
    let script = Script { cut_creates: 2.into(), ..Default::default() };
    let twin = Twin::start(script);
    let ran = run(&twin.socket(), "image create --instance-id web-3 --retry-token mine");
    assert_eq!(ran.exit, Exit::Unreachable);
    assert_eq!(twin.script.creates.lock().unwrap().len(), 2);
    // How it broke depends on who noticed first.
    let err: Vec<_> = ran.err.lines().filter(|line| !line.starts_with("  0: ")).collect();
    insta::assert_snapshot!(err.join("\n"), @"
    imagectl: the connection to imaged broke
      help: see what imaged says: `journalctl -u imaged`
      help: ask again with --retry-token mine: what imaged took already is not done twice
    ");
}

#[test]
fn create_waits_and_shows_phases_on_standard_error() {
    let twin = watching([vec![
        Step::send(accepted()),
        Step::send(reading()),
        Step::send(reading()),
        Step::send(succeeded()),
    ]]);
    let ran = run(
        &twin.socket(),
        "image create --instance-id web-3 --wait-for-state AVAILABLE --output json",
    );
    assert_eq!(ran.exit, Exit::Success);
    let answer: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(answer["data"]["lifecycle-state"], "AVAILABLE");
    assert_eq!(answer["opc-work-request-id"], WORK_ID);
    insta::assert_snapshot!(ran.err, @"
    work request ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
    queued
    the volume is read through io_uring
    read        45%  1.81 GiB of 4.00 GiB  610 MiB/s  3s left
    create image succeeded in 11s: 3.00 GiB read, 1.00 GiB of zeroes skipped, 1.12 GiB stored
    ");
}

#[test]
fn a_wait_for_in_progress_ends_when_the_work_begins() {
    let twin = watching([vec![Step::send(accepted()), Step::send(reading()), Step::Hang]]);
    let ran = run(&twin.socket(), "image create --instance-id web-3 --wait-for-state IN_PROGRESS");
    assert_eq!(ran.exit, Exit::Success, "{}", ran.err);
}

#[test]
fn work_that_fails_is_reported_with_its_causes() {
    let twin = watching([vec![Step::send(reading()), Step::send(failed())]]);
    let ran = run(&twin.socket(), "image create --instance-id web-3 --wait-for-state SUCCEEDED");
    assert_eq!(ran.exit, Exit::Failed);
    assert_eq!(ran.out, "");
    insta::assert_snapshot!(ran.err, @r#"
    work request ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
    the volume is read through io_uring
    read        45%  1.81 GiB of 4.00 GiB  610 MiB/s  3s left
    imagectl: image "golden" was not made
      0: the store "local" has 3.00 MiB left
      1: No space left on device (os error 28)
      reason: STORE_FULL
      help: free some space or name another store
    "#);
}

#[test]
fn work_that_was_canceled_has_an_exit_code() {
    let canceled =
        pb::WorkRequest { status: pb::work_request::Status::Canceled.into(), ..reading() };
    let twin = watching([vec![Step::send(canceled)]]);
    let ran = run(&twin.socket(), &format!("work-request watch --work-request-id {WORK_ID}"));
    assert_eq!(ran.exit, Exit::Canceled);
    insta::assert_snapshot!(ran.err, @"
    the volume is read through io_uring
    imagectl: the work request was canceled
    ");
}

#[test]
fn a_wait_that_is_too_long_ends_and_says_how_to_go_on() {
    let twin = watching([vec![Step::send(reading()), Step::Hang]]);
    let ran = run(
        &twin.socket(),
        "image create --instance-id web-3 --wait-for-state AVAILABLE --max-wait-seconds 1",
    );
    assert_eq!(ran.exit, Exit::TimedOut);
    assert!(ran.out.contains(IMAGE_ID), "{}", ran.out);
    insta::assert_snapshot!(ran.err, @"
    work request ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
    the volume is read through io_uring
    read        45%  1.81 GiB of 4.00 GiB  610 MiB/s  3s left
    imagectl: waited 1s; the work goes on
      watch: imagectl --socket SOCKET work-request watch --work-request-id ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
      cancel: imagectl --socket SOCKET work-request cancel --work-request-id ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
    ");
}

#[test]
fn a_watch_survives_connections_that_break_and_streams_that_end() {
    let twin = watching([
        vec![Step::send(accepted()), Step::Cut],
        vec![Step::send(reading())],
        vec![Step::send(succeeded())],
    ]);
    let ran = run(&twin.socket(), &format!("work-request watch --work-request-id {WORK_ID}"));
    assert_eq!(ran.exit, Exit::Success, "{}", ran.err);
    assert_eq!(twin.script.watched.load(Ordering::SeqCst), 3);
    insta::assert_snapshot!(ran.err, @"
    queued
    the connection to imaged broke; trying to get it back
    the volume is read through io_uring
    read        45%  1.81 GiB of 4.00 GiB  610 MiB/s  3s left
    the connection to imaged broke; trying to get it back
    create image succeeded in 11s: 3.00 GiB read, 1.00 GiB of zeroes skipped, 1.12 GiB stored
    ");
}

#[test]
fn only_an_instance_is_rehearsed() {
    let ran = run(Path::new("/nowhere"), "image create --rehearse --boot-volume /dev/vdb");
    assert_eq!(ran.exit, Exit::Usage);
    insta::assert_snapshot!(ran.err.lines().next().unwrap_or_default(), @"error: the argument '--rehearse' cannot be used with '--boot-volume <PATH>'");
}

#[test]
fn a_verified_image_is_intact() {
    let verified = pb::WorkRequest {
        operation_type: pb::work_request::OperationType::VerifyImage.into(),
        ..succeeded()
    };
    let twin = watching([vec![Step::send(verified)]]);
    let ran = run(&twin.socket(), &format!("image verify --image-id {IMAGE_ID}"));
    assert_eq!(ran.exit, Exit::Success, "{}", ran.err);
    insta::assert_snapshot!(ran.out, @"ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa is intact: its content and its object have the digests of its manifest");
}

#[test]
fn a_damaged_image_has_an_exit_code_of_its_own() {
    let twin = watching([vec![Step::send(corrupt())]]);
    let ran = run(&twin.socket(), &format!("image verify --image-id {IMAGE_ID}"));
    assert_eq!(ran.exit, Exit::VerificationFailed);
    assert_eq!(ran.out, "");
    insta::assert_snapshot!(ran.err, @r#"
    work request ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
    the volume is read through io_uring
    imagectl: part 3 of image "golden" is not what was stored
      reason: IMAGE_CORRUPT
    "#);
}

#[test]
fn an_export_says_where_the_object_is() {
    let location = "the object is at https://s3/images/web: 3.00 GiB (3221225472 bytes), ETag x";
    let mut exported = pb::WorkRequest {
        operation_type: pb::work_request::OperationType::ExportImage.into(),
        ..succeeded()
    };
    exported.logs = vec![pb::WorkRequestLogEntry { message: location.into(), timestamp: None }];
    let twin = watching([vec![Step::send(exported)]]);
    let line = format!("image export to-object --image-id {IMAGE_ID} --store far --name web");
    let ran = run(&twin.socket(), &line);
    assert_eq!((ran.exit, &*ran.out), (Exit::Success, &*format!("{location}\n")), "{}", ran.err);
    let exports = twin.script.exports.lock().unwrap();
    let object = pb::ExportToObject { store: "far".into(), name: "web".into() };
    let wanted = pb::export_image_request::Destination::Object(object);
    assert_eq!(exports[0].destination, Some(wanted));
    assert!(!exports[0].overwrite);
}

#[test]
fn a_secret_url_comes_from_standard_input_or_a_file() {
    use pb::export_image_request::Destination::Uri;
    let twin = watching((0..3).map(|_| vec![Step::send(succeeded())]));
    let url = "https://os/p/hush/n/ns/b/images/o/web";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{url}\n")).unwrap();
    let from_file = format!("file://{}", file.path().display());
    let told: Vec<_> = ["-", &from_file, url, "file:///nowhere/url"]
        .map(|uri| {
            let line = format!("image export to-object-uri --image-id {IMAGE_ID} --uri {uri}");
            let ran = run_with(&twin.socket(), &line, &format!("{url}\n"), Stream::Other);
            assert!(!ran.err.contains("hush"), "{}", ran.err);
            ran.err.lines().next().unwrap_or_default().to_owned()
        })
        .into();
    insta::assert_snapshot!(told.join("\n"), @"
    work request ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
    work request ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
    the URL could be seen by everyone on this host while imagectl runs: give it as file://PATH, or as - on standard input
    imagectl: the URL cannot be read from /nowhere/url
    ");
    let exports = twin.script.exports.lock().unwrap();
    assert_eq!(exports.len(), 3);
    for export in &exports[..] {
        assert!(
            export.destination == Some(Uri(url.into())) && !format!("{export:?}").contains("hush")
        );
    }
}

/// An object of two parts, as it is read.
fn object() -> Vec<Result<pb::ReadImageObjectResponse, Status>> {
    use sha2::{Digest, Sha256};
    let parts: [&[u8]; 2] = [b"qcow", b"2"];
    let mut whole = Sha256::new();
    parts.iter().for_each(|part| whole.update(Sha256::digest(part)));
    let object_digest = whole.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let first =
        pb::ReadImageObjectResponse { object_size_bytes: 5, object_digest, ..Default::default() };
    let further = |data: &[u8], ends_part| pb::ReadImageObjectResponse {
        data: data.into(),
        ends_part,
        ..Default::default()
    };
    vec![Ok(first), Ok(further(b"qc", false)), Ok(further(b"ow", true)), Ok(further(b"2", true))]
}

fn read_to_file(twin: &Twin, dir: &Path, more: &str) -> Ran {
    let file = dir.join("web.qcow2");
    let line =
        format!("image export to-file --image-id {IMAGE_ID} --file {} {more}", file.display());
    let mut ran = run(&twin.socket(), &line);
    for text in [&mut ran.out, &mut ran.err] {
        *text = text.replace(dir.to_str().unwrap(), "/srv");
        // What is told on the way.
        *text =
            text.lines().filter(|line| !line.starts_with("export ")).collect::<Vec<_>>().join("\n");
    }
    ran
}

#[test]
fn a_file_is_the_image_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let files = || std::fs::read_dir(dir.path()).unwrap().count();
    let reading = |messages| {
        let script = Script::default();
        *script.object.lock().unwrap() = messages;
        Twin::start(script)
    };
    let mut other = object();
    other[3].as_mut().unwrap().data = b"3".to_vec();
    let short = object()[..3].to_vec();
    let broken = [&object()[..3], &[Err(Status::data_loss("the object is another"))]].concat();
    for (messages, exit) in [
        (other, Exit::VerificationFailed),
        (short, Exit::VerificationFailed),
        (broken, Exit::VerificationFailed),
        (vec![Err(Status::unavailable("away"))], Exit::Failed),
    ] {
        let ran = read_to_file(&reading(messages), dir.path(), "");
        assert_eq!((ran.exit, files()), (exit, 0), "{}", ran.err);
    }
    let twin = reading(object());
    let ran = read_to_file(&twin, dir.path(), "");
    insta::assert_snapshot!(ran.out + &ran.err, @"/srv/web.qcow2 is the image: 5 B, checked");
    assert_eq!(std::fs::read(dir.path().join("web.qcow2")).unwrap(), b"qcow2");

    let again = read_to_file(&twin, dir.path(), "");
    assert_eq!(again.exit, Exit::Failed);
    insta::assert_snapshot!(again.err, @"
    imagectl: the file /srv/web.qcow2 cannot be written
      0: File exists (os error 17)
      help: choose another name, or say --force to replace it
    ");
    let forced = read_to_file(&twin, dir.path(), "--force --output json");
    assert_eq!((forced.exit, files()), (Exit::Success, 1), "{}", forced.err);
    insta::assert_snapshot!(forced.out, @r#"
    {
      "data": {
        "file": "/srv/web.qcow2",
        "object-digest": "263435256b40795e74f35926e784564317be51ae46e5b5aebac19b3e16080cdd",
        "size-bytes": 5
      }
    }
    "#);
}

#[test]
fn an_image_that_cannot_be_read_back_is_not_called_damaged() {
    let mut unread = corrupt();
    unread.errors[0].code = "STORE_UNAVAILABLE".into();
    let twin = watching([vec![Step::send(unread)]]);
    let ran = run(&twin.socket(), &format!("image verify --image-id {IMAGE_ID}"));
    assert_eq!(ran.exit, Exit::Failed);
}

#[test]
fn a_list_says_that_there_is_more() {
    let twin = twin();
    let ran =
        run(&twin.socket(), "image list --limit 1 --lifecycle-state available --sort-order asc");
    assert_eq!(ran.exit, Exit::Success);
    insta::assert_snapshot!(ran.err, @"there are more: --all, or --page second");
    let lists = twin.script.lists.lock().unwrap();
    assert_eq!(lists[0].limit, 1);
    assert_eq!(lists[0].lifecycle_state(), pb::image::LifecycleState::Available);
    assert_eq!(lists[0].sort_order(), pb::list_images_request::SortOrder::Asc);
}

#[test]
fn a_list_of_all_asks_for_every_page() {
    let twin = twin();
    let ran = run(&twin.socket(), "image list --all --output json");
    let answer: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(answer["data"].as_array().unwrap().len(), 2);
    assert_eq!(answer.get("opc-next-page"), None);

    let ran = run(&twin.socket(), "image list --output json");
    let answer: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(answer["opc-next-page"], "second");
}

#[test]
fn an_empty_list_is_said_to_people_and_empty_for_scripts() {
    let twin = twin();
    let ran = run(&twin.socket(), "instance list --compartment-id other");
    assert_eq!((ran.exit, ran.out.as_str()), (Exit::Success, ""));
    assert!(ran.err.starts_with("no instances"), "{}", ran.err);
    let ran = run(&twin.socket(), "instance list --compartment-id other --output json");
    assert_eq!(ran.out, "{\n  \"data\": []\n}\n");
    assert_eq!(ran.err, "");
}

#[test]
fn the_remaining_verbs_answer() {
    let twin = twin();
    for (line, expected) in [
        ("instance list", "web-3"),
        ("instance get --instance-id web-3", "vm@web-3.service"),
        ("image get --image-id x", "volume-size"),
        ("work-request list", "FAILED"),
        ("work-request get --work-request-id x", "45%"),
        ("work-request cancel --work-request-id x", "CANCELING"),
        ("host get", "io_uring"),
        ("store list", "local (default)"),
        ("store check local", "yes"),
        ("store gc local", "1 dead upload"),
    ] {
        let ran = run(&twin.socket(), line);
        assert_eq!((ran.exit, ran.err.as_str()), (Exit::Success, ""), "{line}");
        assert!(ran.out.contains(expected), "{line}: {}", ran.out);
        let ran = run(&twin.socket(), &format!("{line} --output json"));
        let answer: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        assert!(answer["data"].is_object() || answer["data"].is_array(), "{line}");
    }
}

#[test]
fn the_iscsi_of_a_guest_is_a_table_and_what_it_remembers() {
    let line = "instance iscsi list --instance-id web-3";
    let twin = twin();
    let ran = run(&twin.socket(), line);
    assert_eq!(ran.exit, Exit::Success);
    insta::assert_snapshot!(format!("{}{}", ran.out, ran.err), @"
    STATE       CHAP  AT BOOT  DEVICES       USED AS      PORTAL            TARGET
    LOGGED_IN   yes   yes      sdb, vg-data  /data (xfs)  169.254.2.2:3260  iqn.2015-12.com.oracleiaas:8d0f
    LOGGED_OUT  no    no       -             -            [fd00::2]:3260    iqn.2015-12.com.oracleiaas:11c2
    the guest remembers the targets of 169.254.2.2:3260
    ");
    let ran = run(&twin.socket(), &format!("{line} --output json"));
    assert_eq!((ran.exit, ran.err.as_str()), (Exit::Success, ""));
    let answer: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let [first, _] = answer["data"]["attachments"].as_array().unwrap().as_slice() else {
        panic!("{answer}")
    };
    assert_eq!(first["devices"][1]["kind"], "LOGICAL_VOLUME");
    assert_eq!(first["devices"][1]["uses"][0], "/data (xfs)");
    assert_eq!(answer["data"]["discovery-portals"][0], "169.254.2.2:3260");
}

#[test]
fn a_store_that_fails_a_check_says_what_lacks() {
    let ran = run(&twin().socket(), "store check bad");
    assert_eq!(ran.exit, Exit::Failed);
    insta::assert_snapshot!(format!("{}{}", ran.out, ran.err), @r#"
    STEP  WORKS
    read  yes
    list  NO
    imagectl: the store "bad" cannot be used
      0: it cannot list
      1: 403 AccessDenied
      help: give it rights
    "#);
}

#[test]
fn a_delete_is_confirmed_or_forced() {
    let twin = twin();
    let line = format!("image delete --image-id {IMAGE_ID}");
    let asked = |answer| run_with(&twin.socket(), &line, answer, Stream::Terminal);
    let deleted = || twin.script.deletes.lock().unwrap().len();

    let ran = asked("n\n");
    assert_eq!((ran.exit, deleted()), (Exit::Canceled, 0));
    insta::assert_snapshot!(ran.err, @"Delete the image ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa? This cannot be undone. [y/N]: imagectl: nothing was done");
    assert_eq!((asked("").exit, deleted()), (Exit::Canceled, 0));

    let ran = run(&twin.socket(), &line);
    assert_eq!((ran.exit, deleted()), (Exit::Usage, 0));
    insta::assert_snapshot!(ran.err, @"
    imagectl: the image ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa was not deleted: no terminal to ask for confirmation
      help: say --force to delete without being asked
    ");

    assert_eq!((asked("y\n").exit, deleted()), (Exit::Success, 1));
    let ran = run(&twin.socket(), &format!("{line} --force"));
    assert_eq!((ran.exit, deleted()), (Exit::Success, 2));
}

#[test]
fn a_refusal_shows_all_that_imaged_tells() {
    let mut details = ErrorDetails::new();
    details.set_error_info(
        "VOLUME_HELD",
        "imaged",
        HashMap::from([
            (
                "causes".into(),
                "/dev/dm-3 is held by qemu (pid 4711)\nDevice or resource busy (os error 16)"
                    .into(),
            ),
            ("help".into(), "stop the instance first".into()),
        ]),
    );
    details.set_retry_info(Some(Duration::from_secs(90)));
    let message = "volume \"/dev/vg0/web-3\" cannot be read";
    let twin = refusing(Status::with_error_details(Code::FailedPrecondition, message, details));
    let ran = run(&twin.socket(), "image create --instance-id web-3");
    assert_eq!((ran.exit, ran.out.as_str()), (Exit::Failed, ""));
    insta::assert_snapshot!(ran.err, @r#"
    imagectl: volume "/dev/vg0/web-3" cannot be read
      0: /dev/dm-3 is held by qemu (pid 4711)
      1: Device or resource busy (os error 16)
      reason: VOLUME_HELD
      retry: in 1m30s
      help: stop the instance first
    "#);
}

#[test]
fn a_wrong_field_is_named_as_the_option() {
    let mut details = ErrorDetails::new();
    details.add_bad_request_violation(
        "display_name",
        "it has 300 characters, at most 255 are allowed",
    );
    details.add_bad_request_violation("freeform_tags.env", "");
    let twin = refusing(Status::with_error_details(
        Code::InvalidArgument,
        "the image cannot be made",
        details,
    ));
    let ran = run(&twin.socket(), "image create --instance-id web-3");
    assert_eq!(ran.exit, Exit::Failed);
    insta::assert_snapshot!(ran.err, @"
    imagectl: the image cannot be made
      --display-name: it has 300 characters, at most 255 are allowed
      at --freeform-tags
    ");
}

#[test]
fn a_refused_watch_is_not_tried_again() {
    let twin = refusing(Status::not_found("there is no work request \"x\""));
    let ran = run(&twin.socket(), "work-request watch --work-request-id x");
    assert_eq!(ran.exit, Exit::Failed);
    insta::assert_snapshot!(ran.err, @r#"imagectl: there is no work request "x""#);
}

#[test]
fn what_imaged_sends_cannot_drive_a_terminal() {
    let twin = refusing(Status::not_found("no \u{1b}[2J\u{7}image"));
    let ran = run(&twin.socket(), "image get --image-id x");
    assert_eq!(ran.err, "imagectl: no \\u{1b}[2J\\u{7}image\n");
}

#[test]
fn a_missing_socket_is_told_from_one_that_was_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("imaged.sock");
    let missing = run(&socket, "image list");
    assert_eq!(missing.exit, Exit::Unreachable);
    insta::assert_snapshot!(missing.err, @"
    imagectl: cannot connect to imaged at SOCKET
      0: No such file or directory (os error 2)
      help: imaged is not running, or listens elsewhere: see `systemctl status imaged`, or name the socket by --socket
    ");

    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let refused = run(&socket, "image list");
    assert_eq!(refused.exit, Exit::Unreachable);
    insta::assert_snapshot!(refused.err, @"
    imagectl: cannot connect to imaged at SOCKET
      0: Connection refused (os error 111)
      help: imaged is not running, it left its socket behind: see `systemctl status imaged`
    ");
}

#[test]
fn man_pages_and_completions_come_from_the_same_definitions() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man1");
    let ran = run(Path::new("/nowhere"), &format!("man {}", pages.display()));
    assert_eq!(ran.exit, Exit::Success, "{}", ran.err);
    let mut names: Vec<_> = std::fs::read_dir(&pages)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    insta::assert_snapshot!(names.join("\n"), @"
    imagectl-completions.1
    imagectl-host-drain.1
    imagectl-host-get.1
    imagectl-host-resume.1
    imagectl-host-update.1
    imagectl-host.1
    imagectl-image-create.1
    imagectl-image-delete.1
    imagectl-image-export-to-file.1
    imagectl-image-export-to-object-uri.1
    imagectl-image-export-to-object.1
    imagectl-image-export.1
    imagectl-image-get.1
    imagectl-image-list.1
    imagectl-image-verify.1
    imagectl-image.1
    imagectl-instance-get.1
    imagectl-instance-iscsi-disconnect.1
    imagectl-instance-iscsi-list.1
    imagectl-instance-iscsi-reconnect.1
    imagectl-instance-iscsi.1
    imagectl-instance-list.1
    imagectl-instance.1
    imagectl-man.1
    imagectl-store-check.1
    imagectl-store-gc.1
    imagectl-store-list.1
    imagectl-store.1
    imagectl-volume-restore.1
    imagectl-volume.1
    imagectl-work-request-cancel.1
    imagectl-work-request-get.1
    imagectl-work-request-list.1
    imagectl-work-request-update.1
    imagectl-work-request-watch.1
    imagectl-work-request.1
    imagectl.1
    ");
    let page = std::fs::read_to_string(pages.join("imagectl-image-create.1")).unwrap();
    for expected in ["boot\\-volume", "EXIT STATUS", "IMAGED_SOCKET"] {
        assert!(page.contains(expected), "{expected}: {page}");
    }

    for shell in ["bash", "zsh", "fish"] {
        let ran = run(Path::new("/nowhere"), &format!("completions {shell}"));
        assert_eq!(ran.exit, Exit::Success);
        assert!(ran.out.contains("max-wait-seconds"), "{shell}");
    }
}

#[test]
fn help_lists_every_exit_code() {
    let ran = run(Path::new("/nowhere"), "--help");
    assert_eq!((ran.exit, ran.err.as_str()), (Exit::Success, ""));
    for exit in Exit::ALL {
        let line = format!("  {:<3}  {}\n", exit.code(), exit.meaning());
        assert!(ran.out.contains(&line), "{line}");
    }
}

#[test]
fn a_wrong_command_line_is_a_usage_error() {
    for line in [
        "image create",
        "image create --instance-id a --boot-volume b",
        "image create --instance-id a --freeform-tags [1]",
        "image create --instance-id a --on-read-error skip",
        "image create --instance-id a --max-wait-seconds 5",
        "image create --instance-id a --retry-token 12345678901234567890123456789012345678901234567890123456789012345",
        "image list --limit 0",
        "image list --limit 1001",
        "image list --all --page x",
        "image get",
        "volume inspect",
    ] {
        let ran = run(Path::new("/nowhere"), line);
        assert_eq!((ran.exit, ran.out.as_str()), (Exit::Usage, ""), "{line}");
        assert!(ran.err.starts_with("error: "), "{line}: {}", ran.err);
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    struct Gone;
    impl io::Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let twin = twin();
    let args =
        ["imagectl", "--socket", twin.socket().to_str().unwrap(), "image", "list"].map(Into::into);
    let mut err = Vec::new();
    let exit = super::run(
        args,
        &mut Console {
            input: &mut io::empty(),
            out: &mut Gone,
            err: &mut err,
            input_is: Stream::Other,
            err_is: Stream::Other,
            width: None,
        },
    );
    assert_eq!(exit, Exit::Success);
    assert!(!String::from_utf8(err).unwrap().contains("imagectl:"));
}
