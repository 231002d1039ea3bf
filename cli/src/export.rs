//! `llmpress export`: a checkpoint for other runtimes.

use std::path::Path;

use llmpress_hub::Id;
use llmpress_pipeline::{Measured, export};

use crate::Outcome;
use crate::args::ExportArgs;
use crate::convert::{options, summarise_with};
use crate::progress::Bar;
use crate::report::Output;

pub(crate) fn run(args: &ExportArgs, output: Output) -> Outcome {
    let checkpoint = args.format.open(&args.dir)?;
    let total = checkpoint.tensors().values().map(|t| t.bytes).sum();
    let measured = args.reports.iter().map(|report| Measured::read(report)).collect::<Result<Vec<_>, _>>()?;
    let bar = Bar::new("export", total, output);
    let options = options(&args.job);
    let summary = export(&checkpoint, &args.out, args.format, args.max_shard_size, &measured, &options, &bar);
    bar.finish();
    let upload = args.push.as_ref().map(|id| upload(id, &args.out));
    summarise_with(output, &args.out, &summary?, upload.as_deref());
    Ok(())
}

/// The command that puts an export on the hub: nothing is sent from here.
fn upload(id: &Id, out: &Path) -> String {
    let out = out.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%".contains(c);
    // An option begins with a dash.
    let out = match out.chars().all(plain) && !out.starts_with('-') {
        true => out,
        false => format!("'{}'", out.replace('\'', r"'\''")),
    };
    format!("hf upload {} {out} .", id.repository())
}
