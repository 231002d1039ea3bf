//! Quantising what is 2:4: the kept values, as a matrix of half the columns; sums beside them in eight bits.
//!
//! ```text
//! positions | kept values --grids--> codes        positions | codes        sums --rtn:w8--> codes
//! ```

use std::collections::{BTreeMap, BTreeSet};

use llmpress_formats::encoding::lowrank::{self, Base, BaseRows, Sums};
use llmpress_formats::encoding::sparse24::{self, Kept, matrix, positions_component};
use llmpress_formats::{Checkpoint, Encoding, Tensor};
use llmpress_quantize::{Quantiser, Rung, Spec, expected_bits};
use llmpress_sparsify::GROUP;

use super::data_free::packed;
use crate::blocks::Finish;
use crate::{Error, Result};

/// How sums are quantised.
const SUMS: &str = "rtn:w8";

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
            "{quantiser}: {what}: after sparse24:... there are rtn:w4 and grid:w4, with groups and zero points"
        )))
    };
    if !quantiser.with.is_empty() || quantiser.mean.is_some() {
        return bad("what changes the model before, or measures it, would not leave it 2:4");
    }
    for spec in specs.values() {
        if spec.rung == Rung::Gptq || spec.learn.is_some() {
            return bad("error feedback and learning would move weights that are dropped");
        }
    }
    match specs.iter().find(|(name, spec)| sparse.contains(*name) && spec.abq.activation_bits.is_some()) {
        Some(_) => bad("inputs of kept values stay floating point"),
        None => Ok(()),
    }
}

/// Bytes of a tensor that is 2:4 when its kept values are quantised.
pub(crate) fn expected_bytes(spec: &Spec, tensor: &Tensor, slorb: bool) -> u64 {
    let (rows, cols) = matrix(&tensor.shape).unwrap_or_default();
    let at = positions_component(rows, cols);
    let positions = at.dtype.byte_len(&at.shape).unwrap_or(u64::MAX);
    let sums = match SUMS.parse::<Quantiser>() {
        Ok(sums) if slorb => expected_bits(&sums.spec, rows, cols.div_ceil(GROUP as u64)) / 8,
        _ => 0,
    };
    positions.saturating_add(expected_bits(spec, rows, cols / 2) / 8).saturating_add(sums)
}

/// Quantises the kept values of a tensor that is 2:4; `None` for others.
pub(super) fn quantise(
    checkpoint: &Checkpoint,
    name: &str,
    tensor: &Tensor,
    spec: Spec,
) -> Result<Option<Finish>> {
    let specs = BTreeMap::from([(name.to_owned(), spec)]);
    if of_view(checkpoint, &specs)?.is_empty() {
        return Ok(None);
    }
    let (rows, _) = matrix(&tensor.shape).unwrap_or_default();
    if let Encoding::Sparse24(_) = checkpoint.unit_of(tensor)?.encoding() {
        let dense = checkpoint.sparse_rows(name, 0..rows)?;
        return Ok(Some(Finish::Sparse24(kept(dense, spec)?)));
    }
    let unit = checkpoint.lowrank_rows(name, 0..rows)?;
    let (rows, cols, blocks) = (unit.rows(), unit.cols(), unit.blocks());
    let BaseRows::Sparse24(base) = unit.base() else { return Ok(None) };
    let base = BaseRows::Sparse24(kept(base.clone(), spec)?);
    let mut sums = vec![0.0; rows * blocks];
    for (row, sums) in sums.chunks_exact_mut(blocks.max(1)).enumerate() {
        unit.sums_row(row, sums)?;
    }
    let sums = Sums::Abq(packed(&sums, blocks, SUMS.parse::<Quantiser>()?.spec)?);
    Ok(Some(Finish::Lowrank(lowrank::Packed::new(unit.parameters().block, rows, cols, base, sums)?)))
}

fn kept(dense: sparse24::Packed<'static>, spec: Spec) -> Result<sparse24::Packed<'static>> {
    let half = dense.cols() / 2;
    let mut values = vec![0.0; dense.rows() * half];
    for (row, values) in values.chunks_exact_mut(half.max(1)).enumerate() {
        dense.kept_row(row, values)?;
    }
    Ok(dense.with_values(Kept::Abq(packed(&values, half, spec)?))?)
}
