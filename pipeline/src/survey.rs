//! The first pass over a unit: its method settles its encoding and the exact size of its parts.
//!
//! ```text
//! planned unit --(its method's room)--> coding, or why not: raw tensors
//!              '--a tensor before it has the same bytes--> nothing but its name
//! ```

use llmpress_formats::{Checkpoint, Encoding};

use crate::duplicates::Duplicates;
use crate::method::raw_coding;
use crate::method::room::{Coding, Elsewhere, Encoder};
use crate::plan::PlannedUnit;
use crate::source::UnitSource;
use crate::work::Work;
use crate::{Method, Result};

/// Bytes whose ends any dtype's elements share.
const SAME_STEP: usize = 16;

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
    duplicates: &Duplicates,
    work: Work<'_>,
) -> Result<Vec<SettledUnit<'a>>> {
    let source = UnitSource::new(checkpoint, &planned.tensors)?;
    if let Some((tensor, digest)) = duplicates.get(source.first_name()) {
        let coding = Coding {
            encoding: Encoding::Same { tensor: tensor.to_owned() },
            spec: Vec::new(),
            step: SAME_STEP,
            encoder: Encoder::Sized(Box::new(Elsewhere { digest, reads: planned.method.room().reads() - 1 })),
            fallback: None,
        };
        return Ok(vec![SettledUnit { name: planned.name.clone(), source, coding, fallback: None }]);
    }
    let first = checkpoint.tensor(planned.tensors.first().unwrap_or(&planned.name))?;
    let reason = match planned.method.room().survey(&source, first, work)? {
        Ok(mut coding) => {
            let fallback = coding.fallback.take();
            let fallback = fallback.or_else(|| kept_fallback(checkpoint, planned, &first.unit));
            return Ok(vec![SettledUnit { name: planned.name.clone(), source, coding, fallback }]);
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

/// Why what is kept was made otherwise than asked for, as whoever made it said.
fn kept_fallback(checkpoint: &Checkpoint, planned: &PlannedUnit, unit: &str) -> Option<String> {
    if !matches!(planned.method, Method::Kept | Method::KeptFixed12 | Method::Coded) {
        return None;
    }
    let of_source = || checkpoint.manifest().and_then(|manifest| manifest.units.get(unit));
    checkpoint.finished().get(unit).or_else(of_source)?.fallback.clone()
}
