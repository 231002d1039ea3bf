//! A process with a limit of time.
//!
//! ```text
//! start in a process group of its own --> ended | its time is over | interrupted --> the whole group is killed
//! ```

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use llmpress_formats::read_small_file;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, getpid, getppid, kill_process_group, set_parent_process_death_signal,
    waitid,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How often a process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long a killed process may take to go: one that waits for a lost device may never.
const GOING: Duration = Duration::from_secs(3);
/// Most that a process may print.
const MAX_OUTPUT: u64 = 64 << 20;
/// Of what it says on stderr, the end is kept.
const STDERR_TAIL: usize = 2000;

/// A process that ran.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CallReport {
    /// Its name in its step.
    pub name: String,
    /// The command.
    pub command: Vec<String>,
    /// Seconds that it ran.
    pub seconds: f64,
    /// Seconds that it was given.
    pub limit_s: f64,
    /// How it ended by itself.
    pub exit_code: Option<i32>,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// The end of what it said on stderr.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stderr: String,
}

/// A process to run.
#[derive(Clone, Debug)]
pub(super) struct Call {
    /// Its name among the calls of its step, and of the files with its output.
    pub(super) name: String,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) limit: Duration,
    /// Its failure is no fault: a program that need not be there.
    pub(super) optional: bool,
}

/// A process that ran, and what it printed.
#[derive(Clone, Debug)]
pub(super) struct Done {
    pub(super) report: CallReport,
    pub(super) optional: bool,
    pub(super) over: Option<Over>,
    stdout: PathBuf,
}

/// Why a process was ended before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    Limit,
    Interrupted,
    Output,
}

impl Done {
    pub(super) fn name(&self) -> &str {
        &self.report.name
    }

    /// What was printed, as JSON. Also of a process that failed: some print what they found first.
    pub(super) fn value<T: DeserializeOwned>(&self) -> Result<T, String> {
        let bytes = read_small_file(&self.stdout, MAX_OUTPUT).map_err(|e| e.to_string())?;
        serde_json::from_slice(&bytes).map_err(|e| format!("its output is not understood: {e}"))
    }

    /// What was printed, a line each: those that are JSON of this kind.
    pub(super) fn lines<T: DeserializeOwned>(&self) -> Vec<T> {
        let bytes = read_small_file(&self.stdout, MAX_OUTPUT).unwrap_or_default();
        String::from_utf8_lossy(&bytes).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// What was printed, trimmed.
    pub(super) fn text(&self) -> String {
        let bytes = read_small_file(&self.stdout, MAX_OUTPUT).unwrap_or_default();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}

impl Call {
    /// Runs the process for at most `limit`. What it prints goes to `<prefix>.out` and `<prefix>.err`.
    pub(super) fn run(
        &self,
        limit: Duration,
        environment: &[(String, String)],
        prefix: &Path,
        interrupted: &AtomicBool,
    ) -> Done {
        let named = |ending: &str| {
            let mut name = prefix.as_os_str().to_owned();
            name.push(ending);
            PathBuf::from(name)
        };
        let (stdout, stderr) = (named(".out"), named(".err"));
        let start = Instant::now();
        let ran = File::create(&stdout)
            .and_then(|out| Ok((out, File::create(&stderr)?)))
            .and_then(|(out, err)| {
                let mut command = Command::new(&self.program);
                command
                    .args(&self.arguments)
                    .envs(environment.iter().map(|(name, value)| (name, value)))
                    .stdin(Stdio::null())
                    .stdout(out)
                    .stderr(err)
                    .process_group(0);
                end_with_us(&mut command);
                command.spawn()
            })
            .and_then(|child| wait(child, start, limit, &[&stdout, &stderr], interrupted));
        let tail = tail(&stderr);
        let (exit_code, over, fault) = match ran {
            Err(error) => (None, None, Some(format!("cannot be run: {error}"))),
            Ok((status, None)) => (status.and_then(|s| s.code()), None, status.and_then(|s| fault(s, &tail))),
            Ok((status, Some(over))) => {
                let why = match over {
                    Over::Limit => format!("killed after {:.0} s, its limit", limit.as_secs_f64()),
                    Over::Interrupted => "killed: everything was interrupted".to_owned(),
                    Over::Output => format!("killed: it printed more than {} MiB", MAX_OUTPUT >> 20),
                };
                let stays = if status.is_none() { "; it does not go" } else { "" };
                (None, Some(over), Some(format!("{why}{stays}")))
            }
        };
        let program = self.program.file_name().unwrap_or(self.program.as_os_str()).to_string_lossy();
        Done {
            report: CallReport {
                name: self.name.clone(),
                command: std::iter::once(program.into_owned())
                    .chain(self.arguments.iter().cloned())
                    .collect(),
                seconds: start.elapsed().as_secs_f64(),
                limit_s: limit.as_secs_f64(),
                exit_code,
                fault,
                stderr: tail,
            },
            optional: self.optional,
            over,
            stdout,
        }
    }
}

/// Has the system end the process when this one ends in whatever way: killed, it could not do so itself.
fn end_with_us(command: &mut Command) {
    let us = getpid();
    // SAFETY: between fork and exec there are two system calls; nothing is allocated, no lock is taken.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // Too late where it ended before.
            if getppid() == Some(us) { Ok(()) } else { Err(std::io::ErrorKind::NotFound.into()) }
        });
    }
}

/// What is wrong about the way a process ended by itself.
fn fault(status: ExitStatus, stderr: &str) -> Option<String> {
    let said = stderr.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing on stderr");
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(code), _) => Some(format!("exit code {code}: {said}")),
        (None, signal) => Some(format!("ended by signal {}: {said}", signal.unwrap_or(0))),
    }
}

/// Waits for a process, kills its group when it is over, and says how it ended: `None` if it does not.
fn wait(
    mut child: Child,
    start: Instant,
    limit: Duration,
    files: &[&Path],
    interrupted: &AtomicBool,
) -> std::io::Result<(Option<ExitStatus>, Option<Over>)> {
    let pid = Pid::from_child(&child);
    // The group has the number of its first process. That one is not reaped before the group is killed, so the number
    // cannot be another's by then.
    let ended = || {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        matches!(waitid(WaitId::Pid(pid), options), Ok(Some(_)))
    };
    let too_much = || files.iter().any(|file| std::fs::metadata(file).is_ok_and(|m| m.len() > MAX_OUTPUT));
    let mut over = None;
    while !ended() {
        over = if interrupted.load(Ordering::Relaxed) {
            Some(Over::Interrupted)
        } else if start.elapsed() >= limit {
            Some(Over::Limit)
        } else if too_much() {
            Some(Over::Output)
        } else {
            None
        };
        if over.is_some() {
            break;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    // Also what a process that ended left running. There may be nothing.
    let _ = kill_process_group(pid, Signal::KILL);
    let killed = Instant::now();
    while !ended() && killed.elapsed() < GOING {
        std::thread::sleep(LOOK_EVERY);
    }
    Ok((child.try_wait()?, over))
}

/// The end of a file.
fn tail(path: &Path) -> String {
    let bytes = read_small_file(path, 2 * MAX_OUTPUT).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_end();
    let mut from = text.len().saturating_sub(STDERR_TAIL);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text[from..].to_owned()
}
