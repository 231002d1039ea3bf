//! What a quantiser does with matrices that are 2:4: which they are, what it cannot have there, and what they come to. Codes
//! are of the kept values, as a matrix of half the columns; sums beside them have eight bits (`quantize/src/kept.rs`).

use std::collections::{BTreeMap, BTreeSet};

use llmpress_formats::encoding::lowrank::Base;
use llmpress_formats::encoding::sparse24::{matrix, positions_component};
use llmpress_formats::{Checkpoint, Encoding, Tensor};
use llmpress_quantize::{KEPT_SUMS, Quantiser, Spec, expected_bits};
use llmpress_sparsify::GROUP;

use crate::{Error, Result};

/// Whether a unit is as a pass that makes matrices 2:4 leaves it, or with its values encoded without loss.
pub(crate) fn is_sparse(encoding: &Encoding) -> bool {
    match encoding {
        Encoding::Sparse24(sparse) => !sparse.is_lossy(),
        Encoding::Lowrank(lowrank) => matches!(&lowrank.base, Base::Sparse24(base) if !base.is_lossy()),
        _ => false,
    }
}

/// The tensors of a pass that are 2:4, as a pass before it or the source stores them.
pub(crate) fn of_view(view: &Checkpoint, specs: &BTreeMap<String, Spec>) -> Result<BTreeSet<String>> {
    let mut sparse = BTreeSet::new();
    for name in specs.keys() {
        let tensor = view.tensor(name)?;
        if tensor.is_stored() && is_sparse(view.unit_of(tensor)?.encoding()) {
            sparse.insert(name.clone());
        }
    }
    Ok(sparse)
}

/// Refuses what would undo that tensors are 2:4, or cannot be said of kept values.
///
/// # Errors
/// [`Error::Invalid`], with what would be right.
pub(crate) fn check(
    quantiser: &Quantiser,
    specs: &BTreeMap<String, Spec>,
    sparse: &BTreeSet<String>,
) -> Result<()> {
    if sparse.is_empty() {
        return Ok(());
    }
    let bad = |what: &str| {
        Err(Error::Invalid(format!(
            "{quantiser}: {what}: 2:4 matrices have rtn, grid and gptq, with groups and zero points"
        )))
    };
    if quantiser.with.rotate.is_some() || quantiser.with.smooth || quantiser.mean.is_some() {
        return bad("what changes the model before, or measures it, would not leave it 2:4");
    }
    let mut of_them = specs.iter().filter(|(name, _)| sparse.contains(*name));
    if of_them.clone().any(|(_, spec)| spec.learn.is_some()) {
        return bad("learning would move weights that are dropped");
    }
    if of_them.any(|(_, spec)| spec.abq.activation_bits.is_some()) {
        return bad("inputs of kept values stay floating point");
    }
    Ok(())
}

/// Bytes of a tensor that is 2:4 when its kept values are quantised.
pub(crate) fn expected_bytes(spec: &Spec, tensor: &Tensor, slorb: bool) -> u64 {
    let (rows, cols) = matrix(&tensor.shape).unwrap_or_default();
    let at = positions_component(rows, cols);
    let positions = at.dtype.byte_len(&at.shape).unwrap_or(u64::MAX);
    let sums = if slorb { expected_bits(&KEPT_SUMS, rows, cols.div_ceil(GROUP as u64)) / 8 } else { 0 };
    positions.saturating_add(expected_bits(spec, rows, cols / 2) / 8).saturating_add(sums)
}
