//! Completions and man pages, from the definitions of the command line.

use std::{fs, io, path::Path};

use clap::{Command, CommandFactory};
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

use super::{
    args::{Cli, DEFAULT_SOCKET},
    console::Console,
    exit::Exit,
    failure::Failure,
};

/// Prints a completion script.
pub(super) fn completions(
    shell: clap_complete::Shell,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "imagectl", &mut script);
    console.print(String::from_utf8_lossy(&script).trim_end())
}

/// Writes `imagectl.1` and a page for every verb into `dir`.
pub(super) fn man_pages(dir: &Path) -> Result<(), Failure> {
    let mut command = Cli::command();
    command.build();
    fs::create_dir_all(dir).and_then(|()| write_pages(&command, dir)).map_err(|error| {
        let what = format!("the man pages cannot be written into {}", dir.display());
        Failure::new(Exit::Failed, what).cause(error)
    })
}

fn write_pages(command: &Command, dir: &Path) -> io::Result<()> {
    for verb in command.get_subcommands() {
        write_pages(verb, dir)?;
    }
    // The list of exit codes has a section of its own below.
    let source = concat!("imagectl ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone().after_help(None)).manual("imaged").source(source);
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    closing_sections().to_writer(&mut page)?;
    fs::write(dir.join(man.get_filename()), page)
}

fn closing_sections() -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["EXIT STATUS"]);
    for exit in Exit::ALL {
        roff.control("TP", []);
        roff.text([bold(exit.code().to_string())]);
        roff.text([roman(exit.meaning())]);
    }
    roff.control("SH", ["ENVIRONMENT"]);
    roff.control("TP", []);
    roff.text([bold("IMAGED_SOCKET")]);
    roff.text([roman("Socket of imaged, where --socket does not name it.")]);
    roff.control("SH", ["FILES"]);
    roff.control("TP", []);
    roff.text([bold(DEFAULT_SOCKET)]);
    roff.text([roman("Socket of imaged unless told otherwise.")]);
    roff
}
