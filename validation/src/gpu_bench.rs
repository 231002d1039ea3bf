//! Everything that is to be checked and measured on a machine with a GPU, in bounded time, the most important first.
//!
//! ```text
//! budget |doctor|proofs|a small model: perplexity, logits, texts|kernels|prefill|a model of 8B shapes|more kernels|
//!        each call is a process of its own with a limit;   report.json and report.md are written anew after each
//! ```
//!
//! A kernel can hang a GPU, a driver can end a process: what was found before is in the report by then, and the steps
//! after it run all the same.

mod call;
mod findings;
mod goals;
mod judge;
mod known;
mod options;
mod page;
mod report;
mod sequence;
mod steps;
#[cfg(test)]
mod tests;
mod written;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use llmpress_formats::{Error, Result, write_atomic};

pub use call::CallReport;
pub use findings::{Card, Check, KernelProof, ModelSpeed};
pub use goals::{GOALS, Goal, GoalResult, Measure};
pub use options::{BUDGET, Options};
pub use report::{Outcome, Report, RunState, StepReport};
pub use steps::STEPS;
pub use written::{REPORT_JSON, REPORT_PAGE};

use sequence::Sequence;
use steps::Step;

/// Runs the steps. `interrupted` ends them early, with a report; `say` is told what comes and what came of it.
///
/// # Errors
/// There is a report already; a step that does not exist; a directory that cannot be written. What a step finds is in
/// the report.
pub fn run(options: &Options, interrupted: &AtomicBool, say: &mut dyn FnMut(&str)) -> Result<Report> {
    for name in options.only.iter().chain(&options.stop_after) {
        if !STEPS.contains(&name.as_str()) {
            return Err(Error::Invalid(format!("there is no step {name:?}: {}", STEPS.join(", "))));
        }
    }
    let old = options.out.join(REPORT_JSON);
    if old.exists() && !options.force {
        return Err(Error::Invalid(format!(
            "{} is there already: give another directory, or --force to replace it",
            old.display()
        )));
    }
    let create = |dir: &PathBuf| std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, "create", e));
    create(&options.out)?;
    // A folder of our own inside, so that nothing of anybody else's is removed with it.
    let scratch = options.scratch.join(format!("llmpress-bench-gpu-{}", std::process::id()));
    create(&scratch)?;
    let _removed = Removed(scratch.clone());
    let text = scratch.join("text.txt");
    write_atomic(&text, crate::random_model::random_text().as_bytes())?;
    let steps = steps::steps(options, &scratch, &text);
    let report = Report::new(options, steps.iter().map(Step::waiting));
    let environment = environment(&scratch);
    Sequence { options, environment, interrupted, say }.run(&steps, report)
}

/// Removes a folder when it is dropped.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Every call is a process: the driver's compilations are kept for the next, and the first one's time is that of compiling.
fn environment(scratch: &std::path::Path) -> Vec<(String, String)> {
    let ours = [
        ("CUDA_CACHE_PATH", scratch.join("compiled").display().to_string()),
        ("CUDA_CACHE_MAXSIZE", (1u64 << 30).to_string()),
    ];
    ours.into_iter()
        .filter(|(name, _)| std::env::var_os(name).is_none())
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}
