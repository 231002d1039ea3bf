//! `llmpress export`: a checkpoint for other runtimes.

use llmpress_formats::Checkpoint;
use llmpress_pipeline::export;

use crate::Outcome;
use crate::args::ExportArgs;
use crate::convert::{options, summarise};
use crate::progress::Bar;
use crate::report::Output;

pub(crate) fn run(args: &ExportArgs, output: Output) -> Outcome {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let total = checkpoint.tensors().values().map(|t| t.bytes).sum();
    let bar = Bar::new("export", total, output);
    let summary = export(&checkpoint, &args.out, args.format, args.max_shard_size, &options(&args.job), &bar);
    bar.finish();
    summarise(output, &args.out, &summary?);
    Ok(())
}
