//! Lets a guest go when the imaged that holds it cannot any more.
//!
//! ```text
//! imaged:  start ─► the undo, in a line ─► hold the guest, let it go ─► "lifted"
//! guard:            wait …                                              end
//!                    └ the pipe ends: imaged is dead ─► let go
//! ```
//! A guard is a process of its own: what kills imaged, by whatever signal,
//! ends its pipe and nothing else. It thaws and starts; what else a dead
//! imaged leaves in a QEMU does not hold the guest, and is taken out by the
//! next start. When that comes first, neither notices: both look before they
//! act, and a QEMU serves one at a time.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{ChildStdin, Command, ExitCode, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, Signal};

use super::{libvirt, live};
use crate::{
    error::{Context, Error, Reason, Result},
    model::{instance::Machine, live::Undo},
    recorder::Recorder,
    steps,
};

/// The program that runs, also when its file was replaced (proc(5)).
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Says that nothing holds the guest.
const LIFTED: &str = "lifted";
/// How long a guard tries, with a QEMU or an agent that does not answer.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Between two tries.
const PAUSE: Duration = Duration::from_secs(1);

/// The guards of one daemon.
#[derive(Default)]
pub struct Guards(Mutex<BTreeMap<String, ChildStdin>>);

impl fmt::Debug for Guards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guards")
    }
}

impl Guards {
    /// Sets a guard over a guest that is about to be held. It stands until it
    /// is [lifted](Self::lift), or this process ends. A second one of the
    /// same guest takes the first one's place.
    ///
    /// # Errors
    ///
    /// `INTERNAL`: it cannot be started; the guest is not to be held then.
    pub async fn set(self: &Arc<Self>, undo: &Undo) -> Result<()> {
        let (guards, undo) = (Arc::clone(self), undo.clone());
        let set = tokio::task::spawn_blocking(move || {
            let guard = start(Path::new(THIS_PROGRAM), &undo)?;
            guards.lock().insert(key(&undo), guard);
            Ok(())
        });
        let set = steps::effect("guard set", set).await.map_err(io::Error::other).flatten();
        set.context(Reason::Internal, || "no guard over the guest can be started")
    }

    /// Ends the guard of a guest that is held no more; without one it does
    /// nothing.
    pub async fn lift(&self, undo: &Undo) {
        let Some(mut guard) = self.lock().remove(&key(undo)) else { return };
        let lifted = tokio::task::spawn_blocking(move || writeln!(guard, "{LIFTED}"));
        let lifted = steps::effect("guard lifted", lifted).await;
        if let Ok(Err(error)) = lifted {
            tracing::warn!(instance = undo.instance, "its guard had ended before: {error}");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, ChildStdin>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What tells one from others.
fn key(undo: &Undo) -> String {
    undo.snapshot.tag().to_owned()
}

/// Starts a guard, and tells it of the guest. Blocks.
fn start(program: &Path, undo: &Undo) -> io::Result<ChildStdin> {
    let mut child = Command::new(program)
        .arg0("imaged")
        .arg("guard")
        .arg(&undo.instance)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        // What a terminal interrupts is the daemon.
        .process_group(0)
        .spawn()?;
    let mut stdin = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    // Reaped whenever it ends.
    thread::Builder::new().name("guard".into()).spawn(move || child.wait())?;
    let line = serde_json::to_string(undo)?;
    writeln!(stdin, "{line}")?;
    Ok(stdin)
}

/// The guard's side.
#[must_use]
pub fn main() -> ExitCode {
    match watch(BufReader::new(io::stdin())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The daemon's standard error, and nobody else's.
            eprintln!("imaged guard: {}", error.report());
            ExitCode::FAILURE
        }
    }
}

fn watch(imaged: impl BufRead) -> Result<()> {
    let context = || "a guard cannot do its work";
    // Whoever ends imaged in order may mean all of its processes: the guard
    // ends when it is lifted.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    signals.thread_block().context(Reason::Internal, context)?;
    let mut lines = imaged.lines();
    let Some(Ok(first)) = lines.next() else { return Ok(()) };
    let undo: Undo = serde_json::from_str(&first).context(Reason::Internal, context)?;
    if lines.next().is_some_and(|line| line.is_ok_and(|line| line == LIFTED)) {
        return Ok(());
    }
    eprintln!("imaged guard: imaged has died while it held instance {:?}", undo.instance);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(Reason::Internal, context)?;
    let let_go = runtime.block_on(let_go(&undo));
    if let_go.is_ok() {
        eprintln!("imaged guard: instance {:?} is not held any more", undo.instance);
    }
    let_go
}

async fn let_go(undo: &Undo) -> Result<()> {
    let begun = Instant::now();
    let recorder = Arc::new(Recorder::new());
    loop {
        let let_go = match &undo.machine {
            Machine::Qemu(_) => live::let_go(undo, &recorder).await,
            Machine::Domain(_) => libvirt::stand_by(undo, &recorder).await,
        };
        let error: Error = match let_go {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if begun.elapsed() > PATIENCE {
            return Err(error.advice("look at the instance: it may be frozen or shut down"));
        }
        tokio::time::sleep(PAUSE).await;
    }
}
