//! One input's matrices: from weights and second moments to finished units.
//!
//! ```text
//! moments --> factor, once
//! drift   --> weights to aim at -- diagonal of the moments --> grid -- factor --> codes -- moments --> polished
//! two of four kept: the grids are of those, nothing is polished (`kept.rs`)
//! ```

use std::time::Instant;

use llmpress_calibrate::{
    Factor, MOST_COLUMNS, Moments, Order, energy, named, retarget, share_of_drift, too_few,
};
use llmpress_formats::Result;
use llmpress_formats::encoding::PackedUnit;

use crate::alone::{self, Alone};
use crate::kept::Halved;
use crate::polish::{Damped, polish};
use crate::report::{Finished, Learned, Report};
use crate::{Grid, Rung, Spec, gptq};

/// Rounds of polishing: later ones gain next to nothing.
const ROUNDS: usize = 4;

/// A matrix that is to be quantised, with its weights, rows of as many columns as the input has features.
pub(crate) struct Matrix {
    pub(crate) tensor: String,
    pub(crate) spec: Spec,
    pub(crate) weights: Vec<f32>,
    /// What is kept of it, where that is two of four.
    pub(crate) halved: Option<Halved>,
    /// How it is learned by itself, where it is.
    pub(crate) alone: Option<Alone>,
}

/// A finished tensor, and its new weights.
pub(crate) type Done = (Finished, Vec<f32>);

/// What is known of an input.
#[derive(Default)]
pub(crate) struct Input {
    pub(crate) moments: Option<Moments>,
    /// D of `drift.rs`, `[features, features]`.
    pub(crate) drift: Option<Vec<f32>>,
}

/// A matrix in work.
struct InWork {
    matrix: Matrix,
    rung: Rung,
    instead: Option<String>,
    /// Of its outputs.
    energy: f64,
    seconds: f64,
}

/// Quantises matrices that multiply the same `features`. Returns each with its new weights. Moments are needed where a
/// rung goes by them. `progress` is told what learning has done of its effort.
///
/// # Errors
/// Weights that are not finite, a setting that the encoding does not have, a Hessian that does not factor: by tensor.
pub(crate) fn quantise(
    matrices: Vec<Matrix>,
    features: usize,
    input: Input,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Done>> {
    let Input { moments, drift } = input;
    let few = moments.as_ref().and_then(too_few);
    let h: Option<Vec<f32>> = moments
        .as_ref()
        .filter(|_| few.is_none())
        .map(|moments| moments.diagonal().iter().map(|&h| h as f32).collect());
    let begin = |matrix: Matrix| {
        let started = Instant::now();
        let (mut rung, mut instead) = (matrix.spec.rung, None);
        if rung == Rung::Gptq && h.is_none() {
            rung = Rung::Grid;
            instead = Some(few.clone().unwrap_or_else(|| "no calibration tokens go through it".to_owned()));
        }
        let energy = energy(&matrix.weights, moments.as_ref())?;
        Ok(InWork { matrix, rung, instead, energy, seconds: started.elapsed().as_secs_f64() })
    };
    let works = matrices.into_iter().map(begin).collect::<Result<Vec<_>>>()?;
    let (fed, nearest): (Vec<_>, Vec<_>) =
        works.into_iter().enumerate().partition(|(_, work)| work.rung == Rung::Gptq);
    let mut finished = Vec::new();
    for (index, work) in nearest {
        let done = round_to_nearest(work, features, h.as_deref(), moments.as_ref());
        finished.push((index, done?));
    }
    if let (Some(moments), Some(h), false) = (moments, &h, fed.is_empty()) {
        finished.extend(feed_back(fed, (moments, drift), h, progress)?);
    }
    finished.sort_by_key(|(index, _)| *index);
    Ok(finished.into_iter().map(|(_, finished)| finished).collect())
}

/// The rungs that take each weight by itself.
fn round_to_nearest(
    mut work: InWork,
    features: usize,
    h: Option<&[f32]>,
    moments: Option<&Moments>,
) -> Result<Done> {
    let started = Instant::now();
    let spec = Spec { rung: work.rung, ..work.matrix.spec };
    let tensor = &work.matrix.tensor;
    let make = |weights: &[f32], cols: usize, h: Option<&[f32]>| match work.rung {
        Rung::Rtn => Grid::min_max(weights, cols, spec),
        Rung::Grid | Rung::Gptq => Grid::search(weights, cols, spec, h),
    };
    let (grid, codes, values) = match &work.matrix.halved {
        None => {
            let grid = make(&work.matrix.weights, features, h).map_err(|e| named(tensor, e))?;
            let codes = grid.nearest(&work.matrix.weights);
            let values = grid.values(&codes);
            (grid, codes, values)
        }
        Some(halved) => {
            let weights = work.matrix.weights.clone();
            halved.nearest(weights, h, make).map_err(|e| named(tensor, e))?
        }
    };
    work.matrix.weights.iter_mut().zip(&values).for_each(|(w, v)| *w -= v);
    let error = energy(&work.matrix.weights, moments)?;
    let tokens = moments.map_or(0, Moments::tokens);
    finish(work, &grid, &codes, values, Outcome { error, tokens, damping: None, started })
}

/// Error feedback on a searched grid, towards weights that make up for drift, and polishing: of all matrices on one
/// factor.
fn feed_back(
    works: Vec<(usize, InWork)>,
    (moments, drift): (Moments, Option<Vec<f32>>),
    h: &[f32],
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<(usize, Done)>> {
    let started = Instant::now();
    let (tokens, features) = (moments.tokens(), moments.features());
    let first = works.first().map_or("", |(_, work)| work.matrix.tensor.as_str());
    let (factor, moments) = if features <= MOST_COLUMNS {
        (Factor::new(&moments, Order::Falling), Some(moments))
    } else {
        (Factor::new(moments, Order::Falling), None)
    };
    let factor = factor.map_err(|e| named(first, e))?;
    let damped = moments.as_ref().and_then(|moments| Damped::new(moments, &factor));
    let share = started.elapsed().as_secs_f64() / works.len() as f64;
    let one = |(index, mut work): (usize, InWork)| {
        let started = Instant::now();
        work.seconds += share;
        let weights = &mut work.matrix.weights;
        let named = |e| named(&work.matrix.tensor, e);
        if let Some(drift) = &drift {
            retarget(weights, drift, &factor, share_of_drift(tokens, features));
        }
        let spec = Spec { rung: Rung::Gptq, ..work.matrix.spec };
        if let Some(halved) = &work.matrix.halved {
            halved.without_sums(weights);
            let (kept, h) = (halved.kept(weights), halved.kept(h));
            let grid = Grid::search(&kept, features / 2, spec, Some(&h)).map_err(named)?;
            let fed = halved.gptq(weights, &grid, &factor).map_err(named)?;
            *weights = Vec::new();
            let values = halved.dense(&grid.values(&fed.codes));
            let outcome = Outcome { error: fed.error, tokens, damping: Some(factor.damping()), started };
            return Ok((index, finish(work, &grid, &fed.codes, values, outcome)?));
        }
        let mut grid = Grid::search(weights, features, spec, Some(h)).map_err(named)?;
        let mut fed = gptq(weights, &grid, &factor).map_err(named)?;
        if let Some(damped) = &damped {
            fed.error = polish(weights, &mut grid, &mut fed.codes, damped, ROUNDS);
        }
        let mut learned = None;
        if let (Some(alone), Some(damped)) = (work.matrix.alone, &damped) {
            let found = alone::learn(weights, &mut grid, &mut fed.codes, damped, alone, progress);
            learned = Some(of_outputs(found, work.energy));
        }
        *weights = Vec::new();
        let values = grid.values(&fed.codes);
        let outcome = Outcome { error: fed.error, tokens, damping: Some(factor.damping()), started };
        let mut done = finish(work, &grid, &fed.codes, values, outcome)?;
        done.0.report.learned = learned;
        Ok((index, done))
    };
    works.into_iter().map(one).collect()
}

/// Errors before and after learning as shares of what comes out.
fn of_outputs((before, after): (f64, f64), energy: f64) -> Learned {
    let share = |error: f64| if energy > 0.0 { error / energy } else { error };
    Learned {
        before: share(before),
        after: Some(share(after)).filter(|after| after.is_finite()),
        taken: after < before,
    }
}

/// Whether error feedback makes up for what the layers before have lost, by a text of so many tokens: that takes the original's
/// streams beside those of the model as it is quantised so far.
pub fn makes_up(tokens: u128, features: u64) -> bool {
    let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
    features <= MOST_COLUMNS as u64 && share_of_drift(tokens, features as usize) > 0.0
}

/// What the report says of the work.
struct Outcome {
    error: f64,
    tokens: usize,
    damping: Option<f64>,
    started: Instant,
}

fn finish(work: InWork, grid: &Grid, codes: &[u8], values: Vec<f32>, outcome: Outcome) -> Result<Done> {
    let InWork { matrix, rung, instead, energy, seconds } = work;
    let unit = grid.pack(codes).and_then(|packed| match &matrix.halved {
        None => Ok(PackedUnit::Abq(packed)),
        Some(halved) => halved.pack(packed),
    });
    let unit = unit.map_err(|e| named(&matrix.tensor, e))?;
    let report = Report {
        tensor: matrix.tensor.clone(),
        rung,
        instead,
        tokens: outcome.tokens,
        damping: outcome.damping,
        learned: None,
        unlearned: None,
        relative_error: if energy > 0.0 { outcome.error / energy } else { 0.0 },
        bits_per_weight: unit.bits_per_weight(),
        seconds: seconds + outcome.started.elapsed().as_secs_f64(),
    };
    Ok((Finished { tensor: matrix.tensor, unit, report }, values))
}
