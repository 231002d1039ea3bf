//! What is printed: results to stdout, everything else to stderr.
//!
//! ```text
//! stdout full:     the verb ends its work, then the program fails
//! stdout closed:   likewise, but quietly and with success: who reads has seen enough (`| head`)
//! stderr:          whatever becomes of it, the work goes on
//! ```

use std::io::{ErrorKind, Write};
use std::sync::OnceLock;

use llmpress_formats::printable;
use serde::Serialize;

use crate::call::Listener;

/// How the user wants output.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    /// Whether stderr is coloured.
    pub(crate) colours: bool,
    /// Who is told instead of printing.
    pub(crate) listener: Option<&'a dyn Listener>,
}

/// Why a verb failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The conversion or a file.
    Pipeline(llmpress_pipeline::Error),
    /// A checkpoint that was named could not be had.
    Hub(llmpress_hub::Error),
    /// Likewise, after what is said of the name.
    Named(String, llmpress_hub::Error),
    /// The arguments do not fit together.
    Usage(String),
    /// Something was checked and is not as it should be. The findings were printed.
    Findings(String),
    /// The result could not be printed; the work is done.
    Print(String),
    /// Units that nobody has made, with the command that makes them.
    Units(llmpress_pipeline::Error, String),
    /// What will fail again however often it is tried.
    Final(Box<Self>),
}

impl From<llmpress_pipeline::Error> for Failure {
    fn from(e: llmpress_pipeline::Error) -> Self {
        Self::Pipeline(e)
    }
}

impl From<llmpress_formats::Error> for Failure {
    fn from(e: llmpress_formats::Error) -> Self {
        Self::Pipeline(e.into())
    }
}

impl Failure {
    /// What kind of failure it is, and what is said of it.
    pub(crate) fn kind_and_message(&self) -> (&'static str, String) {
        match self {
            Self::Pipeline(e) => (e.kind(), e.to_string()),
            Self::Hub(e) => (e.kind(), e.to_string()),
            Self::Named(name, e) => (e.kind(), format!("{name}: {e}")),
            Self::Usage(text) => ("usage", text.clone()),
            Self::Findings(text) => ("findings", text.clone()),
            Self::Print(text) => ("io", text.clone()),
            Self::Units(e, command) => (e.kind(), format!("{e}; make them with `{command}` and merge again")),
            Self::Final(failure) => failure.kind_and_message(),
        }
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Final(_) => 3,
            Self::Pipeline(_)
            | Self::Hub(_)
            | Self::Named(..)
            | Self::Findings(_)
            | Self::Print(_)
            | Self::Units(..) => 1,
        }
    }

    /// The same, with the exit code of what may pass or of what will not.
    pub(crate) fn of_worker(self) -> Self {
        match &self {
            Self::Pipeline(e) if !e.may_pass() => Self::Final(Box::new(self)),
            Self::Hub(llmpress_hub::Error::Format(e)) if !matches!(e.kind(), "io" | "limit") => {
                Self::Final(Box::new(self))
            }
            _ => self,
        }
    }
}

/// Bold red and bold yellow, as terminals have them.
const RED: &str = "\x1b[1;31m";
const YELLOW: &str = "\x1b[1;33m";

impl Output<'_> {
    fn coloured(self, text: &str, colour: &str) -> String {
        if self.colours { format!("{colour}{text}\x1b[0m") } else { text.to_owned() }
    }

    /// One line, or an object with `--json`.
    pub(crate) fn failure(self, failure: &Failure) {
        let (kind, message) = failure.kind_and_message();
        note(&match self.json {
            true => serde_json::json!({"error": {"kind": kind, "message": message}}).to_string(),
            false => format!("{} {}", self.coloured("error:", RED), printable(&message)),
        });
    }

    /// A line about the work on the way, where it is wanted.
    pub(crate) fn progress(self, line: &str) {
        if !self.quiet && !self.json {
            note(line);
        }
    }

    /// Something that the user should know though the work goes on; as an object with `--json`.
    pub(crate) fn warn(self, message: &str) {
        if let Some(listener) = self.listener {
            return listener.warn(message);
        }
        if self.quiet {
            return;
        }
        note(&match self.json {
            true => serde_json::json!({"warning": message}).to_string(),
            false => format!("{} {message}", self.coloured("warning:", YELLOW)),
        });
    }

    /// The result: as JSON, or as the text that `text` makes.
    pub(crate) fn result(self, value: &impl Serialize, text: impl FnOnce() -> String) {
        if let Some(listener) = self.listener {
            // What cannot be said in JSON cannot be said to anybody: there is no such result.
            listener.result(serde_json::to_value(value).unwrap_or_default());
        } else if self.json {
            match serde_json::to_string_pretty(value) {
                Ok(json) => print(&format!("{json}\n")),
                Err(e) => not_printed(e.into()),
            }
        } else {
            print(&lines(&text()));
        }
    }
}

/// A text whose lines hold nothing that steers a terminal, whatever the names in it.
fn lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// Why stdout took no more, once it did.
static NOT_PRINTED: OnceLock<std::io::Error> = OnceLock::new();

fn not_printed(error: std::io::Error) {
    let _ = NOT_PRINTED.set(error);
}

/// Writes to stdout. A failure is told at the end, by [`printed`].
pub(crate) fn print(text: &str) {
    if is_stdout_lost() {
        return;
    }
    let mut stdout = std::io::stdout().lock();
    if let Err(e) = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        not_printed(e);
    }
}

/// Whether nothing more can be printed: for verbs whose only work is to print.
pub(crate) fn is_stdout_lost() -> bool {
    NOT_PRINTED.get().is_some()
}

/// Whether all that was printed arrived, or nobody wanted it.
pub(crate) fn printed() -> Result<(), Failure> {
    match NOT_PRINTED.get() {
        Some(e) if e.kind() != ErrorKind::BrokenPipe => Err(Failure::Print(format!(
            "the result could not be printed: {e}; what was to be done before is done"
        ))),
        _ => Ok(()),
    }
}

/// Writes a line to stderr, which nobody may be reading.
pub(crate) fn note(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Bytes for people, in powers of 1000 as disks and downloads are sold.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value < 10.0 => format!("{value:.2} {}", units[unit]),
        _ if value < 100.0 => format!("{value:.1} {}", units[unit]),
        _ => format!("{value:.0} {}", units[unit]),
    }
}

/// `part` of `whole` in percent.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.2} %", part as f64 / whole as f64 * 100.0) }
}

/// Rows as columns: the first left-aligned, the others right-aligned.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell).into_owned()).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[c] - cell.chars().count());
            match c {
                0 => line.push_str(&format!("{cell}{pad}")),
                _ => line.push_str(&format!("  {pad}{cell}")),
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_a_unit() {
        let cases =
            [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (14_696_792, "14.7 MB"), (999_999, "1.00 MB")];
        for (n, text) in cases {
            assert_eq!(bytes(n), text);
        }
    }
}
