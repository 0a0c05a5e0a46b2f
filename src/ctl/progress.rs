//! How far work is, on standard error: a bar on a terminal, lines elsewhere.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    console::{Console, Stream},
    render::words,
};
use crate::{model::ByteSize, pb};

/// Time between two lines of the same phase: a log of an hour's work stays
/// readable.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// How often the spinner turns while nothing is known of the bytes.
const TICK: Duration = Duration::from_millis(200);

/// What shows the progress of one wait.
pub(super) enum Progress<'a> {
    Bar(Bar),
    Lines(Lines<'a>),
}

impl<'a> Progress<'a> {
    pub fn on(console: &'a mut Console<'_>) -> Self {
        match console.err_is {
            Stream::Terminal => Self::Bar(Bar::new(ProgressDrawTarget::stderr())),
            Stream::Other => Self::lines(&mut *console.err),
        }
    }

    /// Lines on `err`.
    pub fn lines(err: &'a mut dyn Write) -> Self {
        Self::Lines(Lines { err, state: LineState::default() })
    }

    /// Shows the state `work` and what is new in its log.
    pub fn show(&mut self, work: &pb::WorkRequest) {
        match self {
            Self::Bar(bar) => bar.show(work),
            Self::Lines(lines) => {
                let now = Instant::now();
                for line in lines.state.lines(work, now) {
                    lines.write(&line);
                }
            }
        }
    }

    /// Tells something that is not progress.
    pub fn note(&mut self, text: &str) {
        match self {
            Self::Bar(bar) => bar.bar.println(text),
            Self::Lines(lines) => lines.write(text),
        }
    }

    /// Ends the display; `work` is what was waited for.
    pub fn end(&mut self, work: Option<&pb::WorkRequest>) {
        if let Some(summary) = work.and_then(summary) {
            self.note(&summary);
        }
        if let Self::Bar(bar) = self {
            bar.bar.finish_and_clear();
        }
    }
}

/// A bar with phase, bytes, rate and time left.
pub(super) struct Bar {
    bar: ProgressBar,
    logs_seen: usize,
    form: Option<Form>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Spinner,
    Bar,
}

impl Form {
    fn style(self) -> ProgressStyle {
        let template = match self {
            Self::Spinner => "{spinner} {msg}",
            Self::Bar => "{prefix} [{wide_bar}] {msg}",
        };
        // The templates are constants; a test parses them.
        ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ")
            .tick_chars("|/-\\ ")
    }
}

impl Bar {
    fn new(target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(None, target);
        Self { bar, logs_seen: 0, form: None }
    }

    fn show(&mut self, work: &pb::WorkRequest) {
        for line in new_logs(work, &mut self.logs_seen) {
            self.bar.println(line);
        }
        let progress = work.progress.unwrap_or_default();
        let form = if progress.bytes_total == 0 { Form::Spinner } else { Form::Bar };
        if self.form.replace(form) != Some(form) {
            self.bar.set_style(form.style());
            self.bar.enable_steady_tick(TICK);
        }
        let phase = phase(work);
        match form {
            Form::Spinner => self.bar.set_message(phase),
            Form::Bar => {
                self.bar.set_prefix(phase);
                self.bar.set_message(amounts(work));
                self.bar.set_length(progress.bytes_total);
                self.bar.set_position(progress.bytes_read + progress.bytes_skipped);
            }
        }
    }
}

/// Lines for logs and pipes.
pub(super) struct Lines<'a> {
    err: &'a mut dyn Write,
    state: LineState,
}

impl Lines<'_> {
    fn write(&mut self, line: &str) {
        // Nobody is left to tell.
        let _ = writeln!(self.err, "{line}").and_then(|()| self.err.flush());
    }
}

/// What was shown already.
#[derive(Default)]
struct LineState {
    phase: String,
    shown_at: Option<Instant>,
    logs_seen: usize,
}

impl LineState {
    /// The lines that `work` adds at `now`.
    fn lines(&mut self, work: &pb::WorkRequest, now: Instant) -> Vec<String> {
        let mut lines = new_logs(work, &mut self.logs_seen);
        let phase = phase(work);
        let is_due = self.shown_at.is_none_or(|at| now.duration_since(at) >= LINE_INTERVAL);
        if phase == self.phase && !is_due {
            return lines;
        }
        let has_bytes = work.progress.is_some_and(|progress| progress.bytes_total > 0);
        // "done" is told by the summary.
        if is_running(work) {
            lines.push(if has_bytes {
                format!("{phase:<10} {}", amounts(work))
            } else {
                phase.clone()
            });
        }
        self.shown_at = Some(now);
        self.phase = phase;
        lines
    }
}

fn is_running(work: &pb::WorkRequest) -> bool {
    use pb::work_request::Status::{Accepted, Canceling, InProgress};
    matches!(work.status(), Accepted | InProgress | Canceling)
}

/// The phase, or the status where that says more.
fn phase(work: &pb::WorkRequest) -> String {
    match work.status() {
        pb::work_request::Status::Canceling => "canceling".into(),
        _ if work.phase.is_empty() => words::work_status(work).to_ascii_lowercase(),
        _ => words::clean(&work.phase).into_owned(),
    }
}

fn new_logs(work: &pb::WorkRequest, seen: &mut usize) -> Vec<String> {
    let lines = work.logs.iter().skip(*seen).map(|entry| words::clean(&entry.message).into_owned());
    let lines = lines.collect();
    *seen = work.logs.len().max(*seen);
    lines
}

/// Percent, bytes, rate and time left.
pub(super) fn amounts(work: &pb::WorkRequest) -> String {
    let progress = work.progress.unwrap_or_default();
    let done = ByteSize(progress.bytes_read + progress.bytes_skipped);
    let mut text = format!(
        "{:>3.0}%  {done} of {}",
        work.percent_complete.floor(),
        ByteSize(progress.bytes_total)
    );
    if !is_running(work) {
        return text;
    }
    if progress.bytes_per_second > 0 {
        text.push_str(&format!("  {}/s", ByteSize(progress.bytes_per_second)));
    }
    if let Some(left) = progress.eta_seconds {
        text.push_str(&format!("  {} left", words::duration(Duration::from_secs(left))));
    }
    text
}

/// One line on work that succeeded.
fn summary(work: &pb::WorkRequest) -> Option<String> {
    if work.status() != pb::work_request::Status::Succeeded {
        return None;
    }
    let mut text = words::operation(work);
    text.push_str(" succeeded");
    if let Some(took) = words::took(work) {
        text.push_str(&format!(" in {took}"));
    }
    let progress = work.progress.unwrap_or_default();
    let amounts = [
        (progress.bytes_read, "read"),
        (progress.bytes_skipped, "of zeroes skipped"),
        (progress.bytes_stored, "stored"),
    ];
    let amounts = amounts.iter().filter(|(bytes, _)| *bytes > 0);
    let amounts: Vec<_> =
        amounts.map(|(bytes, what)| format!("{} {what}", ByteSize(*bytes))).collect();
    if !amounts.is_empty() {
        text.push_str(": ");
        text.push_str(&amounts.join(", "));
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::tests as samples;

    #[test]
    fn lines_come_with_news_and_otherwise_seldom() {
        let start = Instant::now();
        let mut state = LineState::default();
        let mut shown = Vec::new();
        let mut show = |work: &pb::WorkRequest, millis| {
            for line in state.lines(work, start + Duration::from_millis(millis)) {
                shown.push(format!("{millis:>5}: {line}"));
            }
        };
        show(&samples::accepted(), 0);
        show(&samples::accepted(), 250);
        for step in 0..30 {
            show(&samples::reading(), 500 + step * 250);
        }
        show(&samples::succeeded(), 9000);
        insta::assert_snapshot!(shown.join("\n"), @"
           0: queued
         500: the volume is read through io_uring
         500: read        45%  1.81 GiB of 4.00 GiB  610 MiB/s  3s left
        5500: read        45%  1.81 GiB of 4.00 GiB  610 MiB/s  3s left
        ");
    }

    #[test]
    fn success_is_summed_up() {
        insta::assert_snapshot!(summary(&samples::succeeded()).unwrap(), @"create image succeeded in 11s: 3.00 GiB read, 1.00 GiB of zeroes skipped, 1.12 GiB stored");
        assert_eq!(summary(&samples::failed()), None);
    }

    #[test]
    fn the_templates_of_the_bars_are_right() {
        for template in ["{spinner} {msg}", "{prefix} [{wide_bar}] {msg}"] {
            ProgressStyle::with_template(template).unwrap();
        }
    }
}
