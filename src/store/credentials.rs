//! What gives access to a store: read where only root can, shown nowhere.
//!
//! ```text
//! `credentials` of the store's table
//!   else the systemd credential store.NAME ($CREDENTIALS_DIRECTORY)
//!   else the environment, or the file that the service's own tools read
//! ```
//! Files are as those tools write them: sections of `key = value`.

use std::{
    env,
    fs::File,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{oci, par::ParUrl, s3};
use crate::error::{Context, Error, Reason, Result};

/// Largest file of credentials: some keys.
const MAX_FILE: u64 = 64 << 10;

/// Where the credentials of one store may be.
#[derive(Debug, Clone)]
pub struct Place {
    /// The store's name.
    pub store: String,
    /// The file that the configuration names.
    pub file: Option<PathBuf>,
    /// The section of the file that the configuration names.
    pub profile: Option<String>,
}

impl Place {
    /// Reads what gives access to an S3 service. Blocks.
    ///
    /// # Errors
    ///
    /// `STORE_DENIED`: there is nothing, or it cannot be read.
    pub fn s3(&self) -> Result<s3::Credentials> {
        let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let Some(file) = self.found() else {
            let keys = (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY"));
            let (Some(access_key_id), Some(secret_access_key)) = keys else {
                return Err(self.none("or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"));
            };
            let session_token = variable("AWS_SESSION_TOKEN");
            return Ok(s3::Credentials { access_key_id, secret_access_key, session_token });
        };
        let section = self.section(&file, "default")?;
        Ok(s3::Credentials {
            access_key_id: section.required("aws_access_key_id")?,
            secret_access_key: section.required("aws_secret_access_key")?,
            session_token: section.get("aws_session_token"),
        })
    }

    /// Reads what gives access to OCI: a profile, and the key that it names.
    /// Blocks.
    ///
    /// # Errors
    ///
    /// `STORE_DENIED`: there is nothing, or it cannot be read or used.
    pub fn oci(&self) -> Result<oci::Credentials> {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let home = home();
        let of_the_tools = || {
            let named = variable("OCI_CLI_CONFIG_FILE").map(PathBuf::from);
            named.or_else(|| Some(home.join(".oci/config")).filter(|file| file.exists()))
        };
        let file = self.found().or_else(of_the_tools);
        let file =
            file.ok_or_else(|| self.none("or make ~/.oci/config with `oci setup config`"))?;
        let mut section = self.section(&file, "DEFAULT")?;
        let secured = section.get("pass_phrase").is_some();
        // What the profile DEFAULT says counts for all, as for OCI's own tools.
        if let Ok(others) = (Self { profile: None, ..self.clone() }).section(&file, "DEFAULT") {
            section.entries.extend(others.entries);
        }
        let named = section.required("key_file")?;
        let key_file = match named.strip_prefix("~/") {
            Some(below) => home.join(below),
            // An absolute one stays what it is.
            None => file.parent().unwrap_or(Path::new("/")).join(&named),
        };
        if secured {
            return Err(unusable(&key_file, oci::key::BadKey::Encrypted));
        }
        let key = oci::key::parse(&read(&key_file)?).map_err(|cause| unusable(&key_file, cause))?;
        let (tenancy, user) = (section.required("tenancy")?, section.required("user")?);
        let fingerprint = section.required("fingerprint")?;
        let found = oci::key::fingerprint(&key).map_err(|cause| unusable(&key_file, cause))?;
        if !fingerprint.eq_ignore_ascii_case(&found) {
            let context = format!(
                "the key {} has the fingerprint {found}, and section [{}] of {} says {}",
                key_file.display(),
                section.name,
                file.display(),
                super::http::shown(&fingerprint),
            );
            return Err(Error::new(Reason::StoreDenied, context)
                .advice("correct `key_file` or `fingerprint`: they are of different keys"));
        }
        Ok(oci::Credentials { key_id: format!("{tenancy}/{user}/{found}"), key })
    }

    /// Reads the URL of a pre-authenticated request. Blocks.
    ///
    /// # Errors
    ///
    /// `STORE_DENIED`: there is none, or it cannot be read.
    pub fn par(&self) -> Result<ParUrl> {
        let file = self.found().ok_or_else(|| self.none("with the URL in it"))?;
        ParUrl::parse(&read(&file)?).map_err(|cause| {
            let context = format!("{} holds no URL of a pre-authenticated request", file.display());
            Error::new(Reason::StoreDenied, context).because(cause).advice(
                "put the whole URL into it, in one line, as OCI showed it when the request was made",
            )
        })
    }

    /// The file that is there.
    fn found(&self) -> Option<PathBuf> {
        let of_systemd = || {
            let dir = env::var_os("CREDENTIALS_DIRECTORY")?;
            let file = Path::new(&dir).join(format!("store.{}", self.store));
            file.exists().then_some(file)
        };
        self.file.clone().or_else(of_systemd)
    }

    fn none(&self, or: &str) -> Error {
        let store = &self.store;
        Error::new(Reason::StoreDenied, format!("there are no credentials for the store {store:?}"))
            .advice(format!(
                "name a file with `credentials` in [stores.{store}], or let systemd load the \
                 credential store.{store}, {or}"
            ))
    }

    fn section(&self, file: &Path, default: &str) -> Result<Section> {
        let name = self.profile.as_deref().unwrap_or(default);
        let text = read(file)?;
        let entries = section(&text, name).ok_or_else(|| {
            let context = format!("there is no section [{name}] in {}", file.display());
            Error::new(Reason::StoreDenied, context)
                .advice("`profile` in the store's table names the section")
        })?;
        Ok(Section { file: file.to_owned(), name: name.to_owned(), entries })
    }
}

/// Where `~` is, also for a daemon that nobody has told.
fn home() -> PathBuf {
    let told = env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    told.or_else(|| nix::unistd::User::from_uid(nix::unistd::geteuid()).ok()?.map(|user| user.dir))
        .unwrap_or_else(|| "/".into())
}

/// The error about a private key that cannot be used.
fn unusable(key_file: &Path, cause: impl Into<crate::error::Cause>) -> Error {
    let file = key_file.display();
    let context = format!("the key {file} cannot be used");
    Error::new(Reason::StoreDenied, context).because(cause).advice(format!(
        "it must be an RSA key in PEM without a pass phrase (`openssl pkey -in {file} -out NEW` \
         decrypts one), and the profile must have no pass_phrase"
    ))
}

/// Keys and values of one section.
struct Section {
    file: PathBuf,
    name: String,
    entries: Vec<(String, String)>,
}

impl Section {
    fn get(&self, key: &str) -> Option<String> {
        self.entries.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
    }

    fn required(&self, key: &str) -> Result<String> {
        self.get(key).filter(|value| !value.is_empty()).ok_or_else(|| {
            let (name, file) = (&self.name, self.file.display());
            Error::new(Reason::StoreDenied, format!("section [{name}] of {file} has no {key}"))
        })
    }
}

/// A file that nobody else may read, as text.
fn read(path: &Path) -> Result<String> {
    let unreadable = || format!("the credentials {} cannot be read", path.display());
    let file = File::open(path).context(Reason::StoreDenied, unreadable).map_err(|error| {
        error.advice("make the file, or correct `credentials` in the store's table")
    })?;
    let facts = file.metadata().context(Reason::StoreDenied, unreadable)?;
    if facts.mode() & 0o007 != 0 {
        let context = format!("everyone on this host may read or write {}", path.display());
        return Err(Error::new(Reason::StoreDenied, context)
            .advice(format!("take that from them: chmod 600 {}", path.display())));
    }
    let mut text = String::new();
    let read = file.take(MAX_FILE).read_to_string(&mut text);
    read.context(Reason::StoreDenied, unreadable)?;
    Ok(text)
}

/// The entries of the section `name`.
fn section(text: &str, name: &str) -> Option<Vec<(String, String)>> {
    let lines = text.lines().map(str::trim);
    let mut lines = lines.filter(|line| !line.is_empty() && !line.starts_with(['#', ';']));
    let header = |line: &str| Some(line.strip_prefix('[')?.strip_suffix(']')?.trim().to_owned());
    lines.find(|line| header(line).as_deref() == Some(name))?;
    let entries = lines.take_while(|line| header(line).is_none());
    let entry = |line: &str| {
        let (key, value) = line.split_once('=')?;
        Some((key.trim().to_ascii_lowercase(), value.trim().to_owned()))
    };
    Some(entries.filter_map(entry).collect())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn place(text: &str, mode: u32, profile: Option<&str>) -> (tempfile::TempDir, Place) {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("keys");
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        let profile = profile.map(str::to_owned);
        (temp, Place { store: "far".into(), file: Some(file), profile })
    }

    const FILE: &str = "# keys\n[default]\naws_access_key_id = AK\naws_secret_access_key=s=e\n\
                        \n[other]\naws_access_key_id = AK2\n";

    #[test]
    fn keys_are_read_as_the_tools_write_them() {
        let (_temp, place) = place(FILE, 0o600, None);
        let keys = place.s3().unwrap();
        assert_eq!((&*keys.access_key_id, &*keys.secret_access_key), ("AK", "s=e"));
        assert_eq!(keys.session_token, None);
    }

    #[test]
    fn what_is_wrong_is_said_without_what_is_secret() {
        let said = |text, mode, profile| {
            let (temp, place) = place(text, mode, profile);
            let report = place.s3().unwrap_err().report();
            report.replace(temp.path().to_str().unwrap(), "/etc")
        };
        let all = [
            said(FILE, 0o644, None),
            said(FILE, 0o600, Some("other")),
            said(FILE, 0o600, Some("third")),
            said("hush", 0o600, None),
        ];
        insta::assert_snapshot!(all.join("\n"), @"
        everyone on this host may read or write /etc/keys
          help: take that from them: chmod 600 /etc/keys
        section [other] of /etc/keys has no aws_secret_access_key
        there is no section [third] in /etc/keys
          help: `profile` in the store's table names the section
        there is no section [default] in /etc/keys
          help: `profile` in the store's table names the section
        ");
        let missing = Place { store: "far".into(), file: Some("/nowhere".into()), profile: None };
        insta::assert_snapshot!(missing.s3().unwrap_err().report(), @"
        the credentials /nowhere cannot be read
          0: No such file or directory (os error 2)
          help: make the file, or correct `credentials` in the store's table
        ");
        let none = Place { store: "far".into(), file: None, profile: None };
        insta::assert_snapshot!(none.none("or set X").report(), @r#"
        there are no credentials for the store "far"
          help: name a file with `credentials` in [stores.far], or let systemd load the credential store.far, or set X
        "#);
    }

    const PROFILE: &str = "[DEFAULT]\nuser=ocid1.user.oc1..u\ntenancy=ocid1.tenancy.oc1..t\n\
                           fingerprint=b3:27:e7:71:32:5d:50:98:ad:f8:c0:aa:fa:7f:92:8d\n\
                           key_file=oci.pem\nregion=eu-frankfurt-1\n\
                           [OTHER]\nuser=ocid1.user.oc1..v\n\
                           [WRONG]\nfingerprint=00:11\n[CLOSED]\npass_phrase=hush\n";

    fn oci(text: &str, key: &str, mode: u32, profile: Option<&str>) -> Result<String, String> {
        let (temp, place) = place(text, 0o600, profile);
        let file = temp.path().join("oci.pem");
        fs::write(&file, key).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        let said = |error: Error| error.report().replace(temp.path().to_str().unwrap(), "/etc");
        place.oci().map(|credentials| credentials.key_id).map_err(said)
    }

    #[test]
    fn a_profile_of_oci_is_read_as_its_tools_read_it() {
        let key = crate::store::oci::sign::tests::KEY;
        let fingerprint = "b3:27:e7:71:32:5d:50:98:ad:f8:c0:aa:fa:7f:92:8d";
        let key_id = |user| format!("ocid1.tenancy.oc1..t/ocid1.user.oc1..{user}/{fingerprint}");
        assert_eq!(oci(PROFILE, key, 0o600, None).unwrap(), key_id("u"));
        // What a profile does not say, DEFAULT does.
        assert_eq!(oci(PROFILE, key, 0o640, Some("OTHER")).unwrap(), key_id("v"));
    }

    #[test]
    fn what_is_wrong_with_a_profile_of_oci_is_said_without_what_is_secret() {
        let key = crate::store::oci::sign::tests::KEY;
        let said = [
            oci(PROFILE, key, 0o644, None),
            oci(PROFILE, key, 0o600, Some("WRONG")),
            oci(PROFILE, key, 0o600, Some("CLOSED")),
            oci(PROFILE, key, 0o600, Some("NONE")),
            oci(PROFILE, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nhush\n", 0o600, None),
            oci(PROFILE, "hush", 0o600, None),
            oci("[DEFAULT]\nkey_file=/nowhere/key.pem\n", key, 0o600, None),
            oci("[DEFAULT]\nuser=hush\n", key, 0o600, None),
        ]
        .map(Result::unwrap_err);
        insta::assert_snapshot!(said.join("\n"), @"
        everyone on this host may read or write /etc/oci.pem
          help: take that from them: chmod 600 /etc/oci.pem
        the key /etc/oci.pem has the fingerprint b3:27:e7:71:32:5d:50:98:ad:f8:c0:aa:fa:7f:92:8d, and section [WRONG] of /etc/keys says 00:11
          help: correct `key_file` or `fingerprint`: they are of different keys
        the key /etc/oci.pem cannot be used
          0: it is encrypted
          help: it must be an RSA key in PEM without a pass phrase (`openssl pkey -in /etc/oci.pem -out NEW` decrypts one), and the profile must have no pass_phrase
        there is no section [NONE] in /etc/keys
          help: `profile` in the store's table names the section
        the key /etc/oci.pem cannot be used
          0: it is encrypted
          help: it must be an RSA key in PEM without a pass phrase (`openssl pkey -in /etc/oci.pem -out NEW` decrypts one), and the profile must have no pass_phrase
        the key /etc/oci.pem cannot be used
          0: it has neither a BEGIN PRIVATE KEY nor a BEGIN RSA PRIVATE KEY line
          help: it must be an RSA key in PEM without a pass phrase (`openssl pkey -in /etc/oci.pem -out NEW` decrypts one), and the profile must have no pass_phrase
        the credentials /nowhere/key.pem cannot be read
          0: No such file or directory (os error 2)
          help: make the file, or correct `credentials` in the store's table
        section [DEFAULT] of /etc/keys has no key_file
        ");
    }

    #[test]
    fn a_pre_authenticated_request_is_read_and_never_shown() {
        let (_temp, given) = place("https://os.example.com/p/hush/n/ns/b/images/o/\n", 0o600, None);
        assert_eq!(format!("{:?}", given.par().unwrap()), "ParUrl(https://os.example.com/images)");
        let (temp, wrong) = place("https://os.example.com/p/hush/n/ns", 0o600, None);
        let said = wrong.par().unwrap_err().report();
        insta::assert_snapshot!(said.replace(temp.path().to_str().unwrap(), "/etc"), @"
        /etc/keys holds no URL of a pre-authenticated request
          0: it is not of the form https://HOST/p/TOKEN/n/NAMESPACE/b/BUCKET/o/
          help: put the whole URL into it, in one line, as OCI showed it when the request was made
        ");
    }
}
