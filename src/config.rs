//! The configuration: `/etc/imaged/imaged.toml`, and one file for each
//! instance (see [`instances`]).
//!
//! Unknown keys are refused, and every error names file, line and key, so
//! that a misspelt limit is never silently the default. No secret belongs
//! into any of these files.

pub mod instances;
mod source;
mod stores;
mod values;

use std::{
    collections::BTreeMap,
    fs, io,
    num::{NonZeroU16, NonZeroUsize},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use self::{
    source::Source,
    values::{
        absolute, absolute_paths, latency_percent, progress_timeout, read_depth, size, size_if_any,
    },
};
pub use self::{
    stores::{Remote, StoreConfig},
    values::EncodeThreads,
};
use crate::{
    error::{Context, Reason, Result},
    model::{ByteSize, CompartmentId, image::MAX_VOLUME_SIZE},
};

/// Read where no other file is named.
pub const DEFAULT_PATH: &str = "/etc/imaged/imaged.toml";

/// Group of the socket where the configuration names none.
pub const DEFAULT_GROUP: &str = "imaged";

/// Least rate: the largest part takes minutes, less than stores wait for.
const MIN_RATE: ByteSize = ByteSize::mib(1);

/// Least scratch: tables and some clusters of 64 KiB.
const MIN_SCRATCH: ByteSize = ByteSize(4 << 20);

/// Everything that an operator may set. Every key may be left out.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The Unix socket that the daemon serves. Default:
    /// `/run/imaged/imaged.sock`, where `imagectl` looks.
    #[serde(deserialize_with = "absolute")]
    pub socket: PathBuf,
    /// Group whose members may call. Default: `imaged` where that group
    /// exists, otherwise root alone. A group that is named here must exist.
    pub socket_group: Option<String>,
    /// What imaged must remember over a restart: the journal, and the images
    /// of the default store. Default: `/var/lib/imaged`. One daemon per
    /// directory.
    #[serde(deserialize_with = "absolute")]
    pub state_dir: PathBuf,
    /// Directory of the instances' files. Default:
    /// `/etc/imaged/instances.d`.
    #[serde(deserialize_with = "absolute")]
    pub instances_dir: PathBuf,
    /// The libvirtd whose domains are instances. Default: `qemu:///system`.
    pub libvirt_uri: String,
    /// Directories in which a volume must lie, at any depth, to be named
    /// with `--boot-volume`: the path itself, and where its symbolic links
    /// lead (a logical volume lies in `/dev`). Default: none, because whoever
    /// may call could otherwise read every disk of the host. Boot volumes of
    /// instances need not lie in them.
    #[serde(deserialize_with = "absolute_paths")]
    pub boot_volume_dirs: Vec<PathBuf>,
    /// Directories in which a volume must lie, at any depth, for an image to
    /// be restored to it. Default: none, because whoever may call could
    /// otherwise write over every idle disk of the host.
    #[serde(deserialize_with = "absolute_paths")]
    pub restore_dirs: Vec<PathBuf>,
    /// Compartment of instances and images that name none. Default:
    /// `default`.
    pub default_compartment: CompartmentId,
    /// Threads that compress and digest: a number, or `"all"` for one for
    /// each core. Default: an eighth of the cores, at least one, because a
    /// hypervisor's cores are sold.
    pub encode_threads: EncodeThreads,
    /// Reads of 1 MiB that are under way at once, 1 to 256, shared by the
    /// captures that may run at once. Each takes 1 MiB of memory, beyond 16
    /// more than the 128 MiB that are promised. Default: 16, of which 8 for
    /// one volume keep an NVMe disk at its limit.
    #[serde(deserialize_with = "read_depth")]
    pub read_depth: NonZeroU16,
    /// Larger volumes are refused. Default: `"400GiB"`; at most
    /// [`MAX_VOLUME_SIZE`].
    #[serde(deserialize_with = "size")]
    pub max_volume_size: ByteSize,
    /// Larger volumes give a warning. Default: `"400GB"` (10^9), the largest
    /// image that OCI imports.
    #[serde(deserialize_with = "size")]
    pub warn_volume_size: ByteSize,
    /// Work requests that run at once; others wait. Each beyond 2 takes 50
    /// MiB of memory more than the 128 MiB that are promised. Default: 2,
    /// which keeps a store busy while another volume is opened or sealed.
    pub max_captures: NonZeroUsize,
    /// Work requests that may wait; more are refused. Default: 100.
    pub max_queued: usize,
    /// Directory of what running instances overwrite while they are imaged;
    /// the users that their QEMUs run as must be able to pass through it.
    /// Default: `scratch` in the state directory.
    #[serde(deserialize_with = "absolute")]
    pub scratch_dir: PathBuf,
    /// Most that one instance may overwrite before its image fails; as much
    /// must be free when it begins. Default: `"10GiB"`.
    #[serde(deserialize_with = "size")]
    pub scratch_size: ByteSize,
    /// Bytes a second that are read of a running instance's volume at most, at
    /// least 1 MiB. Default: as many as its guest bears.
    #[serde(deserialize_with = "size_if_any")]
    pub read_rate: Option<ByteSize>,
    /// Bytes a second that all work together reads of volumes at most, at least
    /// 1 MiB. `imagectl host update` changes it until the next start. Default:
    /// no limit.
    #[serde(deserialize_with = "size_if_any")]
    pub max_read_rate: Option<ByteSize>,
    /// Bytes a second that all work together sends to stores at most, at least
    /// 1 MiB. `imagectl host update` changes it until the next start. Default:
    /// no limit.
    #[serde(deserialize_with = "size_if_any")]
    pub max_upload_rate: Option<ByteSize>,
    /// Percent, 110 to 1000. When the operations of a guest's disk take longer
    /// than this part of what is usual, its volume is read slower. Default: 150.
    #[serde(deserialize_with = "latency_percent")]
    pub latency_percent: u16,
    /// Seconds, 1 to 1200. Work that gets no further for so long, because a
    /// device or a store does not answer, is ended, so that its instance does
    /// not stay locked. Default: 1200.
    #[serde(rename = "progress_timeout_seconds", deserialize_with = "progress_timeout")]
    pub progress_timeout: Duration,
    /// Name of the store that images go to. Default: the only store; with
    /// several it must be given. Never empty after [`parse`].
    pub default_store: String,
    /// The stores, by name, as `[stores.NAME]`. Default: one directory store
    /// `local` at `images` in the state directory.
    pub stores: BTreeMap<String, StoreConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: "/run/imaged/imaged.sock".into(),
            socket_group: None,
            state_dir: "/var/lib/imaged".into(),
            instances_dir: "/etc/imaged/instances.d".into(),
            libvirt_uri: "qemu:///system".into(),
            boot_volume_dirs: Vec::new(),
            restore_dirs: Vec::new(),
            default_compartment: CompartmentId::default(),
            encode_threads: EncodeThreads::Share,
            read_depth: values::DEFAULT_READ_DEPTH,
            max_volume_size: ByteSize::gib(400),
            warn_volume_size: ByteSize(400_000_000_000),
            max_captures: values::DEFAULT_CAPTURES,
            max_queued: 100,
            scratch_dir: PathBuf::new(),
            scratch_size: ByteSize::gib(10),
            read_rate: None,
            max_read_rate: None,
            max_upload_rate: None,
            latency_percent: 150,
            progress_timeout: values::MAX_PROGRESS_TIMEOUT,
            default_store: String::new(),
            stores: BTreeMap::new(),
        }
    }
}

/// Reads the configuration at `path`, or at [`DEFAULT_PATH`], where a missing
/// file means that everything has its default.
///
/// # Errors
///
/// `INVALID_CONFIGURATION`, also when a file that was named is missing.
pub fn load(path: Option<&Path>) -> Result<Config> {
    let named = path.unwrap_or(Path::new(DEFAULT_PATH));
    match fs::read_to_string(named) {
        Ok(text) => parse(&text, named),
        Err(cause) if path.is_none() && cause.kind() == io::ErrorKind::NotFound => parse("", named),
        Err(cause) => Err(cause).context(Reason::InvalidConfiguration, || {
            format!("the configuration file {} cannot be read", named.display())
        }),
    }
}

/// The configuration that `text` describes; `origin` is named in errors.
///
/// # Errors
///
/// `INVALID_CONFIGURATION`, naming file, line and key.
pub fn parse(text: &str, origin: &Path) -> Result<Config> {
    let source = Source { text, origin };
    let mut config: Config = source.deserialize()?;
    if config.stores.is_empty() {
        let local = StoreConfig::directory(config.state_dir.join("images"));
        config.stores.insert("local".into(), local);
    }
    config.default_store = default_store(&config, &source)?;
    if config.scratch_dir.as_os_str().is_empty() {
        config.scratch_dir = config.state_dir.join("scratch");
    }
    for name in config.stores.keys() {
        // Store names appear in manifests and on command lines.
        if let Err(cause) = name.parse::<CompartmentId>() {
            return Err(source.refuse(&["stores", name], format!("not a name: {cause}")));
        }
    }
    let rates = [
        ("read_rate", config.read_rate),
        ("max_read_rate", config.max_read_rate),
        ("max_upload_rate", config.max_upload_rate),
    ];
    for (key, rate) in rates {
        if rate.is_some_and(|rate| rate < MIN_RATE) {
            let message = "less than 1MiB a second would never come to an end".to_owned();
            return Err(source.refuse(&[key], message));
        }
    }
    if config.scratch_size < MIN_SCRATCH {
        let message = format!("less than {MIN_SCRATCH}, which any guest fills at once");
        return Err(source.refuse(&["scratch_size"], message));
    }
    if config.max_volume_size > MAX_VOLUME_SIZE {
        let message = format!("more than {MAX_VOLUME_SIZE}, the largest volume that can be imaged");
        return Err(source.refuse(&["max_volume_size"], message));
    }
    if config.warn_volume_size > config.max_volume_size {
        let limit = config.max_volume_size;
        let message = format!("larger than max_volume_size ({limit:#}), so it would never warn");
        // Whoever lowers the limit alone need not think of the warning.
        if source.has(&["warn_volume_size"]) {
            return Err(source.refuse(&["warn_volume_size"], message));
        }
        config.warn_volume_size = limit;
    }
    Ok(config)
}

fn default_store(config: &Config, source: &Source<'_>) -> Result<String> {
    let known = || config.stores.keys().cloned().collect::<Vec<_>>().join(", ");
    if config.stores.contains_key(&config.default_store) {
        return Ok(config.default_store.clone());
    }
    if source.has(&["default_store"]) {
        let message = format!("there is no store {:?}, only {}", config.default_store, known());
        return Err(source.refuse(&["default_store"], message));
    }
    let mut names = config.stores.keys();
    match (names.next(), names.next()) {
        (Some(only), None) => Ok(only.clone()),
        _ => {
            let message = format!("missing key \"default_store\": there are {}", known());
            Err(source.refuse(&["stores"], message))
        }
    }
}

impl Config {
    /// Threads that encode on a host of `cores` cores.
    #[must_use]
    pub fn encode_threads(&self, cores: NonZeroUsize) -> NonZeroUsize {
        /// The part of the cores that imaged takes unasked.
        const SHARE: usize = 8;
        match self.encode_threads {
            EncodeThreads::Share => {
                NonZeroUsize::new(cores.get() / SHARE).unwrap_or(NonZeroUsize::MIN)
            }
            EncodeThreads::All => cores,
            EncodeThreads::Count(count) => count,
        }
    }
}

#[cfg(test)]
mod tests {
    /// Keys of the structure `name` in `source`, as a file has them.
    fn keys(source: &str, name: &str) -> Vec<String> {
        let body = source.split_once(&format!("struct {name} {{")).unwrap().1;
        let body = body.split_once("\n}").unwrap().0;
        let fields = body.lines().filter_map(|line| line.trim().split_once(": "));
        let names = fields.map(|(field, _)| field.trim_start_matches("pub "));
        let names = names.filter(|field| field.chars().all(|c| c.is_lowercase() || c == '_'));
        let renamed = |field: &str| match field {
            "progress_timeout" => "progress_timeout_seconds".to_owned(),
            field => field.to_owned(),
        };
        names.map(renamed).collect()
    }

    #[test]
    fn every_key_is_documented_and_no_other() {
        let documented = include_str!("../docs/configuration.md");
        let documented = documented.lines().filter_map(|line| line.strip_prefix("| `"));
        let mut documented: Vec<_> =
            documented.map(|line| line.split('`').next().unwrap().to_owned()).collect();
        let mut known: Vec<_> = [
            keys(include_str!("config.rs"), "Config"),
            keys(include_str!("config/stores.rs"), "StoreTable"),
            keys(include_str!("config/instances.rs"), "InstanceFile"),
        ]
        .concat();
        known.sort();
        documented.sort();
        // Stores of several kinds have keys of the same names.
        documented.dedup();
        known.dedup();
        assert_eq!(known, documented);
    }

    use super::*;

    fn refused(text: &str) -> String {
        parse(text, Path::new("/etc/imaged/imaged.toml")).unwrap_err().report()
    }

    #[test]
    fn nothing_set_means_the_documented_defaults() {
        let config = parse("", Path::new("x")).unwrap();
        assert_eq!(config.default_store, "local");
        let local = StoreConfig::Directory {
            path: "/var/lib/imaged/images".into(),
            min_free: ByteSize::gib(1),
        };
        assert_eq!(config.stores["local"], local);
        assert_eq!(config.max_volume_size, ByteSize::gib(400));
        assert_eq!(config.warn_volume_size, ByteSize(400_000_000_000));
        let threads = |cores| config.encode_threads(NonZeroUsize::new(cores).unwrap()).get();
        assert_eq!([1, 7, 8, 96].map(threads), [1, 1, 1, 12]);
    }

    #[test]
    fn everything_can_be_set() {
        let config = parse(
            r#"
            socket = "/run/x.sock"
            socket_group = "kvm"
            state_dir = "/srv/imaged"
            instances_dir = "/srv/instances"
            boot_volume_dirs = ["/dev/vg0", "/srv/disks"]
            default_compartment = "ocid1.compartment.oc1..aaaa"
            encode_threads = "all"
            read_depth = 32
            max_volume_size = "1TiB"
            warn_volume_size = "900GB"
            max_captures = 4
            max_queued = 0
            default_store = "slow"
            [stores.fast]
            kind = "directory"
            path = "/nvme/images"
            [stores.slow]
            kind = "directory"
            path = "/hdd/images"
            min_free = "0B"
            [stores.far]
            kind = "s3"
            endpoint = "https://s3.example.com"
            bucket = "images"
            prefix = "hosts"
            [stores.oracle]
            kind = "oci"
            region = "eu-frankfurt-1"
            bucket = "images"
            profile = "IMAGES"
            [stores.given]
            kind = "par"
            credentials = "/etc/imaged/given.url"
            "#,
            Path::new("x"),
        )
        .unwrap();
        assert_eq!(config.encode_threads(NonZeroUsize::new(6).unwrap()).get(), 6);
        assert_eq!(config.read_depth.get(), 32);
        assert_eq!(config.max_volume_size, ByteSize::gib(1024));
        assert_eq!(config.warn_volume_size, ByteSize(900_000_000_000));
        assert_eq!(config.default_store, "slow");
        let slow = StoreConfig::Directory { path: "/hdd/images".into(), min_free: ByteSize(0) };
        assert_eq!(config.stores["slow"], slow);
        let remote = Remote { prefix: "hosts".into(), ..Remote::default() };
        let far = StoreConfig::S3 {
            region: "us-east-1".into(),
            endpoint: "https://s3.example.com".into(),
            bucket: "images".into(),
            remote,
        };
        assert_eq!(config.stores["far"], far);
        let oracle = StoreConfig::Oci {
            endpoint: "https://objectstorage.eu-frankfurt-1.oraclecloud.com".into(),
            namespace: None,
            bucket: "images".into(),
            remote: Remote { profile: Some("IMAGES".into()), ..Remote::default() },
        };
        assert_eq!(config.stores["oracle"], oracle);
        let credentials = Some("/etc/imaged/given.url".into());
        let given = StoreConfig::Par { remote: Remote { credentials, ..Remote::default() } };
        assert_eq!(config.stores["given"], given);
        assert_eq!(config.socket_group.as_deref(), Some("kvm"));
    }

    #[test]
    fn a_lower_limit_alone_lowers_the_warning_too() {
        let config = parse("max_volume_size = \"10GiB\"", Path::new("x")).unwrap();
        assert_eq!(config.warn_volume_size, ByteSize::gib(10));
    }

    #[test]
    fn an_unknown_key_names_file_line_and_key() {
        insta::assert_snapshot!(refused("# mine\nsokcet = \"/run/x\"\n"), @"/etc/imaged/imaged.toml, line 2: sokcet: unknown key, expected one of `socket`, `socket_group`, `state_dir`, `instances_dir`, `libvirt_uri`, `boot_volume_dirs`, `restore_dirs`, `default_compartment`, `encode_threads`, `read_depth`, `max_volume_size`, `warn_volume_size`, `max_captures`, `max_queued`, `scratch_dir`, `scratch_size`, `read_rate`, `max_read_rate`, `max_upload_rate`, `latency_percent`, `progress_timeout_seconds`, `default_store`, `stores`");
    }

    #[test]
    fn an_unknown_key_in_a_store() {
        insta::assert_snapshot!(refused("[stores.a]\nkind = \"directory\"\npaht = \"/a\"\n"), @"/etc/imaged/imaged.toml, line 3: stores.a.paht: unknown key, expected one of `kind`, `path`, `min_free`, `endpoint`, `region`, `namespace`, `bucket`, `prefix`, `credentials`, `profile`, `ca_file`");
    }

    #[test]
    fn a_wrong_type() {
        insta::assert_snapshot!(refused("\nmax_captures = \"two\"\n"), @r#"/etc/imaged/imaged.toml, line 2: max_captures: invalid type: string "two", expected a number from 1 on"#);
    }

    #[test]
    fn a_missing_key() {
        insta::assert_snapshot!(refused("\n[stores.a]\nkind = \"directory\"\n"), @"/etc/imaged/imaged.toml, line 2: stores.a: missing key `path`");
    }

    #[test]
    fn bad_values() {
        let reports = [
            "max_volume_size = \"400 gigs\"",
            "max_volume_size = 400",
            "max_captures = 1\nmax_volume_size = \"1025GiB\"",
            "socket = \"run/imaged.sock\"",
            "boot_volume_dirs = [\"/dev\", \"disks\"]",
            "encode_threads = \"some\"",
            "encode_threads = 0",
            "read_depth = 257",
            "max_captures = 0",
            "default_compartment = \"../etc\"",
            "[stores.a]\nkind = \"floppy\"\npath = \"/a\"",
            "[stores.a]\nkind = \"s3\"\nendpoint = \"https://s3\"",
            "\n[stores.a]\nkind = \"s3\"\npath = \"/a\"",
            "[stores.a]\nkind = \"oci\"\nbucket = \"b\"",
            "[stores.a]\nkind = \"oci\"\nregion = \"a.b/c\"\nbucket = \"b\"",
            "[stores.a]\nkind = \"oci\"\nregion = \"a\"\nendpoint = \"b\"\nbucket = \"c\"",
            "[stores.a]\nkind = \"par\"\nbucket = \"b\"",
            "max_volume_size = \"1GiB\"\nwarn_volume_size = \"2GiB\"",
            "[stores.\"a b\"]\nkind = \"directory\"\npath = \"/a\"",
            "default_store = \"b\"\n[stores.a]\nkind = \"directory\"\npath = \"/a\"",
            "[stores.a]\nkind = \"directory\"\npath = \"/a\"\n[stores.b]\nkind = \"directory\"\npath = \"/b\"",
            "socket \"/run/x\"",
        ]
        .map(refused);
        insta::assert_snapshot!(reports.join("\n"), @r#"
        /etc/imaged/imaged.toml, line 1: max_volume_size: "gigs" is not one of the units B, KB, MB, GB, TB, PB, KiB, MiB, GiB, TiB, PiB
        /etc/imaged/imaged.toml, line 1: max_volume_size: invalid type: integer `400`, expected a size with its unit, such as "400GiB"
        /etc/imaged/imaged.toml, line 2: max_volume_size: more than 1.00 TiB, the largest volume that can be imaged
        /etc/imaged/imaged.toml, line 1: socket: "run/imaged.sock" is not an absolute path
        /etc/imaged/imaged.toml, line 1: boot_volume_dirs: "disks" is not an absolute path
        /etc/imaged/imaged.toml, line 1: encode_threads: invalid value: string "some", expected a number of threads from 1 on, or "all"
        /etc/imaged/imaged.toml, line 1: encode_threads: invalid value: integer `0`, expected a number of threads from 1 on, or "all"
        /etc/imaged/imaged.toml, line 1: read_depth: 257 is not from 1 to 256
        /etc/imaged/imaged.toml, line 1: max_captures: invalid value: integer `0`, expected a number from 1 on
        /etc/imaged/imaged.toml, line 1: default_compartment: it begins with '.'
        /etc/imaged/imaged.toml, line 2: stores.a.kind: unknown variant `floppy`, expected one of `directory`, `s3`, `oci`, `par`
        /etc/imaged/imaged.toml, line 1: stores.a: missing key `bucket`
        /etc/imaged/imaged.toml, line 2: stores.a: a store of kind "s3" has no key "path", only endpoint, region, bucket, prefix, credentials, profile, ca_file
        /etc/imaged/imaged.toml, line 1: stores.a: missing key `region`
        /etc/imaged/imaged.toml, line 1: stores.a: "a.b/c" is no region, such as "eu-frankfurt-1"
        /etc/imaged/imaged.toml, line 1: stores.a: either `region` or `endpoint` says where it is
        /etc/imaged/imaged.toml, line 1: stores.a: a store of kind "par" has no key "bucket", only credentials, prefix, ca_file
        /etc/imaged/imaged.toml, line 2: warn_volume_size: larger than max_volume_size (1.00 GiB (1073741824 bytes)), so it would never warn
        /etc/imaged/imaged.toml, line 1: stores.a b: not a name: ' ' is not among the letters, digits, '.', '-' and '_' that an identifier is made of
        /etc/imaged/imaged.toml, line 1: default_store: there is no store "b", only a
        /etc/imaged/imaged.toml, line 1: stores: missing key "default_store": there are a, b
        /etc/imaged/imaged.toml, line 1: key with no value, expected `=`
        "#);
    }

    #[test]
    fn a_named_file_must_exist() {
        let report = load(Some(Path::new("/nonexistent/imaged.toml"))).unwrap_err().report();
        insta::assert_snapshot!(report, @"
        the configuration file /nonexistent/imaged.toml cannot be read
          0: No such file or directory (os error 2)
        ");
    }
}
