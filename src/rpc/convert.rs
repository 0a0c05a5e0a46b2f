//! From the API's messages to the nouns, with every field checked, and back.

mod iscsi;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    str::FromStr,
};

pub(super) use self::iscsi::iscsi;

use prost_types::Timestamp as PbTimestamp;

use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize, ImageId, Timestamp, WorkRequestId,
        image::{Compression, Consistency, Image, ImageState, LaunchMode, SnapshotKind},
        instance::{Instance, Machine, PowerState},
        iscsi::Policy,
        live::{Expected, Force, Mode, PointInTime, Rehearsal},
        trace::{Channel, Dropped, Entry, Kind, Trace},
        work_request::{Action, NewRates, Operation, Rates, Status, WorkRequest},
    },
    pb,
    work::{
        CreateImage, Destination, ExportImage, Guest, Over, RehearseImage, RestoreVolume, Secret,
        Source, VerifyImage,
    },
};

/// OCI's limit for display names.
const MAX_NAME: usize = 255;
/// OCI's limit for retry tokens.
const MAX_RETRY_TOKEN: usize = 64;
/// OCI's limits for free-form tags, their keys and their values.
const MAX_TAGS: usize = 64;
const MAX_TAG_KEY: usize = 100;
const MAX_TAG_VALUE: usize = 256;
/// PATH_MAX.
const MAX_PATH: usize = 4096;

fn invalid(field: &'static str, message: impl Into<String>) -> Error {
    Error::new(Reason::InvalidParameter, message).field(field)
}

/// Text of at least one and at most `max` characters, none of them a control
/// character: texts end up in terminals and logs.
fn text(field: &'static str, value: &str, max: usize) -> Result<()> {
    match value.chars().count() {
        0 => Err(invalid(field, format!("{field} is empty"))),
        count if count > max => {
            Err(invalid(field, format!("{field} has {count} characters, more than {max}")))
        }
        _ if value.chars().any(char::is_control) => {
            Err(invalid(field, format!("{field} has control characters")))
        }
        _ => Ok(()),
    }
}

/// The identifier in `field`.
pub(super) fn id<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    field: &'static str,
    value: &str,
) -> Result<T> {
    value
        .parse()
        .map_err(|cause| invalid(field, format!("{field} is no identifier")).because(cause))
}

fn retry_token(token: String) -> Result<Option<String>> {
    if token.is_empty() {
        return Ok(None);
    }
    text("retry_token", &token, MAX_RETRY_TOKEN)?;
    Ok(Some(token))
}

fn tags(tags: HashMap<String, String>) -> Result<BTreeMap<String, String>> {
    const FIELD: &str = "freeform_tags";
    if tags.len() > MAX_TAGS {
        return Err(invalid(FIELD, format!("there are more than {MAX_TAGS} tags")));
    }
    for (key, value) in &tags {
        text(FIELD, key, MAX_TAG_KEY)?;
        if !value.is_empty() {
            text(FIELD, value, MAX_TAG_VALUE)?;
        }
    }
    Ok(tags.into_iter().collect())
}

fn boot_volume(path: String) -> Result<PathBuf> {
    const FIELD: &str = "boot_volume";
    text(FIELD, &path, MAX_PATH)?;
    let path = PathBuf::from(path);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(invalid(FIELD, format!("{FIELD} {} is not an absolute path", path.display()))),
    }
}

fn launch_mode(value: i32) -> Result<LaunchMode> {
    Ok(match pb::LaunchMode::try_from(value) {
        Ok(pb::LaunchMode::Unspecified | pb::LaunchMode::Paravirtualized) => {
            LaunchMode::Paravirtualized
        }
        Ok(pb::LaunchMode::Native) => LaunchMode::Native,
        Ok(pb::LaunchMode::Emulated) => LaunchMode::Emulated,
        Ok(pb::LaunchMode::Custom) => LaunchMode::Custom,
        Ok(pb::LaunchMode::Acceleratedpv) => LaunchMode::AcceleratedPv,
        Err(_) => {
            return Err(invalid("launch_mode", format!("{value} is no launch mode known here")));
        }
    })
}

fn compression(value: i32) -> Result<Compression> {
    Ok(match pb::Compression::try_from(value) {
        Ok(pb::Compression::Unspecified | pb::Compression::Zstd) => Compression::Zstd,
        Ok(pb::Compression::Deflate) => Compression::Deflate,
        Ok(pb::Compression::None) => Compression::None,
        Err(_) => {
            return Err(invalid("compression", format!("{value} is no compression known here")));
        }
    })
}

fn mode(value: i32) -> Result<Mode> {
    use pb::create_image_request::SnapshotMode as Pb;
    Ok(match Pb::try_from(value) {
        Ok(Pb::Unspecified | Pb::Freeze) => Mode::Freeze,
        Ok(Pb::Crash) => Mode::Crash,
        Ok(Pb::FreezeOrCrash) => Mode::FreezeOrCrash,
        Ok(Pb::Stop) => Mode::Stop(Force::No),
        Ok(Pb::ForceStop) => Mode::Stop(Force::PullThePlug),
        Err(_) => {
            return Err(invalid(
                "snapshot_mode",
                format!("{value} is no snapshot mode known here"),
            ));
        }
    })
}

/// Bytes a second; `None`: no limit.
fn rate(field: &'static str, value: u64) -> Result<Option<ByteSize>> {
    match value {
        0 => Ok(None),
        ByteSize::MIB.. => Ok(Some(ByteSize(value))),
        _ => Err(invalid(field, "less than 1 MiB a second would never come to an end")
            .advice("give at least 1MiB, or unlimited")),
    }
}

/// A change of limits.
pub(super) fn new_rates(upload: Option<u64>, read: Option<u64>) -> Result<NewRates> {
    Ok(NewRates {
        upload: upload.map(|value| rate("max_upload_rate", value)).transpose()?,
        read: read.map(|value| rate("max_read_rate", value)).transpose()?,
    })
}

/// What a request wants that `requested_by` sent.
pub(super) fn create_image(
    request: pb::CreateImageRequest,
    requested_by: String,
) -> Result<CreateImage> {
    use pb::create_image_request::Source as Pb;
    let source = match request.source {
        Some(Pb::InstanceId(name)) => {
            text("instance_id", &name, MAX_NAME)?;
            Source::Instance(name)
        }
        Some(Pb::BootVolume(path)) => Source::BootVolume(boot_volume(path)?),
        None => {
            return Err(invalid("instance_id", "the request names neither instance nor volume")
                .advice("give an instance_id or a boot_volume"));
        }
    };
    let display_name = Some(request.display_name).filter(|name| !name.is_empty());
    if let Some(name) = &display_name {
        text("display_name", name, MAX_NAME)?;
    }
    Ok(CreateImage {
        source,
        compartment_id: match request.compartment_id.as_str() {
            "" => None,
            some => Some(id("compartment_id", some)?),
        },
        display_name,
        freeform_tags: tags(request.freeform_tags)?,
        launch_mode: launch_mode(request.launch_mode)?,
        compression: compression(request.compression)?,
        mode: mode(request.snapshot_mode)?,
        iscsi: iscsi_policy(request.iscsi_policy)?,
        rates: Rates {
            upload: rate("max_upload_rate", request.max_upload_rate)?,
            read: rate("max_read_rate", request.max_read_rate)?,
        },
        retry_token: retry_token(request.retry_token)?,
        requested_by,
    })
}

fn iscsi_policy(policy: i32) -> Result<Policy> {
    use pb::create_image_request::IscsiPolicy as Pb;
    match Pb::try_from(policy) {
        Ok(Pb::Unspecified) => Ok(Policy::NotAsked),
        Ok(Pb::Disconnect) => Ok(Policy::Disconnect),
        Err(_) => Err(invalid("iscsi", format!("{policy} is no policy that imaged knows"))),
    }
}

/// What a request wants that `requested_by` sent.
pub(super) fn verify_image(
    request: pb::VerifyImageRequest,
    requested_by: String,
) -> Result<VerifyImage> {
    Ok(VerifyImage {
        image_id: image_id(&request.image_id)?,
        retry_token: retry_token(request.retry_token)?,
        requested_by,
    })
}

/// What a request wants that `requested_by` sent.
pub(super) fn restore_volume(
    request: pb::RestoreVolumeRequest,
    requested_by: String,
) -> Result<RestoreVolume> {
    text("to", &request.to, MAX_PATH)?;
    Ok(RestoreVolume {
        image_id: image_id(&request.image_id)?,
        path: request.to.into(),
        retry_token: retry_token(request.retry_token)?,
        requested_by,
    })
}

/// What a request about a guest's iSCSI wants that `requested_by` sent.
pub(super) fn guest(instance_id: String, token: String, requested_by: String) -> Result<Guest> {
    text("instance_id", &instance_id, MAX_NAME)?;
    Ok(Guest { instance: instance_id, retry_token: retry_token(token)?, requested_by })
}

/// What a request wants that `requested_by` sent.
pub(super) fn rehearse_image(
    request: pb::RehearseImageRequest,
    requested_by: String,
) -> Result<RehearseImage> {
    text("instance_id", &request.instance_id, MAX_NAME)?;
    Ok(RehearseImage {
        instance: request.instance_id,
        mode: mode(request.snapshot_mode)?,
        retry_token: retry_token(request.retry_token)?,
        requested_by,
    })
}

/// What a request wants that `requested_by` sent.
pub(super) fn export_image(
    request: pb::ExportImageRequest,
    requested_by: String,
) -> Result<ExportImage> {
    use pb::export_image_request::Destination as Pb;
    let destination = match request.destination {
        Some(Pb::Object(object)) => {
            text("store", &object.store, MAX_NAME)?;
            Destination::Object {
                store: object.store,
                name: Some(object.name).filter(|name| !name.is_empty()),
            }
        }
        Some(Pb::Uri(uri)) => Destination::Uri(Secret(uri)),
        None => {
            return Err(invalid("store", "the request does not say where to")
                .advice("give an object in a store, or a URI"));
        }
    };
    Ok(ExportImage {
        image_id: image_id(&request.image_id)?,
        destination,
        over: match request.overwrite {
            true => Over::Anything,
            false => Over::Nothing,
        },
        rates: Rates { upload: rate("max_upload_rate", request.max_upload_rate)?, read: None },
        retry_token: retry_token(request.retry_token)?,
        requested_by,
    })
}

pub(super) fn image_id(value: &str) -> Result<ImageId> {
    id("image_id", value)
}

pub(super) fn work_request_id(value: &str) -> Result<WorkRequestId> {
    id("work_request_id", value)
}

fn time(time: Timestamp) -> PbTimestamp {
    let millis = time.as_millis();
    PbTimestamp {
        seconds: i64::try_from(millis / 1000).unwrap_or(i64::MAX),
        // Below 10^9 by construction.
        nanos: i32::try_from(millis % 1000 * 1_000_000).unwrap_or_default(),
    }
}

pub(super) fn lifecycle_state(state: &ImageState) -> pb::image::LifecycleState {
    use pb::image::LifecycleState;
    match state {
        ImageState::Provisioning => LifecycleState::Provisioning,
        ImageState::Available(_) => LifecycleState::Available,
        ImageState::Exporting(_) => LifecycleState::Exporting,
        ImageState::Deleted => LifecycleState::Deleted,
    }
}

impl From<Image> for pb::Image {
    fn from(image: Image) -> Self {
        let Image { id, record, origin, state } = image;
        let lifecycle_state = lifecycle_state(&state);
        let mut to = Self {
            id: id.into(),
            compartment_id: record.compartment_id.into(),
            display_name: record.display_name,
            lifecycle_state: lifecycle_state.into(),
            create_image_allowed: origin.create_image_allowed,
            operating_system: origin.os.name,
            operating_system_version: origin.os.version,
            time_created: Some(time(origin.time_created)),
            base_image_id: origin.base_image_id.map(String::from).unwrap_or_default(),
            launch_mode: pb::LaunchMode::from(origin.launch_mode).into(),
            launch_options: launch_options(origin.launch_mode),
            freeform_tags: record.freeform_tags.into_iter().collect(),
            architecture: origin.architecture,
            consistency: pb::Consistency::from(origin.consistency).into(),
            source_instance_id: origin.source_instance_id.map(String::from).unwrap_or_default(),
            source_volume: origin.source_volume.display().to_string(),
            store: origin.store,
            compression: pb::Compression::from(origin.compression).into(),
            ..Self::default()
        };
        if let ImageState::Available(stored) | ImageState::Exporting(stored) = state {
            to.size_in_mbs = stored.virtual_size.mib_rounded_up();
            to.format = stored.format.to_string();
            to.virtual_size_bytes = stored.virtual_size.get();
            to.object_size_bytes = stored.object_size.get();
            to.content_digest = stored.content_digest.to_string();
            to.object_digest = stored.object_digest.to_string();
            to.imaged_version = stored.imaged_version;
            to.snapshot = stored.snapshot.map(pb::Snapshot::from).unwrap_or_default().into();
            to.point_in_time = stored.point_in_time.map(Into::into);
            to.expected = stored.expected.map(Into::into);
            to.time_line = stored
                .time_line
                .into_iter()
                .map(|entry| pb::PhaseTime {
                    phase: entry.phase,
                    time_started: Some(time(entry.time_started)),
                })
                .collect();
        }
        to
    }
}

impl From<PointInTime> for pb::PointInTime {
    fn from(point: PointInTime) -> Self {
        Self {
            window_micros: point.window_micros,
            frozen_filesystems: point.frozen,
            fuse: point.fuse,
            scratch_bytes: point.scratch.get(),
            stopped: point.stopped,
        }
    }
}

impl From<Expected> for pb::Expected {
    fn from(expected: Expected) -> Self {
        let Expected { window_micros, scratch, seconds, bytes, from_experience } = expected;
        Self {
            window_micros,
            scratch_bytes: scratch.get(),
            seconds,
            object_size_bytes: bytes.get(),
            from_experience,
        }
    }
}

impl From<Rehearsal> for pb::Rehearsal {
    fn from(rehearsal: Rehearsal) -> Self {
        let Rehearsal { point, sampled_seconds, written, expected } = rehearsal;
        Self {
            point_in_time: Some(point.into()),
            consistency: pb::Consistency::from(point.consistency).into(),
            sampled_seconds,
            written_bytes: written.get(),
            expected: Some(expected.into()),
        }
    }
}

/// The devices that a launch mode stands for. Firmware is not known from it.
fn launch_options(mode: LaunchMode) -> Option<pb::LaunchOptions> {
    let (volume, network) = match mode {
        LaunchMode::Native => ("ISCSI", "VFIO"),
        LaunchMode::Emulated => ("SCSI", "E1000"),
        LaunchMode::Paravirtualized => ("PARAVIRTUALIZED", "PARAVIRTUALIZED"),
        LaunchMode::AcceleratedPv => ("PARAVIRTUALIZED", "ACCELERATEDPV"),
        LaunchMode::Custom => return None,
    };
    Some(pb::LaunchOptions {
        boot_volume_type: volume.into(),
        firmware: String::new(),
        network_type: network.into(),
        remote_data_volume_type: volume.into(),
    })
}

impl From<LaunchMode> for pb::LaunchMode {
    fn from(mode: LaunchMode) -> Self {
        match mode {
            LaunchMode::Native => Self::Native,
            LaunchMode::Emulated => Self::Emulated,
            LaunchMode::Paravirtualized => Self::Paravirtualized,
            LaunchMode::Custom => Self::Custom,
            LaunchMode::AcceleratedPv => Self::Acceleratedpv,
        }
    }
}

impl From<Consistency> for pb::Consistency {
    fn from(consistency: Consistency) -> Self {
        match consistency {
            Consistency::Application => Self::ApplicationConsistent,
            Consistency::Filesystem => Self::FilesystemConsistent,
            Consistency::Clean => Self::Clean,
            Consistency::Crash => Self::CrashConsistent,
        }
    }
}

impl From<SnapshotKind> for pb::Snapshot {
    fn from(kind: SnapshotKind) -> Self {
        match kind {
            SnapshotKind::AtRest => Self::AtRest,
            SnapshotKind::Reflink => Self::Reflink,
            SnapshotKind::Lvm => Self::Lvm,
            SnapshotKind::CopyBeforeWrite => Self::CopyBeforeWrite,
        }
    }
}

impl From<Compression> for pb::Compression {
    fn from(compression: Compression) -> Self {
        match compression {
            Compression::Zstd => Self::Zstd,
            Compression::Deflate => Self::Deflate,
            Compression::None => Self::None,
        }
    }
}

impl From<Trace> for pb::WorkRequestTrace {
    fn from(trace: Trace) -> Self {
        use pb::trace_entry::{Channel as PbChannel, Kind as PbKind};
        let entry = |entry: Entry| pb::TraceEntry {
            at_micros: entry.at_micros,
            channel: match entry.channel {
                Channel::Qmp => PbChannel::Qmp,
                Channel::Agent => PbChannel::Agent,
                Channel::Imaged => PbChannel::Imaged,
                Channel::Libvirt => PbChannel::Libvirt,
            }
            .into(),
            kind: match entry.kind {
                Kind::Command => PbKind::Command,
                Kind::Answer => PbKind::Answer,
                Kind::Refusal => PbKind::Refusal,
                Kind::Event => PbKind::Event,
                Kind::Note => PbKind::Note,
            }
            .into(),
            name: entry.name,
            id: entry.id,
            data_json: entry.data.map(|data| data.to_string()).unwrap_or_default(),
        };
        let Dropped { commands, queries, events } = trace.dropped;
        Self {
            entries: trace.entries.into_iter().map(entry).collect(),
            dropped_entries: commands + queries + events,
        }
    }
}

impl From<WorkRequest> for pb::WorkRequest {
    fn from(request: WorkRequest) -> Self {
        use pb::{
            work_request::{OperationType, Status as PbStatus},
            work_request_resource::ActionType,
        };
        let progress = request.progress;
        Self {
            percent_complete: percent(&request),
            rehearsal: request.rehearsal.map(Into::into),
            max_upload_rate: request.rates.upload.map(ByteSize::get),
            max_read_rate: request.rates.read.map(ByteSize::get),
            id: request.id.into(),
            operation_type: match request.operation {
                Operation::CreateImage => OperationType::CreateImage,
                Operation::VerifyImage => OperationType::VerifyImage,
                Operation::RehearseImage => OperationType::RehearseImage,
                Operation::ExportImage => OperationType::ExportImage,
                Operation::RestoreVolume => OperationType::RestoreVolume,
                Operation::DisconnectIscsi => OperationType::DisconnectIscsi,
                Operation::ReconnectIscsi => OperationType::ReconnectIscsi,
            }
            .into(),
            status: match request.status {
                Status::Accepted => PbStatus::Accepted,
                Status::InProgress => PbStatus::InProgress,
                Status::Succeeded => PbStatus::Succeeded,
                Status::Failed => PbStatus::Failed,
                Status::Canceling => PbStatus::Canceling,
                Status::Canceled => PbStatus::Canceled,
            }
            .into(),
            compartment_id: request.compartment_id.into(),
            resources: request
                .resources
                .into_iter()
                .map(|resource| pb::WorkRequestResource {
                    action_type: match resource.action {
                        Action::Created => ActionType::Created,
                        Action::InProgress => ActionType::InProgress,
                        Action::Related => ActionType::Related,
                    }
                    .into(),
                    entity_type: resource.entity_type.to_string(),
                    identifier: resource.identifier,
                })
                .collect(),
            time_accepted: Some(time(request.time_accepted)),
            time_started: request.time_started.map(time),
            time_finished: request.time_finished.map(time),
            phase: request.phase.to_string(),
            progress: Some(pb::Progress {
                bytes_total: progress.total,
                bytes_read: progress.read,
                bytes_skipped: progress.skipped,
                bytes_stored: progress.stored,
                bytes_per_second: progress.per_second,
                eta_seconds: progress.eta_seconds().filter(|_| !request.status.is_final()),
            }),
            errors: request
                .errors
                .into_iter()
                .map(|error| pb::WorkRequestError {
                    code: error.code,
                    message: error.message,
                    timestamp: Some(time(error.time)),
                })
                .collect(),
            logs: request
                .logs
                .into_iter()
                .map(|entry| pb::WorkRequestLogEntry {
                    message: entry.message,
                    timestamp: Some(time(entry.time)),
                })
                .collect(),
            requested_by: request.requested_by,
        }
    }
}

/// Everything may have been read and yet not be sealed: 100 means done.
fn percent(request: &WorkRequest) -> f32 {
    match request.status {
        Status::Succeeded => 100.0,
        _ => request.progress.percent().min(99.9),
    }
}

/// The instance as it is now.
pub(super) fn instance(instance: &Instance, power: PowerState) -> pb::Instance {
    use pb::instance::LifecycleState;
    let (state, details) = match power {
        PowerState::Running => (LifecycleState::Running, String::new()),
        PowerState::Stopped => (LifecycleState::Stopped, String::new()),
        PowerState::Unknown(why) => (LifecycleState::Unknown, why),
    };
    let optional = |text: &Option<String>| text.clone().unwrap_or_default();
    pb::Instance {
        id: instance.id.to_string(),
        name: instance.name.clone(),
        compartment_id: instance.compartment_id.to_string(),
        lifecycle_state: state.into(),
        lifecycle_details: details,
        boot_volume: instance.boot_volume.display().to_string(),
        base_image_id: instance.base_image_id.clone().map(String::from).unwrap_or_default(),
        shape: optional(&instance.shape),
        hypervisor: match instance.machine {
            Machine::Qemu(_) => "qemu".into(),
            Machine::Domain(_) => "libvirt".into(),
        },
        systemd_unit: optional(&instance.systemd_unit),
        operating_system: instance.os.name.clone(),
        operating_system_version: instance.os.version.clone(),
    }
}

#[cfg(test)]
mod tests;
