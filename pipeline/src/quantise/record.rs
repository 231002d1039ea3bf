//! The record of learning, as files of the output.
//!
//! ```text
//! learning.jsonl            a line for what was learned together (quantize/src/lesson.rs); where the whole model was, one a step and one an
//!                           evaluation (quantize/src/whole/record.rs)
//! learning-loss.svg         the loss by layer, before and after; of the whole model by step
//! learning-error.svg        the relative error by layer, before
//! learning-divergence.svg   of the whole model: KL to the dense model on windows that no step saw
//! ```
//!
//! It holds no times: kept with each block's receipt, it is the same bytes after any number of interruptions.

use std::collections::BTreeMap;

use llmpress_quantize::{Lesson, Record, error_svg, loss_svg, whole_divergence_svg, whole_loss_svg};
use serde::Deserialize;

use crate::Result;
use crate::steps::lines;

/// The name of the record.
pub(crate) const LEARNING_FILE: &str = "learning.jsonl";

/// What was kept with a block.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Told {
    /// Of matrices of a layer.
    Lesson(Lesson),
    /// Of the whole model.
    Record(Record),
}

/// The files by name; none where nothing was learned.
pub(crate) fn files(told: Vec<Told>) -> Result<BTreeMap<String, Vec<u8>>> {
    let (mut lessons, mut records) = (Vec::new(), Vec::new());
    for told in told {
        match told {
            Told::Lesson(lesson) => lessons.push(lesson),
            Told::Record(record) => records.push(record),
        }
    }
    let mut files = BTreeMap::new();
    if lessons.is_empty() && records.is_empty() {
        return Ok(files);
    }
    files.insert(LEARNING_FILE.to_owned(), [lines(&lessons)?, lines(&records)?].concat());
    let mut picture =
        |name: &str, svg: String| files.insert(format!("learning-{name}.svg"), svg.into_bytes());
    if !lessons.is_empty() {
        picture("error", error_svg(&lessons)?);
    }
    if !records.is_empty() {
        picture("divergence", whole_divergence_svg(&records)?);
    }
    // Of both that of the whole model, which was the last.
    picture("loss", if records.is_empty() { loss_svg(&lessons)? } else { whole_loss_svg(&records)? });
    Ok(files)
}
