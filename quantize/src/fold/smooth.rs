//! Diagonal scaling (SmoothQuant, equation 4, at a half; abq.md's starting point).
//!
//! ```text
//! producer / s --> x / s --> W s of all readers      s = sqrt(largest |x| / largest |W|) of a channel
//! norm' = round(norm / s) in its dtype; s = norm / norm'
//! ```

use std::collections::BTreeMap;

use llmpress_calibrate::Calibration;
use llmpress_formats::{Dtype, Error, Result, ScaleSite, Scales, Transform};
use llmpress_model::{Model, Observer, Panels, Reads, SharedInput, Skips, SubLayer};

/// The least and the greatest scale.
const RANGE: [f32; 2] = [1e-5, 1e5];

/// Where scales are wanted: not where a rotation spreads outliers already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Smooth {
    /// Between norms and what reads them.
    pub norms: bool,
    /// Between values and the output projection.
    pub value: bool,
    /// Between the up and the down projection.
    pub up: bool,
}

impl Smooth {
    /// Everywhere.
    pub const ALL: Self = Self { norms: true, value: true, up: true };
}

/// The transformations of a model that smooth it, from what its linears multiply in some windows: one pass over them. Where its family
/// cannot have a scale there is none.
///
/// # Errors
/// A family that can have none of them, by name; weights that cannot be read; an id beyond the vocabulary.
pub fn smoothing(model: &Model, calibration: &Calibration, smooth: Smooth) -> Result<Vec<Transform>> {
    let layers = model.config().layers.len();
    let inputs: Vec<SharedInput> = (0..layers).flat_map(|layer| model.inputs_of(layer)).collect();
    let wanted = inputs.iter().filter(|input| match input.reads {
        Reads::Normed | Reads::ExpertTokens(_) => smooth.norms,
        Reads::Heads => smooth.value,
        Reads::Inner | Reads::ExpertInner(_) => smooth.up,
    });
    let first = |input: &SharedInput| input.tensors.first().cloned();
    let of = wanted.filter_map(|input| Some((first(input)?, vec![0f32; input.features])));
    let mut largest = Largest { of: of.collect() };
    let mut cache = model.cache(calibration.length());
    for ids in calibration.windows() {
        cache.clear();
        cache.announce(ids.len());
        model.hidden(ids, &mut cache, &Skips::new(), &mut largest)?;
    }
    let mut list = Vec::new();
    for layer in 0..layers {
        let of_layer = |site: SubLayer| inputs.iter().filter(move |input| input.sub_layer == site);
        let (attention, mlp) = (SubLayer::Attention(layer), SubLayer::Mlp(layer));
        let norms = [(ScaleSite::AttentionNorm, attention), (ScaleSite::MlpNorm, mlp)];
        for ((site, sub_layer), norm) in norms.into_iter().zip(model.norms(layer)) {
            let readers: Vec<&SharedInput> = of_layer(sub_layer)
                .filter(|input| matches!(input.reads, Reads::Normed | Reads::ExpertTokens(_)))
                .collect();
            if let Some(norm) = norm.filter(|_| smooth.norms && !readers.is_empty()) {
                let scales = channels(model, &largest, &readers)?;
                let scales = stored(model, sub_layer, norm, &scales)?;
                list.push(Transform::Scale { site, layer, scales: Scales::new(&scales) });
            }
        }
        if smooth.value {
            for input in of_layer(attention).filter(|input| input.reads == Reads::Heads) {
                let scales = by_kv_head(model, &largest, input)?;
                list.push(Transform::Scale { site: ScaleSite::Value, layer, scales: Scales::new(&scales) });
            }
        }
        if smooth.up {
            // Experts stand one after the other.
            let inner =
                of_layer(mlp).filter(|input| matches!(input.reads, Reads::Inner | Reads::ExpertInner(_)));
            let mut scales = Vec::new();
            for input in inner {
                scales.extend(channels(model, &largest, &[input])?);
            }
            if !scales.is_empty() {
                list.push(Transform::Scale { site: ScaleSite::Up, layer, scales: Scales::new(&scales) });
            }
        }
    }
    let refused = list.iter().find_map(|transform| model.refuses(transform));
    list.retain(|transform| model.refuses(transform).is_none());
    if let Some(why) = refused.filter(|_| list.is_empty()) {
        return Err(Error::unsupported(model.checkpoint().root(), None, format!("smooth: {why}")));
    }
    model.folds(&list)?;
    Ok(list)
}

/// The largest |x| of every feature of some inputs, by the first tensor that multiplies them.
struct Largest {
    of: BTreeMap<String, Vec<f32>>,
}

impl Observer for Largest {
    fn linear_input(&mut self, weight: &str, input: &Panels) {
        let Some(largest) = self.of.get_mut(weight) else { return };
        for panel in 0..input.count() {
            let rows = input.panel(panel).chunks_exact(input.width(panel));
            for (largest, row) in largest.iter_mut().zip(rows) {
                *largest = row.iter().fold(*largest, |most, x| if x.abs() > most { x.abs() } else { most });
            }
        }
    }
}

impl Largest {
    fn of(&self, input: &SharedInput) -> &[f32] {
        input.tensors.first().and_then(|tensor| self.of.get(tensor)).map_or(&[], Vec::as_slice)
    }
}

/// The largest |W| of every column of the matrices that multiply an input.
fn largest_weights(model: &Model, input: &SharedInput) -> Result<Vec<f32>> {
    let mut largest = vec![0f32; input.features];
    for tensor in &input.tensors {
        for row in model.weights(tensor)?.chunks_exact(input.features.max(1)) {
            for (largest, w) in largest.iter_mut().zip(row) {
                *largest = if w.abs() > *largest { w.abs() } else { *largest };
            }
        }
    }
    Ok(largest)
}

fn scale(act: f32, weight: f32) -> f32 {
    let s = (act / weight).sqrt();
    // Nothing to share where a side is 0.
    if act > 0.0 && weight > 0.0 && s.is_finite() { s.clamp(RANGE[0], RANGE[1]) } else { 1.0 }
}

/// The scales of channels that several inputs are made of in the same way.
fn channels(model: &Model, largest: &Largest, inputs: &[&SharedInput]) -> Result<Vec<f32>> {
    let features = inputs.first().map_or(0, |input| input.features);
    let (mut act, mut weight) = (vec![0f32; features], vec![0f32; features]);
    for input in inputs {
        let weights = largest_weights(model, input)?;
        for (all, one) in [(&mut act, largest.of(input)), (&mut weight, weights.as_slice())] {
            all.iter_mut().zip(one).for_each(|(all, one)| *all = all.max(*one));
        }
    }
    Ok(act.iter().zip(&weight).map(|(a, w)| scale(*a, *w)).collect())
}

/// The scales of values: those of all heads that share a KV head are one.
fn by_kv_head(model: &Model, largest: &Largest, input: &SharedInput) -> Result<Vec<f32>> {
    let c = model.config();
    let (d, group) = (c.head_dim, c.heads / c.kv_heads);
    let weights = largest_weights(model, input)?;
    let most = |of: &[f32], channel: usize| {
        let heads = channel / d * group..(channel / d + 1) * group;
        heads.filter_map(|head| of.get(head * d + channel % d)).fold(0f32, |a, b| a.max(*b))
    };
    Ok((0..c.kv_heads * d).map(|i| scale(most(largest.of(input), i), most(&weights, i))).collect())
}

/// The scales that a norm takes exactly: what it was over what it is when it is stored.
fn stored(model: &Model, sub_layer: SubLayer, norm: &[f32], scales: &[f32]) -> Result<Vec<f32>> {
    let tensor = model.norm_tensor(sub_layer);
    let tensor = tensor.ok_or_else(|| Error::Invalid(format!("{sub_layer:?} has no norm")))?;
    let dtype = model.checkpoint().tensor(tensor)?.dtype;
    let offset = if model.config().norm_offset() { 1.0 } else { 0.0 };
    let one = |(n, s): (&f32, &f32)| {
        let after = round(dtype, n / s - offset) + offset;
        let exact = n / after;
        if *n != 0.0 && after != 0.0 && exact.is_finite() && exact != 0.0 { exact } else { 1.0 }
    };
    Ok(norm.iter().zip(scales).map(one).collect())
}

/// The nearest value of a dtype, ties to even.
pub(crate) fn round(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(value).to_f32(),
        Dtype::F16 => half::f16::from_f32(value).to_f32(),
        _ => value,
    }
}
