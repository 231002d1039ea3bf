//! Compares two checkpoints tensor by tensor, word for word.
//!
//! ```text
//! a: read a piece --+
//!                   +-- equal bytes? --> first difference per tensor
//! b: read a piece --+
//! ```
//!
//! Bytes are compared, never floats: -0.0 and the payload of a NaN count. Of norms to which GGUF adds one the sum counts. Tensors that only
//! `a` stores with loss are told by how far they are, and so are those that a pass made 2:4, and norms that one trained.

use std::collections::BTreeSet;

use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::{Checkpoint, Dtype, Encoding, Error, Result, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use crate::difference::norms_of;
use crate::{Norms, PIECE, TensorDifference};

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Tensors compared.
    pub tensors: usize,
    /// Bytes compared.
    pub bytes: u64,
    /// What differs, by tensor, where nothing may.
    pub differences: Vec<Difference>,
    /// How far the tensors are that were quantised, made 2:4 or trained since, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantised: Option<Quantised>,
}

/// Errors of tensors that are stored with loss, or that a pass made 2:4: A is what they were, B what they decode to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quantised {
    /// The tensors, the largest relative error first.
    pub tensors: Vec<TensorDifference>,
    /// All of them taken together as one.
    pub total: Norms,
    /// How many of them are two in four.
    #[serde(skip_serializing_if = "is_zero")]
    pub sparse: usize,
    /// How many of them are norms that were trained.
    #[serde(skip_serializing_if = "is_zero")]
    pub trained: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// How a tensor differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The tensor.
    pub tensor: String,
    /// In which way.
    pub what: String,
}

impl Comparison {
    /// Whether the checkpoints hold the same tensors, with the same bytes but for those that were quantised.
    pub fn is_exact(&self) -> bool {
        self.differences.is_empty()
    }
}

/// Compares every tensor of `a` with the one of the same name in `b`. A tied tensor counts as the
/// tensor it stands for, so that a stored head equals a tied one of the same bytes. A tensor that `a` stores with loss and `b`
/// does not may differ: by how much is told.
pub fn bit_exact(a: &Checkpoint, b: &Checkpoint, progress: &(dyn Fn(u64) + Sync)) -> Result<Comparison> {
    let names: BTreeSet<&String> =
        [a, b].into_iter().flat_map(|c| c.tensors().keys().chain(c.tied().keys())).collect();
    let mut result = Comparison { tensors: 0, bytes: 0, differences: Vec::new(), quantised: None };
    let (mut quantised, mut sparse, mut norms) = (Vec::new(), 0, 0);
    let sparsified = [has_pass(a, "sparsify"), has_pass(b, "sparsify")];
    let trained = [has_pass(a, "train"), has_pass(b, "train")];
    for name in names {
        let difference = |what: String| Difference { tensor: name.clone(), what };
        let (ta, tb) = match (a.tensor(name), b.tensor(name)) {
            (Ok(ta), Ok(tb)) => (ta, tb),
            (Ok(_), Err(_)) => {
                result.differences.push(difference(format!("is missing from {}", b.root().display())));
                continue;
            }
            _ => {
                result.differences.push(difference(format!("is missing from {}", a.root().display())));
                continue;
            }
        };
        if (ta.dtype, &ta.shape) != (tb.dtype, &tb.shape) {
            result.differences.push(difference(format!(
                "is {} {:?} here and {} {:?} there",
                ta.dtype.name(),
                ta.shape,
                tb.dtype.name(),
                tb.shape
            )));
            continue;
        }
        result.tensors += 1;
        result.bytes += ta.bytes;
        if trained[0] && !trained[1] && name.ends_with("norm.weight") {
            norms += 1;
            quantised.push(name);
            continue;
        }
        if is_lossy(a, ta, sparsified[0])? && !is_lossy(b, tb, sparsified[1])? {
            sparse += usize::from(is_sparse(a.unit_of(ta)?.encoding()));
            quantised.push(name);
            continue;
        }
        let sums = adds_one(a, ta)? || adds_one(b, tb)?;
        if let Some((offset, count)) = first_difference(a, b, name, ta, sums, progress)? {
            let width = u64::from(ta.dtype.bits()).div_ceil(8);
            result.differences.push(difference(format!(
                "differs first at element {}, in {count} bytes in all",
                offset / width
            )));
        }
    }
    if !quantised.is_empty() {
        let (tensors, total) = norms_of(b, a, &quantised, progress)?;
        for tensor in tensors.iter().filter(|t| t.norms.non_finite_mismatches > 0) {
            let what = format!(
                "has {} values that are not finite where they were",
                tensor.norms.non_finite_mismatches
            );
            result.differences.push(Difference { tensor: tensor.tensor.clone(), what });
        }
        result.quantised = Some(Quantised { tensors, total, sparse, trained: norms });
    }
    Ok(result)
}

/// Whether a tensor is not what it was made from to the bit: its encoding rounds it, or what was undone did.
/// Where a pass made tensors 2:4, those that are stored so are what it left.
fn is_lossy(checkpoint: &Checkpoint, tensor: &Tensor, sparsified: bool) -> Result<bool> {
    let encoding = checkpoint.unit_of(tensor)?.encoding();
    Ok(tensor.is_made() || encoding.is_lossy() || sparsified && is_sparse(encoding))
}

/// Whether one was added to the values where they are stored, as GGUF has the norms of Gemma: the sum is what counts there, and of a tiny
/// value it has fewer digits.
fn adds_one(checkpoint: &Checkpoint, tensor: &Tensor) -> Result<bool> {
    let encoding = checkpoint.unit_of(tensor)?.encoding();
    Ok(matches!(encoding, Encoding::Ggml(ggml) if ggml.offset_by_one))
}

/// Whether two runs of values are the same with one added in single precision.
fn same_sums(dtype: Dtype, a: &[u8], b: &[u8]) -> Result<bool> {
    let (a, b) = (Floats::new(dtype, a)?, Floats::new(dtype, b)?);
    Ok(a.len() == b.len() && a.iter().zip(b.iter()).all(|(a, b)| (a + 1.0).to_bits() == (b + 1.0).to_bits()))
}

fn is_sparse(encoding: &Encoding) -> bool {
    matches!(encoding, Encoding::Sparse24(_) | Encoding::Lowrank(_))
}

/// Whether the manifest tells of a pass of this kind: of one that made matrices 2:4, or of one that trained them, and norms with
/// them.
fn has_pass(checkpoint: &Checkpoint, kind: &str) -> bool {
    let passes = checkpoint.manifest().and_then(|manifest| manifest.recipe.get("passes")?.as_array());
    passes.is_some_and(|passes| passes.iter().any(|pass| pass.get(kind).is_some()))
}

/// Offset of the first byte that differs, and how many do; with `sums`, pieces whose values are the same with one added do not.
fn first_difference(
    a: &Checkpoint,
    b: &Checkpoint,
    name: &str,
    tensor: &Tensor,
    sums: bool,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Option<(u64, u64)>> {
    let bytes = tensor.bytes;
    let pieces = usize::try_from(bytes.div_ceil(PIECE as u64)).unwrap_or(usize::MAX);
    (0..pieces)
        .into_par_iter()
        .with_max_len(1)
        .map_init(
            || (vec![0u64; PIECE / 8], vec![0u64; PIECE / 8]),
            |(left, right), piece| {
                let offset = piece as u64 * PIECE as u64;
                let len = (bytes - offset).min(PIECE as u64) as usize;
                let left = &mut bytemuck::cast_slice_mut::<u64, u8>(left)[..len];
                let right = &mut bytemuck::cast_slice_mut::<u64, u8>(right)[..len];
                a.read(name, offset, left)?;
                b.read(name, offset, right)?;
                progress(len as u64);
                if left == right || sums && same_sums(tensor.dtype, left, right)? {
                    return Ok(None);
                }
                let mut differing = left.iter().zip(right.iter()).enumerate().filter(|(_, (a, b))| a != b);
                let first = differing.next().map_or(0, |(i, _)| i as u64);
                Ok::<_, Error>(Some((offset + first, 1 + differing.count() as u64)))
            },
        )
        .try_reduce(
            || None,
            |a, b| {
                Ok(match (a, b) {
                    (Some((fa, na)), Some((fb, nb))) => Some((u64::min(fa, fb), na + nb)),
                    (a, b) => a.or(b),
                })
            },
        )
}
