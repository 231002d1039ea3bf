//! What it costs a model to have one matrix on a coarse grid.

use std::collections::BTreeMap;

use llmpress_calibrate::{
    Calibration, Distance, DistanceKind, Extent, Moments, Room, Streams, Tap, distances, output_energy,
};
use llmpress_formats::{Error, Result};
use llmpress_model::{Model, Panels, Skips, SubLayer, Unobserved};

use super::{WIDTHS, with_width};
use crate::{Grid, Rung, Spec};

/// The width at which distances are measured: far enough to be seen, near enough that they go with the square of the error.
const MEASURED: u8 = 3;
/// Rows of a matrix that tell how its error goes with the width.
const ROWS: usize = 64;
/// The most windows over which distances are measured.
const WINDOWS: usize = 8;
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

/// The original's logits of some windows.
struct Reference {
    windows: Vec<Panels>,
}

impl Reference {
    /// As many windows as fit.
    fn of(model: &Model, calibration: &Calibration, memory: u64) -> Result<(Calibration, Self)> {
        let one = (calibration.length() as u64).saturating_mul(model.vocab_size() as u64).saturating_mul(4);
        let fitting = usize::try_from(memory / one.max(1)).unwrap_or(WINDOWS).clamp(1, WINDOWS);
        let calibration = calibration.first(fitting);
        let mut cache = model.cache(calibration.length());
        let one = |ids: &Vec<u32>| {
            cache.clear();
            cache.announce(ids.len());
            model.logits(&model.hidden(ids, &mut cache, &Skips::new(), &mut Unobserved)?)
        };
        let windows = calibration.windows().iter().map(one).collect::<Result<_>>()?;
        Ok((calibration, Self { windows }))
    }

    /// How far the logits are, if the layers from `first` on run on these streams.
    fn distance(&self, model: &Model, streams: &mut Streams, first: usize, skips: &Skips) -> Result<f64> {
        let mut cache = model.cache(streams.tokens());
        let mut total = Distance::default();
        let mut h = Panels::default();
        for (window, reference) in self.windows.iter().enumerate() {
            streams.get(window, &mut h)?;
            cache.clear();
            cache.announce(h.tokens());
            model.run_layers(
                first..model.config().layers.len(),
                &mut h,
                &mut cache,
                skips,
                &mut Unobserved,
            )?;
            let logits = model.logits(&model.last_norm(&h)?)?;
            total.add(&distances(DistanceKind::JensenShannon, reference, &logits));
        }
        Ok(total.value(DistanceKind::JensenShannon))
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
    let layers = model.config().layers.len();
    let (calibration, reference) = Reference::of(model, calibration, room.memory)?;
    let mut streams = Streams::embed(model, &calibration, room)?;
    let mut all = Vec::new();
    let of_layers: Vec<_> = (0..layers).map(|layer| model.inputs_of(layer)).collect();
    let mut total = 0;
    for tensor in
        of_layers.iter().flatten().flat_map(|input| &input.tensors).filter(|t| specs.contains_key(*t))
    {
        total += model.checkpoint().tensor(tensor)?.shape.iter().product::<u64>();
    }
    progress.start(total);
    for (layer, inputs) in of_layers.iter().enumerate() {
        for site in [SubLayer::Attention(layer), SubLayer::Mlp(layer)] {
            // The streams are past the attention when its MLP is measured.
            let skips = match site {
                SubLayer::Attention(_) => Skips::new(),
                SubLayer::Mlp(_) => Skips::from([SubLayer::Attention(layer)]),
            };
            for input in inputs.iter().filter(|input| input.sub_layer == site) {
                if !input.tensors.iter().any(|tensor| specs.contains_key(tensor)) {
                    continue;
                }
                let tap = [(Tap::from(input), Extent::Diagonal)];
                let moments = streams.moments(model, &tap, &mut || ())?.pop();
                let moments = moments.ok_or_else(|| Error::Invalid("no moments were gathered".to_owned()))?;
                for tensor in &input.tensors {
                    let Some(spec) = specs.get(tensor) else { continue };
                    let weights = model.weights(tensor)?;
                    let named = |e| llmpress_calibrate::named(tensor, e);
                    let (errors, coarse) = errors(&weights, spec, &moments).map_err(named)?;
                    model.replace(tensor, coarse)?;
                    let far = reference.distance(model, &mut streams, layer, &skips);
                    model.restore(tensor)?;
                    let far = far?;
                    let measured =
                        errors.iter().find(|(width, _)| *width == MEASURED).map_or(0.0, |(_, e)| *e);
                    let loss = |&(width, error): &(u8, f64)| {
                        (width, if measured > 0.0 { far * error / measured } else { 0.0 })
                    };
                    all.push(Sensitivity {
                        tensor: tensor.clone(),
                        rows: weights.len() / input.features.max(1),
                        cols: input.features,
                        losses: errors.iter().map(loss).collect(),
                    });
                    progress.step(weights.len() as u64);
                }
            }
            streams.advance(model, site, &mut || ())?;
        }
    }
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
