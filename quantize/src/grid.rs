//! The grids of a matrix: a scale and a zero point a group, as they are stored.
//!
//! ```text
//! row --> groups of columns (the last may be short) --> Line: the values of codes 0 ..= top
//! ```
//!
//! Scales and offsets are rounded to what is stored first; codes are chosen on what is left of them.

use std::borrow::Cow;

use llmpress_formats::encoding::abq::{Floats, Packed, Zero};
use llmpress_formats::{Dtype, Error, Result};
use rayon::prelude::*;

use crate::line::Line;
use crate::rounding::{Rounding, offset_dtype, scale_dtype};
use crate::search;
use crate::{Spec, ZeroPoint};

/// The grids of all groups of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Grid {
    spec: Spec,
    rows: usize,
    cols: usize,
    /// `[rows, groups]`.
    lines: Vec<Line>,
    scales: Dtype,
    offsets: Dtype,
}

impl Grid {
    /// From the least to the greatest weight of each group: what rounding to nearest takes. `weights` are rows of `cols`.
    ///
    /// # Errors
    /// A setting that the encoding does not have; weights that are no whole rows, or not finite.
    pub fn min_max(weights: &[f32], cols: usize, spec: Spec) -> Result<Self> {
        Self::made(weights, cols, spec, |group, _, _| [search::min_max(group, spec); 2], |_, lines| lines[0])
    }

    /// Near-optimal for the weighted squares of the differences, sum over k of h_k (w_k - value_k)^2: found by a search
    /// (`search.rs`) and never worse than [`Self::min_max`]. `h` has `cols` weights, not negative, or one for each of
    /// `weights`; all are 1 where there are none.
    ///
    /// # Errors
    /// As for [`Self::min_max`]; another number of weights h.
    pub fn search(weights: &[f32], cols: usize, spec: Spec, h: Option<&[f32]>) -> Result<Self> {
        let ones = vec![1.0; if h.is_some() { 0 } else { cols }];
        let h = h.unwrap_or(&ones);
        if (h.len() != cols && h.len() != weights.len()) || h.iter().any(|h| !h.is_finite() || *h < 0.0) {
            return Err(Error::Invalid(format!("{} weights of columns do not go with {cols}", h.len())));
        }
        // Where each row has its own.
        let step = if h.len() == cols { 0 } else { cols };
        let of = |row: usize, columns: std::ops::Range<usize>| &h[row * step..][columns];
        Self::made(
            weights,
            cols,
            spec,
            |group, row, columns| search::group(group, of(row, columns), spec),
            |(group, row, columns, rounding), lines| {
                let finished =
                    lines.map(|line| search::finish(group, of(row, columns.clone()), spec, line, rounding));
                // Of equals the searched one.
                let [(searched, a), (widest, b)] = finished;
                if b < a { widest } else { searched }
            },
        )
    }

    /// Of lines that are rounded so already, `[rows, groups]`.
    pub(crate) fn of_lines(
        spec: Spec,
        rows: usize,
        cols: usize,
        lines: Vec<Line>,
        rounding: Rounding,
    ) -> Self {
        Self { spec, rows, cols, lines, scales: rounding.scales, offsets: rounding.offsets }
    }

    /// Finds lines, sees in which dtypes they can be stored, rounds them.
    fn made(
        weights: &[f32],
        cols: usize,
        spec: Spec,
        find: impl Fn(&[f32], usize, std::ops::Range<usize>) -> [Line; 2] + Sync,
        choose: impl Fn((&[f32], usize, std::ops::Range<usize>, Rounding), [Line; 2]) -> Line + Sync,
    ) -> Result<Self> {
        spec.check()?;
        if cols == 0 || !weights.len().is_multiple_of(cols) {
            return Err(Error::Invalid(format!("{} weights are no rows of {cols}", weights.len())));
        }
        if let Some(at) = weights.iter().position(|w| !w.is_finite()) {
            return Err(Error::Invalid(format!(
                "row {}, column {}: {} cannot be quantised",
                at / cols,
                at % cols,
                weights[at]
            )));
        }
        let step = spec.abq.group_columns(cols);
        let groups = |row| groups_of(row, step);
        let raw: Vec<[Line; 2]> = weights
            .par_chunks_exact(cols)
            .enumerate()
            .flat_map_iter(|(i, row)| {
                let find = &find;
                groups(row).map(move |(group, columns)| find(group, i, columns))
            })
            .collect();
        let scales = scale_dtype(spec.zero, raw.iter().flatten().map(|line| line.scale));
        let mut offsets = offset_dtype(raw.iter().flatten());
        let per_row = spec.abq.groups(cols);
        loop {
            let rounding = Rounding { scales, offsets };
            let lines: Vec<Line> = weights
                .par_chunks_exact(cols)
                .zip(raw.par_chunks_exact(per_row))
                .enumerate()
                .flat_map_iter(|(i, (row, raw))| {
                    let choose = &choose;
                    groups(row).zip(raw).map(move |((group, columns), lines)| {
                        let lines = lines.map(|line| rounding.of(line));
                        rounding.of(choose((group, i, columns, rounding), lines))
                    })
                })
                .collect();
            if lines.iter().all(Line::is_sound) {
                return Ok(Self { spec, rows: weights.len() / cols, cols, lines, scales, offsets });
            }
            if offsets == Dtype::F32 {
                return Err(Error::Invalid("its weights are too large or too small for a scale".to_owned()));
            }
            offsets = Dtype::F32;
        }
    }

    /// How it was made.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Of a group of a row.
    pub(crate) fn line(&self, row: usize, group: usize) -> Line {
        self.lines[row * self.spec.abq.groups(self.cols) + group]
    }

    /// `[rows, groups]`, to be changed to others that are rounded by [`Self::rounding`].
    pub(crate) fn lines_mut(&mut self) -> &mut [Line] {
        &mut self.lines
    }

    /// What its scales and offsets are rounded to.
    pub(crate) fn rounding(&self) -> Rounding {
        Rounding { scales: self.scales, offsets: self.offsets }
    }

    /// The codes nearest to weights, `[rows, cols]`.
    pub fn nearest(&self, weights: &[f32]) -> Vec<u8> {
        let mut codes = vec![0; weights.len()];
        let (step, groups) = (self.spec.abq.group_columns(self.cols), self.spec.abq.groups(self.cols));
        let top = f32::from(self.spec.top());
        codes
            .par_chunks_exact_mut(self.cols)
            .zip(weights.par_chunks_exact(self.cols))
            .zip(self.lines.par_chunks_exact(groups))
            .for_each(|((codes, row), lines)| {
                for ((codes, group), line) in codes.chunks_mut(step).zip(row.chunks(step)).zip(lines) {
                    codes.iter_mut().zip(group).for_each(|(code, w)| *code = line.code(*w, top) as u8);
                }
            });
        codes
    }

    /// The values of codes, `[rows, cols]`, as the encoding's reader computes them.
    pub fn values(&self, codes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; codes.len()];
        let (step, groups) = (self.spec.abq.group_columns(self.cols), self.spec.abq.groups(self.cols));
        values
            .par_chunks_exact_mut(self.cols)
            .zip(codes.par_chunks_exact(self.cols))
            .zip(self.lines.par_chunks_exact(groups))
            .for_each(|((values, codes), lines)| {
                for ((values, codes), line) in values.chunks_mut(step).zip(codes.chunks(step)).zip(lines) {
                    values.iter_mut().zip(codes).for_each(|(v, code)| *v = line.value(f32::from(*code)));
                }
            });
        values
    }

    /// Bits a weight, with everything that is stored.
    pub fn bits_per_weight(&self) -> f64 {
        let zero = match self.spec.zero {
            ZeroPoint::Real => self.offsets.bits(),
            ZeroPoint::Integer => 8,
            ZeroPoint::Symmetric => 0,
        };
        let grid = self.lines.len() as f64 * f64::from(self.scales.bits() + zero);
        f64::from(self.spec.abq.planes()) + grid / (self.rows * self.cols).max(1) as f64
    }

    /// Codes with these grids, as they are stored.
    ///
    /// # Errors
    /// Codes that are none of these grids.
    pub fn pack(&self, codes: &[u8]) -> Result<Packed<'static>> {
        let scales: Vec<f32> = self.lines.iter().map(|line| line.scale).collect();
        let zero = match self.spec.zero {
            ZeroPoint::Symmetric => Zero::Symmetric,
            ZeroPoint::Integer => {
                Zero::Integer(Cow::Owned(self.lines.iter().map(|line| line.zero as u8).collect()))
            }
            ZeroPoint::Real => {
                let offsets: Vec<f32> = self.lines.iter().map(|line| line.offset).collect();
                Zero::Real(Floats::round(self.offsets, &offsets)?)
            }
        };
        Packed::from_codes(self.spec.abq, self.cols, codes, Floats::round(self.scales, &scales)?, zero)
    }
}

/// The groups of a row with their columns.
fn groups_of(row: &[f32], step: usize) -> impl Iterator<Item = (&[f32], std::ops::Range<usize>)> {
    row.chunks(step).enumerate().map(move |(i, group)| (group, i * step..i * step + group.len()))
}
