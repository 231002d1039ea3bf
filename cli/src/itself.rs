//! How this program runs itself once more: for what is better done in a process of its own.

use std::path::PathBuf;
use std::sync::OnceLock;

use llmpress_formats::Error;

static ITSELF: OnceLock<PathBuf> = OnceLock::new();

/// Says which program it is, where the running executable is another one.
pub(crate) fn is(program: Option<PathBuf>) {
    if let Some(program) = program {
        let _ = ITSELF.set(program);
    }
}

/// This program.
pub(crate) fn program() -> Result<PathBuf, Error> {
    match ITSELF.get() {
        Some(program) => Ok(program.clone()),
        None => std::env::current_exe().map_err(|e| Error::io("the running program", "find", e)),
    }
}
