//! The view of a chain in which some tensors are finished and all others are as they were: enough for a shard of those.
//!
//! ```text
//! names in the shard --back through removals--> names when each pass runs --quantised one by one--> finished units in a stage
//! ```
//!
//! It is for passes that go by one matrix at a time. What is finished is what a job over all tensors finishes, to the byte.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use llmpress_formats::{Checkpoint, Error as FormatError};

use crate::blocks::Blocks;
use crate::pass::{Pass, apply};
use crate::progress::{Progress, Task, Watch};
use crate::quantise::{run_by_matrix, targets};
use crate::{Recipe, Result};

/// The view after a recipe's passes, each of them settled, with these tensors finished. `stage` is an empty folder for the finished units.
pub(crate) fn partial_view(
    dir: &Path,
    recipe: &Recipe,
    wanted: BTreeSet<String>,
    stage: &Path,
) -> Result<Checkpoint> {
    let rules = recipe.compile()?;
    let names = names_before(dir, recipe, wanted)?;
    let mut view = recipe.open(dir)?;
    for ((number, pass), here) in recipe.passes.iter().enumerate().zip(&names) {
        let Pass::Quantised(done) = pass else {
            view = apply(view, pass)?;
            continue;
        };
        let mut specs = targets(&view, done.to.spec, &rules)?;
        specs.retain(|name, _| here.contains(name));
        if specs.is_empty() {
            view = apply(view, pass)?;
            continue;
        }
        let folder = stage.join(number.to_string());
        std::fs::create_dir(&folder).map_err(|e| FormatError::io(&folder, "create", e))?;
        let mut blocks = Blocks::open(&folder, "a part")?;
        run_by_matrix(&view, &specs, &mut blocks, &Unwatched)?;
        view = blocks.view(view)?;
    }
    Ok(view)
}

/// What tensors are called when each pass runs, where these are their names after all passes.
fn names_before(dir: &Path, recipe: &Recipe, wanted: BTreeSet<String>) -> Result<Vec<BTreeSet<String>>> {
    let mut renamed: Vec<BTreeMap<String, String>> = Vec::new();
    let mut view = recipe.open(dir)?;
    for pass in &recipe.passes {
        renamed.push(match pass {
            Pass::Remove(removal) => {
                removal.edit(&view)?.rename.into_iter().map(|(old, new)| (new, old)).collect()
            }
            _ => BTreeMap::new(),
        });
        view = apply(view, pass)?;
    }
    let mut names = vec![wanted];
    for old in renamed.iter().rev() {
        let after = names.last().cloned().unwrap_or_default();
        names.push(after.into_iter().map(|name| old.get(&name).cloned().unwrap_or(name)).collect());
    }
    // The last are those before the first pass.
    names.reverse();
    names.truncate(recipe.passes.len());
    Ok(names)
}

/// What is quantised here is a part of a unit's progress.
struct Unwatched;

impl Watch for Unwatched {
    fn begin(&self, _task: Task) -> Box<dyn Progress + '_> {
        Box::new(Self)
    }
}

impl Progress for Unwatched {
    fn start(&self, _total: u64) {}
    fn advance(&self, _amount: u64) {}
    fn shard(&self, _file: &str) {}
}
