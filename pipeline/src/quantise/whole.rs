//! Learning the whole model once every block is quantised: the crate `quantize` computes, a stage keeps, also where it goes on
//! (`steps.rs`).
//!
//! ```text
//! blocks 0 .. n of the stage --view--> start \
//!         the view before the pass --------> teacher, originals --> one block more: units that take the place of theirs, the record
//! ```

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use llmpress_calibrate::Calibration;
use llmpress_formats::encoding::PackedUnit;
use llmpress_formats::{Checkpoint, Error as FormatError};
use llmpress_learn::Evaluated;
use llmpress_model::Model;
use llmpress_quantize::{LearnedWhole, Record, Spec, WholeTask, learn_whole};

use crate::Result;
use crate::blocks::{Blocks, Made};
use crate::progress::Watch;
use crate::steps::{Followed, Line, State};

impl Line for Record {
    fn evaluated(&self) -> Option<&Evaluated> {
        match self {
            Self::Evaluated(found) => Some(found),
            Self::Stepped(_) => None,
        }
    }
}

/// Whether any tensor is to be learned so.
pub(crate) fn is_wanted(specs: &BTreeMap<String, Spec>) -> bool {
    specs.values().any(|spec| spec.whole().is_some())
}

/// Learns what the blocks of the stage hold, from the state that is there. `before` and `again` are both the view before the pass.
pub(super) fn run(
    (before, again): (Arc<Checkpoint>, Checkpoint),
    (specs, calibration): (&BTreeMap<String, Spec>, &Calibration),
    blocks: &mut Blocks,
    watch: &dyn Watch,
) -> Result<()> {
    let view = Arc::new(blocks.view(again)?);
    let (dense, start) = (Model::open(before)?, Model::open(view.clone())?);
    let unit = |tensor: &str| {
        let rows = view.tensor(tensor)?.shape.first().copied().unwrap_or(0);
        view.packed_rows(tensor, 0..rows)
    };
    let path = blocks.state();
    let mut state = State::open(&path)?;
    let records = state.as_mut().map(|state| std::mem::take(&mut state.records)).unwrap_or_default();
    let task = WholeTask { dense: &dense, start: &start, specs, unit: &unit, calibration };
    let (steps, tokens) = task.extent();
    let mut kept: Followed<'_, Record> = Followed::new(&path, ("learn", steps, tokens), records, watch);
    let from = state.as_mut().map(|state| (&mut state.rest as &mut dyn Read, path.as_path()));
    let Some(found) = learn_whole(task, from, &mut kept)? else { return Err(Followed::<Record>::stopped()) };
    let records = kept.records;
    let made = made(found, &unit)?;
    drop((dense, start));
    blocks.write((&made, &[]), &records, None)?;
    // Of no more use; what is left of it does no harm.
    let _ = std::fs::remove_file(&path);
    Ok(())
}

/// Finished tensors: those that are better; where a loss was no number all, as they were, with the reason.
fn made(
    found: LearnedWhole,
    unit: &dyn Fn(&str) -> llmpress_formats::Result<llmpress_formats::encoding::abq::Packed<'static>>,
) -> Result<Vec<Made>> {
    let Some(why) = found.unlearned else {
        let all = found.units.into_iter();
        return Ok(all
            .map(|(name, unit)| Made { name, unit: PackedUnit::Abq(unit), instead: None })
            .collect());
    };
    let as_it_was = |name: String| {
        let unit = PackedUnit::Abq(unit(&name)?);
        Ok(Made { name, unit, instead: Some(format!("as gptq left it: {why}")) })
    };
    Ok(found.tensors.into_iter().map(as_it_was).collect::<Result<_, FormatError>>()?)
}
