//! The first pass over a unit: its method settles its encoding and the exact size of its parts.
//!
//! ```text
//! planned unit --(its method's room)--> coding, or why not: raw tensors
//! ```

use llmpress_formats::Checkpoint;

use crate::Result;
use crate::method::raw_coding;
use crate::method::room::Coding;
use crate::plan::PlannedUnit;
use crate::source::UnitSource;
use crate::work::Work;

/// A unit whose encoding is settled.
pub(crate) struct SettledUnit<'a> {
    pub(crate) name: String,
    pub(crate) source: UnitSource<'a>,
    pub(crate) coding: Coding,
    pub(crate) fallback: Option<String>,
}

/// Settles the encoding of a planned unit. A unit that its encoding cannot hold, or would not shrink,
/// becomes raw tensors with the reason.
pub(crate) fn settle<'a>(
    checkpoint: &'a Checkpoint,
    planned: &PlannedUnit,
    work: Work<'_>,
) -> Result<Vec<SettledUnit<'a>>> {
    let source = UnitSource::new(checkpoint, &planned.tensors)?;
    let first = checkpoint.tensor(planned.tensors.first().unwrap_or(&planned.name))?;
    let reason = match planned.method.room().survey(&source, first, work)? {
        Ok(coding) => {
            return Ok(vec![SettledUnit { name: planned.name.clone(), source, coding, fallback: None }]);
        }
        Err(reason) => reason,
    };
    planned
        .tensors
        .iter()
        .map(|name| {
            let tensor = checkpoint.tensor(name)?;
            Ok(SettledUnit {
                name: name.clone(),
                source: UnitSource::new(checkpoint, std::slice::from_ref(name))?,
                coding: raw_coding(tensor.dtype, &tensor.shape),
                fallback: Some(reason.clone()),
            })
        })
        .collect()
}
