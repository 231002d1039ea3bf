//! `llmpress plan`: what a conversion would do.

use std::collections::BTreeMap;

use llmpress_formats::Checkpoint;
use llmpress_pipeline::{Plan, Recipe};

use crate::Outcome;
use crate::args::{PlanArgs, RecipeArgs};
use crate::report::{Failure, Output, bytes, percent, table};

pub(crate) fn run(args: &PlanArgs, output: Output) -> Outcome {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let plan = Plan::new(&checkpoint, &recipe(&args.recipe)?, args.recipe.max_shard_size)?;
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
        text
    });
    Ok(())
}

/// The recipe that the arguments describe.
pub(crate) fn recipe(args: &RecipeArgs) -> Result<Recipe, Failure> {
    let mut recipe = match (&args.recipe, args.to) {
        (Some(path), _) => {
            let text = read_text(path)?;
            Recipe::from_toml(path, &text)?
        }
        (None, Some(to)) => Recipe::new(to),
        (None, None) => {
            return Err(crate::convert::usage(
                "say what to make: --to dfloat11, fixed12 or planes, or --recipe FILE",
            ));
        }
    };
    if let Some(path) = &args.pattern_file {
        let text = read_text(path)?;
        let value: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| llmpress_formats::Error::corrupt(path, None, format!("is not valid JSON: {e}")))?;
        // A whole `dfloat11_config` or `config.json` will do as well.
        let inner = value.get("dfloat11_config").unwrap_or(&value);
        recipe.pattern_dict = Some(inner.get("pattern_dict").unwrap_or(inner).clone());
    }
    recipe.tied_embedding |= args.tied_embedding;
    Ok(recipe)
}

fn read_text(path: &std::path::Path) -> Result<String, Failure> {
    let bytes = llmpress_formats::read_small_file(path, 64 << 20)?;
    let text = String::from_utf8(bytes);
    Ok(text.map_err(|_| llmpress_formats::Error::corrupt(path, None, "is not UTF-8"))?)
}
