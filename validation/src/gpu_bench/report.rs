//! What ran, what held, what was measured, and on what.

use std::time::Duration;

use serde::Serialize;

use super::call::CallReport;
use super::findings::{Card, Check, Findings, KernelProof, ModelSpeed};
use super::goals::{GoalResult, against};
use super::options::Options;
use crate::{Ceilings, KernelRow};

/// How far everything has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Steps are still to come; or it was ended in a way that left no time to say so.
    Running,
    /// Every step ran or has a reason not to.
    Finished,
    /// It was interrupted.
    Interrupted,
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is to come.
    Waiting,
    /// It runs.
    Running,
    /// Everything that it checks holds.
    Held,
    /// Something does not hold, or could not be checked.
    Failed,
    /// It was killed when its time was over.
    TimedOut,
    /// It was interrupted.
    Interrupted,
    /// It did not run.
    NotRun,
    /// It was not asked for.
    NotAskedFor,
}

impl Outcome {
    /// For people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Held => "held",
            Self::Failed => "FAILED",
            Self::TimedOut => "OUT OF TIME",
            Self::Interrupted => "interrupted",
            Self::NotRun => "not run",
            Self::NotAskedFor => "not asked for",
        }
    }
}

/// A step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// Its name.
    pub name: String,
    /// What it shows.
    pub shows: String,
    /// What became of it.
    pub outcome: Outcome,
    /// Why it did not run, or what failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Seconds that it took.
    pub seconds: f64,
    /// Seconds that it may take.
    pub limit_s: f64,
    /// Its processes.
    pub calls: Vec<CallReport>,
    /// What it checked.
    pub checks: Vec<Check>,
}

impl StepReport {
    /// Of a step that is to come.
    pub(super) fn waiting(name: &str, shows: &str, limit: Duration) -> Self {
        Self {
            name: name.to_owned(),
            shows: shows.to_owned(),
            outcome: Outcome::Waiting,
            reason: None,
            seconds: 0.0,
            limit_s: limit.as_secs_f64(),
            calls: Vec::new(),
            checks: Vec::new(),
        }
    }
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What ran.
    pub version: String,
    /// When it began, UTC.
    pub started: String,
    /// When this was written, UTC.
    pub written: String,
    /// Seconds since it began.
    pub seconds: f64,
    /// Seconds that everything may take.
    pub budget_s: f64,
    /// The GPU by its number.
    pub device: String,
    /// How far it has come.
    pub state: RunState,
    /// The GPU.
    pub card: Option<Card>,
    /// The limits of its memory, measured in the same run.
    pub ceilings: Option<Ceilings>,
    /// Why cuBLAS was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_cublas: Option<String>,
    /// The goals, and what was reached.
    pub goals: Vec<GoalResult>,
    /// The steps, in order.
    pub steps: Vec<StepReport>,
    /// Kernels against their references.
    pub proofs: Vec<KernelProof>,
    /// What `bench kernels` measured.
    pub kernels: Vec<KernelRow>,
    /// Layers of the model of 8B shapes that was made.
    pub layers: Option<u64>,
    /// Models' speed and memory.
    pub speeds: Vec<ModelSpeed>,
}

/// Now, UTC.
fn now() -> String {
    format!("{:.0}", jiff::Timestamp::now())
}

impl Report {
    /// Of steps that are to come.
    pub(super) fn new(options: &Options, steps: impl Iterator<Item = StepReport>) -> Self {
        Self {
            version: options.version.clone(),
            started: now(),
            written: String::new(),
            seconds: 0.0,
            budget_s: options.budget.as_secs_f64(),
            device: format!("cuda:{}", options.ordinal),
            state: RunState::Running,
            card: None,
            ceilings: None,
            no_cublas: None,
            goals: against(&[]),
            steps: steps.collect(),
            proofs: Vec::new(),
            kernels: Vec::new(),
            layers: None,
            speeds: Vec::new(),
        }
    }

    /// Whether every step that was asked for ran to its end and everything it checks holds. Goals of speed do not count.
    #[must_use]
    pub fn all_held(&self) -> bool {
        self.state == RunState::Finished
            && self.steps.iter().all(|s| matches!(s.outcome, Outcome::Held | Outcome::NotAskedFor))
    }

    /// Takes in what a step found, all but its checks.
    pub(super) fn take(&mut self, found: &mut Findings) {
        self.card = found.card.take().or(self.card.take());
        self.ceilings = self.ceilings.or(found.ceilings);
        self.no_cublas = found.no_cublas.take().or(self.no_cublas.take());
        self.layers = found.layers.or(self.layers);
        self.proofs.append(&mut found.proofs);
        self.kernels.append(&mut found.kernels);
        self.speeds.append(&mut found.speeds);
        self.goals = against(&self.kernels);
    }

    /// Says when this is.
    pub(super) fn stamp(&mut self, seconds: f64) {
        self.written = now();
        self.seconds = seconds;
    }
}
