//! `fixed12`: twelve bits a weight; BF16 matrices.

use std::collections::BTreeMap;

use llmpress_entropy::fixed12::{self, Grid, TILE_ROWS};
use llmpress_formats::encoding::Encoding;
use llmpress_formats::encoding::fixed12 as names;
use llmpress_formats::{Dtype, Tensor};

use super::room::{Coding, Encoder, Fit, Room, SizedEncoder, Survey, share, would_not_shrink};
use crate::sink::{Encoded, Sink, Slots, SourceDigests};
use crate::source::UnitSource;
use crate::work::{Work, batches, histograms};
use crate::{Error, Result};

pub(crate) struct Fixed12;

impl Room for Fixed12 {
    fn name(&self) -> &'static str {
        "fixed12"
    }

    fn bf16_only(&self) -> bool {
        true
    }

    fn fit(&self, tensor: &Tensor) -> Fit {
        if tensor.dtype != Dtype::BF16 {
            return Fit::Planes;
        }
        match names::grid(&tensor.shape) {
            Some(grid) if without_escapes(&grid) < tensor.bytes => Fit::Suits,
            _ => Fit::Raw,
        }
    }

    fn expected_bytes(&self, tensor: Option<&Tensor>, bytes: u64) -> u64 {
        let grid = tensor.and_then(|tensor| names::grid(&tensor.shape));
        grid.map_or(share(bytes, 76), |grid| without_escapes(&grid))
    }

    fn components(&self) -> &'static [&'static str] {
        &names::COMPONENTS
    }

    fn indivisible_bytes(&self, tensor: &Tensor) -> u64 {
        tensor.shape.last().map_or(0, |cols| cols.saturating_mul(2 * TILE_ROWS as u64))
    }

    fn reads(&self) -> u64 {
        3
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey> {
        let Some(grid) = names::grid(&first.shape) else {
            return Ok(Err("is not a matrix".to_owned()));
        };
        let histograms = histograms(unit, work, |words| {
            let mut histogram = fixed12::Histogram::new();
            histogram.add(words);
            histogram
        })?;
        let mut total = fixed12::Histogram::new();
        for histogram in &histograms {
            total.merge(histogram);
        }
        let window = total.best_window();
        if window.escapes > u64::from(u32::MAX) {
            return Ok(Err(format!("{} weights lie outside the exponent window", window.escapes)));
        }
        let spec = names::components(&grid, window.escapes);
        if let Some(reason) = would_not_shrink(&spec, unit.bytes()) {
            return Ok(Err(format!("{reason}: {} weights lie outside the exponent window", window.escapes)));
        }
        Ok(Ok(Coding {
            encoding: Encoding::Fixed12 { base: window.base },
            spec,
            step: strip_bytes(&grid),
            encoder: Encoder::Sized(Box::new(Strips { grid, base: window.base })),
        }))
    }
}

fn without_escapes(grid: &Grid) -> u64 {
    grid.sign_mantissa_bytes() + grid.codes_bytes() + grid.escape_offsets_bytes()
}

fn strip_bytes(grid: &Grid) -> usize {
    grid.cols() as usize * TILE_ROWS * 2
}

struct Strips {
    grid: Grid,
    base: i16,
}

impl SizedEncoder for Strips {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let mut sign_mantissa = Sink::take(&mut slots, names::SIGN_MANTISSA, work)?;
        let mut codes = Sink::take(&mut slots, names::CODES, work)?;
        let mut offsets = Sink::take(&mut slots, names::ESCAPE_OFFSETS, work)?;
        let mut positions = Sink::take(&mut slots, names::ESCAPE_POSITIONS, work)?;
        let mut exponents = Sink::take(&mut slots, names::ESCAPE_EXPONENTS, work)?;
        let mut digests = SourceDigests::new(unit, work.threads);
        let mut escapes = 0u32;
        let mut table: Vec<u32> = vec![0];
        let strip_bytes = strip_bytes(&self.grid);
        let piece_bytes = (work.piece_bytes / strip_bytes).max(1) * strip_bytes;
        batches::<fixed12::Strips>(
            unit,
            piece_bytes,
            work,
            |_, words, strips| {
                fixed12::encode_strips(self.base, self.grid.cols() as usize, words, strips)
                    .map_err(|e| Error::Invalid(e.to_string()))
            },
            |batch| {
                for count in batch.iter().flat_map(|(_, strips)| &strips.escape_counts) {
                    escapes = escapes.wrapping_add(*count);
                    table.push(escapes);
                }
                let (a, b) = work.threads.join(
                    || batch.iter().try_for_each(|(_, strips)| sign_mantissa.append(&strips.sign_mantissa)),
                    || {
                        let (small, ()) = work.threads.join(
                            || {
                                offsets.append(bytemuck::cast_slice(&table))?;
                                table.clear();
                                batch.iter().try_for_each(|(_, strips)| {
                                    codes.append(&strips.codes)?;
                                    positions.append(bytemuck::cast_slice(&strips.escape_positions))?;
                                    exponents.append(&strips.escape_exponents)
                                })
                            },
                            || {
                                batch
                                    .iter()
                                    .for_each(|(words, _)| digests.update(bytemuck::cast_slice(words)));
                            },
                        );
                        small
                    },
                );
                a.and(b)
            },
        )?;
        let mut components = BTreeMap::new();
        for sink in [sign_mantissa, codes, offsets, positions, exponents] {
            sink.finish(&mut components)?;
        }
        Ok(Encoded { tensors: digests.finish(), components })
    }
}
