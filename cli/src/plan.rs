//! `llmpress plan`: what a conversion would do.

use std::collections::BTreeMap;

use llmpress_pipeline::{Plan, Uncovered};

use crate::Outcome;
use crate::args::PlanArgs;
use crate::passes::{describe, forecast};
use crate::recipe::request;
use crate::report::{Output, bytes, percent, table};

pub(crate) fn run(args: &PlanArgs, output: Output) -> Outcome {
    let request = request(&args.recipe, args.cut.without_text())?;
    let (plan, checkpoint) = Plan::forecast(&args.dir, &request, args.recipe.max_shard_size)?;
    if let Some(uncovered) = Uncovered::of(&checkpoint, &plan) {
        output.warn(&uncovered.to_string());
    }
    let budget = plan.budget(&checkpoint, args.jobs.map(usize::from), args.max_memory)?;
    output.result(&plan, || {
        let mut text = String::new();
        if args.tensors {
            let mut rows =
                vec![["unit", "method", "tensors", "source", "expected"].map(str::to_owned).to_vec()];
            for unit in plan.units() {
                rows.push(vec![
                    unit.name.clone(),
                    unit.method.name().to_owned(),
                    unit.tensors.len().to_string(),
                    bytes(unit.source_bytes),
                    bytes(unit.expected_bytes),
                ]);
            }
            text.push_str(&table(&rows));
            text.push('\n');
        }
        let mut methods: BTreeMap<&str, (usize, usize, u64, u64)> = BTreeMap::new();
        for unit in plan.units() {
            let sum = methods.entry(unit.method.name()).or_default();
            sum.0 += 1;
            sum.1 += unit.tensors.len();
            sum.2 += unit.source_bytes;
            sum.3 += unit.expected_bytes;
        }
        let mut rows = vec![["method", "units", "tensors", "source", "expected"].map(str::to_owned).to_vec()];
        for (method, (units, tensors, source, expected)) in methods {
            rows.push(vec![
                method.to_owned(),
                units.to_string(),
                tensors.to_string(),
                bytes(source),
                bytes(expected),
            ]);
        }
        text.push_str(&table(&rows));
        text.push_str(&format!(
            "\n{} shards, {} -> about {} ({})\ndisk needed: about {}\nmemory: at most {} with {} jobs\n",
            plan.shards.len(),
            bytes(plan.source_bytes),
            bytes(plan.expected_bytes),
            percent(plan.expected_bytes, plan.source_bytes),
            bytes(plan.expected_bytes),
            bytes(budget.peak_bytes),
            budget.jobs,
        ));
        let mut open = plan.passes.iter();
        for pass in &plan.recipe.passes {
            text.push_str(&match pass.is_settled() {
                true => format!("{}\n", describe(pass)),
                false => open.next().map(forecast).unwrap_or_default(),
            });
        }
        if !plan.recipe.passes.is_empty() && plan.passes.is_empty() {
            text.push_str(&format!("{} tensors go\n", checkpoint.dropped().len()));
        }
        text
    });
    Ok(())
}
