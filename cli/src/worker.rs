//! `llmpress worker`: units of a plan, beside others who make others.

use std::path::{Path, PathBuf};

use llmpress_pipeline::{Options, Plan, Spread, Worked, listed};

use crate::Outcome;
use crate::args::{SpreadArgs, WorkerArgs};
use crate::hub::{Held, resolve_source};
use crate::progress::Bar;
use crate::report::{Failure, Output, bytes};
use crate::share;
use crate::stop::Stop;

pub(crate) fn run(args: &WorkerArgs, output: Output) -> Outcome {
    let stop = Stop::install(output);
    let done = work(args, &stop, output).map_err(Failure::of_worker);
    stop.wait_if_asked();
    done
}

fn work(args: &WorkerArgs, stop: &Stop, output: Output) -> Outcome {
    let plan = Plan::parse(&llmpress_formats::read_input(&args.spread.plan, MAX_PLAN_BYTES)?)?;
    let units = match args.units.is_empty() {
        false => {
            args.units.iter().flatten().cloned().flat_map(|range| named(range, plan.shards.len())).collect()
        }
        true => {
            let share = share::of(args, &|name| std::env::var(name).ok())?;
            output.progress(&format!("job {} of {} (by {})", share.rank, share.jobs, share.by));
            plan.share(share.jobs, share.rank)
        }
    };
    let (spread, _held) = open(&plan, &args.spread, output)?;
    let shards = units.iter().filter_map(|&unit| plan.shards.get(unit));
    let bar = Bar::new("worker", shards.map(|shard| shard.source_bytes).sum(), output);
    let options = options(&args.spread);
    let worked = spread.work(&args.spread.out, &units, &options, stop.scratch(), &bar)?;
    drop(bar);
    summarise(output, &args.spread.out, &worked);
    Ok(())
}

/// The largest plan that is read.
pub(crate) const MAX_PLAN_BYTES: u64 = 1 << 30;

/// The numbers of a range, without going beyond the first that there is not: it is refused by its number.
fn named(range: std::ops::RangeInclusive<usize>, units: usize) -> std::ops::RangeInclusive<usize> {
    let (first, last) = range.into_inner();
    first..=last.min(first.max(units))
}

/// The plan with its source, and what has to stay while it is read.
pub(crate) fn open(plan: &Plan, args: &SpreadArgs, output: Output) -> Result<(Spread, Held), Failure> {
    let mut source = match (&args.source, &plan.source) {
        (Some(source), _) => source.clone(),
        (None, Some(source)) => PathBuf::from(source),
        (None, None) => {
            return Err(Failure::Usage(
                "the plan does not say where its source lies: give --source DIR".to_owned(),
            ));
        }
    };
    let held = resolve_source(&mut source, output)?;
    Ok((Spread::open(plan, &source)?, held))
}

pub(crate) fn options(args: &SpreadArgs) -> Options {
    Options {
        jobs: args.jobs.map(usize::from),
        max_memory: args.max_memory,
        resume: true,
        force: false,
        producer: crate::documents::producer(),
        extra_files: Default::default(),
    }
}

fn summarise(output: Output, out: &Path, worked: &Worked) {
    if output.quiet && !output.json {
        return;
    }
    let rate = worked.source_bytes as f64 / worked.seconds.max(1e-9) / 1e9;
    let value = serde_json::json!({
        "out": out.display().to_string(),
        "made": worked.made,
        "found": worked.found,
        "source_bytes": worked.source_bytes,
        "output_bytes": worked.output_bytes,
        "seconds": worked.seconds,
        "gb_per_second": rate,
        "fallbacks": worked.fallbacks.iter().map(|(unit, why)| serde_json::json!({"unit": unit, "why": why})).collect::<Vec<_>>(),
        "jobs": worked.budget.jobs,
        "peak_memory_bytes": crate::memory::peak(),
    });
    output.result(&value, || {
        let units = |numbers: &[usize]| match numbers {
            [] => "no units".to_owned(),
            [one] => format!("unit {one}"),
            many => format!("units {}", listed(many)),
        };
        let mut text = format!("{}: made {}", out.display(), units(&worked.made));
        if !worked.made.is_empty() {
            text.push_str(&format!(
                ": {} -> {}, {:.2} s, {rate:.2} GB/s",
                bytes(worked.source_bytes),
                bytes(worked.output_bytes),
                worked.seconds
            ));
        }
        if !worked.found.is_empty() {
            text.push_str(&format!("; {} there already", units(&worked.found)));
        }
        text.push('\n');
        for (tensor, why) in worked.fallbacks.iter().take(SHOWN) {
            text.push_str(&format!("not as asked for: {tensor}: {why}\n"));
        }
        if worked.fallbacks.len() > SHOWN {
            text.push_str(&format!("not as asked for: {} more\n", worked.fallbacks.len() - SHOWN));
        }
        text
    });
}

/// Most reasons that are printed one by one.
const SHOWN: usize = 8;
