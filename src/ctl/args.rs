//! The command line: verbs and options as the `oci` CLI names them. Help,
//! man pages and completions come from here.

use std::{collections::HashMap, convert::Infallible, fmt, fs, path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::exit::Exit;
use crate::{
    model::{ByteSize, size},
    pb,
};

/// Where imaged listens unless told otherwise.
pub(super) const DEFAULT_SOCKET: &str = "/run/imaged/imaged.sock";

/// Longest retry token that imaged takes (OCI: `opc-retry-token`).
const MAX_TOKEN: usize = 64;

/// Makes images of this host's virtual machines.
///
/// imagectl asks imaged, the daemon on this host. Work goes on when imagectl
/// ends: find it again by `imagectl work-request list`.
#[derive(Debug, Parser)]
#[command(name = "imagectl", version, after_help = Exit::list(), max_term_width = 100)]
#[command(disable_help_subcommand = true)]
pub(super) struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub noun: Noun,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(super) struct Global {
    /// Socket of imaged.
    #[arg(long, global = true, value_name = "PATH", env = "IMAGED_SOCKET", hide_env_values = true)]
    #[arg(default_value = DEFAULT_SOCKET, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub socket: String,
    /// Form of the result: for people, or as `oci` prints it for scripts.
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Noun {
    /// Virtual machines of this host.
    #[command(subcommand)]
    Instance(InstanceVerb),
    /// Images in the stores.
    #[command(subcommand)]
    Image(ImageVerb),
    /// Work that was asked for: how far it is, how it ended.
    #[command(subcommand)]
    WorkRequest(WorkRequestVerb),
    /// This host: what it can do, and its stores.
    #[command(subcommand)]
    Host(HostVerb),
    /// The stores of this host, where images are kept.
    #[command(subcommand)]
    Store(StoreVerb),
    /// Volumes of this host: block devices and raw files.
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Print a completion script for a shell.
    Completions {
        /// The shell that will read it.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write all man pages into a directory.
    Man {
        /// The directory; it is made if missing.
        dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum InstanceVerb {
    /// List the instances that imaged was told of.
    List {
        /// Only those of this compartment.
        #[arg(long, value_name = "OCID")]
        compartment_id: Option<String>,
    },
    /// Show one instance.
    Get {
        /// OCID or name of the instance.
        #[arg(long, value_name = "ID")]
        instance_id: String,
    },
    /// iSCSI attachments of an instance's guest.
    #[command(subcommand)]
    Iscsi(IscsiVerb),
}

#[derive(Debug, Subcommand)]
pub(super) enum IscsiVerb {
    /// List the targets that the guest of a running instance is logged in to
    /// or has on record, with what lies on them. Nothing is changed.
    List {
        /// OCID or name of the instance.
        #[arg(long, value_name = "ID")]
        instance_id: String,
    },
    /// Unmount what lies on its iSCSI disks, log out of all targets and remove
    /// all records, before an image is made. Nothing is taken that could not
    /// be given back.
    Disconnect(Box<IscsiOrder>),
    /// Give the guest back what was taken: records, sessions and mounts.
    Reconnect(Box<IscsiOrder>),
}

#[derive(Debug, Args)]
pub(super) struct IscsiOrder {
    /// OCID or name of the instance.
    #[arg(long, value_name = "ID")]
    pub instance_id: String,
    #[command(flatten)]
    pub asking: Asking,
}

#[derive(Debug, Subcommand)]
pub(super) enum HostVerb {
    /// Show what this host can do, and its stores.
    Get,
    /// Change how fast all work together may go, until imaged ends: the
    /// configuration says how it begins.
    Update(NewRates),
    /// Begin no new work on this host, and wait until none runs: for
    /// maintenance. It lasts until `host resume`, or imaged is started again.
    Drain {
        /// Cancel and undo what is not done after so long; 0: at once
        /// [default: wait until it is done].
        #[arg(long, value_name = "SECONDS")]
        finish_within: Option<u64>,
    },
    /// Let work begin again after a drain.
    Resume,
}

#[derive(Debug, Args)]
#[group(id = "rates", required = true, multiple = true)]
pub(super) struct NewRates {
    /// Most bytes a second that are sent to stores, such as 200MiB, or
    /// unlimited.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub max_upload_rate: Option<Rate>,
    /// The same of what is read of volumes.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub max_read_rate: Option<Rate>,
}

/// Bytes a second; 0: no limit.
pub(super) type Rate = u64;

fn parse_rate(text: &str) -> Result<Rate, String> {
    if text == "unlimited" {
        return Ok(0);
    }
    match size::parse(text) {
        Ok(rate) if rate >= ByteSize::mib(1) => Ok(rate.get()),
        Ok(_) => Err("less than 1MiB a second would never come to an end".into()),
        Err(error) => Err(format!("{error}; or \"unlimited\"")),
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum StoreVerb {
    /// List the stores.
    List,
    /// Try everything that an image needs of a store, and remove it again.
    Check {
        /// Name of the store.
        name: String,
    },
    /// Remove what dead uploads of this host left in a store.
    Gc {
        /// Name of the store.
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum VolumeVerb {
    /// Write an image over a volume, or into a new file.
    ///
    /// Every extent is compared with the image's digests before it is written.
    /// The volume must be as large as the image, and nothing may use it. All
    /// that it held is lost. Until the end it has no beginning that a machine
    /// would boot from, so that what is broken off is not taken for whole.
    Restore(VolumeRestore),
}

#[derive(Debug, Args)]
pub(super) struct VolumeRestore {
    /// OCID of the image.
    #[arg(long, value_name = "OCID")]
    pub image_id: String,
    /// Block device or raw file to write over; a file that does not exist is
    /// made, sparse.
    #[arg(long, value_name = "PATH")]
    pub to: PathBuf,
    /// Do not ask. Required where no terminal can be asked and PATH exists.
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub asking: Asking,
}

#[derive(Debug, Subcommand)]
pub(super) enum ImageVerb {
    /// Make an image of an instance, running or not, or of a volume that
    /// nothing uses.
    Create(Box<ImageCreate>),
    /// List images.
    List(Box<ImageList>),
    /// Show one image.
    Get {
        /// OCID of the image.
        #[arg(long, value_name = "OCID")]
        image_id: String,
    },
    /// Delete an image from its store.
    Delete {
        /// OCID of the image.
        #[arg(long, value_name = "OCID")]
        image_id: String,
        /// Do not ask. Required where no terminal can be asked.
        #[arg(long)]
        force: bool,
    },
    /// Read an image back from its store and recompute its digests.
    ///
    /// Waits for the verdict; exit code 6 says that the image is not what was
    /// stored.
    Verify(ImageVerify),
    /// Copy an image's qcow2 elsewhere.
    #[command(subcommand)]
    Export(ImageExport),
}

#[derive(Debug, Subcommand)]
pub(super) enum ImageExport {
    /// Copy it to an object of another store.
    ///
    /// imaged copies it; the image is EXPORTING until then and cannot be
    /// deleted.
    #[command(name = "to-object")]
    Object(ExportToObject),
    /// Copy it to the object of a pre-authenticated request of OCI's Object
    /// Storage.
    ///
    /// imaged copies it; the image is EXPORTING until then and cannot be
    /// deleted.
    #[command(name = "to-object-uri")]
    ObjectUri(ExportToUri),
    /// Copy it to a file on this host.
    ///
    /// imagectl writes it with the rights of who runs it. The file has its
    /// name only when it is whole and checked.
    #[command(name = "to-file")]
    File(ExportToFile),
}

#[derive(Debug, Args)]
pub(super) struct ExportToObject {
    /// OCID of the image.
    #[arg(long, value_name = "OCID")]
    pub image_id: String,
    /// Name of the store, which stands for namespace and bucket.
    #[arg(long, value_name = "NAME")]
    pub store: String,
    /// Name of the object, under the store's prefix [default: the image's OCID
    /// and .qcow2].
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    #[command(flatten)]
    pub export: ExportOptions,
}

#[derive(Debug, Args)]
pub(super) struct ExportToUri {
    /// OCID of the image.
    #[arg(long, value_name = "OCID")]
    pub image_id: String,
    /// The whole URL of a pre-authenticated request for one object, from a
    /// file, or from standard input: `-`. It is a secret, and an argument can
    /// be seen by everyone on this host: the URL itself is taken, too, but
    /// better not given.
    #[arg(long, value_name = "file://PATH")]
    pub uri: Uri,
    #[command(flatten)]
    pub export: ExportOptions,
}

#[derive(Debug, Args)]
pub(super) struct ExportOptions {
    /// Replace an object of that name.
    #[arg(long)]
    pub overwrite: bool,
    /// Most bytes a second that are sent, such as 200MiB. The host's limit
    /// holds, too.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub max_upload_rate: Option<Rate>,
    #[command(flatten)]
    pub asking: Asking,
}

#[derive(Debug, Args)]
pub(super) struct ExportToFile {
    /// OCID of the image.
    #[arg(long, value_name = "OCID")]
    pub image_id: String,
    /// The file. It will be readable by its owner alone.
    #[arg(long, value_name = "PATH")]
    pub file: PathBuf,
    /// Replace a file of that name.
    #[arg(long)]
    pub force: bool,
}

/// Where a secret URL is.
#[derive(Clone)]
pub(super) enum Uri {
    StandardInput,
    File(PathBuf),
    /// In the arguments.
    Given(String),
}

impl fmt::Debug for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StandardInput => f.write_str("StandardInput"),
            Self::File(path) => write!(f, "File({})", path.display()),
            Self::Given(_) => f.write_str("Given"),
        }
    }
}

impl FromStr for Uri {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.strip_prefix("file://") {
            _ if text == "-" => Self::StandardInput,
            Some(path) => Self::File(path.into()),
            None => Self::Given(text.to_owned()),
        })
    }
}

#[derive(Debug, Args)]
#[group(id = "source", required = true, multiple = false, args = ["instance_id", "boot_volume"])]
pub(super) struct ImageCreate {
    /// OCID or name of the instance whose boot volume is read.
    #[arg(long, value_name = "ID")]
    pub instance_id: Option<String>,
    /// Block device or raw file to read.
    #[arg(long, value_name = "PATH")]
    pub boot_volume: Option<PathBuf>,
    /// Compartment of the image [default: the instance's, or the configured one].
    #[arg(long, value_name = "OCID")]
    pub compartment_id: Option<String>,
    /// Name of the image [default: made from the time].
    #[arg(long, value_name = "NAME")]
    pub display_name: Option<String>,
    /// Tags, as a JSON object of strings: '{"env": "prod"}', or file://PATH
    /// of a file that has it.
    #[arg(long, value_name = "JSON", value_parser = parse_tags)]
    pub freeform_tags: Option<Tags>,
    /// How instances are to be launched from it [default: PARAVIRTUALIZED].
    #[arg(long, value_enum, ignore_case = true, value_name = "MODE")]
    pub launch_mode: Option<LaunchMode>,
    /// Compression; zstd needs QEMU 5.1 to read, deflate any QEMU [default: zstd].
    #[arg(long, value_enum, ignore_case = true, value_name = "METHOD")]
    pub compression: Option<Compression>,
    /// How the point in time of a running instance is taken: inside a freeze
    /// of its filesystems by its agent, or at any moment, as after a power
    /// failure [default: freeze]. With freeze-or-crash a guest that cannot be
    /// frozen, or does not stay so, makes a crash-consistent image. With stop
    /// it is shut down and started again at once.
    #[arg(long, value_enum, ignore_case = true, value_name = "MODE")]
    pub consistency: Option<Consistency>,
    /// With --consistency stop: pull the plug of a guest that does not shut
    /// down. The image is crash consistent then.
    #[arg(long, requires = "consistency")]
    pub force_stop: bool,
    /// With --consistency stop: disconnect the guest from its iSCSI volumes
    /// before it is shut down, and give them back once it runs again
    /// [default: it is not asked].
    #[arg(long, value_enum, ignore_case = true, value_name = "POLICY", requires = "consistency")]
    pub iscsi: Option<IscsiPolicy>,
    /// Make no image: do to the running instance what making one does, watch
    /// it for a minute, and tell what an image would cost.
    #[arg(long, requires = "instance_id", conflicts_with_all = [
        "boot_volume", "compartment_id", "display_name", "freeform_tags", "launch_mode", "compression",
        "iscsi", "on_read_error", "max_upload_rate", "max_read_rate",
    ])]
    pub rehearse: bool,
    /// Most bytes a second that are sent to the store, such as 200MiB. The
    /// host's limit holds, too.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub max_upload_rate: Option<Rate>,
    /// The same of what is read of the volume.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub max_read_rate: Option<Rate>,
    /// What to do when the volume cannot be read.
    #[arg(long, value_enum, value_name = "ACTION", default_value = "fail")]
    pub on_read_error: OnReadError,
    /// Names this request: asking again within 24 hours with the same token
    /// is asking once [default: a new one].
    #[arg(long, value_name = "TOKEN", value_parser = parse_token)]
    pub retry_token: Option<String>,
    #[command(flatten)]
    pub wait: CreateWait,
}

#[derive(Debug, Args)]
pub(super) struct CreateWait {
    /// Wait until the image or its work request is in this state. May be
    /// given more than once: the first that is reached ends the wait. Failed
    /// work always ends it, with exit code 1.
    #[arg(long, value_enum, ignore_case = true, value_name = "STATE")]
    pub wait_for_state: Vec<WaitFor>,
    /// Longest time to wait, as in `oci`.
    #[arg(long, value_name = "SECONDS", default_value_t = 1200, requires = "wait_for_state")]
    pub max_wait_seconds: u64,
}

/// How work is asked for that is waited for unless told otherwise.
#[derive(Debug, Args)]
pub(super) struct Asking {
    /// Names this request: asking twice with the same token is asking once
    /// [default: a new one].
    #[arg(long, value_name = "TOKEN", value_parser = parse_token)]
    pub retry_token: Option<String>,
    /// Wait until the work request is in this state; ACCEPTED does not wait.
    #[arg(long, value_enum, ignore_case = true, value_name = "STATE")]
    #[arg(default_value = "SUCCEEDED")]
    pub wait_for_state: Vec<WaitFor>,
    /// Longest time to wait [default: until the work ends].
    #[arg(long, value_name = "SECONDS")]
    pub max_wait_seconds: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct ImageVerify {
    /// OCID of the image.
    #[arg(long, value_name = "OCID")]
    pub image_id: String,
    #[command(flatten)]
    pub asking: Asking,
}

#[derive(Debug, Args)]
pub(super) struct ImageList {
    /// Only those of this compartment.
    #[arg(long, value_name = "OCID")]
    pub compartment_id: Option<String>,
    /// Only those with exactly this name.
    #[arg(long, value_name = "NAME")]
    pub display_name: Option<String>,
    /// Only those with this operating system.
    #[arg(long, value_name = "NAME")]
    pub operating_system: Option<String>,
    /// Only those with this version of it.
    #[arg(long, value_name = "VERSION")]
    pub operating_system_version: Option<String>,
    /// Only those in this state.
    #[arg(long, value_enum, ignore_case = true, value_name = "STATE")]
    pub lifecycle_state: Option<LifecycleState>,
    /// Only those in this store, whichever host made them.
    #[arg(long, value_name = "NAME")]
    pub store: Option<String>,
    /// What to sort by [default: TIMECREATED].
    #[arg(long, value_enum, ignore_case = true, value_name = "FIELD")]
    pub sort_by: Option<SortBy>,
    /// Which way [default: DESC for TIMECREATED, ASC for DISPLAYNAME].
    #[arg(long, value_enum, ignore_case = true, value_name = "ORDER")]
    pub sort_order: Option<SortOrder>,
    #[command(flatten)]
    pub paging: Paging,
}

#[derive(Debug, Args)]
pub(super) struct Paging {
    /// How many at most [default: 100].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub limit: Option<u32>,
    /// Go on where an earlier list ended: its `opc-next-page`.
    #[arg(long, value_name = "TOKEN")]
    pub page: Option<String>,
    /// All of them.
    #[arg(long, conflicts_with_all = ["limit", "page"])]
    pub all: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum WorkRequestVerb {
    /// List work requests, newest first.
    List {
        /// Only those of this compartment.
        #[arg(long, value_name = "OCID")]
        compartment_id: Option<String>,
        /// Only those about this image, instance or volume.
        #[arg(long, value_name = "ID")]
        resource_id: Option<String>,
        #[command(flatten)]
        paging: Paging,
    },
    /// Show one work request, with its errors and its log.
    Get {
        /// OCID of the work request.
        #[arg(long, value_name = "OCID")]
        work_request_id: String,
        /// Show instead what was said to the instance, command by command.
        #[arg(long)]
        trace: bool,
    },
    /// Follow a work request to its end; the exit code tells how it ended.
    Watch {
        /// OCID of the work request.
        #[arg(long, value_name = "OCID")]
        work_request_id: String,
        /// Longest time to wait [default: until the work ends].
        #[arg(long, value_name = "SECONDS")]
        max_wait_seconds: Option<u64>,
    },
    /// Change how fast a work request may go.
    Update {
        /// OCID of the work request.
        #[arg(long, value_name = "OCID")]
        work_request_id: String,
        #[command(flatten)]
        rates: NewRates,
    },
    /// Ask for the end of a work request; what it made is undone.
    Cancel {
        /// OCID of the work request.
        #[arg(long, value_name = "OCID")]
        work_request_id: String,
    },
}

/// How far work must be for a wait to end. In order: a later point includes
/// the earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Until {
    Accepted,
    Started,
    Ended,
}

/// The words of `oci`'s `--wait-for-state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum WaitFor {
    Available,
    Provisioning,
    Accepted,
    InProgress,
    Succeeded,
    Failed,
    Canceled,
}

impl WaitFor {
    /// The first point that one of `wanted` names; `None` is no wait.
    pub fn earliest(wanted: &[Self]) -> Option<Until> {
        wanted.iter().map(|state| state.point()).min()
    }

    fn point(self) -> Until {
        match self {
            Self::Provisioning | Self::Accepted => Until::Accepted,
            Self::InProgress => Until::Started,
            Self::Available | Self::Succeeded | Self::Failed | Self::Canceled => Until::Ended,
        }
    }
}

/// What becomes of a volume that cannot be read in places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OnReadError {
    /// The image fails and leaves nothing behind.
    Fail,
}

/// Words of the command line for values of the API.
macro_rules! api_words {
    ($(#[$attribute:meta])* $name:ident -> $api:ty { $($variant:ident => $value:ident,)+ }) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
        $(#[$attribute])*
        pub(super) enum $name { $($variant,)+ }

        impl From<$name> for $api {
            fn from(word: $name) -> Self {
                match word { $($name::$variant => Self::$value,)+ }
            }
        }
    };
}

api_words!(
    #[value(rename_all = "UPPER")]
    LaunchMode -> pb::LaunchMode {
    Native => Native,
    Emulated => Emulated,
    Paravirtualized => Paravirtualized,
    Custom => Custom,
    AcceleratedPv => Acceleratedpv,
    }
);

api_words!(
    #[value(rename_all = "lower")]
    Compression -> pb::Compression {
    Zstd => Zstd,
    Deflate => Deflate,
    None => None,
    }
);

api_words!(
    #[value(rename_all = "kebab-case")]
    Consistency -> pb::create_image_request::SnapshotMode {
    Freeze => Freeze,
    FreezeOrCrash => FreezeOrCrash,
    Crash => Crash,
    Stop => Stop,
    }
);

api_words!(
    #[value(rename_all = "kebab-case")]
    IscsiPolicy -> pb::create_image_request::IscsiPolicy {
    Disconnect => Disconnect,
    }
);

api_words!(
    #[value(rename_all = "UPPER")]
    LifecycleState -> pb::image::LifecycleState {
    Provisioning => Provisioning,
    Importing => Importing,
    Available => Available,
    Exporting => Exporting,
    Disabled => Disabled,
    Deleted => Deleted,
    }
);

api_words!(
    #[value(rename_all = "UPPER")]
    SortBy -> pb::list_images_request::SortBy {
    TimeCreated => Timecreated,
    DisplayName => Displayname,
    }
);

api_words!(
    #[value(rename_all = "UPPER")]
    SortOrder -> pb::list_images_request::SortOrder {
    Asc => Asc,
    Desc => Desc,
    }
);

/// Free-form tags.
pub(super) type Tags = HashMap<String, String>;

fn parse_tags(text: &str) -> Result<Tags, String> {
    let read = text.strip_prefix("file://").map(fs::read_to_string).transpose();
    let read = read.map_err(|error| format!("the file cannot be read: {error}"))?;
    serde_json::from_str(read.as_deref().unwrap_or(text)).map_err(|error| {
        format!("not a JSON object of strings like '{{\"env\": \"prod\"}}': {error}")
    })
}

fn parse_token(text: &str) -> Result<String, String> {
    match text.chars().count() {
        1..=MAX_TOKEN => Ok(text.to_owned()),
        count => Err(format!("a retry token has 1 to {MAX_TOKEN} characters, this one {count}")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn tags_come_from_the_command_line_or_from_a_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(br#"{"env": "prod"}"#).unwrap();
        let from_file = parse_tags(&format!("file://{}", file.path().display())).unwrap();
        assert_eq!(from_file, parse_tags(r#"{"env": "prod"}"#).unwrap());
        assert_eq!(from_file["env"], "prod");
        let refused = |text: &str| parse_tags(text).unwrap_err();
        insta::assert_snapshot!(
            [refused("file:///missing"), refused("env=prod"), refused(r#"{"a": 1}"#)].join("\n"),
            @r#"
        the file cannot be read: No such file or directory (os error 2)
        not a JSON object of strings like '{"env": "prod"}': expected value at line 1 column 1
        not a JSON object of strings like '{"env": "prod"}': invalid type: integer `1`, expected a string at line 1 column 7
        "#
        );
    }
}
