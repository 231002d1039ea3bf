//! The record of learning, as files of the output.
//!
//! ```text
//! learning.jsonl        a line for what was learned together (quantize/src/lesson.rs)
//! learning-loss.svg     the loss by layer, before and after
//! learning-error.svg    the relative error by layer, before
//! ```
//!
//! It holds no times: kept with each block's receipt, it is the same bytes after any number of interruptions.

use std::collections::BTreeMap;

use llmpress_quantize::{Lesson, error_svg, loss_svg};

use crate::{Error, Result};

/// The name of the record.
pub(crate) const LEARNING_FILE: &str = "learning.jsonl";

/// The files by name; none where nothing was learned.
pub(crate) fn files(lessons: &[Lesson]) -> Result<BTreeMap<String, Vec<u8>>> {
    if lessons.is_empty() {
        return Ok(BTreeMap::new());
    }
    let mut lines = Vec::new();
    for lesson in lessons {
        serde_json::to_writer(&mut lines, lesson)
            .map_err(|e| Error::Invalid(format!("{LEARNING_FILE}: {e}")))?;
        lines.push(b'\n');
    }
    Ok(BTreeMap::from([
        (LEARNING_FILE.to_owned(), lines),
        ("learning-loss.svg".to_owned(), loss_svg(lessons)?.into_bytes()),
        ("learning-error.svg".to_owned(), error_svg(lessons)?.into_bytes()),
    ]))
}
