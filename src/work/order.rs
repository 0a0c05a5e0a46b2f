//! What can be asked for, and what is wrong with it before anything is done.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, Reason, Result},
    model::{
        CompartmentId, ImageId,
        image::{Compression, LaunchMode},
        iscsi::Policy,
        live::Mode,
        work_request::{Rates, Retry},
    },
    port::{Over, Secret},
};

/// An order for an image.
#[derive(Debug, Clone)]
pub struct CreateImage {
    /// What to image.
    pub source: Source,
    /// Where the image belongs; none: where the source does.
    pub compartment_id: Option<CompartmentId>,
    /// None: `image` and the time.
    pub display_name: Option<String>,
    /// Free-form tags.
    pub freeform_tags: BTreeMap<String, String>,
    /// How instances are to be launched from it.
    pub launch_mode: LaunchMode,
    /// How its clusters are compressed.
    pub compression: Compression,
    /// How the point in time of a running instance is taken.
    pub mode: Mode,
    /// What is done about its iSCSI.
    pub iscsi: Policy,
    /// How fast it may go. Another rate makes no other order.
    pub rates: Rates,
    /// Makes asking twice asking once.
    pub retry_token: Option<String>,
    /// Who asks.
    pub requested_by: String,
}

/// What to image.
#[derive(Debug, Clone)]
pub enum Source {
    /// The boot volume of an instance, by OCID or name.
    Instance(String),
    /// A volume that belongs to no instance.
    BootVolume(PathBuf),
}

/// An order to verify an image.
#[derive(Debug, Clone)]
pub struct VerifyImage {
    /// Which.
    pub image_id: ImageId,
    /// Makes asking twice asking once.
    pub retry_token: Option<String>,
    /// Who asks.
    pub requested_by: String,
}

/// An order to write an image over a volume.
#[derive(Debug, Clone)]
pub struct RestoreVolume {
    /// Which.
    pub image_id: ImageId,
    /// Where to.
    pub path: PathBuf,
    /// Makes asking twice asking once.
    pub retry_token: Option<String>,
    /// Who asks.
    pub requested_by: String,
}

/// An order to send an image's object elsewhere.
#[derive(Debug, Clone)]
pub struct ExportImage {
    /// Which.
    pub image_id: ImageId,
    /// Where to.
    pub destination: Destination,
    /// What it may replace there.
    pub over: Over,
    /// How fast it may go. Another rate makes no other order.
    pub rates: Rates,
    /// Makes asking twice asking once.
    pub retry_token: Option<String>,
    /// Who asks.
    pub requested_by: String,
}

impl ExportImage {
    /// What tells it from other orders about the same image. A secret.
    pub(super) fn words(&self) -> String {
        let over = self.over;
        match &self.destination {
            Destination::Uri(Secret(uri)) => format!("{over:?} to {uri:?}"),
            Destination::Object { store, name } => format!("{over:?} to {name:?} in {store:?}"),
        }
    }
}

/// Where an object is sent.
#[derive(Debug, Clone)]
pub enum Destination {
    /// Another store.
    Object {
        /// Its name.
        store: String,
        /// The object's; none: the image's OCID, and `.qcow2`.
        name: Option<String>,
    },
    /// The object that a URL gives access to.
    Uri(Secret),
}

/// An order to try what an image of a running instance would cost.
#[derive(Debug, Clone)]
pub struct RehearseImage {
    /// OCID or name.
    pub instance: String,
    /// How the point in time is taken.
    pub mode: Mode,
    /// Makes asking twice asking once.
    pub retry_token: Option<String>,
    /// Who asks.
    pub requested_by: String,
}

/// An order about an instance's guest.
#[derive(Debug, Clone)]
pub struct Guest {
    /// OCID or name.
    pub instance: String,
    /// Makes asking twice asking once.
    pub retry_token: Option<String>,
    /// Who asks.
    pub requested_by: String,
}

/// Only a guest that is started again can be given it back.
pub(super) fn check_iscsi(wanted: &CreateImage) -> Result<()> {
    let stops = matches!(wanted.mode, Mode::Stop(_));
    let of_instance = matches!(wanted.source, Source::Instance(_));
    match wanted.iscsi {
        Policy::Disconnect if !(stops && of_instance) => {
            let context = "iSCSI is disconnected for the image of an instance that is shut down";
            Err(Error::new(Reason::InvalidParameter, context)
                .advice(
                    "ask with --consistency stop, or disconnect it before and reconnect it after: \
                     `imagectl instance iscsi disconnect`",
                )
                .field("iscsi"))
        }
        _ => Ok(()),
    }
}

/// What is wrong is told of `field`.
pub(super) fn check_path(path: &Path, field: &'static str) -> Result<PathBuf> {
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    let context = format!("{:?} is not an absolute path", path.display().to_string());
    Err(Error::new(Reason::InvalidParameter, context)
        .advice("name the volume from the root on, e.g. /dev/vg0/web-1")
        .field(field))
}

/// OCI: 1 to 255 characters. Control characters would forge log lines.
pub(super) fn check_name(name: Option<&str>) -> Result<()> {
    let wrong = match name {
        None => return Ok(()),
        Some("") => "is empty",
        Some(name) if name.chars().count() > 255 => "is longer than 255 characters",
        Some(name) if name.chars().any(char::is_control) => "has control characters",
        Some(_) => return Ok(()),
    };
    Err(Error::new(Reason::InvalidParameter, format!("the display name {wrong}"))
        .advice("give 1 to 255 printable characters, or none to have one made")
        .field("display_name"))
}

/// `2026-11-21T08:45:16.000Z` without what file names and shells dislike.
pub(super) fn compact(time: &str) -> String {
    time.chars().take(19).filter(|c| *c != '-' && *c != ':').collect()
}

/// What the order says, whoever sends it: two orders with one retry token
/// must be the same.
pub(super) fn fingerprint(wanted: &CreateImage) -> String {
    let CreateImage {
        source,
        compartment_id,
        display_name,
        freeform_tags,
        launch_mode,
        compression,
        mode,
        iscsi,
        rates: _,
        retry_token: _,
        requested_by: _,
    } = wanted;
    format!(
        "create {source:?} {compartment_id:?} {display_name:?} {freeform_tags:?} {launch_mode} \
         {compression} {mode:?} {iscsi:?}"
    )
}

/// Tokens are each user's own: `uid 1000`, without the name, which a slow
/// directory service may fail to tell the next time.
pub(super) fn retry(token: &Option<String>, requested_by: &str, words: &str) -> Option<Retry> {
    let user = requested_by.split(" (").next().unwrap_or(requested_by);
    token.as_ref().map(|token| Retry {
        user: user.to_owned(),
        token: token.clone(),
        fingerprint: blake3::hash(words.as_bytes()).to_string(),
    })
}
