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
        ("size-in-mbs", size(image.size_in_mbs)),
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
        ("operation-type", words::operation_type(work).into()),
        ("percent-complete", percent(work.percent_complete)),
        ("phase", text(&work.phase)),
        ("progress", work.progress.as_ref().map(progress).into()),
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
        (
            "stores",
            list(&host.stores, |store| {
                object([
                    ("free-bytes", store.free_bytes.into()),
                    ("is-default", store.is_default.into()),
                    ("kind", text(&store.kind)),
                    ("location", text(&store.location)),
                    ("name", text(&store.name)),
                    ("problem", text(&store.problem)),
                    ("total-bytes", store.total_bytes.into()),
                ])
            }),
        ),
        ("work-requests-in-progress", host.work_requests_in_progress.into()),
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
