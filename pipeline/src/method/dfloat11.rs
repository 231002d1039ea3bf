//! `dfloat11`: the published format; BF16 linears of repeated blocks, and the head, block by block.

mod timed;

use std::collections::{BTreeMap, BTreeSet};

use llmpress_entropy::dfloat11;
use llmpress_formats::encoding::Encoding;
use llmpress_formats::encoding::dfloat11 as names;
use llmpress_formats::{Checkpoint, Dtype, PatternDict, Tensor, Traits, UnitPattern, derive_units};
use llmpress_model::Weights;

use super::room::{
    Asked, Coding, Encoder, Fit, Room, SizedEncoder, Survey, missing_tensor, share, would_not_shrink,
};
use super::timed::Timed;
use crate::sink::{Encoded, Sink, Slots, SourceDigests};
use crate::source::UnitSource;
use crate::work::{Work, batches, histograms, pieces};
use crate::{Error, Result};

/// Decoded ranges begin and end on whole elements of any dtype.
const STEP: usize = 16;

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

    fn on_gpu(&self) -> Weights {
        Weights::Dfloat11
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
        let histograms: Vec<dfloat11::Histogram> = histograms(unit, work, |words| {
            let mut histogram = dfloat11::Histogram::new();
            histogram.add(words);
            histogram
        })?;
        let mut total = dfloat11::Histogram::new();
        for histogram in &histograms {
            total.merge(histogram);
        }
        let code = match dfloat11::Code::build(&total) {
            Ok(code) => code,
            Err(e) => return Ok(Err(e.to_string())),
        };
        let layout = match dfloat11::Layout::new(&code, &total) {
            Ok(layout) => layout,
            Err(e) => return Ok(Err(e.to_string())),
        };
        let mut at = dfloat11::Position::default();
        let starts: Vec<dfloat11::Position> = histograms
            .iter()
            .map(|histogram| {
                let start = at;
                at.element += histogram.total();
                at.bit += code.encoded_bits(histogram);
                start
            })
            .collect();
        if code.lengths().contains(&1) {
            let most = most_block_symbols(unit, &code, &layout, &starts, work.piece_bytes)?;
            if most > dfloat11::MAX_BLOCK_SYMBOLS {
                return Ok(Err(dfloat11::Unrepresentable::BlockSymbols(most).to_string()));
            }
        }
        let tensors = unit.tensors();
        let splits = names::split_positions(tensors.iter().map(|t| t.bytes / 2));
        let spec = names::components(&layout, code.luts().len() as u64, tensors.len() as u64);
        if let Some(reason) = would_not_shrink(&spec, unit.bytes()) {
            return Ok(Err(reason));
        }
        Ok(Ok(Coding {
            encoding: Encoding::Dfloat11,
            spec,
            step: STEP,
            encoder: Encoder::Sized(Box::new(Stream { code, layout, starts, splits })),
            fallback: None,
        }))
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

/// The most symbols of a block. Only a code with a word of one bit can exceed what the official decoder
/// has room for, so the extra pass is rare.
fn most_block_symbols(
    unit: &UnitSource<'_>,
    code: &dfloat11::Code,
    layout: &dfloat11::Layout,
    starts: &[dfloat11::Position],
    piece_bytes: usize,
) -> Result<u64> {
    let mut assembler = dfloat11::Assembler::new(layout);
    let (mut piece, mut sections) = (dfloat11::Piece::default(), dfloat11::Sections::default());
    let mut words: Vec<u16> = Vec::new();
    for ((offset, len), start) in pieces(unit.bytes(), piece_bytes & !1).zip(starts) {
        words.resize(len / 2, 0);
        unit.read(offset, bytemuck::cast_slice_mut(&mut words))?;
        dfloat11::encode_piece(code, *start, &words, &mut piece);
        assembler.push(&piece, &mut sections);
        sections = dfloat11::Sections::default();
    }
    Ok(assembler.most_block_symbols(layout.elements))
}

struct Stream {
    code: dfloat11::Code,
    layout: dfloat11::Layout,
    /// Where each piece starts in the stream.
    starts: Vec<dfloat11::Position>,
    splits: Vec<i64>,
}

impl SizedEncoder for Stream {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let mut luts = Sink::take(&mut slots, names::LUTS, work)?;
        luts.append(self.code.luts())?;
        let mut splits = Sink::take(&mut slots, names::SPLIT_POSITIONS, work)?;
        splits.append(bytemuck::cast_slice(&self.splits))?;
        let mut encoded = Sink::take(&mut slots, names::ENCODED_EXPONENT, work)?;
        let mut sign_mantissa = Sink::take(&mut slots, names::SIGN_MANTISSA, work)?;
        let mut positions = Sink::take(&mut slots, names::OUTPUT_POSITIONS, work)?;
        let mut gaps = Sink::take(&mut slots, names::GAPS, work)?;
        let mut digests = SourceDigests::new(unit, work.threads);
        let mut assembler = dfloat11::Assembler::new(&self.layout);
        let mut sections = dfloat11::Sections::default();
        let mut write = |sections: &mut dfloat11::Sections| -> Result<()> {
            encoded.append(&sections.encoded_exponent)?;
            positions.append(&sections.output_positions)?;
            gaps.append(&sections.gaps)?;
            sections.encoded_exponent.clear();
            sections.output_positions.clear();
            sections.gaps.clear();
            Ok(())
        };
        batches::<dfloat11::Piece>(
            unit,
            work.piece_bytes & !1,
            work,
            |i, words, piece| {
                let start = self.starts.get(i).copied().unwrap_or_default();
                dfloat11::encode_piece(&self.code, start, words, piece);
                Ok(())
            },
            |batch| {
                for (_, piece) in batch {
                    assembler.push(piece, &mut sections);
                }
                let (written, others) = work.threads.join(
                    || write(&mut sections),
                    || {
                        let (mantissas, ()) = work.threads.join(
                            || {
                                batch
                                    .iter()
                                    .try_for_each(|(_, piece)| sign_mantissa.append(&piece.sign_mantissa))
                            },
                            || {
                                batch
                                    .iter()
                                    .for_each(|(words, _)| digests.update(bytemuck::cast_slice(words)));
                            },
                        );
                        mantissas
                    },
                );
                written.and(others)
            },
        )?;
        assembler.finish(&self.code, &mut sections).map_err(|e| Error::Invalid(e.to_string()))?;
        write(&mut sections)?;
        let mut components = BTreeMap::new();
        for sink in [luts, splits, encoded, sign_mantissa, positions, gaps] {
            sink.finish(&mut components)?;
        }
        Ok(Encoded { tensors: digests.finish(), components })
    }
}
