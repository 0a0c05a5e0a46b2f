//! Tables and cards for people: no lines drawn, readable in a pipe as well.
//!
//! OCIDs are long and must be copied whole, so they come last and are never
//! cut or wrapped; what matters least is left out where a terminal is too
//! narrow for all.

use std::{fmt::Display, time::Duration};

use comfy_table::{ContentArrangement, Table, presets};

use super::words;
use crate::{
    ctl::progress::amounts,
    model::{ByteSize, Timestamp, iscsi::Portal},
    pb,
};

/// Shown for what is not known, or not yet.
const UNKNOWN: &str = "-";

/// A column of a list.
struct Column<'a, T> {
    title: &'a str,
    /// Columns of the highest rank go first when there is no room; 0 stays.
    rank: u8,
    cell: Box<dyn Fn(&T) -> String + 'a>,
}

fn column<'a, T>(title: &'a str, rank: u8, cell: impl Fn(&T) -> String + 'a) -> Column<'a, T> {
    Column { title, rank, cell: Box::new(cell) }
}

/// A table of `items` within `width` columns, if there is a limit.
fn list<T>(items: &[T], mut columns: Vec<Column<'_, T>>, width: Option<u16>) -> String {
    loop {
        let mut table = plain_table();
        table.set_header(columns.iter().map(|column| column.title));
        for item in items {
            table.add_row(
                columns.iter().map(|column| words::clean(&(column.cell)(item)).into_owned()),
            );
        }
        for column in table.column_iter_mut() {
            // The space between two columns.
            column.set_padding((0, 2));
        }
        let text = table.trim_fmt();
        let widest = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        let last_resort = columns.iter().map(|column| column.rank).max().unwrap_or(0);
        if last_resort == 0 || width.is_none_or(|width| widest <= usize::from(width)) {
            return text;
        }
        columns.retain(|column| column.rank != last_resort);
    }
}

fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

/// One thing, a property a line, named as in JSON.
#[derive(Default)]
struct Card(Vec<(&'static str, String)>);

impl Card {
    /// A line that is always there.
    fn line(&mut self, name: &'static str, value: impl Display) {
        let value = value.to_string();
        self.0.push((name, if value.is_empty() { UNKNOWN.into() } else { value }));
    }

    /// A line that is there where `value` is known.
    fn known(&mut self, name: &'static str, value: impl Into<Option<String>>) {
        if let Some(value) = value.into().filter(|value| !value.is_empty()) {
            self.0.push((name, value));
        }
    }

    /// Several lines under one name.
    fn block(&mut self, name: &'static str, lines: impl IntoIterator<Item = String>) {
        let mut name = name;
        for line in lines {
            self.0.push((name, line));
            name = "";
        }
    }

    fn text(self) -> String {
        let width = self.0.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
        let lines =
            self.0.iter().map(|(name, value)| format!("{name:<width$}{}", words::clean(value)));
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// A list of images.
pub(in crate::ctl) fn images(images: &[pb::Image], now: Timestamp, width: Option<u16>) -> String {
    let columns = vec![
        column("NAME", 0, |image: &pb::Image| or_unknown(&image.display_name)),
        column("STATE", 0, |image: &pb::Image| {
            words::image_state(image).unwrap_or(UNKNOWN).to_owned()
        }),
        column("OS", 4, |image: &pb::Image| {
            operating_system(&image.operating_system, &image.operating_system_version)
        }),
        column("VOLUME", 3, |image: &pb::Image| size(image.virtual_size_bytes)),
        column("STORED", 2, |image: &pb::Image| size(image.object_size_bytes)),
        column("AGE", 1, |image: &pb::Image| age(image.time_created.as_ref(), now)),
        column("ID", 0, |image: &pb::Image| image.id.clone()),
    ];
    list(images, columns, width)
}

/// One image.
pub(in crate::ctl) fn image(image: &pb::Image, now: Timestamp) -> String {
    let mut card = Card::default();
    card.line("display-name", &image.display_name);
    card.line("id", &image.id);
    card.line("lifecycle-state", words::image_state(image).unwrap_or(UNKNOWN));
    card.line("time-created", time(image.time_created.as_ref(), now));
    card.line("compartment-id", &image.compartment_id);
    card.line(
        "operating-system",
        operating_system(&image.operating_system, &image.operating_system_version),
    );
    card.line("architecture", &image.architecture);
    card.line("launch-mode", words::launch_mode(image).unwrap_or(UNKNOWN));
    card.known("launch-options", image.launch_options.as_ref().map(launch_options));
    card.line("consistency", words::consistency(image).unwrap_or(UNKNOWN));
    card.known("snapshot", words::snapshot(image).map(String::from));
    card.known("point-in-time", image.point_in_time.as_ref().map(point_in_time));
    card.known("expected", image.expected.as_ref().map(expected));
    card.known("source-instance-id", image.source_instance_id.clone());
    card.line("source-volume", &image.source_volume);
    card.known("base-image-id", image.base_image_id.clone());
    card.line("volume-size", exact_size(image.virtual_size_bytes));
    card.line("object-size", exact_size(image.object_size_bytes));
    let form = [words::known(&image.format), words::compression(image)];
    card.line("format", form.into_iter().flatten().collect::<Vec<_>>().join(", "));
    card.line("store", &image.store);
    card.line("content-digest", &image.content_digest);
    card.line("object-digest", &image.object_digest);
    let mut tags: Vec<_> = image.freeform_tags.iter().map(|(k, v)| format!("{k}={v}")).collect();
    tags.sort_unstable();
    card.block("freeform-tags", tags);
    card.block(
        "time-line",
        image
            .time_line
            .iter()
            .map(|step| format!("{:<10} {}", step.phase, clock(step.time_started.as_ref()))),
    );
    card.known("imaged-version", image.imaged_version.clone());
    card.text()
}

/// What a rehearsal found, and what it lets expect.
fn rehearsal(rehearsal: &pb::Rehearsal) -> Vec<String> {
    let point = rehearsal.point_in_time.unwrap_or_default();
    let per_second = rehearsal.written_bytes.checked_div(rehearsal.sampled_seconds).unwrap_or(0);
    let mut lines = vec![
        format!(
            "{}, {}",
            point_in_time(&point),
            if point.fuse { "with a fuse in the guest" } else { "without a fuse in the guest" }
        ),
        format!(
            "the guest wrote {} in {} s, {}/s",
            ByteSize(rehearsal.written_bytes),
            rehearsal.sampled_seconds,
            ByteSize(per_second)
        ),
    ];
    if let Some(cost) = &rehearsal.expected {
        lines.push(format!("an image is expected to cost {}", expected(cost)));
    }
    lines
}

/// `131ms, 12.0 MiB of scratch, 40s, 1.20 GiB stored`.
fn expected(expected: &pb::Expected) -> String {
    format!(
        "{}, {} of scratch, {}, {} stored{}",
        words::duration(Duration::from_micros(expected.window_micros)),
        ByteSize(expected.scratch_bytes),
        words::duration(Duration::from_secs(expected.seconds)),
        ByteSize(expected.object_size_bytes),
        if expected.from_experience { "" } else { " (assumed: this host has made no image yet)" }
    )
}

/// `frozen for 104ms, 640 KiB of scratch`.
fn point_in_time(point: &pb::PointInTime) -> String {
    let window = words::duration(Duration::from_micros(point.window_micros));
    let how = match (point.stopped, point.frozen_filesystems) {
        (true, _) => "shut down for it, running again after",
        (false, 0) => "taken within",
        (false, _) => "frozen for",
    };
    format!("{how} {window}, {} of scratch", ByteSize(point.scratch_bytes))
}

/// What a create that does not wait tells.
pub(in crate::ctl) fn accepted(image: &pb::Image, work: &pb::WorkRequest) -> String {
    let mut card = Card::default();
    card.line("display-name", &image.display_name);
    card.line("id", &image.id);
    card.line("lifecycle-state", words::image_state(image).unwrap_or(UNKNOWN));
    card.line("work-request-id", &work.id);
    card.text()
}

/// A list of instances.
pub(in crate::ctl) fn instances(instances: &[pb::Instance], width: Option<u16>) -> String {
    let columns = vec![
        column("NAME", 0, |instance: &pb::Instance| instance.name.clone()),
        column("STATE", 0, |instance: &pb::Instance| {
            words::instance_state(instance).unwrap_or(UNKNOWN).to_owned()
        }),
        column("OS", 3, |instance: &pb::Instance| {
            operating_system(&instance.operating_system, &instance.operating_system_version)
        }),
        column("SHAPE", 2, |instance: &pb::Instance| or_unknown(&instance.shape)),
        column("BOOT VOLUME", 1, |instance: &pb::Instance| instance.boot_volume.clone()),
        column("ID", 0, |instance: &pb::Instance| instance.id.clone()),
    ];
    list(instances, columns, width)
}

/// One instance.
pub(in crate::ctl) fn instance(instance: &pb::Instance) -> String {
    let mut card = Card::default();
    card.line("name", &instance.name);
    card.line("id", &instance.id);
    card.line("lifecycle-state", words::instance_state(instance).unwrap_or(UNKNOWN));
    card.known("lifecycle-details", instance.lifecycle_details.clone());
    card.line("compartment-id", &instance.compartment_id);
    card.line("boot-volume", &instance.boot_volume);
    card.known("base-image-id", instance.base_image_id.clone());
    card.known("shape", instance.shape.clone());
    card.line(
        "operating-system",
        operating_system(&instance.operating_system, &instance.operating_system_version),
    );
    card.line("hypervisor", &instance.hypervisor);
    card.known("systemd-unit", instance.systemd_unit.clone());
    card.text()
}

/// The iSCSI attachments of an instance.
pub(in crate::ctl) fn iscsi(
    iscsi: &pb::ListIscsiAttachmentsResponse,
    width: Option<u16>,
) -> String {
    type Attachment = pb::IscsiAttachment;
    let or_none = |words: Vec<String>| match words.is_empty() {
        true => "-".to_owned(),
        false => words.join(", "),
    };
    let name = |device: &pb::IscsiDevice| match device.mapper_name.as_str() {
        "" => device.name.clone(),
        mapper => mapper.to_owned(),
    };
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let columns = vec![
        column("STATE", 0, |attachment: &Attachment| {
            words::iscsi_state(attachment).unwrap_or(UNKNOWN).to_owned()
        }),
        column("CHAP", 1, |attachment: &Attachment| yes(attachment.chap)),
        column("AT BOOT", 2, |attachment: &Attachment| yes(attachment.at_boot)),
        column("DEVICES", 0, |attachment: &Attachment| {
            or_none(attachment.devices.iter().map(name).collect())
        }),
        column("USED AS", 0, |attachment: &Attachment| {
            or_none(attachment.devices.iter().flat_map(|device| device.uses.clone()).collect())
        }),
        column("PORTAL", 0, |attachment: &Attachment| {
            let port = attachment.port.try_into().unwrap_or_default();
            Portal { address: attachment.address.clone(), port }.to_string()
        }),
        column("TARGET", 0, |attachment: &Attachment| attachment.iqn.clone()),
    ];
    list(&iscsi.items, columns, width)
}

/// A list of work requests.
pub(in crate::ctl) fn work_requests(
    work: &[pb::WorkRequest],
    now: Timestamp,
    width: Option<u16>,
) -> String {
    let columns = vec![
        column("OPERATION", 2, |work: &pb::WorkRequest| {
            words::operation_type(work).unwrap_or(UNKNOWN).to_owned()
        }),
        column("STATUS", 0, |work: &pb::WorkRequest| words::work_status(work).to_owned()),
        column("DONE", 0, |work: &pb::WorkRequest| {
            format!("{:.0}%", work.percent_complete.floor())
        }),
        column("AGE", 1, |work: &pb::WorkRequest| age(work.time_accepted.as_ref(), now)),
        column("TOOK", 3, |work: &pb::WorkRequest| {
            words::took(work).unwrap_or_else(|| UNKNOWN.into())
        }),
        column("ABOUT", 4, |work: &pb::WorkRequest| about(work)),
        column("ID", 0, |work: &pb::WorkRequest| work.id.clone()),
    ];
    list(work, columns, width)
}

/// What a person would know the work by: the volume's path before any OCID.
fn about(work: &pb::WorkRequest) -> String {
    let of = |entity| work.resources.iter().find(|resource| resource.entity_type == entity);
    let known = of("volume").or_else(|| of("instance")).or_else(|| work.resources.first());
    known.map_or(UNKNOWN.into(), |resource| resource.identifier.clone())
}

/// One work request.
pub(in crate::ctl) fn work_request(work: &pb::WorkRequest, now: Timestamp) -> String {
    let mut card = Card::default();
    card.line("operation-type", words::operation_type(work).unwrap_or(UNKNOWN));
    card.line("id", &work.id);
    card.line("status", words::work_status(work));
    card.known("phase", work.phase.clone());
    if let Some(progress) = work.progress.as_ref().filter(|progress| progress.bytes_total > 0) {
        card.line("progress", amounts(work).trim_start());
        card.line(
            "bytes",
            format!(
                "{} read, {} of zeroes skipped, {} stored",
                ByteSize(progress.bytes_read),
                ByteSize(progress.bytes_skipped),
                ByteSize(progress.bytes_stored)
            ),
        );
    }
    card.known("max-upload-rate", work.max_upload_rate.map(rate));
    card.known("max-read-rate", work.max_read_rate.map(rate));
    card.block(
        "resources",
        work.resources.iter().map(|resource| {
            let action = words::action_type(resource).unwrap_or(UNKNOWN);
            format!("{:<8} {} ({action})", resource.entity_type, resource.identifier)
        }),
    );
    card.line("compartment-id", &work.compartment_id);
    card.known("requested-by", work.requested_by.clone());
    card.line("time-accepted", time(work.time_accepted.as_ref(), now));
    card.known("time-started", work.time_started.as_ref().map(|at| time(Some(at), now)));
    card.known("time-finished", work.time_finished.as_ref().map(|at| time(Some(at), now)));
    card.known("took", words::took(work));
    card.block("rehearsal", work.rehearsal.iter().flat_map(rehearsal));
    for error in &work.errors {
        card.line("error", &error.code);
        card.block("", error.message.lines().map(str::to_owned));
    }
    card.block(
        "log",
        work.logs
            .iter()
            .map(|entry| format!("{}  {}", clock(entry.timestamp.as_ref()), entry.message)),
    );
    card.text()
}

/// What a work request said and heard: seconds since the beginning, with
/// whom, `>` sent, `<` answered, `!` refused, `*` event, `#` remark. Lines are
/// cut at `width`, if there is a limit.
pub(in crate::ctl) fn trace(trace: &pb::WorkRequestTrace, width: Option<u16>) -> String {
    use pb::trace_entry::Kind;
    let line = |entry: &pb::TraceEntry| {
        let sign = match entry.kind() {
            Kind::Unspecified => '?',
            Kind::Command => '>',
            Kind::Answer => '<',
            Kind::Refusal => '!',
            Kind::Event => '*',
            Kind::Note => '#',
        };
        let (seconds, micros) = (entry.at_micros / 1_000_000, entry.at_micros % 1_000_000);
        let channel = words::trace_channel(entry).unwrap_or(UNKNOWN).to_lowercase();
        let text = format!(
            "{seconds:>4}.{micros:06}  {channel:<6} {sign} {} {}",
            entry.name, entry.data_json
        );
        let text = words::clean(text.trim_end()).into_owned();
        match width {
            Some(width) => text.chars().take(width.into()).collect(),
            None => text,
        }
    };
    let mut lines: Vec<String> = trace.entries.iter().map(line).collect();
    if trace.dropped_entries > 0 {
        lines.push(format!("{} entries between these were not kept", trace.dropped_entries));
    }
    lines.join("\n")
}

/// The host, its features and stores.
pub(in crate::ctl) fn host(host: &pb::Host) -> String {
    let mut card = Card::default();
    card.line("hostname", &host.hostname);
    card.line("imaged-version", &host.imaged_version);
    card.line("kernel-release", &host.kernel_release);
    card.line("architecture", &host.architecture);
    card.line("encode-threads", host.encode_threads);
    card.line("work-requests-in-progress", host.work_requests_in_progress);
    card.line("work-requests-waiting", host.work_requests_waiting);
    card.known("drained", host.drained.then(|| "yes: no new work begins".to_owned()));
    card.known("max-upload-rate", host.max_upload_rate.map(rate));
    card.known("max-read-rate", host.max_read_rate.map(rate));
    let mut parts = vec![card.text()];
    if !host.features.is_empty() {
        let columns = vec![
            column("FEATURE", 0, |feature: &pb::Feature| feature.name.clone()),
            column("AVAILABLE", 0, |feature: &pb::Feature| {
                if feature.available { "yes" } else { "NO" }.to_owned()
            }),
            column("DETAILS", 0, |feature: &pb::Feature| feature.details.clone()),
        ];
        parts.push(list(&host.features, columns, None));
    }
    if !host.stores.is_empty() {
        parts.push(stores(&host.stores, None));
    }
    parts.join("\n\n")
}

/// Bytes a second.
fn rate(bytes: u64) -> String {
    format!("{}/s", ByteSize(bytes))
}

/// The stores.
pub(in crate::ctl) fn stores(stores: &[pb::Store], width: Option<u16>) -> String {
    let columns = vec![
        column("STORE", 0, |store: &pb::Store| {
            if store.is_default { format!("{} (default)", store.name) } else { store.name.clone() }
        }),
        column("KIND", 0, |store: &pb::Store| store.kind.clone()),
        column("FREE", 0, |store: &pb::Store| store.free_bytes.map_or(UNKNOWN.into(), show_size)),
        column("TOTAL", 0, |store: &pb::Store| store.total_bytes.map_or(UNKNOWN.into(), show_size)),
        column("STORED", 1, |store: &pb::Store| show_size(store.bytes_stored)),
        column("READ", 1, |store: &pb::Store| show_size(store.bytes_read)),
        column("RETRIED", 1, |store: &pb::Store| store.retried_requests.to_string()),
        column("FAILED", 1, |store: &pb::Store| store.failed_calls.to_string()),
        column("LOCATION", 0, |store: &pb::Store| match words::known(&store.problem) {
            Some(problem) => format!("{}: {}", store.location, words::in_one_line(problem)),
            None => store.location.clone(),
        }),
    ];
    list(stores, columns, width)
}

/// What was tried of a store.
pub(in crate::ctl) fn steps(steps: &[pb::StoreStep], width: Option<u16>) -> String {
    let columns = vec![
        column("STEP", 0, |step: &pb::StoreStep| step.name.clone()),
        column("WORKS", 0, |step: &pb::StoreStep| {
            if step.problem.is_empty() { "yes" } else { "NO" }.to_owned()
        }),
    ];
    list(steps, columns, width)
}

fn or_unknown(text: &str) -> String {
    words::known(text).unwrap_or(UNKNOWN).to_owned()
}

/// A size that is 0 until it is known.
fn size(bytes: u64) -> String {
    if bytes == 0 { UNKNOWN.into() } else { show_size(bytes) }
}

fn show_size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

fn exact_size(bytes: u64) -> String {
    if bytes == 0 { UNKNOWN.into() } else { format!("{:#}", ByteSize(bytes)) }
}

/// `Oracle Linux 7.2`; `UNKNOWN` once where both are.
fn operating_system(name: &str, version: &str) -> String {
    match (name, version) {
        ("", "") => UNKNOWN.into(),
        (name, "" | "UNKNOWN") => name.into(),
        (name, version) => format!("{name} {version}"),
    }
}

fn launch_options(options: &pb::LaunchOptions) -> String {
    let options = [
        ("firmware", &options.firmware),
        ("boot volume", &options.boot_volume_type),
        ("network", &options.network_type),
        ("remote data", &options.remote_data_volume_type),
    ];
    let known = options.iter().filter(|(_, value)| !value.is_empty());
    known.map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
}

fn age(time: Option<&prost_types::Timestamp>, now: Timestamp) -> String {
    words::time(time).map_or(UNKNOWN.into(), |time| words::age(time, now))
}

/// `2026-11-21 08:45:16 UTC, 3h ago`.
fn time(time: Option<&prost_types::Timestamp>, now: Timestamp) -> String {
    words::time(time).map_or(UNKNOWN.into(), |time| {
        let text = time.to_string();
        let (date, clock) = (text.get(..10).unwrap_or(&text), text.get(11..19).unwrap_or(""));
        format!("{date} {clock} UTC, {} ago", words::age(time, now))
    })
}

/// `08:45:16.250`.
fn clock(time: Option<&prost_types::Timestamp>) -> String {
    words::time(time)
        .and_then(|time| Some(time.to_string().get(11..23)?.to_owned()))
        .unwrap_or_else(|| UNKNOWN.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::tests as samples;

    fn two_images() -> [pb::Image; 2] {
        let unknown = pb::Image {
            display_name: "from-a-volume".into(),
            operating_system: "UNKNOWN".into(),
            operating_system_version: "UNKNOWN".into(),
            ..samples::provisioning()
        };
        [samples::image(), unknown]
    }

    #[test]
    fn a_pipe_gets_all_columns_of_images() {
        insta::assert_snapshot!(images(&two_images(), samples::now(), None), @"
        NAME           STATE         OS         VOLUME    STORED    AGE  ID
        golden         AVAILABLE     Debian 12  4.00 GiB  1.12 GiB  3h   ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa
        from-a-volume  PROVISIONING  UNKNOWN    -         -         3h   ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa
        ");
    }

    #[test]
    fn a_narrow_terminal_keeps_the_ids_whole() {
        let text = images(&two_images(), samples::now(), Some(80));
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        insta::assert_snapshot!(text, @"
        NAME           STATE         AGE  ID
        golden         AVAILABLE     3h   ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa
        from-a-volume  PROVISIONING  3h   ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa
        ");
    }

    #[test]
    fn no_width_loses_names_states_and_ids() {
        let text = images(&two_images(), samples::now(), Some(1));
        insta::assert_snapshot!(text.lines().next().unwrap(), @"NAME           STATE         ID");
    }

    #[test]
    fn an_image_reads_as_a_card() {
        insta::assert_snapshot!(image(&samples::image(), samples::now()), @"
        display-name        golden
        id                  ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa
        lifecycle-state     AVAILABLE
        time-created        2026-11-21 08:45:16 UTC, 3h ago
        compartment-id      ocid1.compartment.oc1..web
        operating-system    Debian 12
        architecture        x86_64
        launch-mode         PARAVIRTUALIZED
        launch-options      firmware UEFI_64, boot volume PARAVIRTUALIZED
        consistency         CLEAN
        snapshot            AT_REST
        source-instance-id  ocid1.instance.imaged..01k6dz3s20cccccccccccccccc
        source-volume       /dev/vg0/web-3
        volume-size         4.00 GiB (4294967296 bytes)
        object-size         1.12 GiB (1203765248 bytes)
        format              QCOW2, ZSTD
        store               local
        content-digest      1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f
        object-digest       c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4
        freeform-tags       env=prod
                            team=web
        time-line           preflight  08:45:16.000
                            read       08:45:16.250
                            seal       08:45:27.000
        imaged-version      0.1.0
        ");
    }

    #[test]
    fn an_image_in_the_making_shows_what_is_not_known_yet() {
        let new = pb::Image {
            launch_options: None,
            freeform_tags: Default::default(),
            source_instance_id: String::new(),
            ..samples::provisioning()
        };
        insta::assert_snapshot!(image(&new, samples::now()), @"
        display-name      golden
        id                ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa
        lifecycle-state   PROVISIONING
        time-created      2026-11-21 08:45:16 UTC, 3h ago
        compartment-id    ocid1.compartment.oc1..web
        operating-system  Debian 12
        architecture      x86_64
        launch-mode       PARAVIRTUALIZED
        consistency       CLEAN
        source-volume     /dev/vg0/web-3
        volume-size       -
        object-size       -
        format            ZSTD
        store             local
        content-digest    -
        object-digest     -
        ");
    }

    #[test]
    fn instances_read_as_a_list_and_as_a_card() {
        insta::assert_snapshot!(instances(&[samples::instance()], None), @"
        NAME   STATE    OS         SHAPE           BOOT VOLUME     ID
        web-3  STOPPED  Debian 12  VM.Standard2.1  /dev/vg0/web-3  ocid1.instance.imaged..01k6dz3s20cccccccccccccccc
        ");
        insta::assert_snapshot!(instance(&samples::instance()), @"
        name              web-3
        id                ocid1.instance.imaged..01k6dz3s20cccccccccccccccc
        lifecycle-state   STOPPED
        compartment-id    ocid1.compartment.oc1..web
        boot-volume       /dev/vg0/web-3
        shape             VM.Standard2.1
        operating-system  Debian 12
        hypervisor        qemu
        systemd-unit      vm@web-3.service
        ");
    }

    #[test]
    fn work_requests_read_as_a_list() {
        let all = [samples::reading(), samples::failed(), samples::succeeded()];
        insta::assert_snapshot!(work_requests(&all, samples::now(), Some(80)), @"
        STATUS       DONE  AGE  ID
        IN_PROGRESS  45%   3h   ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        FAILED       45%   3h   ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        SUCCEEDED    100%  3h   ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        ");
        insta::assert_snapshot!(work_requests(&all, samples::now(), None), @"
        OPERATION     STATUS       DONE  AGE  TOOK  ABOUT           ID
        CREATE_IMAGE  IN_PROGRESS  45%   3h   -     /dev/vg0/web-3  ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        CREATE_IMAGE  FAILED       45%   3h   4s    /dev/vg0/web-3  ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        CREATE_IMAGE  SUCCEEDED    100%  3h   11s   /dev/vg0/web-3  ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        ");
    }

    #[test]
    fn a_rehearsal_is_told_in_three_lines() {
        let point = pb::PointInTime {
            window_micros: 131_400,
            frozen_filesystems: 2,
            fuse: true,
            scratch_bytes: 5 << 20,
            stopped: false,
        };
        let cost = pb::Expected {
            window_micros: 131_400,
            scratch_bytes: 12 << 20,
            seconds: 70,
            object_size_bytes: 1 << 30,
            from_experience: false,
        };
        let rehearsed = pb::Rehearsal {
            point_in_time: Some(point),
            consistency: pb::Consistency::FilesystemConsistent.into(),
            sampled_seconds: 60,
            written_bytes: 600 << 20,
            expected: Some(cost),
        };
        insta::assert_snapshot!(rehearsal(&rehearsed).join("\n"), @"
        frozen for 131ms, 5.00 MiB of scratch, with a fuse in the guest
        the guest wrote 600 MiB in 60 s, 10.0 MiB/s
        an image is expected to cost 131ms, 12.0 MiB of scratch, 1m10s, 1.00 GiB stored (assumed: this host has made no image yet)
        ");
    }

    #[test]
    fn a_trace_reads_as_a_time_line() {
        use pb::trace_entry::{Channel, Kind};
        let entry = |at_micros, channel: Channel, kind: Kind, name: &str, data: &str| {
            let (channel, kind) = (channel.into(), kind.into());
            let (name, data_json) = (name.into(), data.into());
            pb::TraceEntry { at_micros, channel, kind, name, id: None, data_json }
        };
        let entries = vec![
            entry(0, Channel::Imaged, Kind::Note, "connected to QEMU 7.2.22", ""),
            entry(412, Channel::Qmp, Kind::Command, "query-status", ""),
            entry(730, Channel::Qmp, Kind::Answer, "query-status", r#"{"running":true}"#),
            entry(1_500_730, Channel::Agent, Kind::Refusal, "guest-exec", r#"{"class":"\u001b"}"#),
            entry(2_000_000, Channel::Qmp, Kind::Event, "RESET", r#"{"guest":true}"#),
        ];
        let whole = pb::WorkRequestTrace { entries, dropped_entries: 7 };
        insta::assert_snapshot!(trace(&whole, Some(50)), @r#"
           0.000000  imaged # connected to QEMU 7.2.22
           0.000412  qmp    > query-status
           0.000730  qmp    < query-status {"running":true
           1.500730  agent  ! guest-exec {"class":"\u001b"
           2.000000  qmp    * RESET {"guest":true}
        7 entries between these were not kept
        "#);
    }

    #[test]
    fn a_work_request_reads_as_a_card() {
        insta::assert_snapshot!(work_request(&samples::reading(), samples::now()), @"
        operation-type  CREATE_IMAGE
        id              ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        status          IN_PROGRESS
        phase           read
        progress        45%  1.81 GiB of 4.00 GiB  610 MiB/s  3s left
        bytes           1.40 GiB read, 425 MiB of zeroes skipped, 534 MiB stored
        resources       image    ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa (IN_PROGRESS)
                        volume   /dev/vg0/web-3 (RELATED)
        compartment-id  ocid1.compartment.oc1..web
        requested-by    uid 1000 (alice)
        time-accepted   2026-11-21 08:45:16 UTC, 3h ago
        time-started    2026-11-21 08:45:16 UTC, 2h ago
        log             08:45:16.200  the volume is read through io_uring
        ");
        insta::assert_snapshot!(work_request(&samples::failed(), samples::now()), @r#"
        operation-type  CREATE_IMAGE
        id              ocid1.workrequest.imaged..01k6dz3s20bbbbbbbbbbbbbbbb
        status          FAILED
        phase           read
        progress        45%  1.81 GiB of 4.00 GiB
        bytes           1.40 GiB read, 425 MiB of zeroes skipped, 534 MiB stored
        resources       image    ocid1.image.imaged..01k6dz3s20aaaaaaaaaaaaaaaa (IN_PROGRESS)
                        volume   /dev/vg0/web-3 (RELATED)
        compartment-id  ocid1.compartment.oc1..web
        requested-by    uid 1000 (alice)
        time-accepted   2026-11-21 08:45:16 UTC, 3h ago
        time-started    2026-11-21 08:45:16 UTC, 2h ago
        time-finished   2026-11-21 08:45:21 UTC, 2h ago
        took            4s
        error           STORE_FULL
                        image "golden" was not made
                          0: the store "local" has 3.00 MiB left
                          1: No space left on device (os error 28)
                          help: free some space or name another store
        log             08:45:16.200  the volume is read through io_uring
        "#);
    }

    #[test]
    fn the_host_shows_what_it_lacks() {
        insta::assert_snapshot!(host(&samples::host()), @"
        hostname                   hv-17
        imaged-version             0.1.0
        kernel-release             6.1.0-31-amd64
        architecture               x86_64
        encode-threads             4
        work-requests-in-progress  1
        work-requests-waiting      0
        max-upload-rate            200 MiB/s

        FEATURE   AVAILABLE  DETAILS
        io_uring  yes        SINGLE_ISSUER, DEFER_TASKRUN
        qemu-img  NO         qemu-img was not found; install qemu-utils

        STORE            KIND       FREE     TOTAL     STORED   READ      RETRIED  FAILED  LOCATION
        local (default)  directory  120 GiB  1.00 TiB  560 MiB  3.00 GiB  12       1       /var/lib/imaged/images
        nfs              directory  -        -         0 B      0 B       0        0       /mnt/images: No such file or directory (os error 2)
        ");
    }

    #[test]
    fn names_cannot_drive_a_terminal() {
        let hostile = pb::Image { display_name: "a\u{1b}[31m\nb".into(), ..samples::image() };
        for text in [
            images(std::slice::from_ref(&hostile), samples::now(), None),
            image(&hostile, samples::now()),
        ] {
            assert!(!text.contains('\u{1b}'), "{text:?}");
            assert!(text.contains("a\\u{1b}[31m\\nb"), "{text:?}");
        }
    }
}
