//! What a matrix loses at each width: measured on a coarse grid, and scaled by how its error goes with the width.

use std::collections::BTreeMap;

use llmpress_calibrate::{Calibration, Measured as Matrix, Moments, Probe, Room, output_energy};
use llmpress_formats::Result;
use llmpress_model::Model;

use super::{WIDTHS, with_width};
use crate::{Grid, Rung, Spec};

/// The width at which distances are measured: far enough to be seen, near enough that they go with the square of the error.
const MEASURED: u8 = 3;
/// Rows of a matrix that tell how its error goes with the width.
const ROWS: usize = 64;
/// A matrix matters at least so much of what all do on average, weight by weight: what few tokens show may be too little.
const LEAST: f64 = 0.01;

/// What a matrix loses at each width.
pub(super) struct Sensitivity {
    pub(super) tensor: String,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Width, and the Jensen-Shannon divergence that it is expected to cost.
    pub(super) losses: Vec<(u8, f64)>,
}

/// Watches the measuring.
pub trait Measured {
    /// The weights whose matrices are to be measured.
    fn start(&mut self, weights: u64);

    /// So many more are.
    fn step(&mut self, weights: u64);
}

/// Puts each matrix on a coarse grid, and keeps what its error is at each width.
struct Coarse<'a> {
    specs: &'a BTreeMap<String, Spec>,
    /// Columns and errors of each matrix, in the order in which they come.
    errors: Vec<(usize, ByWidth)>,
    progress: &'a mut dyn Measured,
}

impl Probe for Coarse<'_> {
    fn form(&mut self, matrix: Matrix<'_>, number: usize) -> Result<Option<Vec<f32>>> {
        let Some(spec) = self.specs.get(matrix.tensor).filter(|_| number == 0) else { return Ok(None) };
        let (errors, coarse) = errors(matrix.weights, spec, matrix.moments)?;
        self.errors.push((matrix.moments.features(), errors));
        Ok(Some(coarse))
    }

    fn start(&mut self, weights: u64) {
        self.progress.start(weights);
    }

    fn step(&mut self, weights: u64) {
        self.progress.step(weights);
    }
}

/// Measures every matrix of a layer that is to be quantised. The model is as before at the end.
pub(super) fn measure(
    model: &mut Model,
    specs: &BTreeMap<String, Spec>,
    calibration: &Calibration,
    room: &Room,
    progress: &mut dyn Measured,
) -> Result<Vec<Sensitivity>> {
    let mut coarse = Coarse { specs, errors: Vec::new(), progress };
    let wanted = |tensor: &str| specs.contains_key(tensor);
    let found = llmpress_calibrate::measure(model, &wanted, calibration, room, &mut coarse)?;
    let of_matrix = |(found, (cols, errors)): (llmpress_calibrate::Sensitivity, (usize, ByWidth))| {
        let far = found.distances.first().copied().unwrap_or(0.0);
        let measured = errors.iter().find(|(width, _)| *width == MEASURED).map_or(0.0, |(_, e)| *e);
        let loss =
            |(width, error): (u8, f64)| (width, if measured > 0.0 { far * error / measured } else { 0.0 });
        Sensitivity {
            tensor: found.tensor,
            rows: found.weights as usize / cols.max(1),
            cols,
            losses: errors.into_iter().map(loss).collect(),
        }
    };
    let mut all: Vec<Sensitivity> = found.into_iter().zip(coarse.errors).map(of_matrix).collect();
    floor(&mut all);
    Ok(all)
}

/// What a matrix loses at each width.
type ByWidth = Vec<(u8, f64)>;

/// The errors of some rows at each width, and all weights on the coarse grid.
fn errors(weights: &[f32], spec: &Spec, moments: &Moments) -> Result<(ByWidth, Vec<f32>)> {
    let cols = moments.features().max(1);
    let h: Option<Vec<f32>> =
        (moments.tokens() > 0).then(|| moments.diagonal().iter().map(|&h| h as f32).collect());
    let on_grid = |weights: &[f32], width: u8| -> Result<Option<Vec<f32>>> {
        let spec = Spec { rung: Rung::Grid, ..with_width(spec, width) };
        if spec.check().is_err() {
            return Ok(None);
        }
        let grid = Grid::search(weights, cols, spec, h.as_deref())?;
        Ok(Some(grid.values(&grid.nearest(weights))))
    };
    let count = weights.len() / cols;
    let step = count.div_ceil(ROWS).max(1);
    let some: Vec<f32> = weights.chunks_exact(cols).step_by(step).flatten().copied().collect();
    let mut errors = Vec::new();
    for width in WIDTHS {
        let Some(mut values) = on_grid(&some, width)? else { continue };
        values.iter_mut().zip(&some).for_each(|(value, weight)| *value -= weight);
        let error = match h {
            Some(_) => output_energy(&values, moments)?,
            None => values.iter().map(|&v| f64::from(v) * f64::from(v)).sum(),
        };
        errors.push((width, error));
    }
    let coarse = on_grid(weights, MEASURED)?.unwrap_or_else(|| weights.to_vec());
    Ok((errors, coarse))
}

/// Raises what seems to matter next to nothing.
fn floor(all: &mut [Sensitivity]) {
    let at = |s: &Sensitivity| s.losses.iter().find(|(width, _)| *width == MEASURED).map_or(0.0, |(_, l)| *l);
    let weights: usize = all.iter().map(|s| s.rows * s.cols).sum();
    let mean = all.iter().map(at).sum::<f64>() / weights.max(1) as f64;
    for sensitivity in all {
        let least = LEAST * mean * (sensitivity.rows * sensitivity.cols) as f64;
        let found = at(sensitivity);
        if found < least {
            // Four times the error for a bit less, where nothing was measured.
            for (width, loss) in &mut sensitivity.losses {
                let by_width = 4f64.powi(i32::from(MEASURED) - i32::from(*width));
                *loss = if found > 0.0 { *loss * least / found } else { least * by_width };
            }
        }
    }
}
