//! Secrets that an undo needs after a crash, each sealed in a file of its own.
//!
//! ```text
//! keep ─► systemd-creds encrypt ─► DIR/NAME, durable ─► the journal has NAME
//! open ─► systemd-creds decrypt
//! wipe    when what it was for is over; sweep: all that the journal does not name
//! ```
//! Not in the journal itself: what is removed from its database stays in free
//! pages of the file until they are used again.

mod creds;

use std::{
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::timeout;

use self::creds::Creds;
use crate::{
    error::{Context, Error, Reason, Result},
    model::host::Feature,
    port::{BoxFuture, Secret, Vault},
    steps,
};

/// Longest wait for the disk, as the journal's.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is missing where it does not work.
const LACKING: &str = "without it a crash of imaged leaves its upload to a URL, and no guest is disconnected from iSCSI";

/// A directory of files that this host alone can read.
#[derive(Debug)]
pub struct SystemdVault {
    dir: PathBuf,
}

impl SystemdVault {
    /// What is kept is in `dir`, which nothing else uses. It is made with the
    /// first secret.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Whether it works on this host: tries it.
    pub async fn feature(&self) -> Feature {
        let tried = async {
            let (creds, secret) = (Creds::find()?, Secret("imaged tries whether it can".into()));
            let sealed = creds.seal("attempt", &secret).await?;
            match creds.open("attempt", &sealed).await? == secret {
                true => Ok(()),
                false => Err(Error::new(Reason::JournalFailed, "systemd-creds opens another")),
            }
        };
        let (available, details) = match tried.await {
            Ok(()) => (
                true,
                "what aborts an upload to a URL, and the iSCSI of guests, is kept by systemd-creds"
                    .into(),
            ),
            Err(error) => {
                let mut why = error.causes().fold(error.to_string(), |all, why| all + ": " + &why);
                for more in error.advice_text().into_iter().chain([LACKING]) {
                    why = why + "; " + more;
                }
                (false, why)
            }
        };
        Feature { name: "sealing".into(), available, details }
    }

    /// Has `job` done to the directory.
    async fn disk<T: Send + 'static>(
        &self,
        doing: &str,
        job: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let context = || format!("{doing} in {}", self.dir.display());
        let dir = self.dir.clone();
        let done = tokio::task::spawn_blocking(move || job(&dir));
        let done = timeout(PATIENCE, done).await.context(Reason::JournalFailed, context)?;
        done.context(Reason::JournalFailed, context)?.context(Reason::JournalFailed, context)
    }
}

impl SystemdVault {
    async fn remove(&self, name: &OsStr) -> Result<()> {
        let name = name.to_owned();
        let gone = self.disk("a secret cannot be wiped", move |dir| remove(&dir.join(name)));
        steps::effect("vault wipe", gone).await
    }
}

impl Vault for SystemdVault {
    fn keep<'a>(&'a self, secret: &'a Secret) -> BoxFuture<'a, Result<String>> {
        Box::pin(async move {
            let random = getrandom::u64()
                .context(Reason::JournalFailed, || "the kernel gives no random numbers")?;
            let name = format!("{random:016x}");
            let sealed = Creds::find()?.seal(&name, secret).await?;
            let file = name.clone();
            let write = self.disk("a secret cannot be kept", move |dir| write(dir, &file, &sealed));
            steps::effect("vault keep", write).await?;
            Ok(name)
        })
    }

    fn open<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Secret>>> {
        Box::pin(async move {
            let file = name.to_owned();
            let sealed = self.disk("a secret cannot be read", move |dir| read(&dir.join(file)));
            let Some(sealed) = sealed.await? else { return Ok(None) };
            Creds::find()?.open(name, &sealed).await.map(Some)
        })
    }

    fn wipe<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.remove(OsStr::new(name)))
    }

    fn sweep<'a>(&'a self, keep: &'a [&'a str]) -> BoxFuture<'a, Result<usize>> {
        Box::pin(async move {
            let mut names = self.disk("secrets cannot be listed", names).await?;
            names.retain(|name| !keep.iter().any(|&kept| *kept == **name));
            for name in &names {
                self.remove(name).await?;
            }
            Ok(names.len())
        })
    }
}

fn write(dir: &Path, name: &str, sealed: &[u8]) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(dir.join(name))?;
    file.write_all(sealed)?;
    file.sync_all()?;
    // The names: of the file, and of the directory if it is new.
    File::open(dir)?.sync_all()?;
    dir.parent().map_or(Ok(()), |above| File::open(above)?.sync_all())
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// The name goes, and not what lay on the disk: that is of no use, for what
/// it gave access to has ended.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn names(dir: &Path) -> io::Result<Vec<OsString>> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.file_name())).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[ignore = "needs root and systemd-creds"]
    async fn root_what_is_kept_is_sealed_opened_and_wiped() {
        let dir = tempfile::tempdir().unwrap();
        let vault = SystemdVault::new(dir.path().join("sealed"));
        assert!(vault.feature().await.available, "{:?}", vault.feature().await);
        assert_eq!(vault.sweep(&[]).await.unwrap(), 0, "there is none yet");
        let secrets = ["hush one", "hush two", "hush \n three\n"].map(|text| Secret(text.into()));
        let mut names = Vec::new();
        for secret in &secrets {
            names.push(vault.keep(secret).await.unwrap());
        }
        for (name, secret) in names.iter().zip(&secrets) {
            let sealed = fs::read(vault.dir.join(name)).unwrap();
            assert!(!String::from_utf8_lossy(&sealed).contains("hush"));
            assert_eq!(vault.open(name).await.unwrap().as_ref(), Some(secret));
        }
        // One that was put in another's place is none.
        let place = |name: &str| vault.dir.join(name);
        fs::rename(place(&names[2]), place("0123456789abcdef")).unwrap();
        let error = vault.open("0123456789abcdef").await.unwrap_err();
        assert!(error.causes().any(|why| why.contains("does not match")), "{error:?}");

        vault.wipe(&names[0]).await.unwrap();
        vault.wipe(&names[0]).await.unwrap();
        assert_eq!(vault.open(&names[0]).await.unwrap(), None);
        assert_eq!(vault.sweep(&[&names[1]]).await.unwrap(), 1);
        assert_eq!(fs::read_dir(&vault.dir).unwrap().count(), 1);
        assert_eq!(vault.open(&names[1]).await.unwrap().as_ref(), Some(&secrets[1]));
    }

    #[tokio::test]
    async fn a_directory_that_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = SystemdVault::new(file).open("name").await.unwrap_err();
        let said = error.report().replace(&dir.path().display().to_string(), "/dir");
        insta::assert_snapshot!(said, @"
        a secret cannot be read in /dir/file
          0: Not a directory (os error 20)
        ");
    }
}
