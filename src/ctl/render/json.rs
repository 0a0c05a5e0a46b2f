//! The `oci` CLI's JSON: `{"data": …}`, kebab-case keys in order, null for
//! what is not known.

use prost_types::Timestamp as ProtoTime;
use serde_json::{Map, Value};

use super::words;
use crate::pb;

/// A whole answer: `data`, and beside it what is not null of `headers`.
pub(in crate::ctl) fn document<const N: usize>(data: Value, headers: [(&str, &str); N]) -> String {
    let mut fields = vec![("data", data)];
    fields.extend(
        headers.into_iter().filter(|(_, value)| !value.is_empty()).map(|(k, v)| (k, v.into())),
    );
    // Values that were made here always become text.
    serde_json::to_string_pretty(&object(fields)).unwrap_or_default()
}

/// A list of what `one` makes of each.
pub(in crate::ctl) fn list<T>(items: &[T], one: impl Fn(&T) -> Value) -> Value {
    items.iter().map(one).collect()
}

/// An image.
pub(in crate::ctl) fn image(image: &pb::Image) -> Value {
    object([
        ("architecture", text(&image.architecture)),
        ("base-image-id", text(&image.base_image_id)),
        ("compartment-id", text(&image.compartment_id)),
        ("compression", words::compression(image).into()),
        ("consistency", words::consistency(image).into()),
        ("content-digest", text(&image.content_digest)),
        ("create-image-allowed", image.create_image_allowed.into()),
        ("display-name", text(&image.display_name)),
        ("expected", image.expected.as_ref().map(expected).into()),
        ("format", text(&image.format)),
        ("freeform-tags", object(image.freeform_tags.iter().map(|(k, v)| (k, v.as_str().into())))),
        ("id", text(&image.id)),
        ("imaged-version", text(&image.imaged_version)),
        ("launch-mode", words::launch_mode(image).into()),
        ("launch-options", image.launch_options.as_ref().map(launch_options).into()),
        ("lifecycle-state", words::image_state(image).into()),
        ("object-digest", text(&image.object_digest)),
        ("object-size-bytes", size(image.object_size_bytes)),
        ("operating-system", text(&image.operating_system)),
        ("operating-system-version", text(&image.operating_system_version)),
        ("point-in-time", image.point_in_time.as_ref().map(point_in_time).into()),
        ("size-in-mbs", size(image.size_in_mbs)),
        ("snapshot", words::snapshot(image).into()),
        ("source-instance-id", text(&image.source_instance_id)),
        ("source-volume", text(&image.source_volume)),
        ("store", text(&image.store)),
        ("time-created", time(image.time_created.as_ref())),
        (
            "time-line",
            list(&image.time_line, |step| {
                object([
                    ("phase", text(&step.phase)),
                    ("time-started", time(step.time_started.as_ref())),
                ])
            }),
        ),
        ("virtual-size-bytes", size(image.virtual_size_bytes)),
    ])
}

fn point_in_time(point: &pb::PointInTime) -> Value {
    object([
        ("frozen-filesystems", point.frozen_filesystems.into()),
        ("fuse", point.fuse.into()),
        ("scratch-bytes", point.scratch_bytes.into()),
        ("stopped", point.stopped.into()),
        ("window-micros", point.window_micros.into()),
    ])
}

fn expected(expected: &pb::Expected) -> Value {
    object([
        ("from-experience", expected.from_experience.into()),
        ("object-size-bytes", expected.object_size_bytes.into()),
        ("scratch-bytes", expected.scratch_bytes.into()),
        ("seconds", expected.seconds.into()),
        ("window-micros", expected.window_micros.into()),
    ])
}

fn rehearsal(rehearsal: &pb::Rehearsal) -> Value {
    object([
        ("consistency", words::rehearsed(rehearsal).into()),
        ("expected", rehearsal.expected.as_ref().map(expected).into()),
        ("point-in-time", rehearsal.point_in_time.as_ref().map(point_in_time).into()),
        ("sampled-seconds", rehearsal.sampled_seconds.into()),
        ("written-bytes", rehearsal.written_bytes.into()),
    ])
}

/// What a work request said and heard.
pub(in crate::ctl) fn trace(trace: &pb::WorkRequestTrace) -> Value {
    object([
        ("dropped-entries", trace.dropped_entries.into()),
        (
            "entries",
            list(&trace.entries, |entry| {
                object([
                    ("at-micros", entry.at_micros.into()),
                    ("channel", words::trace_channel(entry).into()),
                    ("data", serde_json::from_str(&entry.data_json).unwrap_or_default()),
                    ("id", entry.id.into()),
                    ("kind", words::trace_kind(entry).into()),
                    ("name", text(&entry.name)),
                ])
            }),
        ),
    ])
}

fn launch_options(options: &pb::LaunchOptions) -> Value {
    object([
        ("boot-volume-type", text(&options.boot_volume_type)),
        ("firmware", text(&options.firmware)),
        ("network-type", text(&options.network_type)),
        ("remote-data-volume-type", text(&options.remote_data_volume_type)),
    ])
}

/// An instance.
pub(in crate::ctl) fn instance(instance: &pb::Instance) -> Value {
    object([
        ("base-image-id", text(&instance.base_image_id)),
        ("boot-volume", text(&instance.boot_volume)),
        ("compartment-id", text(&instance.compartment_id)),
        ("hypervisor", text(&instance.hypervisor)),
        ("id", text(&instance.id)),
        ("lifecycle-details", text(&instance.lifecycle_details)),
        ("lifecycle-state", words::instance_state(instance).into()),
        ("name", text(&instance.name)),
        ("operating-system", text(&instance.operating_system)),
        ("operating-system-version", text(&instance.operating_system_version)),
        ("shape", text(&instance.shape)),
        ("systemd-unit", text(&instance.systemd_unit)),
    ])
}

/// What of iSCSI an instance has.
pub(in crate::ctl) fn iscsi(iscsi: &pb::ListIscsiAttachmentsResponse) -> Value {
    object([
        ("attachments", list(&iscsi.items, iscsi_attachment)),
        ("discovery-portals", list(&iscsi.discovery_portals, |portal| text(portal))),
        ("has-iscsiadm", iscsi.has_iscsiadm.into()),
        ("initiator-name", text(&iscsi.initiator_name)),
    ])
}

fn iscsi_attachment(attachment: &pb::IscsiAttachment) -> Value {
    object([
        ("address", text(&attachment.address)),
        ("at-boot", attachment.at_boot.into()),
        ("chap", attachment.chap.into()),
        (
            "devices",
            list(&attachment.devices, |device| {
                object([
                    ("kind", words::iscsi_device(device).into()),
                    ("mapper-name", text(&device.mapper_name)),
                    ("name", text(&device.name)),
                    ("size-in-bytes", size(device.size_in_bytes)),
                    ("uses", list(&device.uses, |used| text(used))),
                ])
            }),
        ),
        ("iqn", text(&attachment.iqn)),
        ("on-record", attachment.on_record.into()),
        ("port", attachment.port.into()),
        ("state", words::iscsi_state(attachment).into()),
    ])
}

/// A work request.
pub(in crate::ctl) fn work_request(work: &pb::WorkRequest) -> Value {
    object([
        ("compartment-id", text(&work.compartment_id)),
        (
            "errors",
            list(&work.errors, |error| {
                object([
                    ("code", text(&error.code)),
                    ("message", text(&error.message)),
                    ("timestamp", time(error.timestamp.as_ref())),
                ])
            }),
        ),
        ("id", text(&work.id)),
        (
            "logs",
            list(&work.logs, |entry| {
                object([
                    ("message", text(&entry.message)),
                    ("timestamp", time(entry.timestamp.as_ref())),
                ])
            }),
        ),
        ("max-read-rate", work.max_read_rate.into()),
        ("max-upload-rate", work.max_upload_rate.into()),
        ("operation-type", words::operation_type(work).into()),
        ("percent-complete", percent(work.percent_complete)),
        ("phase", text(&work.phase)),
        ("progress", work.progress.as_ref().map(progress).into()),
        ("rehearsal", work.rehearsal.as_ref().map(rehearsal).into()),
        ("requested-by", text(&work.requested_by)),
        (
            "resources",
            list(&work.resources, |resource| {
                object([
                    ("action-type", words::action_type(resource).into()),
                    ("entity-type", text(&resource.entity_type)),
                    ("identifier", text(&resource.identifier)),
                ])
            }),
        ),
        ("status", words::status(work).into()),
        ("time-accepted", time(work.time_accepted.as_ref())),
        ("time-finished", time(work.time_finished.as_ref())),
        ("time-started", time(work.time_started.as_ref())),
    ])
}

fn progress(progress: &pb::Progress) -> Value {
    object([
        ("bytes-per-second", progress.bytes_per_second.into()),
        ("bytes-read", progress.bytes_read.into()),
        ("bytes-skipped", progress.bytes_skipped.into()),
        ("bytes-stored", progress.bytes_stored.into()),
        ("bytes-total", size(progress.bytes_total)),
        ("eta-seconds", progress.eta_seconds.into()),
    ])
}

/// The host.
pub(in crate::ctl) fn host(host: &pb::Host) -> Value {
    object([
        ("architecture", text(&host.architecture)),
        ("drained", host.drained.into()),
        ("encode-threads", host.encode_threads.into()),
        (
            "features",
            list(&host.features, |feature| {
                object([
                    ("available", feature.available.into()),
                    ("details", text(&feature.details)),
                    ("name", text(&feature.name)),
                ])
            }),
        ),
        ("hostname", text(&host.hostname)),
        ("imaged-version", text(&host.imaged_version)),
        ("kernel-release", text(&host.kernel_release)),
        ("max-read-rate", host.max_read_rate.into()),
        ("max-upload-rate", host.max_upload_rate.into()),
        ("stores", stores(&host.stores)),
        ("work-requests-in-progress", host.work_requests_in_progress.into()),
        ("work-requests-waiting", host.work_requests_waiting.into()),
    ])
}

/// The stores.
pub(in crate::ctl) fn stores(stores: &[pb::Store]) -> Value {
    list(stores, |store| {
        object([
            ("bytes-read", store.bytes_read.into()),
            ("bytes-stored", store.bytes_stored.into()),
            ("failed-calls", store.failed_calls.into()),
            ("free-bytes", store.free_bytes.into()),
            ("is-default", store.is_default.into()),
            ("kind", text(&store.kind)),
            ("location", text(&store.location)),
            ("name", text(&store.name)),
            ("problem", text(&store.problem)),
            ("retried-requests", store.retried_requests.into()),
            ("total-bytes", store.total_bytes.into()),
        ])
    })
}

/// What was tried of a store.
pub(in crate::ctl) fn steps(steps: &[pb::StoreStep]) -> Value {
    list(steps, |step| object([("name", text(&step.name)), ("problem", text(&step.problem))]))
}

/// What was removed from a store.
pub(in crate::ctl) fn garbage(uploads: u32) -> Value {
    object([("uploads", uploads.into())])
}

/// A file that an image was copied to.
pub(in crate::ctl) fn file(path: &str, size_bytes: u64, object_digest: &str) -> Value {
    object([
        ("file", text(path)),
        ("object-digest", text(object_digest)),
        ("size-bytes", size(size_bytes)),
    ])
}

/// An object with its keys in order, however `serde_json` was built.
fn object<K: Into<String>>(fields: impl IntoIterator<Item = (K, Value)>) -> Value {
    let mut fields: Vec<_> = fields.into_iter().map(|(key, value)| (key.into(), value)).collect();
    fields.sort_by(|(a, _), (b, _)| a.cmp(b));
    Value::Object(Map::from_iter(fields))
}

fn text(text: &str) -> Value {
    words::known(text).into()
}

/// A size that is 0 until it is known: imaged refuses empty volumes.
fn size(size: u64) -> Value {
    Some(size).filter(|size| *size > 0).into()
}

fn time(time: Option<&ProtoTime>) -> Value {
    words::time(time).map(|time| time.to_string()).into()
}

/// With two digits: the rest of an f32 is noise.
fn percent(percent: f32) -> Value {
    ((f64::from(percent) * 100.0).round() / 100.0).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::tests as samples;

    #[test]
    fn an_image_has_the_shape_of_oci() {
        let document = document(image(&samples::image()), [("opc-work-request-id", "w")]);
        insta::assert_snapshot!(document, @r#"
        {
          "data": {
            "architecture": "x86_64",
            "base-image-id": null,
            "compartment-id": "ocid1.compartment.oc1..web",
            "compression": "ZSTD",
            "consistency": "CLEAN",
            "content-digest": "1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f",
            "create-image-allowed": true,
            "display-name": "golden",
            "expected": null,
            "format": "QCOW2",
            "freeform-tags": {
              "env": "prod",
              "team": "web"
            },
            "id": "ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa",
            "imaged-version": "0.1.0",
            "launch-mode": "PARAVIRTUALIZED",
            "launch-options": {
              "boot-volume-type": "PARAVIRTUALIZED",
              "firmware": "UEFI_64",
              "network-type": null,
              "remote-data-volume-type": null
            },
            "lifecycle-state": "AVAILABLE",
            "object-digest": "c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4",
            "object-size-bytes": 1203765248,
            "operating-system": "Debian",
            "operating-system-version": "12",
            "point-in-time": null,
            "size-in-mbs": 4096,
            "snapshot": "AT_REST",
            "source-instance-id": "ocid1.instance.imaged..01k6dz3s20cccccccccccccccc",
            "source-volume": "/dev/vg0/web-3",
            "store": "local",
            "time-created": "2026-11-21T08:45:16.000Z",
            "time-line": [
              {
                "phase": "preflight",
                "time-started": "2026-11-21T08:45:16.000Z"
              },
              {
                "phase": "read",
                "time-started": "2026-11-21T08:45:16.250Z"
              },
              {
                "phase": "seal",
                "time-started": "2026-11-21T08:45:27.000Z"
              }
            ],
            "virtual-size-bytes": 4294967296
          },
          "opc-work-request-id": "w"
        }
        "#);
    }

    #[test]
    fn what_is_not_known_is_null() {
        let value = image(&pb::Image::default());
        for key in [
            "display-name",
            "lifecycle-state",
            "size-in-mbs",
            "time-created",
            "consistency",
            "launch-options",
        ] {
            assert_eq!(value.get(key), Some(&Value::Null), "{key}");
        }
    }

    #[test]
    fn a_value_of_a_newer_imaged_is_called_as_the_sdks_do() {
        let value =
            image(&pb::Image { lifecycle_state: 99, consistency: 99, ..Default::default() });
        assert_eq!(value["lifecycle-state"], "UNKNOWN_ENUM_VALUE");
        assert_eq!(value["consistency"], "UNKNOWN_ENUM_VALUE");
    }

    #[test]
    fn a_work_request_has_the_shape_of_oci() {
        insta::assert_snapshot!(document(work_request(&samples::failed()), []), @r#"
        {
          "data": {
            "compartment-id": "ocid1.compartment.oc1..web",
            "errors": [
              {
                "code": "STORE_FULL",
                "message": "image \"golden\" was not made\n  0: the store \"local\" has 3.00 MiB left\n  1: No space left on device (os error 28)\n  help: free some space or name another store",
                "timestamp": "2026-11-21T08:45:21.000Z"
              }
            ],
            "id": "ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb",
            "logs": [
              {
                "message": "the volume is read through io_uring",
                "timestamp": "2026-11-21T08:45:16.200Z"
              }
            ],
            "max-read-rate": null,
            "max-upload-rate": null,
            "operation-type": "CREATE_IMAGE",
            "percent-complete": 45.3,
            "phase": "read",
            "progress": {
              "bytes-per-second": 640000000,
              "bytes-read": 1500000000,
              "bytes-skipped": 445628416,
              "bytes-stored": 560000000,
              "bytes-total": 4294967296,
              "eta-seconds": 3
            },
            "rehearsal": null,
            "requested-by": "uid 1000 (alice)",
            "resources": [
              {
                "action-type": "IN_PROGRESS",
                "entity-type": "image",
                "identifier": "ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa"
              },
              {
                "action-type": "RELATED",
                "entity-type": "volume",
                "identifier": "/dev/vg0/web-3"
              }
            ],
            "status": "FAILED",
            "time-accepted": "2026-11-21T08:45:16.000Z",
            "time-finished": "2026-11-21T08:45:21.000Z",
            "time-started": "2026-11-21T08:45:16.100Z"
          }
        }
        "#);
    }

    #[test]
    fn the_page_stands_beside_the_data() {
        let text = document(list(&[samples::instance()], instance), [("opc-next-page", "p2")]);
        insta::assert_snapshot!(text, @r#"
        {
          "data": [
            {
              "base-image-id": null,
              "boot-volume": "/dev/vg0/web-3",
              "compartment-id": "ocid1.compartment.oc1..web",
              "hypervisor": "qemu",
              "id": "ocid1.instance.imaged..01k6dz3s20cccccccccccccccc",
              "lifecycle-details": null,
              "lifecycle-state": "STOPPED",
              "name": "web-3",
              "operating-system": "Debian",
              "operating-system-version": "12",
              "shape": "VM.Standard2.1",
              "systemd-unit": "vm@web-3.service"
            }
          ],
          "opc-next-page": "p2"
        }
        "#);
        assert!(!document(list(&[], instance), [("opc-next-page", "")]).contains("opc"));
    }

    #[test]
    fn the_host_is_an_object() {
        insta::assert_snapshot!(document(host(&samples::host()), []), @r#"
        {
          "data": {
            "architecture": "x86_64",
            "drained": false,
            "encode-threads": 4,
            "features": [
              {
                "available": true,
                "details": "SINGLE_ISSUER, DEFER_TASKRUN",
                "name": "io_uring"
              },
              {
                "available": false,
                "details": "qemu-img was not found; install qemu-utils",
                "name": "qemu-img"
              }
            ],
            "hostname": "hv-17",
            "imaged-version": "0.1.0",
            "kernel-release": "6.1.0-31-amd64",
            "max-read-rate": null,
            "max-upload-rate": 209715200,
            "stores": [
              {
                "bytes-read": 3221225472,
                "bytes-stored": 587202560,
                "failed-calls": 1,
                "free-bytes": 128849018880,
                "is-default": true,
                "kind": "directory",
                "location": "/var/lib/imaged/images",
                "name": "local",
                "problem": null,
                "retried-requests": 12,
                "total-bytes": 1099511627776
              },
              {
                "bytes-read": 0,
                "bytes-stored": 0,
                "failed-calls": 0,
                "free-bytes": null,
                "is-default": false,
                "kind": "directory",
                "location": "/mnt/images",
                "name": "nfs",
                "problem": "No such file or directory (os error 2)",
                "retried-requests": 0,
                "total-bytes": null
              }
            ],
            "work-requests-in-progress": 1,
            "work-requests-waiting": 0
          }
        }
        "#);
    }
}
