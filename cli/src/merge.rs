//! `llmpress merge`: completes what workers made.

use llmpress_pipeline::{Error, Plan, listed};

use crate::Outcome;
use crate::args::MergeArgs;
use crate::convert::summarise;
use crate::progress::Bar;
use crate::report::{Failure, Output};
use crate::worker::{MAX_PLAN_BYTES, open, options};

pub(crate) fn run(args: &MergeArgs, output: Output) -> Outcome {
    merge(args, output).map_err(Failure::of_worker)
}

fn merge(args: &MergeArgs, output: Output) -> Outcome {
    let args = &args.spread;
    let plan = Plan::parse(&llmpress_formats::read_input(&args.plan, MAX_PLAN_BYTES)?)?;
    let spread = open(&plan, args, output)?;
    let bar = Bar::new("merge", plan.expected_bytes, output);
    let merged = spread.merge(&args.out, &options(args), &bar);
    drop(bar);
    let summary = merged.map_err(|error| match &error {
        Error::Missing { missing, .. } => {
            let mut command = format!(
                "llmpress worker --plan {} {} --unit {}",
                args.plan.display(),
                args.out.display(),
                listed(missing)
            );
            if let Some(source) = &args.source {
                command.push_str(&format!(" --source {}", source.display()));
            }
            Failure::Units(error, command)
        }
        _ => error.into(),
    })?;
    if let Some(uncovered) = &summary.uncovered {
        output.warn(&uncovered.to_string());
    }
    summarise(output, &args.out, &summary);
    Ok(())
}
