//! `llmpress restore`: back to a plain checkpoint.

use llmpress_formats::{Base, Checkpoint};
use llmpress_model::undone;
use llmpress_pipeline::restore;

use crate::Outcome;
use crate::args::RestoreArgs;
use crate::convert::{options, summarise};
use crate::progress::Bar;
use crate::report::Output;

pub(crate) fn run(args: &RestoreArgs, output: Output) -> Outcome {
    let mut checkpoint = Checkpoint::open_plain(&args.dir)?;
    if let Some(base) = &args.base {
        checkpoint = checkpoint.with_base(&Base::open(base)?)?;
    }
    let checkpoint = undone(checkpoint)?;
    let total = checkpoint.tensors().values().map(|t| t.bytes).sum();
    let bar = Bar::new("restore", total, output);
    let summary = restore(&checkpoint, &args.out, args.max_shard_size, &options(&args.job), &bar);
    bar.finish();
    summarise(output, &args.out, &summary?);
    Ok(())
}
