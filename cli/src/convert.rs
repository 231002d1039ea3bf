//! `llmpress convert`: carry out a plan.

use llmpress_formats::{Base, printable};
use llmpress_pipeline::{Options, Plan, Request, Summary, convert, convert_request, view};

use crate::Outcome;
use crate::args::{ConvertArgs, JobArgs};
use crate::progress::{Bar, Bars};
use crate::recipe::request;
use crate::report::{Output, bytes, percent};

pub(crate) fn run(args: &ConvertArgs, output: Output) -> Outcome {
    let options = options(&args.job);
    let watch = Bars(output);
    let summary = match &args.plan {
        Some(path) => {
            let saved = llmpress_formats::read_input(path, 1 << 30)?;
            let recipe = Plan::recipe_of_json(&saved)?;
            let mut checkpoint = view(recipe.open(&args.dir)?, &recipe.passes)?;
            if let Some(base) = Plan::parse(&saved)?.base {
                checkpoint = checkpoint.to_store_by(Base::open(base.as_ref())?);
            }
            let plan = Plan::from_json(&checkpoint, &saved)?;
            let files = plan.files.iter().map(|(name, text)| (name.clone(), text.clone().into_bytes()));
            let options = Options { extra_files: files.collect(), ..options };
            let bar = Bar::new("convert", plan.source_bytes, output);
            convert(&checkpoint, &args.out, &plan, &options, &bar)?
        }
        None => {
            let request = request(&args.recipe, args.calibration.text()?)?;
            warn_of_rankings(&request, output)?;
            convert_request(&args.dir, &args.out, &request, args.recipe.max_shard_size, &options, &watch)?
        }
    };
    if let Some(uncovered) = &summary.uncovered {
        output.warn(&uncovered.to_string());
    }
    summarise(output, &args.out, &summary);
    Ok(())
}

/// Says which rankings nobody can check.
pub(crate) fn warn_of_rankings(request: &Request, output: Output) -> Outcome {
    for path in request.unmarked_rankings()? {
        output.warn(&format!(
            "{} does not say which model it was made of: rank again if it was another one",
            printable(&path.display().to_string())
        ));
    }
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
pub(crate) fn summarise(output: Output, out: &std::path::Path, summary: &Summary) {
    summarise_with(output, out, summary, None);
}

/// The same, with a command that uploads what was made.
pub(crate) fn summarise_with(output: Output, out: &std::path::Path, summary: &Summary, upload: Option<&str>) {
    let seconds = summary.seconds;
    let rate = summary.source_bytes as f64 / seconds.max(1e-9) / 1e9;
    let mut value = serde_json::json!({
        "out": out.display().to_string(),
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
    if let Some(upload) = upload {
        value["upload"] = upload.into();
    }
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
            text.push_str(&format!("not as asked for: {}: {why}\n", printable(unit)));
        }
        if summary.fallbacks.len() > SHOWN {
            text.push_str(&format!(
                "not as asked for: {} more (see llmpress.json)\n",
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
        if let Some(upload) = upload {
            text.push_str(&format!("to upload it: {}\n", printable(upload)));
        }
        text
    });
}
