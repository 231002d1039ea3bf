//! `dfloat11`: the published format; BF16 linears of repeated blocks, and the head, block by block.

pub(super) mod stream;
mod timed;

use std::collections::BTreeSet;

use llmpress_formats::encoding::Encoding;
use llmpress_formats::encoding::dfloat11 as names;
use llmpress_formats::{Checkpoint, Dtype, PatternDict, Tensor, Traits, UnitPattern, derive_units};

use super::room::{Asked, Fit, Room, Survey, missing_tensor, share};
use super::timed::Timed;
use crate::source::UnitSource;
use crate::work::Work;
use crate::{Error, Result};
use stream::Form;

pub(crate) struct Dfloat11;

impl Room for Dfloat11 {
    fn name(&self) -> &'static str {
        "dfloat11"
    }

    fn bf16_only(&self) -> bool {
        true
    }

    fn takes_patterns(&self) -> bool {
        true
    }

    fn check_source(&self, checkpoint: &Checkpoint) -> Result<()> {
        match checkpoint.config() {
            Some(_) => Ok(()),
            None => Err(Error::Invalid(format!(
                "{}: config.json is missing; a DFloat11 checkpoint carries its unit patterns there",
                checkpoint.root().display()
            ))),
        }
    }

    fn groups(&self, asked: &Asked<'_>) -> Result<Vec<UnitPattern>> {
        match asked.patterns {
            Some(patterns) => units_by_patterns(asked, patterns),
            None => Ok(derived_units(asked)),
        }
    }

    /// The published format keeps everything outside its units plain.
    fn fit(&self, _tensor: &Tensor) -> Fit {
        Fit::Raw
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        share(bytes, 68)
    }

    fn components(&self) -> &'static [&'static str] {
        &names::COMPONENTS
    }

    fn on_gpu(&self) -> Encoding {
        Encoding::Dfloat11
    }

    fn reads(&self) -> u64 {
        3
    }

    fn nothing_suits(&self, found: &str, has_bf16: bool) -> String {
        if has_bf16 {
            format!(
                "no BF16 linears in repeated blocks were found among {found}; name the units with --pattern-file, or use --to planes"
            )
        } else {
            format!("dfloat11 holds BF16 matrices, and this checkpoint has {found}; use --to planes")
        }
    }

    fn timed(&self, dtype: Dtype) -> Option<Box<dyn Timed>> {
        (dtype == Dtype::BF16).then(|| Box::<timed::Unit>::default() as Box<dyn Timed>)
    }

    fn gb_per_second(&self) -> f64 {
        0.35
    }

    fn survey(&self, unit: &UnitSource<'_>, _first: &Tensor, work: Work<'_>) -> Result<Survey> {
        stream::survey(Form::Bf16, unit, work)
    }
}

/// The units that a pattern file names, of what the recipe gives to this method.
fn units_by_patterns(asked: &Asked<'_>, patterns: &PatternDict) -> Result<Vec<UnitPattern>> {
    let tensors = asked.checkpoint.tensors();
    let (mut units, unused) = patterns.units(tensors.keys().map(String::as_str))?;
    if let Some(pattern) = unused.first() {
        return Err(Error::Invalid(format!("pattern {pattern:?} matches no module of this checkpoint")));
    }
    for unit in &mut units {
        for name in unit.tensors() {
            match tensors.get(&name) {
                None => return Err(missing_tensor(asked.checkpoint, unit, &name)),
                Some(t) if t.dtype != Dtype::BF16 => {
                    return Err(Error::Invalid(format!(
                        "tensor {name} of unit {} is {}; DFloat11 holds BF16 only: take it out of the pattern file",
                        unit.unit,
                        t.dtype.name()
                    )));
                }
                Some(_) => {}
            }
        }
        let name = unit.unit.clone();
        unit.paths.retain(|path| (asked.wanted)(&format!("{name}.{path}.weight")));
    }
    let own = |unit: &UnitPattern| format!("{}.weight", unit.unit);
    units.retain(|u| !u.paths.is_empty() || (asked.wanted)(&own(u)) && tensors.contains_key(&own(u)));
    let mut seen = BTreeSet::new();
    if let Some(name) = units.iter().flat_map(UnitPattern::tensors).find(|n| !seen.insert(n.clone())) {
        return Err(Error::Invalid(format!("the pattern file puts tensor {name} into two units")));
    }
    Ok(units)
}

/// The units that the published tool would make.
fn derived_units(asked: &Asked<'_>) -> Vec<UnitPattern> {
    let checkpoint = asked.checkpoint;
    let config = checkpoint.config();
    let traits = Traits {
        model_type: config.and_then(|c| c.model_type()),
        tied: !checkpoint.tied().is_empty() || config.and_then(|c| c.tie_word_embeddings()) == Some(true),
        tied_embedding: asked.tied_embedding,
    };
    let linear = |t: &Tensor| t.dtype == Dtype::BF16 && t.shape.len() == 2 && t.bytes > 0;
    let linears = checkpoint
        .tensors()
        .iter()
        .filter(|(name, t)| linear(t) && (asked.wanted)(name))
        .map(|(name, _)| name.as_str());
    derive_units(traits, linears)
}
