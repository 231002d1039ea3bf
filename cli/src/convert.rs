//! `llmpress convert`: carry out a plan.

use llmpress_formats::{Checkpoint, printable};
use llmpress_pipeline::{Options, Plan, Summary, convert};

use crate::Outcome;
use crate::args::{ConvertArgs, JobArgs};
use crate::progress::Bar;
use crate::report::{Failure, Output, bytes, percent};

pub(crate) fn run(args: &ConvertArgs, output: Output) -> Outcome {
    let mut options = options(&args.job);
    let (checkpoint, plan) = match &args.plan {
        Some(path) => {
            let saved = llmpress_formats::read_input(path, 1 << 30)?;
            let checkpoint = Checkpoint::open(&args.dir)?;
            let checkpoint = crate::prune::pruned(checkpoint, Plan::recipe_of_json(&saved)?.prune.as_ref())?;
            let plan = Plan::from_json(&checkpoint, &saved)?;
            (checkpoint, plan)
        }
        None => {
            let asked = crate::prune::ask(&args.dir, &args.recipe, args.job.jobs, output)?;
            options.extra_files.extend(asked.files);
            let plan = Plan::new(&asked.checkpoint, &asked.recipe, args.recipe.max_shard_size)?;
            (asked.checkpoint, plan)
        }
    };
    let bar = Bar::new("convert", plan.source_bytes, output);
    let summary = convert(&checkpoint, &args.out, &plan, &options, &bar);
    let seconds = bar.finish();
    summarise(output, &args.out, &summary?, seconds);
    Ok(())
}

/// How the job is to run.
pub(crate) fn options(job: &JobArgs) -> Options {
    Options {
        jobs: job.jobs.map(usize::from),
        max_memory: job.max_memory,
        resume: job.resume,
        force: job.force,
        producer: crate::documents::producer(),
        extra_files: Default::default(),
    }
}

/// Most reasons, and removed files, that are printed one by one.
const SHOWN: usize = 8;

/// The summary at the end of a job.
pub(crate) fn summarise(output: Output, out: &std::path::Path, summary: &Summary, seconds: f64) {
    let rate = summary.source_bytes as f64 / seconds.max(1e-9) / 1e9;
    let value = serde_json::json!({
        "out": out,
        "source_bytes": summary.source_bytes,
        "output_bytes": summary.output_bytes,
        "ratio": summary.output_bytes as f64 / summary.source_bytes.max(1) as f64,
        "seconds": seconds,
        "gb_per_second": rate,
        "shards": summary.shards,
        "resumed_shards": summary.resumed,
        "fallbacks": summary.fallbacks.iter().map(|(unit, why)| serde_json::json!({"unit": unit, "why": why})).collect::<Vec<_>>(),
        "left_behind": summary.left_behind,
        "removed": summary.removed,
        "jobs": summary.budget.jobs,
        "peak_memory_bytes": crate::memory::peak(),
    });
    if output.quiet && !output.json {
        return;
    }
    output.result(&value, || {
        let mut text = format!(
            "{}: {} -> {} ({}), {seconds:.2} s, {rate:.2} GB/s\n",
            out.display(),
            bytes(summary.source_bytes),
            bytes(summary.output_bytes),
            percent(summary.output_bytes, summary.source_bytes),
        );
        if summary.resumed > 0 {
            text.push_str(&format!("{} of {} shards were there already\n", summary.resumed, summary.shards));
        }
        for (unit, why) in summary.fallbacks.iter().take(SHOWN) {
            text.push_str(&format!("kept raw: {}: {why}\n", printable(unit)));
        }
        if summary.fallbacks.len() > SHOWN {
            text.push_str(&format!(
                "kept raw: {} more (see llmpress.json)\n",
                summary.fallbacks.len() - SHOWN
            ));
        }
        if !summary.left_behind.is_empty() {
            text.push_str(&format!("not copied: {}\n", printable(&summary.left_behind.join(", "))));
        }
        if !summary.removed.is_empty() {
            let shown: Vec<&str> = summary.removed.iter().take(SHOWN).map(String::as_str).collect();
            let more = summary.removed.len() - shown.len();
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            text.push_str(&format!("removed of an earlier job: {}{more}\n", printable(&shown.join(", "))));
        }
        text
    });
}

/// An argument that is missing.
pub(crate) fn usage(text: &str) -> Failure {
    Failure::Usage(text.to_owned())
}
