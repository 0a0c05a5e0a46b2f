//! Where imagectl reads and writes, so that tests can take its place.

use std::{
    fmt,
    io::{self, BufRead, IsTerminal, Write},
};

use super::{exit::Exit, failure::Failure};

/// What a stream is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// A person.
    Terminal,
    /// A file, a pipe or nothing.
    Other,
}

impl Stream {
    fn of(stream: &impl IsTerminal) -> Self {
        if stream.is_terminal() { Self::Terminal } else { Self::Other }
    }
}

/// The three standard streams.
///
/// Writing blocks, also between two awaits: imagectl has nothing else to do
/// than to wait for its reader.
pub struct Console<'a> {
    /// Answers to questions.
    pub input: &'a mut dyn BufRead,
    /// The result, and nothing else.
    pub out: &'a mut dyn Write,
    /// Progress, questions and errors.
    pub err: &'a mut dyn Write,
    /// Whether questions can be asked.
    pub input_is: Stream,
    /// Whether `err` can show a progress bar. Bars are drawn on the process's
    /// own standard error.
    pub err_is: Stream,
    /// Columns of the terminal behind `out`; `None` where there is none.
    pub width: Option<u16>,
}

impl fmt::Debug for Console<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console")
            .field("input_is", &self.input_is)
            .field("err_is", &self.err_is)
            .field("width", &self.width)
            .finish_non_exhaustive()
    }
}

impl<'a> Console<'a> {
    /// A console on these streams, which are the process's own.
    pub fn of_process(
        input: &'a mut io::StdinLock<'_>,
        out: &'a mut io::StdoutLock<'_>,
        err: &'a mut io::Stderr,
    ) -> Self {
        let input_is = Stream::of(input);
        let err_is = Stream::of(err);
        // Measures standard output, and only where that is a terminal.
        let width = comfy_table::Table::new().width();
        Self { input, out, err, input_is, err_is, width }
    }

    /// Writes a result and ends the line.
    ///
    /// # Errors
    ///
    /// When it cannot be written. A reader that went away (`| head`) is none:
    /// it has read what it wanted.
    pub(super) fn print(&mut self, text: &str) -> Result<(), Failure> {
        let written = writeln!(self.out, "{text}").and_then(|()| self.out.flush());
        match written {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::new(Exit::Failed, "the result cannot be written").cause(error))
            }
            _ => Ok(()),
        }
    }

    /// Tells something beside the result. Nobody is left to tell when that
    /// fails.
    pub(super) fn tell(&mut self, text: &str) {
        let _ = writeln!(self.err, "{text}").and_then(|()| self.err.flush());
    }

    /// Asks a question that only `y` or `yes` agrees to.
    ///
    /// # Errors
    ///
    /// [`Exit::Canceled`] for every other answer.
    pub(super) fn confirm(&mut self, question: &str) -> Result<(), Failure> {
        let _ = write!(self.err, "{question} [y/N]: ").and_then(|()| self.err.flush());
        let mut answer = String::new();
        let read = self.input.read_line(&mut answer);
        if !answer.ends_with('\n') {
            // Ctrl-D leaves the cursor behind the question.
            self.tell("");
        }
        let agreed = matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes");
        if read.is_ok() && agreed {
            Ok(())
        } else {
            Err(Failure::new(Exit::Canceled, "nothing was done"))
        }
    }
}
