//! The daemon. Exit codes: 0 after a stop, 1 for a failure, 2 for wrong
//! arguments, 78 for a wrong configuration.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use imaged::{
    config::{self, Config},
    daemon,
    error::{Context, Error, Reason, Result},
    hypervisor::guard,
    worker::{self, Attempt, Workers},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// EX_CONFIG of sysexits.h: starting again would not help.
const WRONG_CONFIGURATION: u8 = 78;

/// Threads that answer requests. Reading and encoding have their own, and a
/// hypervisor's cores are sold.
const REQUEST_THREADS: usize = 2;

/// Makes custom images of the virtual machines of this host.
#[derive(Debug, Parser)]
#[command(name = "imaged", version)]
struct Arguments {
    /// Configuration file
    #[arg(long, value_name = "PATH", help = format!("Configuration file [default: {}]", config::DEFAULT_PATH))]
    config: Option<PathBuf>,
    /// Check the configuration and the instances' files, and exit
    #[arg(long)]
    check_config: bool,
    /// Let confined processes try what they must not be able to do, and exit
    #[arg(long)]
    check_confinement: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Decodes images for the daemon that starts it
    #[command(hide = true)]
    Worker,
    /// Lets a guest go when the daemon that holds it dies
    #[command(hide = true)]
    Guard {
        /// The instance's name, for who looks at the list of processes
        instance: String,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Worker) => return worker::child::main(),
        Some(Command::Guard { .. }) => return guard::main(),
        None => {}
    }
    if arguments.check_confinement {
        return check_confinement();
    }
    let outcome =
        config::load(arguments.config.as_deref()).and_then(|config| match arguments.check_config {
            true => daemon::check(&config),
            false => serve(config),
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("imaged: {}", error.report());
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Prints what confined processes can do: nothing, if all is well.
fn check_confinement() -> ExitCode {
    let workers = Workers::of_this_program();
    let mut holds = true;
    for attempt in [&[Attempt::Nothing], Attempt::ALL].concat() {
        match workers.attempt(attempt) {
            Ok(tried) if attempt == Attempt::Nothing => println!("confined: {}", tried.how),
            Ok(tried) => {
                holds &= tried.is_refused();
                let mark = if tried.is_refused() { "refused" } else { "POSSIBLE" };
                println!("{attempt:24}{mark:10}{tried}");
            }
            Err(error) => {
                eprintln!("imaged: {}", error.report());
                return ExitCode::FAILURE;
            }
        }
    }
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn exit_code(error: &Error) -> u8 {
    match error.reason() {
        Reason::InvalidConfiguration => WRONG_CONFIGURATION,
        _ => 1,
    }
}

fn serve(config: Config) -> Result<()> {
    daemon::logging::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(REQUEST_THREADS)
        .enable_all()
        .build()
        .context(Reason::Internal, || "the threads cannot be started")?;
    let outcome = runtime.block_on(async {
        let stop = CancellationToken::new();
        stop_on_signals(stop.clone())?;
        daemon::run(config, daemon::wire, stop).await
    });
    // What blocks on a dead device does not keep the process.
    runtime.shutdown_background();
    outcome
}

/// Cancels `stop` at the first SIGTERM or SIGINT, and at SIGHUP, which a
/// closed terminal sends. Later ones change nothing: the undo is never cut
/// short, only SIGKILL does that.
fn stop_on_signals(stop: CancellationToken) -> Result<()> {
    let context = || "signals cannot be handled";
    let mut terminate = signal(SignalKind::terminate()).context(Reason::Internal, context)?;
    let mut interrupt = signal(SignalKind::interrupt()).context(Reason::Internal, context)?;
    let mut hangup = signal(SignalKind::hangup()).context(Reason::Internal, context)?;
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                _ = hangup.recv() => "SIGHUP",
            };
            match stop.is_cancelled() {
                false => tracing::info!("{name}"),
                true => tracing::info!("{name} again: imaged is stopping already"),
            }
            stop.cancel();
        }
    });
    Ok(())
}
