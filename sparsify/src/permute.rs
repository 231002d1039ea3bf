//! Channels in another order before masks are found, where the order is free: each in a place of a quad that loses less.
//!
//! ```text
//! gate, up --rows--> inner features --columns--> down      any order of all
//! v        --rows--> heads          --columns--> o         any order within a KV head, for all query heads that share it
//! ```
//!
//! What a weight is worth is its square times the mean square of what it multiplies in the model as it is (Wanda's score, squared); for
//! masks by magnitude its square alone. The function of the model stays.

use std::collections::BTreeMap;

use llmpress_calibrate::{Calibration, Extent, Moments, named};
use llmpress_formats::{Error, Order, PermutationSite, Result, Transform};
use llmpress_model::{Model, Observer, Panels, Reads, SharedInput, Skips, SubLayer};
use rayon::prelude::*;

use crate::reorder::reorder;
use crate::{QUAD, Rule, Sparsifier};

/// Takes how far it is.
pub trait Permuted {
    /// There are so many weights to find an order for.
    fn start(&mut self, weights: u64) {
        let _ = weights;
    }

    /// So many more are done.
    fn step(&mut self, weights: u64) {
        let _ = weights;
    }
}

/// The orders that a model's channels get: of what `down` and the output projection multiply, where they are to be made sparse.
///
/// # Errors
/// NaN or infinite activations or weights, by their matrix; what cannot be read.
pub fn permutations(
    model: &Model,
    hows: &BTreeMap<String, Sparsifier>,
    calibration: Option<&Calibration>,
    watch: &mut dyn Permuted,
) -> Result<Vec<Transform>> {
    let layers = model.config().layers.len();
    let inputs: Vec<SharedInput> = (0..layers)
        .flat_map(|layer| model.inputs_of(layer))
        .filter(|input| matches!(input.reads, Reads::Heads | Reads::Inner | Reads::ExpertInner(_)))
        .collect();
    let wanted = |input: &&SharedInput| input.tensors.iter().any(|tensor| permutes(hows, tensor).is_some());
    let weights_of = |input: &SharedInput| -> Result<u64> {
        let of = |tensor: &String| Ok(model.checkpoint().tensor(tensor)?.shape.iter().product::<u64>());
        input.tensors.iter().map(of).sum()
    };
    watch.start(inputs.iter().filter(wanted).map(weights_of).sum::<Result<u64>>()?);
    let by_text = |input: &&SharedInput| {
        let rule = |tensor| permutes(hows, tensor).is_some_and(|how| how.rule != Rule::Magnitude);
        input.tensors.iter().any(rule)
    };
    let moments = match calibration {
        Some(calibration) => gather(model, calibration, inputs.iter().filter(wanted).filter(by_text))?,
        None => BTreeMap::new(),
    };
    let mut list = Vec::new();
    for layer in 0..layers {
        let of_site = |site: SubLayer| inputs.iter().filter(move |input| input.sub_layer == site);
        let sites = [
            (PermutationSite::Value, SubLayer::Attention(layer)),
            (PermutationSite::Down, SubLayer::Mlp(layer)),
        ];
        for (site, sub_layer) in sites {
            // Experts stand one after the other.
            let (mut places, mut moved) = (Vec::new(), false);
            for input in of_site(sub_layer) {
                let order = match input.tensors.first().filter(|_| wanted(&input)) {
                    Some(tensor) => {
                        let order = order(model, input, tensor, moments.get(tensor))?;
                        watch.step(weights_of(input)?);
                        order
                    }
                    None => None,
                };
                moved |= order.is_some();
                places.extend(order.unwrap_or_else(|| (0..channels(model, input) as u32).collect()));
            }
            if moved {
                list.push(Transform::Permutation { site, layer, order: Order::new(places) });
            }
        }
    }
    model.folds(&list)?;
    Ok(list)
}

/// How a tensor is to be made sparse, if its channels may be reordered first.
fn permutes<'a>(hows: &'a BTreeMap<String, Sparsifier>, tensor: &String) -> Option<&'a Sparsifier> {
    hows.get(tensor).filter(|how| how.permute)
}

/// How many channels of an input have a place of their own: values of all KV heads, or all that there are.
fn channels(model: &Model, input: &SharedInput) -> usize {
    let c = model.config();
    if input.reads == Reads::Heads { c.kv_heads * c.head_dim } else { input.features }
}

/// What some inputs are in a text, by the first tensor that multiplies each.
fn gather<'a>(
    model: &Model,
    calibration: &Calibration,
    inputs: impl Iterator<Item = &'a SharedInput>,
) -> Result<BTreeMap<String, Moments>> {
    let mut of = BTreeMap::new();
    for input in inputs {
        if let Some(tensor) = input.tensors.first() {
            of.insert(tensor.clone(), Moments::new(input.features, Extent::Diagonal)?);
        }
    }
    let mut gathered = Gathered { of, failed: None };
    let mut cache = model.cache(calibration.length());
    for ids in calibration.windows() {
        cache.clear();
        cache.announce(ids.len());
        model.hidden(ids, &mut cache, &Skips::new(), &mut gathered)?;
        if let Some(error) = gathered.failed.take() {
            return Err(error);
        }
    }
    Ok(gathered.of.into_iter().map(|(tensor, moments)| (tensor, moments.close())).collect())
}

struct Gathered {
    of: BTreeMap<String, Moments>,
    failed: Option<Error>,
}

impl Observer for Gathered {
    fn linear_input(&mut self, weight: &str, input: &Panels) {
        let Some(moments) = self.of.get_mut(weight) else { return };
        if let Err(error) = moments.add(input) {
            self.failed.get_or_insert(named(weight, error));
        }
    }
}

/// The order of what one matrix multiplies; none where it stays.
fn order(
    model: &Model,
    input: &SharedInput,
    tensor: &str,
    moments: Option<&Moments>,
) -> Result<Option<Vec<u32>>> {
    let weights = model.weights(tensor)?;
    let cols = input.features;
    // An expert that no token went to says nothing.
    let mean_squares = moments.filter(|moments| moments.tokens() > 0).map(Moments::diagonal);
    let worth = |at: usize, column: usize| {
        let w = f64::from(weights[at]);
        w * w * mean_squares.map_or(1.0, |squares| squares[column])
    };
    let most = weights.iter().enumerate().map(|(at, _)| worth(at, at % cols.max(1)));
    let most = most.fold(0.0, |most: f64, worth| if worth > most || worth.is_nan() { worth } else { most });
    if !most.is_finite() {
        let what = "holds NaN or infinite weights, or multiplies what is far too large: no order of its columns can be found";
        return Err(Error::Invalid(format!("{tensor}: {what}")));
    }
    if most == 0.0 {
        return Ok(None);
    }
    let rows = weights.len() / cols;
    // As no greater than 1.
    let scores = |columns: &[usize]| -> Vec<f32> {
        let mut scores = vec![0f32; rows * columns.len()];
        scores.par_chunks_mut(rows).zip(columns).for_each(|(scores, &column)| {
            let of_row =
                |(row, score): (usize, &mut f32)| *score = (worth(row * cols + column, column) / most) as f32;
            scores.iter_mut().enumerate().for_each(of_row);
        });
        scores
    };
    if input.reads != Reads::Heads {
        return Ok(reorder(&scores(&(0..cols).collect::<Vec<_>>()), rows));
    }
    let c = model.config();
    let (d, group) = (c.head_dim, c.heads / c.kv_heads);
    if d % QUAD != 0 {
        // Quads would reach from head to head.
        return Ok(None);
    }
    let (mut places, mut moved) = (Vec::new(), false);
    for head in 0..c.kv_heads {
        // A channel's scores in all query heads that share it.
        let columns = (0..d).flat_map(|i| (0..group).map(move |query| (head * group + query) * d + i));
        let order = reorder(&scores(&columns.collect::<Vec<_>>()), rows * group);
        moved |= order.is_some();
        let first = (head * d) as u32;
        places.extend(order.unwrap_or_else(|| (0..d as u32).collect()).into_iter().map(|i| first + i));
    }
    Ok(moved.then_some(places))
}
