//! Every effect that imaged has outside of its process, by name, so that a
//! test can have it die before and after each.
//!
//! ```text
//! IMAGED_TEST_STEPS=FILE   a line there for each: `before qom-set 1`
//! IMAGED_TEST_DIES=STEP    SIGKILL at this one
//! ```
//! The number counts equal names from the process's start; what the recovery
//! does has another name, `recovery: qom-set`. In builds with debug assertions
//! alone: of a release nothing of this is part.

use std::future::Future;

/// Has `deed` done, which is called `name`.
pub async fn effect<T>(name: &str, deed: impl Future<Output = T>) -> T {
    reached("before", name);
    let done = deed.await;
    reached("after", name);
    done
}

/// From here on, or no longer, what is done is the recovery's.
pub fn recovering(now: bool) {
    #[cfg(debug_assertions)]
    counted::RECOVERING.store(now, std::sync::atomic::Ordering::SeqCst);
    #[cfg(not(debug_assertions))]
    let _ = now;
}

/// A step is reached.
pub fn reached(when: &str, name: &str) {
    #[cfg(debug_assertions)]
    counted::reached(when, name);
    #[cfg(not(debug_assertions))]
    let (_, _) = (when, name);
}

#[cfg(debug_assertions)]
mod counted {
    use std::{
        collections::BTreeMap,
        fs::File,
        io::Write,
        sync::{
            Mutex, OnceLock, PoisonError,
            atomic::{AtomicBool, Ordering},
        },
    };

    use nix::sys::signal::{Signal, kill};

    pub static RECOVERING: AtomicBool = AtomicBool::new(false);

    struct Steps {
        dies: Option<String>,
        told: Option<File>,
        counts: Mutex<BTreeMap<String, u32>>,
    }

    static STEPS: OnceLock<Option<Steps>> = OnceLock::new();

    fn from_environment() -> Option<Steps> {
        let dies = std::env::var("IMAGED_TEST_DIES").ok();
        let told = std::env::var_os("IMAGED_TEST_STEPS")
            .and_then(|path| File::options().append(true).create(true).open(path).ok());
        (dies.is_some() || told.is_some()).then(|| Steps { dies, told, counts: Mutex::default() })
    }

    pub fn reached(when: &str, name: &str) {
        let Some(steps) = STEPS.get_or_init(from_environment) else { return };
        let recovery = if RECOVERING.load(Ordering::SeqCst) { "recovery: " } else { "" };
        let name = format!("{when} {recovery}{name}");
        let mut counts = steps.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(name.clone()).or_default();
        *count += 1;
        let step = format!("{name} {count}");
        if let Some(mut told) = steps.told.as_ref() {
            let _ = writeln!(told, "{step}");
        }
        if steps.dies.as_ref() == Some(&step) {
            let _ = kill(nix::unistd::getpid(), Signal::SIGKILL);
        }
    }
}
