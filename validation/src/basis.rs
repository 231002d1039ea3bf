//! Two checkpoints in one basis: tensors that a pass turned or scaled are no others.
//!
//! ```text
//! the same transformations on both sides    compared as they are
//! else                                      those of each are undone first
//! ```

use llmpress_formats::{Checkpoint, Result};
use llmpress_model::undone;

/// Checkpoints whose tensors can be compared: the transformations of both are undone, unless they are the same.
///
/// # Errors
/// Those of [`undone`].
pub fn in_one_basis(a: Checkpoint, b: Checkpoint) -> Result<(Checkpoint, Checkpoint)> {
    if a.transforms() == b.transforms() {
        return Ok((a, b));
    }
    Ok((undone(a)?, undone(b)?))
}
