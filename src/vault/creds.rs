//! systemd-creds: seals and opens by a key of the host, which systemd makes
//! when there is none. Needs systemd 250.
//!
//! Secrets go through pipes, never into its arguments.

use std::{
    env,
    ffi::OsStr,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

use crate::{
    error::{Cause, Error, Reason, Result},
    port::Secret,
};

/// The program.
const NAME: &str = "systemd-creds";

/// Where it is looked for without a `PATH`.
const USUAL: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The host's key alone. `auto` would take a TPM, too, where there is one: it
/// answers slowly, its device may be kept from a service, and it gives nothing
/// back after its firmware was updated. What is sealed is of use for minutes,
/// on this disk, where the key is.
const KEY: &str = "--with-key=host";

/// Longest run: it takes 20 ms.
const DEADLINE: Duration = Duration::from_secs(10);

/// Most that is read of each of its outputs.
const MAX_ANSWER: u64 = 64 << 10;

/// What of its complaint is told.
const TOLD: usize = 500;

/// A systemd-creds that was found.
#[derive(Debug)]
pub(super) struct Creds {
    program: PathBuf,
    deadline: Duration,
}

impl Creds {
    /// Looks for it.
    pub fn find() -> Result<Self> {
        let path = env::var_os("PATH");
        let path = path.as_deref().unwrap_or(OsStr::new(USUAL));
        let found = env::split_paths(path).map(|dir| dir.join(NAME)).find(|file| file.is_file());
        let program = found.ok_or_else(|| {
            Error::new(Reason::JournalFailed, "there is no systemd-creds on this host")
                .advice("it comes with systemd 250 and newer")
        })?;
        Ok(Self { program, deadline: DEADLINE })
    }

    /// `secret`, which only this host opens, and only by this name.
    pub async fn seal(&self, name: &str, secret: &Secret) -> Result<Vec<u8>> {
        let name = of(name);
        let words = ["encrypt", KEY, &name, "-", "-"];
        self.run(&words, secret.0.as_bytes(), "systemd-creds cannot seal a secret").await
    }

    /// What was sealed by this name.
    pub async fn open(&self, name: &str, sealed: &[u8]) -> Result<Secret> {
        let (name, cannot) = (of(name), "systemd-creds cannot open a secret");
        let words = ["decrypt", "--newline=no", &name, "-", "-"];
        let opened = self.run(&words, sealed, cannot).await?;
        // The cause would have what is in it.
        let text = String::from_utf8(opened);
        text.map(Secret).map_err(|_| Error::new(Reason::JournalFailed, cannot))
    }

    async fn run(&self, words: &[&str], input: &[u8], cannot: &str) -> Result<Vec<u8>> {
        let failed = |cause: Cause| {
            Error::new(Reason::JournalFailed, cannot)
                .because(cause)
                .advice("look whether `systemd-creds setup` works, which makes the host's key")
        };
        let answered = timeout(self.deadline, self.answer(words, input)).await;
        let answered = answered.map_err(|late| failed(late.into()))?;
        let (status, answer, complaint) = answered.map_err(|broken| failed(broken.into()))?;
        if status.success() {
            return Ok(answer);
        }
        let said = String::from_utf8_lossy(&complaint);
        let said: String = said.trim().chars().take(TOLD).collect();
        let why = if said.is_empty() { status.to_string() } else { said };
        Err(failed(why.into()))
    }

    async fn answer(
        &self,
        words: &[&str],
        input: &[u8],
    ) -> std::io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
        let mut child = Command::new(&self.program)
            .args(words)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", USUAL)
            // Else it tells each time that the key's disk is not encrypted.
            .env("SYSTEMD_LOG_LEVEL", "err")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let give = async {
            if let Some(mut stdin) = stdin {
                // One that does not listen says why.
                let _ = stdin.write_all(input).await;
            }
            Ok(())
        };
        let (answer, complaint) = (read(stdout), read(stderr));
        let ((), answer, complaint) = tokio::try_join!(give, answer, complaint)?;
        Ok((child.wait().await?, answer, complaint))
    }
}

/// A sealed text says what it is called, so that none takes another's place.
fn of(name: &str) -> String {
    format!("--name=imaged-{name}")
}

async fn read(from: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        let _ = from.take(MAX_ANSWER).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::{path::Path, process, time::Instant};

    use super::*;

    /// One that does what `script` says. Written by another process: a child
    /// of this one, begun by another test, could have the file open still when
    /// it is to be run.
    fn creds(dir: &Path, script: &str) -> Creds {
        let program = dir.join(NAME);
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" >"$0" && chmod 755 "$0""#;
        let mut sh = process::Command::new("sh");
        assert!(sh.args(["-c", write]).arg(&program).arg(script).status().unwrap().success());
        Creds { program, deadline: Duration::from_secs(20) }
    }

    #[tokio::test]
    async fn a_complaint_is_told_and_no_secret_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let refuses =
            creds(dir.path(), "echo 'Failed to open the key: no such device' >&2; exit 1");
        let error = refuses.seal("name", &Secret("hush".into())).await.unwrap_err();
        insta::assert_snapshot!(error.report(), @"
        systemd-creds cannot seal a secret
          0: Failed to open the key: no such device
          help: look whether `systemd-creds setup` works, which makes the host's key
        ");
        let dies = creds(dir.path(), "exit 3");
        let error = dies.open("name", b"sealed").await.unwrap_err();
        insta::assert_snapshot!(error.report(), @"
        systemd-creds cannot open a secret
          0: exit status: 3
          help: look whether `systemd-creds setup` works, which makes the host's key
        ");
        // No text.
        let odd = creds(dir.path(), r"printf 'hush\377'");
        let error = odd.open("name", b"sealed").await.unwrap_err();
        assert!(!format!("{error:?}").contains("hush"), "{error:?}");
    }

    #[tokio::test]
    async fn the_secret_goes_through_a_pipe_and_not_into_the_arguments() {
        let dir = tempfile::tempdir().unwrap();
        let shows = creds(dir.path(), "echo \"$@\"; env; cat");
        let said = shows.seal("name", &Secret("hush".into())).await.unwrap();
        let said = String::from_utf8(said).unwrap();
        assert!(said.starts_with("encrypt --with-key=host --name=imaged-name - -\n"), "{said}");
        assert_eq!(said.matches("hush").count(), 1, "{said}");
    }

    #[tokio::test]
    async fn one_that_hangs_ends_at_its_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let hangs = creds(dir.path(), "exec sleep 60");
        let hangs = Creds { deadline: Duration::from_millis(100), ..hangs };
        let begun = Instant::now();
        let error = hangs.seal("name", &Secret("hush".into())).await.unwrap_err();
        insta::assert_snapshot!(error.report(), @"
        systemd-creds cannot seal a secret
          0: deadline has elapsed
          help: look whether `systemd-creds setup` works, which makes the host's key
        ");
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
