//! Where messages go: the journal under systemd, stderr elsewhere.
//!
//! `RUST_LOG` filters; the default is `info`.

use std::{
    io::{self, IsTerminal},
    os::fd::AsFd,
};

use nix::sys::stat::fstat;
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// Sets the process's logging up. To be called once, first.
pub fn init() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    // Already set up is as good: nothing to report to.
    let _ = match tracing_journald::layer() {
        Ok(journal) if stderr_is_the_journal() => registry.with(journal).try_init(),
        _ => {
            let lines = tracing_subscriber::fmt::layer()
                .with_target(false)
                .with_ansi(io::stderr().is_terminal())
                .with_writer(io::stderr);
            registry.with(lines).try_init()
        }
    };
}

/// systemd names the device and inode of the journal's socket, so that a
/// program whose stderr was redirected can tell (systemd.exec(5),
/// `$JOURNAL_STREAM`).
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr().as_fd())
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.st_dev, stderr.st_ino))
}
