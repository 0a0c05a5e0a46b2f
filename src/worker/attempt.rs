//! What a confined worker tries, to show that it cannot.
//!
//! An attempt that the filter stops ends the process, so each has a worker of
//! its own.

use std::{
    env, fmt, fs, io,
    net::{Ipv4Addr, TcpListener},
    os::unix::process::CommandExt,
    process::Command,
    thread,
};

use nix::{
    sys::{ptrace, signal},
    unistd::getppid,
};
use serde::{Deserialize, Serialize};

use super::process::Death;

/// Something that a worker tries after it was confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attempt {
    /// Nothing: it only tells how it is confined.
    Nothing,
    /// Opens a file that everyone may read.
    OpenFile,
    /// Makes a directory where everyone may.
    WriteFile,
    /// Listens on a port.
    Socket,
    /// Becomes traceable by its parent.
    Trace,
    /// Asks whether its parent could be sent a signal.
    Signal,
    /// Executes a program.
    Execute,
    /// Starts a thread.
    Thread,
    /// Allocates without end.
    Memory,
    /// Computes without end.
    Processor,
}

impl Attempt {
    /// All that must fail.
    pub const ALL: &[Self] = &[
        Self::OpenFile,
        Self::WriteFile,
        Self::Socket,
        Self::Trace,
        Self::Signal,
        Self::Execute,
        Self::Thread,
        Self::Memory,
        Self::Processor,
    ];

    /// How it must end.
    #[must_use]
    pub const fn must_end(self) -> Death {
        match self {
            Self::Nothing => Death::Exit,
            Self::Memory => Death::Memory,
            Self::Processor => Death::Processor,
            _ => Death::SystemCall,
        }
    }

    /// Tries. Whoever reads the answer knows that it was possible, or that
    /// something other than the filter stood in its way.
    #[must_use]
    pub fn run(self) -> String {
        let outcome = match self {
            Self::Nothing => Ok(()),
            Self::OpenFile => fs::File::open("/").map(drop),
            Self::WriteFile => {
                let path = env::temp_dir().join("imaged-attempt");
                fs::create_dir(&path).and_then(|()| fs::remove_dir(&path))
            }
            Self::Socket => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map(drop),
            Self::Trace => ptrace::traceme().map_err(io::Error::from),
            Self::Signal => signal::kill(getppid(), None).map_err(io::Error::from),
            Self::Execute => Err(Command::new("/proc/self/exe").arg("--version").exec()),
            Self::Thread => thread::Builder::new().spawn(|| {}).map(drop),
            Self::Memory => allocate(),
            Self::Processor => compute(),
        };
        match outcome {
            Ok(()) => "it was possible".to_owned(),
            Err(cause) => format!("it failed otherwise: {cause}"),
        }
    }
}

/// Twice what [`Limits::for_attempts`](super::limits::Limits) allows, no more:
/// where the limit fails the host must not suffer.
fn allocate() -> io::Result<()> {
    let mut taken = Vec::new();
    for piece in 1..=24_u8 {
        taken.push(vec![piece; 16 << 20]);
    }
    drop(std::hint::black_box(taken));
    Ok(())
}

/// For longer than [`Limits::for_attempts`](super::limits::Limits) allows.
fn compute() -> io::Result<()> {
    let start = std::time::Instant::now();
    while start.elapsed().as_secs() < 30 {
        std::hint::spin_loop();
    }
    Ok(())
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Nothing => "do nothing",
            Self::OpenFile => "open a file",
            Self::WriteFile => "make a directory",
            Self::Socket => "listen on a port",
            Self::Trace => "be traced",
            Self::Signal => "signal its parent",
            Self::Execute => "execute a program",
            Self::Thread => "start a thread",
            Self::Memory => "use memory without end",
            Self::Processor => "compute without end",
        })
    }
}
