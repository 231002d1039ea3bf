//! Which tensors a quantising pass takes: the linears of repeated blocks, and what rules say otherwise.

use std::collections::{BTreeMap, BTreeSet};

use llmpress_formats::encoding::abq;
use llmpress_formats::{Checkpoint, Tensor, block_linears};
use llmpress_quantize::{MeanBits, Quantiser, Spec};

use super::is_sparse;
use crate::recipe::{Compiled, Target};
use crate::sparsify::refuse_transposed;
use crate::{Error, Result};

/// How each tensor is to be quantised.
pub(crate) fn targets(view: &Checkpoint, spec: Spec, rules: &Compiled) -> Result<BTreeMap<String, Spec>> {
    refuse_transposed(view)?;
    let names = view.tensors().iter().filter(|(_, t)| is_matrix(t)).map(|(name, _)| name.as_str());
    let linears: BTreeSet<String> =
        block_linears(view.config().and_then(|c| c.model_type()), names).into_iter().flatten().collect();
    let mut specs = BTreeMap::new();
    for (name, tensor) in view.tensors() {
        let spec = match rules.rule(name) {
            Some(Target::Method(_)) => continue,
            Some(Target::Quantise(quantiser)) => quantiser.spec,
            None if linears.contains(name) && !tensor.is_zero() => spec,
            None => continue,
        };
        if !is_matrix(tensor) {
            return Err(Error::Invalid(format!(
                "tensor {name} is {} {:?}, and matrices of F16, BF16 or F32 are quantised: have the rule name those alone",
                tensor.dtype.name(),
                tensor.shape
            )));
        }
        let encoding = view.unit_of(tensor)?.encoding();
        if encoding.is_lossy() && !is_sparse(encoding) {
            return Err(Error::Invalid(format!(
                "{}: {name} is quantised already: quantise the original checkpoint",
                view.root().display()
            )));
        }
        specs.insert(name.clone(), spec);
    }
    if specs.is_empty() {
        return Err(Error::Invalid(format!(
            "{}: none of its tensors is a linear of a repeated block, in F16, BF16 or F32, that no rule excepts: name what \
             is to be quantised by rules",
            view.root().display()
        )));
    }
    Ok(specs)
}

/// The tensors whose widths are assigned under a mean: all that no rule names.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Assigned {
    pub(crate) mean: MeanBits,
    pub(crate) tensors: BTreeSet<String>,
}

impl Assigned {
    /// Those of a quantiser that says a mean.
    pub(crate) fn of(
        quantiser: &Quantiser,
        specs: &BTreeMap<String, Spec>,
        rules: &Compiled,
    ) -> Option<Self> {
        let free = specs.keys().filter(|name| rules.rule(name).is_none());
        quantiser.mean.map(|mean| Self { mean, tensors: free.cloned().collect() })
    }
}

fn is_matrix(tensor: &Tensor) -> bool {
    abq::DTYPES.contains(&tensor.dtype) && abq::matrix(&tensor.shape).is_some()
}
