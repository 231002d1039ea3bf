//! Two checkpoints in one basis: tensors that a pass turned or scaled are no others.
//!
//! ```text
//! the same transformations on both sides                              compared as they are
//! one without any, with the other's tensors: an export of it          likewise
//! else                                                                those of each are undone first
//! ```

use llmpress_formats::{Checkpoint, Result};
use llmpress_model::{changed, undone};

/// Bytes that are compared at a time.
const PIECE: usize = 1 << 20;

/// Checkpoints whose tensors can be compared: the transformations of both are undone, unless they are the same, or one says
/// nothing of any and has the first tensor that the other's have changed as it is there, as what was exported from it has.
///
/// # Errors
/// Those of [`undone`]; a tensor that cannot be read.
pub fn in_one_basis(a: Checkpoint, b: Checkpoint) -> Result<(Checkpoint, Checkpoint)> {
    if a.transforms() == b.transforms() {
        return Ok((a, b));
    }
    let (a, changed_in_a) = changed(a)?;
    let (b, changed_in_b) = changed(b)?;
    let exported = match (changed_in_a.first(), changed_in_b.first()) {
        (Some(tensor), None) | (None, Some(tensor)) => is_same(&a, &b, tensor)?,
        _ => false,
    };
    if exported { Ok((a, b)) } else { Ok((undone(a)?, undone(b)?)) }
}

/// Whether both have a tensor with the same bytes.
fn is_same(a: &Checkpoint, b: &Checkpoint, tensor: &str) -> Result<bool> {
    let (Ok(of_a), Ok(of_b)) = (a.tensor(tensor), b.tensor(tensor)) else { return Ok(false) };
    if (of_a.dtype, &of_a.shape) != (of_b.dtype, &of_b.shape) {
        return Ok(false);
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    let bytes = of_a.bytes;
    for at in (0..bytes).step_by(PIECE) {
        let piece = (bytes - at).min(PIECE as u64) as usize;
        left.resize(piece, 0);
        right.resize(piece, 0);
        a.read(tensor, at, &mut left)?;
        b.read(tensor, at, &mut right)?;
        if left != right {
            return Ok(false);
        }
    }
    Ok(true)
}
