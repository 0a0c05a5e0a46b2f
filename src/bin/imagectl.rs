//! imagectl: the operator's tool.

use std::{env, io, process::ExitCode};

use imaged::ctl::{self, Console};

fn main() -> ExitCode {
    let (mut input, mut out, mut err) = (io::stdin().lock(), io::stdout().lock(), io::stderr());
    let mut console = Console::of_process(&mut input, &mut out, &mut err);
    ctl::run(env::args_os(), &mut console).into()
}
