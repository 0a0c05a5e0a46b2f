//! Things that imaged could answer.

use prost_types::Timestamp;

use crate::pb::{self, work_request::Status};

pub const IMAGE_ID: &str = "ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa";
pub const WORK_ID: &str = "ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb";
pub const INSTANCE_ID: &str = "ocid1.instance.imaged..01k6dz3s20cccccccccccccccc";

/// 2026-11-21 08:45:16 UTC.
pub const CREATED: i64 = 1_795_250_716;

/// Three hours later.
pub fn now() -> crate::model::Timestamp {
    crate::model::Timestamp::from_millis((CREATED.unsigned_abs() + 3 * 3600) * 1000)
}

pub fn at(seconds: i64, nanos: i32) -> Option<Timestamp> {
    Some(Timestamp { seconds: CREATED + seconds, nanos })
}

pub fn image() -> pb::Image {
    let step = |phase: &str, seconds, nanos| pb::PhaseTime {
        phase: phase.into(),
        time_started: at(seconds, nanos),
    };
    pb::Image {
        lifecycle_state: pb::image::LifecycleState::Available.into(),
        size_in_mbs: 4096,
        format: "QCOW2".into(),
        virtual_size_bytes: 4 << 30,
        object_size_bytes: 1_203_765_248,
        content_digest: "1f".repeat(32),
        object_digest: "c4".repeat(32),
        time_line: vec![step("preflight", 0, 0), step("read", 0, 250_000_000), step("seal", 11, 0)],
        snapshot: pb::Snapshot::AtRest.into(),
        imaged_version: "0.1.0".into(),
        ..provisioning()
    }
}

pub fn provisioning() -> pb::Image {
    pb::Image {
        id: IMAGE_ID.into(),
        compartment_id: "ocid1.compartment.oc1..web".into(),
        display_name: "golden".into(),
        lifecycle_state: pb::image::LifecycleState::Provisioning.into(),
        create_image_allowed: true,
        operating_system: "Debian".into(),
        operating_system_version: "12".into(),
        time_created: at(0, 0),
        launch_mode: pb::LaunchMode::Paravirtualized.into(),
        launch_options: Some(pb::LaunchOptions {
            boot_volume_type: "PARAVIRTUALIZED".into(),
            firmware: "UEFI_64".into(),
            ..Default::default()
        }),
        freeform_tags: [("team", "web"), ("env", "prod")].map(|(k, v)| (k.into(), v.into())).into(),
        architecture: "x86_64".into(),
        consistency: pb::Consistency::Clean.into(),
        source_instance_id: INSTANCE_ID.into(),
        source_volume: "/dev/vg0/web-3".into(),
        store: "local".into(),
        compression: pb::Compression::Zstd.into(),
        ..Default::default()
    }
}

pub fn iscsi() -> pb::ListIscsiAttachmentsResponse {
    use pb::{iscsi_attachment::State, iscsi_device::Kind};
    let device = |name: &str, kind: Kind, mapper_name: &str, uses: &[&str]| pb::IscsiDevice {
        name: name.into(),
        kind: kind.into(),
        mapper_name: mapper_name.into(),
        size_in_bytes: 50 << 30,
        uses: uses.iter().map(|&used| used.into()).collect(),
    };
    let logged_in = pb::IscsiAttachment {
        iqn: "iqn.2015-12.com.oracleiaas:8d0f".into(),
        address: "169.254.2.2".into(),
        port: 3260,
        state: State::LoggedIn.into(),
        chap: true,
        on_record: true,
        at_boot: true,
        devices: vec![
            device("sdb", Kind::Disk, "", &[]),
            device("dm-0", Kind::LogicalVolume, "vg-data", &["/data (xfs)"]),
        ],
    };
    let on_record = pb::IscsiAttachment {
        iqn: "iqn.2015-12.com.oracleiaas:11c2".into(),
        address: "fd00::2".into(),
        port: 3260,
        state: State::LoggedOut.into(),
        on_record: true,
        ..pb::IscsiAttachment::default()
    };
    pb::ListIscsiAttachmentsResponse {
        items: vec![logged_in, on_record],
        discovery_portals: vec!["169.254.2.2:3260".into()],
        initiator_name: "iqn.1988-12.com.oracle:web-3".into(),
        has_iscsiadm: true,
    }
}

pub fn instance() -> pb::Instance {
    pb::Instance {
        id: INSTANCE_ID.into(),
        name: "web-3".into(),
        compartment_id: "ocid1.compartment.oc1..web".into(),
        lifecycle_state: pb::instance::LifecycleState::Stopped.into(),
        boot_volume: "/dev/vg0/web-3".into(),
        shape: "VM.Standard2.1".into(),
        hypervisor: "qemu".into(),
        systemd_unit: "vm@web-3.service".into(),
        operating_system: "Debian".into(),
        operating_system_version: "12".into(),
        ..Default::default()
    }
}

pub fn accepted() -> pb::WorkRequest {
    let resource = |action: pb::work_request_resource::ActionType, entity: &str, id: &str| {
        pb::WorkRequestResource {
            action_type: action.into(),
            entity_type: entity.into(),
            identifier: id.into(),
        }
    };
    use pb::work_request_resource::ActionType::{InProgress, Related};
    pb::WorkRequest {
        id: WORK_ID.into(),
        operation_type: pb::work_request::OperationType::CreateImage.into(),
        status: Status::Accepted.into(),
        compartment_id: "ocid1.compartment.oc1..web".into(),
        resources: vec![
            resource(InProgress, "image", IMAGE_ID),
            resource(Related, "volume", "/dev/vg0/web-3"),
        ],
        time_accepted: at(0, 0),
        phase: "queued".into(),
        requested_by: "uid 1000 (alice)".into(),
        ..Default::default()
    }
}

pub fn reading() -> pb::WorkRequest {
    pb::WorkRequest {
        status: Status::InProgress.into(),
        phase: "read".into(),
        percent_complete: 45.3,
        time_started: at(0, 100_000_000),
        progress: Some(pb::Progress {
            bytes_total: 4 << 30,
            bytes_read: 1_500_000_000,
            bytes_skipped: 445_628_416,
            bytes_stored: 560_000_000,
            bytes_per_second: 640_000_000,
            eta_seconds: Some(3),
        }),
        logs: vec![pb::WorkRequestLogEntry {
            message: "the volume is read through io_uring".into(),
            timestamp: at(0, 200_000_000),
        }],
        ..accepted()
    }
}

pub fn succeeded() -> pb::WorkRequest {
    pb::WorkRequest {
        status: Status::Succeeded.into(),
        phase: "done".into(),
        percent_complete: 100.0,
        time_finished: at(12, 0),
        progress: Some(pb::Progress {
            bytes_total: 4 << 30,
            bytes_read: 3 << 30,
            bytes_skipped: 1 << 30,
            bytes_stored: 1_203_765_248,
            ..Default::default()
        }),
        ..reading()
    }
}

pub fn failed() -> pb::WorkRequest {
    pb::WorkRequest {
        status: Status::Failed.into(),
        time_finished: at(5, 0),
        errors: vec![pb::WorkRequestError {
            code: "STORE_FULL".into(),
            message:
                "image \"golden\" was not made\n  0: the store \"local\" has 3.00 MiB left\n  \
                      1: No space left on device (os error 28)\n  help: free some space or name \
                      another store"
                    .into(),
            timestamp: at(5, 0),
        }],
        ..reading()
    }
}

/// Work that finds the image damaged.
pub fn corrupt() -> pb::WorkRequest {
    pb::WorkRequest {
        operation_type: pb::work_request::OperationType::VerifyImage.into(),
        errors: vec![pb::WorkRequestError {
            code: "IMAGE_CORRUPT".into(),
            message: "part 3 of image \"golden\" is not what was stored".into(),
            timestamp: at(5, 0),
        }],
        ..failed()
    }
}

pub fn host() -> pb::Host {
    pb::Host {
        hostname: "hv-17".into(),
        imaged_version: "0.1.0".into(),
        kernel_release: "6.1.0-31-amd64".into(),
        architecture: "x86_64".into(),
        features: vec![
            pb::Feature {
                name: "io_uring".into(),
                available: true,
                details: "SINGLE_ISSUER, DEFER_TASKRUN".into(),
            },
            pb::Feature {
                name: "qemu-img".into(),
                available: false,
                details: "qemu-img was not found; install qemu-utils".into(),
            },
        ],
        stores: vec![
            pb::Store {
                name: "local".into(),
                kind: "directory".into(),
                location: "/var/lib/imaged/images".into(),
                is_default: true,
                free_bytes: Some(120 << 30),
                total_bytes: Some(1 << 40),
                problem: String::new(),
                bytes_stored: 560 << 20,
                bytes_read: 3 << 30,
                failed_calls: 1,
                retried_requests: 12,
            },
            pb::Store {
                name: "nfs".into(),
                kind: "directory".into(),
                location: "/mnt/images".into(),
                problem: "No such file or directory (os error 2)".into(),
                ..Default::default()
            },
        ],
        encode_threads: 4,
        work_requests_in_progress: 1,
        work_requests_waiting: 0,
        drained: false,
        max_upload_rate: Some(200 << 20),
        max_read_rate: None,
    }
}
