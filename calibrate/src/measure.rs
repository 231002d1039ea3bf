//! What it costs a model to have one matrix in another form: how far its logits are then from what they were.
//!
//! ```text
//! the first windows --> logits of the model as it is
//! matrix by matrix: its forms, one at a time --> the layers from there on --> distance of the logits
//! ```
//!
//! Distances are Jensen-Shannon divergences, in nats a token.

use llmpress_formats::{Error, Result};
use llmpress_model::{Model, Panels, Skips, SubLayer, Unobserved};

use crate::{Calibration, Distance, DistanceKind, Extent, Moments, Room, Streams, Tap, distances, named};

/// The most windows over which distances are measured.
pub const MEASURED_WINDOWS: usize = 8;

/// A matrix that is measured.
#[derive(Clone, Copy, Debug)]
pub struct Measured<'a> {
    /// Its name.
    pub tensor: &'a str,
    /// Rows of as many columns as the moments have features.
    pub weights: &'a [f32],
    /// Squares of what each column multiplies, over the windows that are measured; of no tokens where an expert saw none.
    pub moments: &'a Moments,
}

/// Says what is to be measured, and watches.
pub trait Probe {
    /// A form of a matrix, from 0 on: weights of the same shape. `None` after the last one.
    ///
    /// # Errors
    /// What ends the measuring.
    fn form(&mut self, matrix: Measured<'_>, number: usize) -> Result<Option<Vec<f32>>>;

    /// The weights whose matrices are to be measured.
    fn start(&mut self, weights: u64) {
        let _ = weights;
    }

    /// So many more are.
    fn step(&mut self, weights: u64) {
        let _ = weights;
    }
}

/// How far the logits are with a matrix in each of its forms.
#[derive(Clone, Debug, PartialEq)]
pub struct Sensitivity {
    /// Its name.
    pub tensor: String,
    /// Its weights.
    pub weights: u64,
    /// The Jensen-Shannon divergence of each form, in nats a token.
    pub distances: Vec<f64>,
}

/// Measures the matrices of layers that `wanted` names, in the order in which the model reads them. The model is as before at the
/// end.
///
/// # Errors
/// NaN or infinite activations; what cannot be read; what `probe` says.
pub fn measure(
    model: &mut Model,
    wanted: &dyn Fn(&str) -> bool,
    calibration: &Calibration,
    room: &Room,
    probe: &mut dyn Probe,
) -> Result<Vec<Sensitivity>> {
    let layers = model.config().layers.len();
    let (calibration, reference) = Reference::of(model, calibration, room.memory)?;
    let mut streams = Streams::embed(model, &calibration, room)?;
    let of_layers: Vec<_> = (0..layers).map(|layer| model.inputs_of(layer)).collect();
    let mut total = 0u64;
    for tensor in of_layers.iter().flatten().flat_map(|input| &input.tensors).filter(|t| wanted(t)) {
        total = total.saturating_add(model.checkpoint().tensor(tensor)?.shape.iter().product::<u64>());
    }
    probe.start(total);
    let mut all = Vec::new();
    for (layer, inputs) in of_layers.iter().enumerate() {
        for site in [SubLayer::Attention(layer), SubLayer::Mlp(layer)] {
            // The streams are past the attention when its MLP is measured.
            let skips = match site {
                SubLayer::Attention(_) => Skips::new(),
                SubLayer::Mlp(_) => Skips::from([SubLayer::Attention(layer)]),
            };
            for input in inputs.iter().filter(|input| input.sub_layer == site) {
                if !input.tensors.iter().any(|tensor| wanted(tensor)) {
                    continue;
                }
                let tap = [(Tap::from(input), Extent::Diagonal)];
                let moments = streams.moments(model, &tap, &mut || ())?.pop();
                let moments = moments.ok_or_else(|| Error::Invalid("no moments were gathered".to_owned()))?;
                for tensor in input.tensors.iter().filter(|tensor| wanted(tensor)) {
                    let weights = model.weights(tensor)?;
                    let matrix = Measured { tensor, weights: &weights, moments: &moments };
                    let mut distances = Vec::new();
                    while let Some(form) =
                        probe.form(matrix, distances.len()).map_err(|e| named(tensor, e))?
                    {
                        model.replace(tensor, form)?;
                        let far = reference.distance(model, &mut streams, layer, &skips);
                        model.restore(tensor)?;
                        distances.push(far?);
                    }
                    let weights = weights.len() as u64;
                    all.push(Sensitivity { tensor: tensor.clone(), weights, distances });
                    probe.step(weights);
                }
            }
            streams.advance(model, site, &mut || ())?;
        }
    }
    Ok(all)
}

/// The original's logits of some windows.
struct Reference {
    windows: Vec<Panels>,
}

impl Reference {
    /// As many windows as fit.
    fn of(model: &Model, calibration: &Calibration, memory: u64) -> Result<(Calibration, Self)> {
        let one = (calibration.length() as u64).saturating_mul(model.vocab_size() as u64).saturating_mul(4);
        let most = MEASURED_WINDOWS;
        let fitting = usize::try_from(memory / one.max(1)).unwrap_or(most).clamp(1, most);
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
