//! `llmpress diff`: how far two checkpoints are from each other.

use std::collections::BTreeSet;

use llmpress_formats::{Checkpoint, Dtype};
use llmpress_pipeline::Progress;
use llmpress_validation::{CheckpointDifference, Norms, difference};

use crate::Outcome;
use crate::args::DiffArgs;
use crate::models::in_pool;
use crate::progress::Bar;
use crate::report::{Failure, Output, bytes, table};

pub(crate) fn run(args: &DiffArgs, output: Output) -> Outcome {
    in_pool(args.jobs, || diff(args, output))
}

fn diff(args: &DiffArgs, output: Output) -> Outcome {
    let (a, b) = (Checkpoint::open_dequantised(&args.a)?, Checkpoint::open_dequantised(&args.b)?);
    let both: BTreeSet<&String> = a.tensors().keys().filter(|&name| b.tensor(name).is_ok()).collect();
    let size = both.iter().filter_map(|&name| a.tensors().get(name)).map(|t| t.bytes).sum();
    let bar = Bar::new("diff", size, output);
    let found = difference(&a, &b, &|n| bar.advance(n));
    let seconds = bar.finish();
    let found = found?;
    output.result(&found, || text(args, &found, size, seconds));
    if found.is_identical() {
        return Ok(());
    }
    Err(Failure::Findings(format!("{} and {} differ", args.a.display(), args.b.display())))
}

fn text(args: &DiffArgs, found: &CheckpointDifference, size: u64, seconds: f64) -> String {
    let (a, b) = (args.a.display(), args.b.display());
    let mut text = String::new();
    for (root, names) in [(&a, &found.only_in_a), (&b, &found.only_in_b)] {
        names.iter().for_each(|name| text.push_str(&format!("only in {root}: {name}\n")));
    }
    for t in &found.incomparable {
        text.push_str(&format!(
            "not comparable: {} is {} {:?} in {a} and {} {:?} in {b}\n",
            t.tensor,
            t.dtype_a.name(),
            t.shape_a,
            t.dtype_b.name(),
            t.shape_b
        ));
    }
    if !found.different.is_empty() {
        let head = ["tensor", "dtype", "differing", "of", "relative", "max abs", "rms", "cosine", "NaN, inf"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for t in found.different.iter().take(args.limit) {
            rows.push(row(&t.tensor, &dtypes(t.dtype_a, t.dtype_b), &t.norms));
        }
        if let Some(more) = found.different.len().checked_sub(args.limit).filter(|&more| more > 0) {
            rows.push(vec![format!("... {more} more, see --limit")]);
        }
        rows.push(row("total", "", &found.total));
        text.push_str(&table(&rows));
    }
    let different = found.different.len();
    text.push_str(&format!(
        "{a} and {b}: {} tensors compared, {} in {seconds:.2} s: {} identical, {different} different, {} not \
         comparable, {} in one only\n",
        found.identical + different,
        bytes(size),
        found.identical,
        found.incomparable.len(),
        found.only_in_a.len() + found.only_in_b.len(),
    ));
    text
}

fn dtypes(a: Dtype, b: Dtype) -> String {
    if a == b { a.name().to_owned() } else { format!("{}/{}", a.name(), b.name()) }
}

fn row(name: &str, dtypes: &str, norms: &Norms) -> Vec<String> {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.3e}"));
    vec![
        name.to_owned(),
        dtypes.to_owned(),
        norms.differing.to_string(),
        norms.elements.to_string(),
        number(norms.relative),
        number(norms.max_abs),
        number(norms.rms),
        norms.cosine.map_or_else(|| "-".to_owned(), |c| format!("{c:.6}")),
        norms.non_finite_mismatches.to_string(),
    ]
}
