//! Matrices of which two of four weights are kept: codes stand for those alone.
//!
//! ```text
//! dense weights, positions --> kept weights, [rows, cols / 2] --> grids, whose groups count kept columns
//! error feedback goes over all columns: what is not kept stays zero, and what that loses is fed back like any error
//! codes of kept weights --> sparse24 with values in abq
//! sums that lie beside --> eight bits each, before: what that loses of them is fed back, too
//! ```

use llmpress_calibrate::{Factor, Piece, feed_back};
use llmpress_formats::encoding::PackedUnit;
use llmpress_formats::encoding::abq::{self, Abq};
use llmpress_formats::encoding::lowrank::{self, Base, BaseRows, Sums};
use llmpress_formats::encoding::sparse24::{self, Kept, QUAD, positions};
use llmpress_formats::{Checkpoint, Encoding, Error, Result};
use rayon::prelude::*;

use crate::Grid;
use crate::gptq::Fed;
use crate::{Rung, Spec, ZeroPoint};

/// What is kept of a matrix, and the sums beside it.
#[derive(Clone, Debug)]
pub(crate) struct Halved {
    rows: usize,
    cols: usize,
    /// `[rows, ceil(cols / 8)]`.
    positions: Vec<u8>,
    beside: Option<Beside>,
}

#[derive(Clone, Debug)]
struct Beside {
    block: u32,
    sums: Sums<'static>,
    /// The same in single precision, `[rows, blocks]`.
    values: Vec<f32>,
}

impl Beside {
    /// Sums in eight bits, rounded to the nearest code; those that are codes already stay.
    fn eight_bits(packed: &lowrank::Packed<'static>) -> Result<Self> {
        let blocks = packed.blocks().max(1);
        let mut values = vec![0.0; packed.rows() * packed.blocks()];
        for (row, out) in values.chunks_exact_mut(blocks).enumerate() {
            packed.sums_row(row, out)?;
        }
        let block = packed.block() as u32;
        if let Sums::Abq(_) = packed.sums() {
            return Ok(Self { block, sums: packed.sums().clone(), values });
        }
        let grid = Grid::min_max(&values, blocks, KEPT_SUMS)?;
        let codes = grid.nearest(&values);
        Ok(Self { block, sums: Sums::Abq(grid.pack(&codes)?), values: grid.values(&codes) })
    }
}

/// How sums beside kept weights are quantised.
pub const KEPT_SUMS: Spec = Spec { abq: Abq::new(8), zero: ZeroPoint::Real, rung: Rung::Rtn, learn: None };

/// Whether two of four weights of a tensor are kept, by how it is stored.
pub(crate) fn is_halved(checkpoint: &Checkpoint, tensor: &str) -> Result<bool> {
    let info = checkpoint.tensor(tensor)?;
    Ok(info.is_stored()
        && match checkpoint.unit_of(info)?.encoding() {
            Encoding::Sparse24(_) => true,
            Encoding::Lowrank(lowrank) => matches!(lowrank.base, Base::Sparse24(_)),
            _ => false,
        })
}

/// Quantises what is kept of a tensor by its weights alone; `None` where it is stored otherwise.
///
/// # Errors
/// A rung that goes by a text, a setting that the encoding does not have, components that break their format.
pub fn quantise_kept(checkpoint: &Checkpoint, tensor: &str, spec: Spec) -> Result<Option<PackedUnit>> {
    let shape = &checkpoint.tensor(tensor)?.shape;
    let rows = abq::matrix(shape).unwrap_or_default().0;
    let Some(halved) = Halved::read(checkpoint, tensor, rows as usize)? else { return Ok(None) };
    let mut weights = vec![0.0; halved.rows * halved.cols];
    let out = weights.chunks_exact_mut(halved.cols.max(1)).enumerate();
    if halved.beside.is_some() {
        let packed = checkpoint.lowrank_rows(tensor, 0..rows)?;
        out.into_iter().try_for_each(|(row, out)| packed.decode_row(row, out))?;
    } else {
        let packed = checkpoint.sparse_rows(tensor, 0..rows)?;
        out.into_iter().try_for_each(|(row, out)| packed.decode_row(row, out))?;
    }
    let (grid, codes, _) = halved.nearest(weights, None, |weights, cols, h| match spec.rung {
        Rung::Rtn => Grid::min_max(weights, cols, spec),
        Rung::Grid => Grid::search(weights, cols, spec, h),
        Rung::Gptq => Err(Error::Invalid(format!("{} goes by a text", spec.rung))),
    })?;
    halved.pack(grid.pack(&codes)?).map(Some)
}

impl Halved {
    /// What is kept of a tensor; `None` where it is stored otherwise.
    ///
    /// # Errors
    /// Components that break their format.
    pub(crate) fn read(checkpoint: &Checkpoint, tensor: &str, rows: usize) -> Result<Option<Self>> {
        if !is_halved(checkpoint, tensor)? {
            return Ok(None);
        }
        let all = 0..rows as u64;
        let of = |packed: &sparse24::Packed<'_>, beside| Self {
            rows: packed.rows(),
            cols: packed.cols(),
            positions: packed.positions().to_vec(),
            beside,
        };
        let info = checkpoint.tensor(tensor)?;
        if let Encoding::Sparse24(_) = checkpoint.unit_of(info)?.encoding() {
            return Ok(Some(of(&checkpoint.sparse_rows(tensor, all)?, None)));
        }
        let packed = checkpoint.lowrank_rows(tensor, all)?;
        let beside = Beside::eight_bits(&packed)?;
        Ok(match packed.base() {
            BaseRows::Sparse24(base) => Some(of(base, Some(beside))),
            BaseRows::Raw(_) => None,
        })
    }

    /// Codes of the weights nearest to them, on grids that `make` makes of rows of kept weights, with their columns' squares:
    /// grids, codes of kept weights, and all weights that these stand for.
    pub(crate) fn nearest(
        &self,
        mut weights: Vec<f32>,
        h: Option<&[f32]>,
        make: impl Fn(&[f32], usize, Option<&[f32]>) -> Result<Grid>,
    ) -> Result<(Grid, Vec<u8>, Vec<f32>)> {
        self.without_sums(&mut weights);
        let (kept, h) = (self.kept(&weights), h.map(|h| self.kept(h)));
        let grid = make(&kept, self.cols / 2, h.as_deref())?;
        let codes = grid.nearest(&kept);
        let values = self.dense(&grid.values(&codes));
        Ok((grid, codes, values))
    }

    /// Takes the sums out of weights, so that the rest is what is kept and dropped.
    pub(crate) fn without_sums(&self, weights: &mut [f32]) {
        self.each_block(weights, |weight, sum| *weight -= sum);
    }

    fn each_block(&self, weights: &mut [f32], change: impl Fn(&mut f32, f32) + Sync) {
        let Some(Beside { block, values, .. }) = &self.beside else { return };
        let block = *block as usize;
        let blocks = self.cols.div_ceil(block.max(1)).max(1);
        let rows = weights.par_chunks_mut(self.cols.max(1)).zip(values.par_chunks(blocks));
        rows.for_each(|(row, sums)| {
            for (weights, sum) in row.chunks_mut(block.max(1)).zip(sums) {
                weights.iter_mut().for_each(|weight| change(weight, *sum));
            }
        });
    }

    /// What is kept of numbers of all columns, `[rows, cols]` or one row for all, as `[rows, cols / 2]`.
    pub(crate) fn kept(&self, dense: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols / 2];
        let one_for_all = dense.len() == self.cols;
        out.par_chunks_mut((self.cols / 2).max(1)).enumerate().for_each(|(row, out)| {
            let dense = if one_for_all { dense } else { &dense[row * self.cols..][..self.cols] };
            out.iter_mut().zip(self.columns(row)).for_each(|(out, column)| *out = dense[column]);
        });
        out
    }

    /// The columns that a row keeps.
    fn columns(&self, row: usize) -> impl Iterator<Item = usize> {
        let bytes = positions::row_bytes(self.cols);
        let of_row = &self.positions[row * bytes..][..bytes];
        (0..self.cols / QUAD).flat_map(move |quad| {
            // They were checked when they were read.
            let (first, second) = positions::places(positions::get(of_row, quad)).unwrap_or((0, 1));
            [quad * QUAD + first, quad * QUAD + second]
        })
    }

    /// All weights that kept values and sums stand for, `[rows, cols]`.
    pub(crate) fn dense(&self, kept: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        let rows = out.par_chunks_mut(self.cols.max(1)).zip(kept.par_chunks((self.cols / 2).max(1)));
        rows.enumerate().for_each(|(row, (out, kept))| {
            self.columns(row).zip(kept).for_each(|(column, value)| out[column] = *value);
        });
        self.each_block(&mut out, |weight, sum| *weight += sum);
        out
    }

    /// Error feedback on grids of the kept columns, over all columns of `weights`, from which sums are taken out. Returns codes
    /// of kept weights, `[rows, cols / 2]`.
    ///
    /// # Errors
    /// Sizes that do not go together.
    pub(crate) fn gptq(&self, weights: &[f32], grid: &Grid, factor: &Factor) -> Result<Fed> {
        let (rows, n) = (self.rows, self.cols);
        let fits = grid.rows() == rows && grid.cols() == n / 2 && factor.len() == n;
        if weights.len() != rows * n || !fits {
            return Err(Error::Invalid(format!(
                "{} weights and a Hessian of {} columns do not go with half of {rows} x {n}",
                weights.len(),
                factor.len()
            )));
        }
        // A quad has two kept columns, and groups hold whole quads.
        let step = 2 * grid.spec().abq.group_columns(n / 2);
        let groups = grid.spec().abq.groups(n / 2);
        let top = f32::from(grid.spec().top());
        let mut keeps = vec![false; rows * n];
        keeps.par_chunks_mut(n.max(1)).enumerate().for_each(|(row, keeps)| {
            self.columns(row).for_each(|column| keeps[column] = true);
        });
        let order = factor.order();
        let mut w = factor.ordered(weights);
        let mut chosen = vec![0u8; rows * n];
        let error = feed_back(&mut w, &mut chosen, factor, |piece| {
            let lines: Vec<_> = (0..groups).map(|group| grid.line(piece.row, group)).collect();
            let (first, width) = (piece.columns.start, piece.columns.len());
            let keeps = &keeps[piece.row * n..][..n];
            let Piece { weights: w, chosen, feedback, .. } = piece;
            let mut total = 0.0;
            for at in 0..w.len() {
                let column = order[first + at] as usize;
                let u = &factor.row(first + at)[..width - at];
                let value = if keeps[column] {
                    let line = &lines[column / step];
                    let code = line.code(w[at], top);
                    chosen[at] = code as u8;
                    line.value(code)
                } else {
                    0.0
                };
                let e = (w[at] - value) / u[0];
                feedback[at] = e;
                total += f64::from(e) * f64::from(e);
                w[at + 1..].iter_mut().zip(&u[1..]).for_each(|(w, u)| *w -= e * u);
            }
            total
        })?;
        drop(w);
        let all = factor.put_back(&chosen);
        let mut codes = vec![0; rows * n / 2];
        codes.par_chunks_mut((n / 2).max(1)).enumerate().for_each(|(row, out)| {
            out.iter_mut().zip(self.columns(row)).for_each(|(out, column)| *out = all[row * n + column]);
        });
        Ok(Fed { codes, error })
    }

    /// Codes of what is kept as they are stored.
    ///
    /// # Errors
    /// Codes of another matrix.
    pub(crate) fn pack(&self, codes: abq::Packed<'static>) -> Result<PackedUnit> {
        let base = sparse24::Packed::new(self.rows, self.cols, self.positions.clone(), Kept::Abq(codes))?;
        Ok(match &self.beside {
            None => PackedUnit::Sparse24(base),
            Some(Beside { block, sums, .. }) => {
                let base = BaseRows::Sparse24(base);
                PackedUnit::Lowrank(lowrank::Packed::new(*block, self.rows, self.cols, base, sums.clone())?)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use llmpress_calibrate::Order;

    use super::*;
    use crate::gptq::tests::{moments, noise, plain};

    fn halved(rows: usize, cols: usize) -> Halved {
        const MASKS: [u8; 6] = [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100];
        let mut positions = vec![0; rows * positions::row_bytes(cols)];
        for (row, out) in positions.chunks_mut(positions::row_bytes(cols)).enumerate() {
            let masks = (0..cols / QUAD).map(|quad| MASKS[(noise(row, quad).abs() * 6.0) as usize % 6]);
            super::positions::pack_row(masks.map(|mask| super::positions::of_mask(mask).unwrap()), out);
        }
        Halved { rows, cols, positions, beside: None }
    }

    #[test]
    fn feedback_into_what_is_kept_equals_the_plain_equations() {
        for (rows, n, bits, group, zero) in [
            (3, 4, 4, None, ZeroPoint::Real),
            (17, 100, 3, Some(32), ZeroPoint::Integer),
            (33, 152, 4, Some(64), ZeroPoint::Symmetric),
            (20, 260, 2, None, ZeroPoint::Real),
        ] {
            let halved = halved(rows, n);
            let weights: Vec<f32> = (0..rows * n).map(|i| noise(77, i) * noise(78, i)).collect();
            let m = moments(n, 2 * n + 3, 0);
            let diagonal: Vec<f32> = m.diagonal().iter().map(|&h| h as f32).collect();
            let h = m.full().unwrap().to_vec();
            let spec = Spec {
                abq: Abq { group_size: group, ..Abq::new(bits) },
                zero,
                rung: Rung::Gptq,
                learn: None,
            };
            let (kept, of_kept) = (halved.kept(&weights), halved.kept(&diagonal));
            let grid = Grid::search(&kept, n / 2, spec, Some(&of_kept)).unwrap();
            let factor = Factor::new(m, Order::Falling).unwrap();
            let fed = halved.gptq(&weights, &grid, &factor).unwrap();
            let top = f32::from(grid.spec().top());
            let plain = plain((&weights, n), &h, factor.order(), |row, column, w| {
                let Some(at) = halved.columns(row).position(|kept| kept == column) else { return (0, 0.0) };
                let line = grid.line(row, at / group.map_or(n / 2, |group| group as usize));
                let code = line.code(w, top);
                (code as u8, line.value(code))
            });
            let plain: Vec<f32> = plain.iter().map(|code| f32::from(*code)).collect();
            let fed: Vec<f32> = fed.codes.iter().map(|code| f32::from(*code)).collect();
            assert_eq!(fed, halved.kept(&plain), "{rows} x {n}, {bits} bits");
        }
    }

    #[test]
    fn grids_of_what_is_kept_go_by_the_squares_of_their_own_columns() {
        // Column 1 counts alone, of rows that keep it: its weight has no error.
        let halved = halved(40, 8);
        let weights: Vec<f32> = (0..320).map(|i| noise(3, i)).collect();
        let h = halved.kept(&[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let kept = halved.kept(&weights);
        let spec = Spec { abq: Abq::new(2), zero: ZeroPoint::Real, rung: Rung::Grid, learn: None };
        let grid = Grid::search(&kept, 4, spec, Some(&h)).unwrap();
        let values = halved.dense(&grid.values(&grid.nearest(&kept)));
        let mut rows = 0;
        for row in (0..40).filter(|row| halved.columns(*row).any(|column| column == 1)) {
            let (value, weight) = (values[row * 8 + 1], weights[row * 8 + 1]);
            assert!((value - weight).abs() < 0.01, "{value} {weight}");
            rows += 1;
        }
        assert!(rows > 10);
    }
}
