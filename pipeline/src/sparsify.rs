//! Passes that make matrices 2:4: which tensors, how, and the finished units that they leave.
//!
//! ```text
//! "sparse24:wanda" --headers--> linears of repeated blocks --data, block by block--> finished units in a stage --> view
//! ```

mod forecast;
mod partly;
mod record;
mod run;

use std::collections::BTreeSet;

use llmpress_formats::encoding::sparse24::{DTYPES, matrix};
use llmpress_formats::{Blueprint, Checkpoint, Tensor, block_linears};
pub use llmpress_sparsify::{Share, Sparsifier};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::recipe::{Compiled, Target};
use crate::{CalibrationRecord, Error, Result};

pub(crate) use forecast::{forecast, stored_bytes};
pub(crate) use partly::{Becomes, Choices, Line as SettledLine};
pub(crate) use record::{Line, files as record_files};
pub(crate) use run::{MEMORY, Pass as Run, run};

/// A pass that has made matrices 2:4.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sparsified {
    /// What was asked for.
    #[serde(serialize_with = "write", deserialize_with = "read")]
    pub to: Sparsifier,
    /// What it went by, if by a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationRecord>,
    /// Matrices that were not made 2:4 for what that would have cost.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub dense: BTreeSet<String>,
    /// Matrices, dense or 2:4, that the quantiser after it leaves as they are.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub unquantised: BTreeSet<String>,
}

impl Sparsified {
    /// What was asked for, before anything is settled.
    pub(crate) fn new(to: Sparsifier, calibration: Option<CalibrationRecord>) -> Self {
        Self { to, calibration, dense: BTreeSet::new(), unquantised: BTreeSet::new() }
    }

    /// With what was settled.
    pub(crate) fn with(mut self, settled: &[SettledLine]) -> Self {
        let chosen = |which: &dyn Fn(&SettledLine) -> bool| -> BTreeSet<String> {
            settled.iter().filter(|line| which(line)).map(|line| line.tensor.clone()).collect()
        };
        self.dense = chosen(&|line| matches!(line.becomes, Becomes::Dense | Becomes::Quantised));
        let quantised = |line: &SettledLine| line.divergence.contains_key(&Becomes::Quantised);
        self.unquantised =
            chosen(&|line| quantised(line) && matches!(line.becomes, Becomes::Dense | Becomes::Sparse));
        self
    }
}

fn write<S: Serializer>(sparsifier: &Sparsifier, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(sparsifier)
}

fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Sparsifier, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// The tensors that are made 2:4: linears of repeated blocks that no rule gives a method of their own.
pub(crate) fn targets(view: &Checkpoint, rules: &Compiled) -> Result<BTreeSet<String>> {
    refuse_transposed(view)?;
    let names = view.tensors().iter().filter(|(_, t)| is_matrix(t)).map(|(name, _)| name.as_str());
    let linears = block_linears(view.config().and_then(|c| c.model_type()), names);
    let mut targets = BTreeSet::new();
    for name in linears.into_iter().flatten() {
        let tensor = view.tensor(&name)?;
        if tensor.is_zero() || matches!(rules.rule(&name), Some(Target::Method(_))) {
            continue;
        }
        if view.unit_of(tensor)?.encoding().is_lossy() {
            return Err(Error::Invalid(format!(
                "{}: {name} is quantised already: make the original checkpoint 2:4",
                view.root().display()
            )));
        }
        targets.insert(name);
    }
    if targets.is_empty() {
        return Err(Error::Invalid(format!(
            "{}: none of its tensors is a linear of a repeated block, in F16, BF16 or F32, with columns in fours, that no rule \
             excepts",
            view.root().display()
        )));
    }
    Ok(targets)
}

/// Refuses a family whose matrices lie the other way round: what is taken along their rows would be along their columns.
pub(crate) fn refuse_transposed(view: &Checkpoint) -> Result<()> {
    let blueprint = view.config().and_then(|c| c.model_type()).and_then(Blueprint::of);
    match blueprint.filter(|blueprint| blueprint.transposed) {
        None => Ok(()),
        Some(blueprint) => {
            let what = format!(
                "{} models store their matrices as [inputs, outputs], which are neither quantised nor made 2:4 yet: lossless methods \
                 and pruning work",
                blueprint.name
            );
            Err(llmpress_formats::Error::unsupported(view.root(), None, what).into())
        }
    }
}

fn is_matrix(tensor: &Tensor) -> bool {
    DTYPES.contains(&tensor.dtype) && matrix(&tensor.shape).is_some()
}
