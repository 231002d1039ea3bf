//! `kept` with its values in `fixed12`: a matrix of two in four with sums stays what a pass made it, and the kept values take seven bits
//! less a quarter. Lossless, as `fixed12` is.

use std::collections::BTreeMap;

use llmpress_entropy::fixed12::{self as strips, Histogram, Window};
use llmpress_formats::encoding::lowrank::{self, Base, Lowrank};
use llmpress_formats::encoding::sparse24::{self, Inner, Sparse24};
use llmpress_formats::encoding::{ComponentSpec, Encoding, fixed12};
use llmpress_formats::{Checkpoint, Component, Dtype, Tensor, Unit};

use super::fixed12::StripSinks;
use super::kept::{Copy, coding, decoded_digests, kept_unit};
use super::room::{Coding, Encoder, Fit, Room, SizedEncoder, Survey, would_not_shrink};
use crate::sink::{Encoded, Slots};
use crate::source::UnitSource;
use crate::work::{Work, batches_of};
use crate::{Error, Result};

/// Where the kept values of a base lie, plain, and what their names begin with when they are encoded.
const VALUES: &str = "base.values";
const VALUES_WITHIN: &str = "base.values.";

pub(crate) struct KeptFixed12;

/// How a tensor is stored, where it has plain kept values of BF16 beside sums.
pub(crate) fn plain_values<'a>(checkpoint: &'a Checkpoint, tensor: &Tensor) -> Option<(&'a Unit, Lowrank)> {
    let unit = kept_unit(checkpoint, tensor)?;
    match unit.encoding() {
        Encoding::Lowrank(lowrank)
            if lowrank.base == Base::Sparse24(Sparse24 { values: None })
                && unit.components().get(VALUES).is_some_and(|values| values.dtype() == Dtype::BF16) =>
        {
            Some((unit, *lowrank))
        }
        _ => None,
    }
}

impl Room for KeptFixed12 {
    fn name(&self) -> &'static str {
        "kept:fixed12"
    }

    fn fit(&self, _tensor: &Tensor) -> Fit {
        Fit::Suits
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        bytes
    }

    fn components(&self) -> &'static [&'static str] {
        &lowrank::COMPONENTS
    }

    /// The rows of a strip.
    fn indivisible_bytes(&self, tensor: &Tensor) -> u64 {
        let row = sparse24::matrix(&tensor.shape).map_or(0, |(rows, _)| tensor.bytes / rows.max(1));
        row.saturating_mul(strips::TILE_ROWS as u64).min(tensor.bytes)
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey> {
        let as_it_is = || coding(unit, first, &[]);
        let found = plain_values(unit.checkpoint(), first).zip(sparse24::matrix(&first.shape));
        let Some(((stored, lowrank), (rows, cols))) = found else { return as_it_is() };
        let Some((component, grid)) = stored.components().get(VALUES).zip(fixed12::grid(&[rows, cols / 2]))
        else {
            return as_it_is();
        };
        let values = Values { component: component.clone(), rows, cols: cols / 2 };
        let mut total = Histogram::new();
        let histograms = work.threads.map(values.pieces(work), Vec::new, |words, piece| {
            values.read(piece, words)?;
            let mut histogram = Histogram::new();
            histogram.add(words);
            Ok(histogram)
        })?;
        histograms.iter().for_each(|histogram| total.merge(histogram));
        let window = total.best_window();
        let encoded = fixed12::components(&grid, window.escapes);
        let fallback = match would_not_shrink(&encoded, component.bytes()) {
            _ if window.escapes > u64::from(u32::MAX) => {
                Some(format!("{} kept values lie outside the exponent window", window.escapes))
            }
            reason => reason.map(|reason| format!("kept values stay plain: in fixed12 they {reason}")),
        };
        let kept = as_it_is()?;
        let kept = match (kept, fallback) {
            (Ok(kept), Some(reason)) => return Ok(Ok(Coding { fallback: Some(reason), ..kept })),
            (Ok(kept), None) => kept,
            (Err(reason), _) => return Ok(Err(reason)),
        };
        let mut spec: Vec<ComponentSpec> = kept.spec.into_iter().filter(|spec| spec.name != VALUES).collect();
        spec.extend(encoded.into_iter().map(|spec| ComponentSpec { name: within(spec.name), ..spec }));
        let others =
            spec.iter().filter_map(|spec| Some((spec.name, stored.components().get(spec.name)?.clone())));
        let copy = Copy { unit: first.unit.clone(), parts: others.collect() };
        let base = Base::Sparse24(Sparse24 { values: Some(Inner::Fixed12 { base: window.base }) });
        Ok(Ok(Coding {
            encoding: Encoding::Lowrank(Lowrank { base, ..lowrank }),
            spec,
            step: kept.step,
            encoder: Encoder::Sized(Box::new(Encode { copy, values, window })),
            fallback: None,
        }))
    }
}

/// The name of a component of the values in the unit.
fn within(name: &'static str) -> &'static str {
    let full = lowrank::COMPONENTS.iter().find(|full| full.strip_prefix(VALUES_WITHIN) == Some(name));
    full.copied().unwrap_or(name)
}

/// The kept values of a matrix, row by row.
struct Values {
    component: Component,
    rows: u64,
    cols: u64,
}

impl Values {
    /// Rows in whole strips, as many as a piece may have.
    fn pieces(&self, work: Work<'_>) -> Vec<(u64, u64)> {
        let strip = self.cols.saturating_mul(2 * strips::TILE_ROWS as u64).max(1);
        let step = (work.piece_bytes as u64 / strip).max(1) * strips::TILE_ROWS as u64;
        (0..self.rows.div_ceil(step)).map(|i| (i * step, step.min(self.rows - i * step))).collect()
    }

    fn read(&self, (first, rows): (u64, u64), words: &mut Vec<u16>) -> Result<()> {
        words.resize((rows * self.cols) as usize, 0);
        self.component.read_at(2 * first * self.cols, bytemuck::cast_slice_mut(words))?;
        Ok(())
    }
}

struct Encode {
    copy: Copy,
    values: Values,
    window: Window,
}

impl SizedEncoder for Encode {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let mut components = BTreeMap::new();
        self.copy.copy(unit, &mut slots, work, &mut components)?;
        let mut sinks = StripSinks::take(&mut slots, within, work)?;
        batches_of::<_, strips::Strips>(
            &self.values.pieces(work),
            work,
            |_, piece, words, strips| {
                self.values.read(*piece, words)?;
                strips::encode_strips(self.window.base, self.values.cols as usize, words, strips)
                    .map_err(|e| Error::Invalid(e.to_string()))
            },
            |batch| sinks.append(batch.iter().map(|(_, strips)| strips)),
        )?;
        sinks.finish(&mut components)?;
        Ok(Encoded { tensors: decoded_digests(unit, work)?, components })
    }
}
