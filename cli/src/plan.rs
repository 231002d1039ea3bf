//! `llmpress plan`: what a conversion would do.

use std::collections::BTreeMap;

use llmpress_formats::Removal;
use llmpress_pipeline::{Plan, Recipe};

use crate::Outcome;
use crate::args::{PlanArgs, RecipeArgs};
use crate::report::{Failure, Output, bytes, percent, table};

pub(crate) fn run(args: &PlanArgs, output: Output) -> Outcome {
    let asked = crate::prune::ask(&args.dir, &args.recipe, args.jobs, output)?;
    let checkpoint = asked.checkpoint;
    let plan = Plan::new(&checkpoint, &asked.recipe, args.recipe.max_shard_size)?;
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
        if let Some(removal) = &plan.recipe.prune {
            text.push_str(&format!("{}; {} tensors go\n", describe(removal), checkpoint.dropped().len()));
        }
        text
    });
    Ok(())
}

/// What is removed, for people.
pub(crate) fn describe(removal: &Removal) -> String {
    let layers = |layers: &std::collections::BTreeSet<usize>| {
        layers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    if removal.renumbers() {
        return format!("pruned: layers {}", layers(&removal.attention));
    }
    let mut parts = Vec::new();
    if !removal.attention.is_empty() {
        parts.push(format!("attention of layers {}", layers(&removal.attention)));
    }
    if !removal.mlp.is_empty() {
        parts.push(format!("MLP of layers {}", layers(&removal.mlp)));
    }
    let how = if removal.portable { " (made zero)" } else { "" };
    format!("pruned{how}: {}", parts.join(", "))
}

/// The recipe that the arguments describe, without pruning that is still to be ranked.
pub(crate) fn recipe(args: &RecipeArgs) -> Result<Recipe, Failure> {
    let mut recipe = match (&args.recipe, args.to.as_ref().map(|to| to.method)) {
        (Some(path), _) => {
            let text = read_text(path)?;
            Recipe::from_toml(path, &text)?
        }
        (None, Some(to)) => Recipe::new(to),
        (None, None) => {
            return Err(crate::convert::usage(
                "say what to make: --to dfloat11, fixed12, planes or a pruning, or --recipe FILE",
            ));
        }
    };
    if let Some(path) = &args.pattern_file {
        let text = read_text(path)?;
        let value: serde_json::Value = llmpress_formats::python_json(text.as_bytes())
            .map_err(|e| llmpress_formats::Error::corrupt(path, None, format!("is not valid JSON: {e}")))?;
        // A whole `dfloat11_config` or `config.json` will do as well.
        let inner = value.get("dfloat11_config").unwrap_or(&value);
        recipe.pattern_dict = Some(inner.get("pattern_dict").unwrap_or(inner).clone());
    }
    recipe.tied_embedding |= args.tied_embedding;
    Ok(recipe)
}

fn read_text(path: &std::path::Path) -> Result<String, Failure> {
    let bytes = llmpress_formats::read_input(path, 64 << 20)?;
    let text = String::from_utf8(bytes);
    Ok(text.map_err(|_| llmpress_formats::Error::corrupt(path, None, "is not UTF-8"))?)
}
