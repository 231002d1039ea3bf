//! Verbs of the command as calls: they work on a thread of their own, and this one waits for them.
//!
//! ```text
//! job thread:     verb --begin--> waits until it was told -> works --advance--> ...  unwound when it is to stop
//! calling thread: signals? tell callbacks ---------^   signals? tell ...             raises what stopped it
//! ```
//!
//! Callbacks run on the calling thread alone, which is where Python delivers signals: Ctrl-C, or a callback that raises, stops the job.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use llmpress_cli::{Called, Listener};
use pyo3::prelude::*;
use serde_json::Value;

use crate::errors::{invalid, of_kind};

/// How often signals are looked for.
const SIGNALS_EVERY: Duration = Duration::from_millis(50);
/// The stack of a program's main thread, which is what verbs are used to.
const STACK_BYTES: usize = 8 << 20;

/// How far a part of a job is.
#[derive(Clone, Copy)]
struct Part {
    verb: &'static str,
    done: u64,
    size: u64,
    unit: &'static str,
    /// Whether it has advanced since it was told.
    is_news: bool,
}

#[derive(Default)]
struct State {
    /// Parts that began and were not told of yet, then the current one.
    parts: VecDeque<Part>,
    warnings: Vec<String>,
    result: Option<Value>,
    finished: bool,
}

#[derive(Default)]
struct Watched {
    state: Mutex<State>,
    changed: Condvar,
    told: Condvar,
    stop: AtomicBool,
}

impl Watched {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.told.notify_all();
    }

    /// What is to be told now: waits a little for something.
    fn news(&self) -> (Vec<Part>, Vec<String>, bool) {
        let mut state = self.state();
        if !state.finished && state.warnings.is_empty() && state.parts.len() <= 1 {
            let waited = self.changed.wait_timeout(state, SIGNALS_EVERY);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut parts: Vec<Part> = state.parts.iter().filter(|part| part.is_news).copied().collect();
        // The last one may go on.
        while state.parts.len() > 1 {
            state.parts.pop_front();
        }
        if let Some(part) = state.parts.front_mut() {
            part.is_news = false;
        }
        parts.iter_mut().for_each(|part| part.done = part.done.min(part.size));
        (parts, std::mem::take(&mut state.warnings), state.finished)
    }
}

impl Listener for Watched {
    fn begin(&self, verb: &'static str, size: u64, unit: &'static str) {
        let mut state = self.state();
        state.parts.push_back(Part { verb, done: 0, size, unit, is_news: true });
        self.changed.notify_all();
        // Nothing begins that whoever waits does not know of: a callback can stop it before any work.
        while state.parts.back().is_some_and(|part| part.is_news) && !self.is_stopped() {
            state = self.told.wait_timeout(state, SIGNALS_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn advance(&self, done: u64) {
        if let Some(part) = self.state().parts.back_mut() {
            part.done = part.done.max(done);
            part.is_news = true;
        }
    }

    fn warn(&self, message: &str) {
        self.state().warnings.push(message.to_owned());
        self.changed.notify_all();
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn result(&self, value: Value) {
        self.state().result = Some(value);
    }
}

/// Does a job and tells callbacks of it: `progress(verb, done, size, unit)` and `warn(message)`.
fn watch<T: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    warn: &Bound<'_, PyAny>,
    job: impl FnOnce(&Watched) -> Result<T, Called> + Send,
) -> PyResult<(Result<T, Called>, Option<Value>)> {
    let watched = Watched::default();
    let mut stopped_by: Option<PyErr> = None;
    let outcome = std::thread::scope(|scope| {
        let shared = &watched;
        let work = std::thread::Builder::new().name("llmpress".to_owned()).stack_size(STACK_BYTES);
        let work = work.spawn_scoped(scope, move || {
            let outcome = job(shared);
            shared.state().finished = true;
            shared.changed.notify_all();
            outcome
        });
        let Ok(work) = work else { return None };
        loop {
            let (parts, warnings, finished) = py.detach(|| watched.news());
            let tell = || -> PyResult<()> {
                py.check_signals()?;
                for message in warnings {
                    warn.call1((message,))?;
                }
                if let Some(progress) = progress {
                    for part in &parts {
                        progress.call1((part.verb, part.done, part.size, part.unit))?;
                    }
                }
                Ok(())
            };
            // What stopped it first is what is raised.
            if let Err(error) = tell() {
                stopped_by.get_or_insert(error);
                watched.stop();
            }
            watched.told.notify_all();
            if finished || work.is_finished() {
                return Some(py.detach(|| work.join()));
            }
        }
    });
    if let Some(error) = stopped_by {
        return Err(error);
    }
    let result = watched.state().result.take();
    match outcome {
        Some(Ok(outcome)) => Ok((outcome, result)),
        Some(Err(payload)) => std::panic::resume_unwind(payload),
        None => Err(of_kind(py, "limit", "no thread could be started for the job".to_owned())),
    }
}

fn failed(py: Python<'_>, called: Called) -> PyErr {
    match called {
        Called::Stopped => pyo3::exceptions::PyKeyboardInterrupt::new_err(()),
        Called::Failed { kind, message } => of_kind(py, kind, message),
    }
}

/// Does what the arguments say, which begin with a verb of the command. Gives its result as JSON; where what was checked is not as it
/// should be, with the message that says so.
#[pyfunction]
pub(crate) fn call(
    py: Python<'_>,
    arguments: Vec<OsString>,
    progress: Option<&Bound<'_, PyAny>>,
    warn: &Bound<'_, PyAny>,
) -> PyResult<(String, Option<String>)> {
    crate::limit_instructions(py)?;
    let (outcome, result) = watch(py, progress, warn, |watched| llmpress_cli::call(arguments, watched))?;
    let json = result.unwrap_or_default().to_string();
    match outcome {
        Ok(()) => Ok((json, None)),
        Err(Called::Failed { kind: "findings", message }) => Ok((json, Some(message))),
        Err(called) => Err(failed(py, called)),
    }
}

/// The directory of a checkpoint that may be named as on the hub.
#[pyfunction]
pub(crate) fn download(
    py: Python<'_>,
    path: PathBuf,
    progress: Option<&Bound<'_, PyAny>>,
    warn: &Bound<'_, PyAny>,
) -> PyResult<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(invalid(py, "an empty name"));
    }
    let (outcome, _) = watch(py, progress, warn, |watched| llmpress_cli::local_checkpoint(&path, watched))?;
    outcome.map_err(|called| failed(py, called))
}
