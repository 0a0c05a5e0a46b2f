use std::path::Path;

use super::*;
use crate::model::work_request::{Phase, Progress};

fn request() -> pb::CreateImageRequest {
    pb::CreateImageRequest {
        source: Some(pb::create_image_request::Source::InstanceId("web-3".into())),
        ..pb::CreateImageRequest::default()
    }
}

fn create(request: pb::CreateImageRequest) -> Result<CreateImage> {
    create_image(request, "uid 0 (root)".into())
}

#[test]
fn what_is_left_out_has_the_documented_default() {
    let wanted = create(request()).unwrap();
    assert!(matches!(wanted.source, Source::Instance(name) if name == "web-3"));
    assert_eq!(wanted.launch_mode, LaunchMode::Paravirtualized);
    assert_eq!(wanted.compression, Compression::Zstd);
    assert_eq!(wanted.display_name, None);
    assert_eq!(wanted.compartment_id, None);
    assert_eq!(wanted.retry_token, None);
    assert_eq!(wanted.requested_by, "uid 0 (root)");
}

#[test]
fn each_bad_field_is_named() {
    type Spoil = fn(&mut pb::CreateImageRequest);
    let volume = |path: &str| Some(pb::create_image_request::Source::BootVolume(path.into()));
    let cases: [(&str, Spoil); 9] = [
        ("instance_id", |r| r.source = None),
        ("instance_id", |r| {
            r.source = Some(pb::create_image_request::Source::InstanceId(String::new()));
        }),
        ("display_name", |r| r.display_name = "x".repeat(256)),
        ("display_name", |r| r.display_name = "a\x1b[31mb".into()),
        ("compartment_id", |r| r.compartment_id = "../x".into()),
        ("launch_mode", |r| r.launch_mode = 99),
        ("compression", |r| r.compression = -1),
        ("retry_token", |r| r.retry_token = "x".repeat(65)),
        ("freeform_tags", |r| drop(r.freeform_tags.insert(String::new(), "x".into()))),
    ];
    for (field, spoil) in cases {
        let mut request = request();
        spoil(&mut request);
        assert_eq!(create(request).unwrap_err().field_name(), Some(field));
    }
    for path in ["", "disk.raw", "/dev/vg\0/x"] {
        let request = pb::CreateImageRequest { source: volume(path), ..request() };
        assert_eq!(create(request).unwrap_err().field_name(), Some("boot_volume"), "{path:?}");
    }
    let request = pb::CreateImageRequest { source: volume("/dev/vg0/x"), ..request() };
    let source = create(request).unwrap().source;
    assert!(matches!(source, Source::BootVolume(path) if path == Path::new("/dev/vg0/x")));
}

#[test]
fn names_of_255_characters_of_any_script_are_taken() {
    let request = pb::CreateImageRequest { display_name: "像".repeat(255), ..request() };
    assert_eq!(create(request).unwrap().display_name, Some("像".repeat(255)));
}

fn work_request(status: Status, read: u64) -> WorkRequest {
    let now = Timestamp::from_millis(1_700_000_000_123);
    WorkRequest {
        id: WorkRequestId::generate(now, 1),
        operation: Operation::CreateImage,
        status,
        compartment_id: "default".parse().unwrap(),
        resources: Vec::new(),
        phase: Phase::Seal,
        progress: Progress { total: 100, read, per_second: 10, ..Progress::default() },
        time_accepted: now,
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
fn only_success_is_a_hundred_percent() {
    let percent = |status, read| pb::WorkRequest::from(work_request(status, read)).percent_complete;
    assert!(percent(Status::InProgress, 100) < 100.0);
    assert!(percent(Status::Failed, 100) < 100.0);
    assert_eq!(percent(Status::InProgress, 50).to_string(), "50");
    assert_eq!(percent(Status::Succeeded, 0).to_string(), "100");
}

#[test]
fn times_and_phases_survive() {
    let pb = pb::WorkRequest::from(work_request(Status::InProgress, 40));
    assert_eq!(pb.time_accepted, Some(PbTimestamp { seconds: 1_700_000_000, nanos: 123_000_000 }));
    assert_eq!((pb.phase.as_str(), pb.time_started), ("seal", None));
    assert_eq!(pb.progress.unwrap().eta_seconds, Some(6));
    let done = pb::WorkRequest::from(work_request(Status::Canceled, 40));
    assert_eq!(done.progress.unwrap().eta_seconds, None);
}
