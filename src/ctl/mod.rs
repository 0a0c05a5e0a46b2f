//! imagectl: arguments in, text and an exit code out.
//!
//! ```text
//! args ──► verbs ──► client ──gRPC──► imaged
//!            │  └──► wait ──► progress (standard error)
//!            └─────► render (standard output)
//! ```

mod args;
mod client;
mod console;
mod documents;
mod exit;
mod failure;
mod progress;
mod render;
mod verbs;
mod wait;

use std::ffi::OsString;

use clap::Parser;

pub use console::{Console, Stream};
pub use exit::Exit;

use args::{Cli, Global, Noun};
use client::Client;
use failure::Failure;
use verbs::Session;

/// Does what the command line `args` says, the program's name first, and
/// reports on `console`. Blocks until it is done, on a runtime of its own.
pub fn run(args: impl IntoIterator<Item = OsString>, console: &mut Console<'_>) -> Exit {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => return explain(&error, console),
    };
    match perform(cli, console) {
        Ok(()) => Exit::Success,
        Err(failure) => {
            console.tell(&format!("imagectl: {failure}"));
            failure.exit
        }
    }
}

fn perform(cli: Cli, console: &mut Console<'_>) -> Result<(), Failure> {
    match &cli.noun {
        Noun::Completions { shell } => return documents::completions(*shell, console),
        Noun::Man { dir } => return documents::man_pages(dir),
        Noun::Image(verb) => verbs::confirm(verb, console)?,
        Noun::Volume(verb) => verbs::confirm_volume(verb, console)?,
        Noun::Instance(_) | Noun::WorkRequest(_) | Noun::Host(_) | Noun::Store(_) => {}
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failed, "imagectl cannot start").cause(error))?;
    runtime.block_on(ask(cli.global, cli.noun, console))
}

async fn ask(global: Global, noun: Noun, console: &mut Console<'_>) -> Result<(), Failure> {
    let client = Client::connect(&global.socket).await?;
    verbs::run(Session { client, output: global.output, console }, noun).await
}

/// Prints help where it was asked for, and what is wrong otherwise.
fn explain(error: &clap::Error, console: &mut Console<'_>) -> Exit {
    let text = error.render();
    if error.use_stderr() {
        match console.err_is {
            Stream::Terminal => console.tell(text.ansi().to_string().trim_end()),
            Stream::Other => console.tell(text.to_string().trim_end()),
        }
        return Exit::Usage;
    }
    let text = match console.width {
        Some(_) => text.ansi().to_string(),
        None => text.to_string(),
    };
    match console.print(text.trim_end()) {
        Ok(()) => Exit::Success,
        Err(failure) => failure.exit,
    }
}

#[cfg(test)]
mod tests;
