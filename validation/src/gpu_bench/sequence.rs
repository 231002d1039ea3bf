//! The steps one after the other, within the budget, with a report after each.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use llmpress_formats::{Error, Result};

use super::call::{Done, Over};
use super::findings::Findings;
use super::known::Known;
use super::options::Options;
use super::report::{Outcome, Report, RunState};
use super::steps::Step;
use super::written::write;

/// What the calls printed, in the output directory.
const CALLS_DIR: &str = "calls";

/// How the steps are run.
pub(super) struct Sequence<'a> {
    pub(super) options: &'a Options,
    pub(super) environment: Vec<(String, String)>,
    pub(super) interrupted: &'a AtomicBool,
    pub(super) say: &'a mut dyn FnMut(&str),
}

/// What became of a step.
struct Ran {
    outcome: Outcome,
    reason: Option<String>,
    calls: Vec<Done>,
    found: Findings,
}

impl Ran {
    fn not(outcome: Outcome, reason: impl Into<String>) -> Self {
        Self { outcome, reason: Some(reason.into()), calls: Vec::new(), found: Findings::default() }
    }
}

impl Sequence<'_> {
    /// Runs the steps that are asked for.
    ///
    /// # Errors
    /// The report cannot be written.
    pub(super) fn run(self, steps: &[Step], mut report: Report) -> Result<Report> {
        let start = Instant::now();
        let out = &self.options.out;
        let calls = out.join(CALLS_DIR);
        std::fs::create_dir_all(&calls).map_err(|e| Error::io(&calls, "create", e))?;
        let wanted = wanted(steps, &self.options.only, self.options.stop_after.as_deref());
        let mut known = Known::default();
        for (index, step) in steps.iter().enumerate() {
            let begun = Instant::now();
            let ran = if wanted.get(index) == Some(&true) {
                match self.obstacle(step, &known, &report, start) {
                    Some(why) => Ran::not(Outcome::NotRun, why),
                    None => {
                        (self.say)(&format!("{}: {}", step.name, step.shows));
                        if let Some(entry) = report.steps.get_mut(index) {
                            entry.outcome = Outcome::Running;
                        }
                        write(&mut report, out, start.elapsed().as_secs_f64())?;
                        self.step(step, &known, &calls, start)
                    }
                }
            } else {
                Ran::not(Outcome::NotAskedFor, "not asked for")
            };
            let Ran { outcome, reason, calls, mut found } = ran;
            if let Some(card) = &found.card {
                known.memory_bytes = Some(card.memory_bytes);
            }
            known.no_gpu = found.no_gpu.take().or(known.no_gpu);
            known.layers = found.layers.or(known.layers);
            report.take(&mut found);
            if outcome != Outcome::NotAskedFor {
                let why = reason.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
                (self.say)(&format!(
                    "{}: {}{why} ({:.1} s)",
                    step.name,
                    outcome.text(),
                    begun.elapsed().as_secs_f64()
                ));
            }
            if let Some(entry) = report.steps.get_mut(index) {
                entry.outcome = outcome;
                entry.reason = reason;
                entry.seconds = begun.elapsed().as_secs_f64();
                entry.calls = calls.into_iter().map(|done| done.report).collect();
                entry.checks = found.checks;
            }
            write(&mut report, out, start.elapsed().as_secs_f64())?;
        }
        report.state =
            if self.interrupted.load(Ordering::Relaxed) { RunState::Interrupted } else { RunState::Finished };
        write(&mut report, out, start.elapsed().as_secs_f64())?;
        Ok(report)
    }

    fn left(&self, start: Instant) -> Duration {
        self.options.budget.saturating_sub(start.elapsed())
    }

    /// Why a step cannot begin.
    fn obstacle(&self, step: &Step, known: &Known, report: &Report, start: Instant) -> Option<String> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Some("everything was interrupted".to_owned());
        }
        if let Some(why) = known.no_gpu.as_ref().filter(|_| step.gpu) {
            return Some(format!("no GPU: {why}"));
        }
        let missing = step.after.iter().find_map(|&before| {
            let entry = report.steps.iter().find(|entry| entry.name == before)?;
            let why = entry.reason.as_deref().unwrap_or(entry.outcome.text());
            (entry.outcome != Outcome::Held).then(|| format!("it needs {before}: {why}"))
        });
        if missing.is_some() {
            return missing;
        }
        let left = self.left(start);
        (left < step.least).then(|| {
            format!(
                "{:.0} s of the budget of {:.0} s are left, too few to begin: it wants {:.0}",
                left.as_secs_f64(),
                self.options.budget.as_secs_f64(),
                step.least.as_secs_f64()
            )
        })
    }

    fn step(&self, step: &Step, known: &Known, dir: &Path, start: Instant) -> Ran {
        let calls = match (step.calls)(known) {
            Ok(calls) => calls,
            Err(why) => return Ran::not(Outcome::NotRun, why),
        };
        let end = step.limit.min(self.left(start));
        let begun = Instant::now();
        let mut done = Vec::with_capacity(calls.len());
        for (number, call) in calls.iter().enumerate() {
            let limit = call.limit.min(end.saturating_sub(begun.elapsed()));
            // A call without any time is killed at once, and is in the report with that reason.
            let name =
                if calls.len() == 1 { step.name.to_owned() } else { format!("{}-{number}", step.name) };
            done.push(call.run(limit, &self.environment, &dir.join(name), self.interrupted));
            if self.interrupted.load(Ordering::Relaxed) {
                break;
            }
        }
        let mut found = (step.judge)(&done, known);
        let faults =
            done.iter().filter(|d| !d.optional).filter_map(|d| Some((d.name(), d.report.fault.as_ref()?)));
        let faults: Vec<String> = faults.map(|(name, fault)| format!("{name}: {fault}")).collect();
        let broken = found.checks.iter().filter(|c| !c.held).map(|c| format!("not {}: {}", c.what, c.found));
        let reasons: Vec<String> = faults.into_iter().chain(broken).collect();
        let over = |over| done.iter().any(|d| !d.optional && d.over == Some(over));
        let outcome = if over(Over::Interrupted) {
            Outcome::Interrupted
        } else if over(Over::Limit) {
            Outcome::TimedOut
        } else if reasons.is_empty() {
            Outcome::Held
        } else {
            Outcome::Failed
        };
        if outcome == Outcome::Held && found.checks.is_empty() {
            found.check("ends without an error", true, "exit code 0");
        }
        Ran { outcome, reason: (!reasons.is_empty()).then(|| reasons.join("; ")), calls: done, found }
    }
}

/// Which steps are asked for: those named and what they need, up to the last; the first always, since it says what is
/// measured on.
fn wanted(steps: &[Step], only: &[String], stop_after: Option<&str>) -> Vec<bool> {
    let last = stop_after.and_then(|name| steps.iter().position(|s| s.name == name)).unwrap_or(usize::MAX);
    let named = |name: &str| only.is_empty() || only.iter().any(|o| o == name);
    let mut wanted: Vec<bool> =
        steps.iter().enumerate().map(|(i, s)| i == 0 || i <= last && named(s.name)).collect();
    // What a step needs comes before it.
    for index in (0..steps.len()).rev() {
        if wanted[index] {
            for before in steps[index].after {
                wanted.iter_mut().zip(steps).filter(|(_, s)| s.name == *before).for_each(|(w, _)| *w = true);
            }
        }
    }
    wanted
}
