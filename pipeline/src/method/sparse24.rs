//! `sparse24`: matrices of which at most two in four consecutive inputs are not zero, without loss; values plain or in
//! `fixed12`.
//!
//! ```text
//! rows --choose--> positions --pack--> kept values, or strips of them     a matrix that is dense somewhere stays raw
//! ```

mod rows;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use llmpress_entropy::fixed12::{self as strips, Histogram, Window};
use llmpress_formats::encoding::sparse24::{self as names, DTYPES, Inner};
use llmpress_formats::encoding::{ComponentSpec, Encoding, fixed12};
use llmpress_formats::{Dtype, Tensor};

use super::fixed12::StripSinks;
use super::room::{Coding, Encoder, Fit, Room, SizedEncoder, Survey, would_not_shrink};
use crate::sink::{Encoded, Sink, Slots, SourceDigests};
use crate::source::UnitSource;
use crate::work::{Work, batches_of};
use crate::{Error, Result};
use rows::{Packing, Sheet};

/// Whether values are to be encoded too.
pub(crate) struct Sparse24 {
    pub(crate) fixed12: bool,
}

impl Room for Sparse24 {
    fn name(&self) -> &'static str {
        if self.fixed12 { "sparse24:fixed12" } else { "sparse24" }
    }

    fn fit(&self, tensor: &Tensor) -> Fit {
        let suits = DTYPES.contains(&tensor.dtype) && names::matrix(&tensor.shape).is_some();
        if suits { Fit::Suits } else { Fit::Raw }
    }

    /// Of a matrix that is two in four: headers do not tell which are.
    fn expected_bytes(&self, tensor: Option<&Tensor>, bytes: u64) -> u64 {
        let sparse = tensor.and_then(|tensor| Some((tensor, names::matrix(&tensor.shape)?)));
        let Some((tensor, (rows, cols))) = sparse else { return bytes };
        let grid = fixed12::grid(&[rows, cols / 2]);
        match grid.filter(|_| self.fixed12 && tensor.dtype == Dtype::BF16) {
            Some(grid) => {
                let values = size(&fixed12::components(&grid, 0));
                size(&[names::positions_component(rows, cols)]).saturating_add(values)
            }
            None => size(&names::components(rows, cols, tensor.dtype)),
        }
    }

    fn on_gpu(&self) -> Encoding {
        let values = self.fixed12.then_some(Inner::Fixed12 { base: 0 });
        Encoding::Sparse24(names::Sparse24 { values })
    }

    fn components(&self) -> &'static [&'static str] {
        &names::COMPONENTS
    }

    /// A row, or the rows of a strip of `fixed12`.
    fn indivisible_bytes(&self, tensor: &Tensor) -> u64 {
        let row = names::matrix(&tensor.shape).map_or(0, |(rows, _)| tensor.bytes / rows.max(1));
        if self.fixed12 { row.saturating_mul(strips::TILE_ROWS as u64).min(tensor.bytes) } else { row }
    }

    fn reads(&self) -> u64 {
        3
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey> {
        let Some((rows, cols)) = names::matrix(&first.shape) else {
            return Ok(Err("is not a matrix whose columns are a multiple of four".to_owned()));
        };
        let sheet = Sheet::new(unit, first, rows, cols as usize)?;
        let wants_strips = self.fixed12 && first.dtype == Dtype::BF16;
        let histogram = match look(&sheet, wants_strips, work)? {
            Ok(histogram) => histogram,
            Err(reason) => return Ok(Err(reason)),
        };
        let plain = names::components(rows, cols, first.dtype);
        let (mut window, mut fallback) = (None, None);
        if let (Some(histogram), Some(grid)) = (histogram, fixed12::grid(&[rows, cols / 2])) {
            let best = histogram.best_window();
            let values = fixed12::components(&grid, best.escapes);
            match would_not_shrink(&values, size(&plain[1..])) {
                _ if best.escapes > u64::from(u32::MAX) => {
                    fallback = Some(format!("{} kept values lie outside the exponent window", best.escapes));
                }
                Some(reason) => fallback = Some(format!("kept values stay plain: in fixed12 they {reason}")),
                None => window = Some((best, names::encoded_components(rows, cols, values))),
            }
        }
        let (spec, window) = match window {
            Some((window, spec)) => (spec, Some(window)),
            None => (plain, None),
        };
        if let Some(reason) = would_not_shrink(&spec, unit.bytes()) {
            return Ok(Err(reason));
        }
        let values = window.as_ref().map(|window| Inner::Fixed12 { base: window.base });
        let step = sheet.row_bytes() * if window.is_some() { strips::TILE_ROWS } else { 1 };
        Ok(Ok(Coding {
            encoding: Encoding::Sparse24(names::Sparse24 { values }),
            spec,
            step: if step > work.piece_bytes { sheet.row_bytes() } else { step },
            encoder: Encoder::Sized(Box::new(Encode { rows, cols: cols as usize, window })),
            fallback,
        }))
    }
}

fn size(specs: &[ComponentSpec]) -> u64 {
    let sizes = specs.iter().map(|spec| spec.dtype.byte_len(&spec.shape));
    sizes.sum::<Option<u64>>().unwrap_or(u64::MAX)
}

/// Reads all rows until one is not two in four: says which, whatever the order in which they were read. Exponents of the kept
/// values are counted where they are wanted.
fn look(sheet: &Sheet<'_>, count: bool, work: Work<'_>) -> Result<Result<Option<Histogram>, String>> {
    let pieces = sheet.pieces(work.piece_bytes, 1);
    // The first row that is known to be dense: none after it need be read.
    let dense = AtomicU64::new(u64::MAX);
    let found = work.threads.map(
        pieces,
        <(Vec<u16>, Packing)>::default,
        |(dense_rows, packing), rows: Range<u64>| {
            if rows.start > dense.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let bytes = sheet.bytes_of(&rows);
            let found = match sheet.pack(rows, dense_rows, packing)? {
                Ok(()) if count => {
                    let mut histogram = Histogram::new();
                    histogram.add(&packing.words());
                    Some(Ok(histogram))
                }
                Ok(()) => None,
                Err((row, reason)) => {
                    dense.fetch_min(row, Ordering::Relaxed);
                    Some(Err((row, reason)))
                }
            };
            work.progress.advance(bytes);
            Ok(found)
        },
    )?;
    let mut total = count.then(Histogram::new);
    // Pieces are in order: the first that is dense is the first of all.
    for piece in found.into_iter().flatten() {
        match (piece, &mut total) {
            (Err((row, reason)), _) => return Ok(Err(format!("is not 2:4: row {row}: {reason}"))),
            (Ok(histogram), Some(total)) => total.merge(&histogram),
            (Ok(_), None) => {}
        }
    }
    Ok(Ok(total))
}

struct Encode {
    rows: u64,
    cols: usize,
    /// The exponents that codes stand for, where values are encoded.
    window: Option<Window>,
}

/// What becomes of some rows.
#[derive(Default)]
struct Piece {
    packing: Packing,
    strips: strips::Strips,
}

/// Where the values go.
enum Values {
    Plain(Box<Sink>),
    Strips(Box<StripSinks>),
}

impl SizedEncoder for Encode {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let first = unit.checkpoint().tensor(unit.first_name())?;
        let sheet = Sheet::new(unit, first, self.rows, self.cols)?;
        let mut positions = Sink::take(&mut slots, names::POSITIONS, work)?;
        let mut values = match self.window {
            None => Values::Plain(Box::new(Sink::take(&mut slots, names::VALUES, work)?)),
            Some(_) => Values::Strips(Box::new(StripSinks::take(&mut slots, names::within, work)?)),
        };
        let mut digests = SourceDigests::new(unit, work.threads);
        let together = if self.window.is_some() { strips::TILE_ROWS as u64 } else { 1 };
        let pieces = sheet.pieces(work.piece_bytes, together);
        batches_of::<_, Piece>(
            &pieces,
            work,
            |_, rows, words, piece| {
                let packed = sheet.pack(rows.clone(), words, &mut piece.packing)?;
                packed.map_err(|(row, reason)| {
                    Error::Invalid(format!("tensor {}: changed: row {row}: {reason}", unit.first_name()))
                })?;
                if let Some(window) = &self.window {
                    let kept = piece.packing.words();
                    strips::encode_strips(window.base, self.cols / 2, &kept, &mut piece.strips)
                        .map_err(|e| Error::Invalid(e.to_string()))?;
                }
                Ok(())
            },
            |batch| {
                let (written, ()) = work.threads.join(
                    || {
                        let each = || batch.iter().map(|(_, piece)| piece);
                        each().try_for_each(|piece| positions.append(piece.packing.positions()))?;
                        match &mut values {
                            Values::Plain(sink) => {
                                each().try_for_each(|piece| sink.append(piece.packing.values()))
                            }
                            Values::Strips(sinks) => sinks.append(each().map(|piece| &piece.strips)),
                        }
                    },
                    || batch.iter().for_each(|(words, _)| digests.update(bytemuck::cast_slice(words))),
                );
                written
            },
        )?;
        let mut components = BTreeMap::new();
        positions.finish(&mut components)?;
        match values {
            Values::Plain(sink) => sink.finish(&mut components)?,
            Values::Strips(sinks) => sinks.finish(&mut components)?,
        }
        Ok(Encoded { tensors: digests.finish(), components })
    }
}
