//! Text files.

use std::path::Path;

use llmpress_formats::Error;

use crate::report::Failure;

/// Longest text that is read.
const MAX_TEXT_BYTES: u64 = 1 << 30;

/// Reads one.
pub(crate) fn read_text(path: &Path) -> Result<String, Failure> {
    let bytes = llmpress_formats::read_input(path, MAX_TEXT_BYTES)?;
    String::from_utf8(bytes).map_err(|e| {
        Error::corrupt(path, None, format!("is not UTF-8 at byte {}", e.utf8_error().valid_up_to())).into()
    })
}
