//! A line for each call, each fault and each leak.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use crate::code::Code;

#[derive(Debug, Default)]
pub(crate) struct Log {
    file: Option<File>,
    /// What is said of the call that is under way.
    note: String,
}

impl Log {
    /// Adds to a file, so that libraries that are loaded twice share one.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self, String> {
        let Some(path) = path else { return Ok(Self::default()) };
        let file = File::options().create(true).append(true).open(path);
        file.map(|file| Self { file: Some(file), note: String::new() })
            .map_err(|e| format!("{}: {e}", path.display()))
    }

    fn line(&mut self, line: &str) {
        if let Some(file) = &mut self.file {
            // A log that cannot be written fails the test that reads it.
            let _ = file.write_all(format!("{line}\n").as_bytes());
        }
    }

    pub(crate) fn note(&mut self, note: String) {
        self.note = note;
    }

    pub(crate) fn call(&mut self, name: &str, code: Code) {
        let note = std::mem::take(&mut self.note);
        self.line(&format!("call {name}({note}) = {code}"));
    }

    /// A call that a correct program does not make, whether or not it is told so.
    pub(crate) fn fault(&mut self, what: &str) {
        self.line(&format!("fault {what}"));
    }

    /// A call that is not allowed during a capture; the caller is told.
    pub(crate) fn refused(&mut self, what: &str) {
        self.line(&format!("refused {what}"));
    }

    pub(crate) fn leak(&mut self, what: &str) {
        self.line(&format!("leak {what}"));
    }
}
