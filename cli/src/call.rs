//! The verbs for a program that is no terminal: arguments in, a result or an error out, everything else told to a listener.
//!
//! ```text
//! arguments --parsed as the command's--> verb --> result       the JSON that --json prints
//!                                             \-> Listener     warnings, progress
//! is_stopped, asked whenever work advances --> the verb is unwound: nothing has its name that is not whole
//! ```
//!
//! A job that is stopped leaves what one leaves that is killed, and `--resume` goes on from there. It is unwound by a panic of our own that
//! no hook sees, so that no verb and no pass needs a way out of its own; what trains keeps a state first.

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use clap::Parser;
use serde_json::Value;

use crate::args::{Cli, Command};
use crate::report::{Failure, Output};

/// Is told what a verb does, from any thread.
pub trait Listener: Sync {
    /// A part of the job begins that is so large.
    fn begin(&self, verb: &'static str, size: u64, unit: &'static str);
    /// So much of it is done in all.
    fn advance(&self, done: u64);
    /// Something that the user should know though the work goes on.
    fn warn(&self, message: &str);
    /// Whether the job is to stop.
    fn is_stopped(&self) -> bool;
    /// The result, as `--json` prints it.
    fn result(&self, value: Value);
}

/// What came of a call that did not succeed.
#[derive(Debug, Clone, PartialEq)]
pub enum Called {
    /// The listener wanted it to stop.
    Stopped,
    /// It failed.
    Failed {
        /// `io`, `corrupt`, `unsupported`, `invalid`, `limit`, `mismatch`, `refused` (by a hub), `usage` or `findings` (what was checked
        /// is not as it should be; the listener has the result).
        kind: &'static str,
        /// What was wrong, where, and what to do.
        message: String,
    },
}

impl From<Failure> for Called {
    fn from(failure: Failure) -> Self {
        let (kind, message) = failure.kind_and_message();
        Self::Failed { kind, message }
    }
}

/// What unwinds a job.
struct Stop;

/// Unwinds the job of this thread.
pub(crate) fn stop() {
    resume_unwind(Box::new(Stop));
}

/// Does what the arguments say, which begin with a verb.
///
/// # Errors
/// Those of the command; [`Called::Stopped`] where the listener stopped it. Verbs that have no result are refused.
pub fn call(arguments: Vec<OsString>, listener: &dyn Listener) -> Result<(), Called> {
    let all = std::iter::once(OsString::from("llmpress")).chain(arguments);
    let cli = Cli::try_parse_from(all)
        .map_err(|mistake| Failure::Usage(mistake.render().to_string().trim().to_owned()))?;
    let has_result = match &cli.command {
        Command::Inspect(_) | Command::Plan(_) | Command::Convert(_) | Command::Rank(_) => true,
        Command::Export(_) | Command::Restore(_) | Command::Verify(_) | Command::Diff(_) => true,
        Command::Eval(_) => true,
        Command::Generate(_) | Command::Bench(_) | Command::Speed(_) | Command::Doctor(_) => false,
        Command::Completions(_) | Command::Man(_) | Command::RenderChatTemplate => false,
        // They wait for signals, which end their process.
        Command::Worker(_) | Command::Merge(_) => false,
    };
    if !has_result {
        return Err(
            Failure::Usage("this verb is for a process of its own: run it as a command".to_owned()).into()
        );
    }
    let output = Output { json: true, quiet: false, colours: false, listener: Some(listener) };
    stoppable(listener, || crate::run(cli.command, output))
}

/// The directory of a checkpoint that may be named as on the hub: it is downloaded into the shared cache then.
///
/// # Errors
/// A name that the hub does not have, or a hub that cannot be reached; [`Called::Stopped`].
pub fn local_checkpoint(path: &Path, listener: &dyn Listener) -> Result<PathBuf, Called> {
    let output = Output { json: true, quiet: false, colours: false, listener: Some(listener) };
    stoppable(listener, || {
        let mut path = path.to_owned();
        crate::hub::resolve_whole(&mut path, output)?;
        Ok(path)
    })
}

fn stoppable<T>(listener: &dyn Listener, job: impl FnOnce() -> Result<T, Failure>) -> Result<T, Called> {
    match catch_unwind(AssertUnwindSafe(job)) {
        Ok(Ok(done)) => Ok(done),
        // A thread of the job may have been unwound, and what waited for it says that it failed.
        Ok(Err(_)) if listener.is_stopped() => Err(Called::Stopped),
        Ok(Err(failure)) => Err(failure.into()),
        Err(payload) if payload.is::<Stop>() => Err(Called::Stopped),
        Err(payload) => resume_unwind(payload),
    }
}
