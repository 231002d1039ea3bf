//! The record of training, as files of the output.
//!
//! ```text
//! training.jsonl             a line a step, and one an evaluation (sparsify/src/ast/record.rs)
//! training-loss.svg          the loss by step
//! training-flips.svg         quads whose masks changed, by step
//! training-perplexity.svg    on windows that no step saw, beside the dense model's
//! training-divergence.svg    KL to the dense model on these
//! ```
//!
//! It holds no times: it is the same bytes after any number of interruptions.

use std::collections::BTreeMap;

use llmpress_sparsify::ast::{Record, divergence_svg, flips_svg, loss_svg, perplexity_svg};

use crate::Result;
use crate::sparsify::Line;
use crate::steps::lines;

/// The name of the record.
const TRAINING_FILE: &str = "training.jsonl";

/// The file of a run that trained sub-layers by themselves, by its name: a line a sub-layer.
pub(crate) fn of_sub_layers(lessons: &[Line]) -> Result<BTreeMap<String, Vec<u8>>> {
    Ok(BTreeMap::from([(TRAINING_FILE.to_owned(), lines(lessons)?)]))
}

/// The files by name.
pub(crate) fn files(records: &[Record]) -> Result<BTreeMap<String, Vec<u8>>> {
    let picture = |name: &str, svg: String| (format!("training-{name}.svg"), svg.into_bytes());
    Ok(BTreeMap::from([
        (TRAINING_FILE.to_owned(), lines(records)?),
        picture("loss", loss_svg(records)?),
        picture("flips", flips_svg(records)?),
        picture("perplexity", perplexity_svg(records)?),
        picture("divergence", divergence_svg(records)?),
    ]))
}
