//! Which tensors a transformation changes, family by family.
//!
//! ```text
//! residual          every reader of an input norm: columns    o, down: rows and biases
//! value             v: rows of each KV head, bias             o: columns of each head
//! down              (online)                                  down: columns
//! attention_norm    the norm                                  q, k, v (or the matrix of all): columns
//! mlp_norm          the norm                                  gate, up (of all experts), router: columns
//! up                up: rows, bias (or its half of gate_up)   down: columns
//! permuted value    v: rows of each KV head, bias             o: columns of each head
//! permuted down     gate, up: rows, biases                    down: columns
//! ```

use std::sync::Arc;

use llmpress_formats::blueprint::{MlpNames, NormKind};
use llmpress_formats::{Error, Order, PermutationSite, Result, RotationSite, ScaleSite, Transform};
use llmpress_kernels::cpu::Hadamard;

use super::steps::Step;
use super::{Folds, Target};
use crate::attention::{Attention, Projections};
use crate::decoder::SubLayerParts;
use crate::linear::Linear;
use crate::mlp::{GateUp, Gated, Mlp};
use crate::{Model, ModelConfig, online};

/// Refuses what a family cannot have.
pub(crate) fn check_support(config: &ModelConfig, transform: &Transform) -> Result<(), String> {
    let blueprint = config.blueprint;
    let name = blueprint.name;
    let residual = matches!(transform, Transform::Rotation { site: RotationSite::Residual, .. });
    let of_norm =
        matches!(transform, Transform::Scale { site: ScaleSite::AttentionNorm | ScaleSite::MlpNorm, .. });
    let up = matches!(transform, Transform::Scale { site: ScaleSite::Up, .. });
    let folded = !matches!(transform, Transform::Quantize { .. });
    if folded && blueprint.transposed {
        return Err(format!(
            "{name} models store their matrices transposed, which nothing is folded into yet"
        ));
    }
    if residual && config.post_norms() {
        return Err(format!(
            "{name} models norm the outputs of attention and MLP, which a rotation of the residual stream does not commute with; \
             rotations of value and down are possible"
        ));
    }
    if (residual || of_norm) && matches!(blueprint.norm, NormKind::Layer { .. }) {
        return Err(format!(
            "{name} models have layer norms, which take a mean away: neither scales nor rotations of the residual stream are folded \
             into their readers; rotations of value and down are possible"
        ));
    }
    if of_norm && (blueprint.names.attention_norm.is_none() || blueprint.names.mlp_norm.is_none()) {
        return Err(format!(
            "{name} models do not norm what attention and MLP read: there is no norm to scale"
        ));
    }
    if (residual || of_norm) && blueprint.parallel {
        return Err(format!(
            "attention and MLP of {name} models read the same norm, which is not folded into both yet; rotations of value and down \
             are possible"
        ));
    }
    if up && matches!(blueprint.names.mlp, MlpNames::Plain(_)) {
        return Err(format!("the MLP of {name} models has no gate: no scale goes through its function"));
    }
    Ok(())
}

/// What a list does to each tensor.
pub(super) fn folds(model: &Model, transforms: &[Transform]) -> Result<Folds> {
    let mut builder = Builder { model, folds: Folds::default() };
    for transform in transforms {
        let name = transform.name();
        let refused =
            |what: String| Error::unsupported(model.checkpoint.root(), None, format!("{name}: {what}"));
        check_support(model.config(), transform).map_err(refused)?;
        let misfit = |what: String| {
            Error::corrupt(
                model.checkpoint.root(),
                None,
                format!("{name}: {what}: it was made for another model"),
            )
        };
        match transform {
            Transform::Rotation { site, rotation } => {
                let by = Arc::new(online::hadamard(rotation).map_err(|e| misfit(e.to_string()))?);
                builder.rotation(*site, &by).map_err(misfit)?;
            }
            Transform::Scale { site, layer, scales } => {
                builder.scale(*site, *layer, scales.values().into()).map_err(misfit)?;
            }
            Transform::Permutation { site, layer, order } => {
                builder.permutation(*site, *layer, order).map_err(misfit)?;
            }
            Transform::Quantize { .. } => {}
        }
    }
    Ok(builder.folds)
}

struct Builder<'a> {
    model: &'a Model,
    folds: Folds,
}

type Checked = Result<(), String>;

fn check_size(what: &str, expected: usize, found: usize) -> Checked {
    if expected == found { Ok(()) } else { Err(format!("has {found} features where {what} has {expected}")) }
}

impl Builder<'_> {
    fn rotation(&mut self, site: RotationSite, by: &Arc<Hadamard>) -> Checked {
        let c = self.model.config();
        match site {
            RotationSite::Residual => {
                check_size("the residual stream", c.hidden_size, by.size())?;
                for layer in &self.model.layers {
                    if let Some(SubLayerParts { body, .. }) = &layer.attention {
                        body.projections.linears().iter().for_each(|reader| self.turn_columns(reader, by));
                        self.turn_rows(&body.output, 0, body.output.rows(), by);
                    }
                    let Some(mlp) = &layer.mlp else { continue };
                    if let Mlp::Experts { router, .. } = &mlp.body {
                        self.turn_columns(router, by);
                    }
                    for gated in mlp.body.gated() {
                        gated.gate_up.linears().iter().for_each(|reader| self.turn_columns(reader, by));
                        self.turn_rows(&gated.down, 0, gated.down.rows(), by);
                    }
                }
            }
            RotationSite::Value => {
                check_size("a head", c.head_dim, by.size())?;
                for attention in self.model.layers.iter().filter_map(|layer| layer.attention.as_ref()) {
                    let (value, first) = value_rows(c, &attention.body);
                    self.turn_rows(value, first, c.kv_heads * c.head_dim, by);
                    self.turn_columns(&attention.body.output, by);
                }
            }
            RotationSite::Down => {
                let all = self.model.layers.iter().filter_map(|layer| layer.mlp.as_ref());
                let fitting: Vec<&Gated> =
                    all.flat_map(|mlp| mlp.body.gated()).filter(|g| g.down.cols() == by.size()).collect();
                if fitting.is_empty() {
                    return Err(format!("has {} features, which no down projection has", by.size()));
                }
                fitting.into_iter().for_each(|gated| self.turn_columns(&gated.down, by));
            }
        }
        Ok(())
    }

    fn scale(&mut self, site: ScaleSite, layer: usize, scales: Arc<[f32]>) -> Checked {
        let c = self.model.config();
        let count = self.model.layers.len();
        let layer =
            self.model.layers.get(layer).ok_or_else(|| format!("layer {layer} is none of {count}"))?;
        let of_norm = matches!(site, ScaleSite::AttentionNorm | ScaleSite::MlpNorm);
        if let Some(at) = scales.iter().position(|s| *s == 0.0).filter(|_| !of_norm) {
            return Err(format!("scale {at} is 0"));
        }
        // What was pruned away later needs no fold.
        match (site, &layer.attention, &layer.mlp) {
            (ScaleSite::AttentionNorm, Some(attention), _) => {
                check_size("the norm", c.hidden_size, scales.len())?;
                if let Some(norm) = &attention.norm {
                    self.norm(&norm.name, &scales);
                }
                let readers = attention.body.projections.linears();
                readers.iter().for_each(|reader| self.times_columns(reader, &scales));
            }
            (ScaleSite::MlpNorm, _, Some(mlp)) => {
                check_size("the norm", c.hidden_size, scales.len())?;
                if let Some(norm) = &mlp.norm {
                    self.norm(&norm.name, &scales);
                }
                if let Mlp::Experts { router, .. } = &mlp.body {
                    self.times_columns(router, &scales);
                }
                let readers = mlp.body.gated().iter().flat_map(|gated| gated.gate_up.linears());
                readers.for_each(|reader| self.times_columns(reader, &scales));
            }
            (ScaleSite::Value, Some(attention), _) => {
                check_size("value", c.kv_heads * c.head_dim, scales.len())?;
                let (value, first) = value_rows(c, &attention.body);
                self.divide_rows(value, first, &scales);
                let group = c.heads / c.kv_heads;
                let heads = (0..c.heads).flat_map(|head| &scales[head / group * c.head_dim..][..c.head_dim]);
                let columns: Arc<[f32]> = heads.copied().collect();
                self.times_columns(&attention.body.output, &columns);
            }
            (ScaleSite::Up, _, Some(mlp)) => {
                let all = mlp.body.gated();
                check_size("up", all.iter().map(|gated| gated.down.cols()).sum(), scales.len())?;
                let mut rest = &*scales;
                for gated in all {
                    let (own, others) = rest.split_at(gated.down.cols());
                    rest = others;
                    let own: Arc<[f32]> = own.into();
                    let (up, first) = up_rows(gated);
                    self.divide_rows(up, first, &own);
                    self.times_columns(&gated.down, &own);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn permutation(&mut self, site: PermutationSite, layer: usize, order: &Order) -> Checked {
        let c = self.model.config();
        let count = self.model.layers.len();
        let layer =
            self.model.layers.get(layer).ok_or_else(|| format!("layer {layer} is none of {count}"))?;
        let places = order.places();
        // What was pruned away later needs no fold.
        match (site, &layer.attention, &layer.mlp) {
            (PermutationSite::Value, Some(attention), _) => {
                let d = c.head_dim;
                check_size("value", c.kv_heads * d, places.len())?;
                let heads = places.chunks_exact(d.max(1)).enumerate();
                let within = heads.map(|(head, places)| permutation(places, head * d));
                let within: Vec<Vec<u32>> = within.collect::<Result<_, _>>()?;
                let (value, first) = value_rows(c, &attention.body);
                self.rows(value, Step::PermuteRows { first, order: places.into() });
                let group = c.heads / c.kv_heads;
                let columns = (0..c.heads).flat_map(|head| {
                    let places = within.get(head / group).map_or(&[][..], Vec::as_slice);
                    places.iter().map(move |place| (head * d) as u32 + place)
                });
                self.permute_columns(&attention.body.output, columns.collect());
            }
            (PermutationSite::Down, _, Some(mlp)) => {
                let all = mlp.body.gated();
                check_size("down", all.iter().map(|gated| gated.down.cols()).sum(), places.len())?;
                let mut rest = places;
                for gated in all {
                    let (own, others) = rest.split_at(gated.down.cols());
                    rest = others;
                    let own: Arc<[u32]> = permutation(own, 0)?.into();
                    for (linear, first) in gate_rows(gated).into_iter().chain([up_rows(gated)]) {
                        self.rows(linear, Step::PermuteRows { first, order: own.clone() });
                    }
                    self.permute_columns(&gated.down, own);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn permute_columns(&mut self, linear: &Linear, order: Arc<[u32]>) {
        self.push(linear.tensor(), linear.rows(), linear.cols(), Step::PermuteColumns { order });
    }

    fn push(&mut self, tensor: &str, rows: usize, cols: usize, step: Step) {
        let new = || Target { rows, cols, steps: Vec::new() };
        self.folds.0.entry(tensor.to_owned()).or_insert_with(new).steps.push(step);
    }

    fn norm(&mut self, tensor: &str, scales: &Arc<[f32]>) {
        let offset = if self.model.config().norm_offset() { 1.0 } else { 0.0 };
        self.push(tensor, scales.len(), 1, Step::DivideNorm { scales: scales.clone(), offset });
    }

    fn times_columns(&mut self, linear: &Linear, scales: &Arc<[f32]>) {
        self.push(
            linear.tensor(),
            linear.rows(),
            linear.cols(),
            Step::TimesColumns { scales: scales.clone() },
        );
    }

    fn turn_columns(&mut self, linear: &Linear, by: &Arc<Hadamard>) {
        self.push(linear.tensor(), linear.rows(), linear.cols(), Step::TurnColumns { by: by.clone() });
    }

    fn divide_rows(&mut self, linear: &Linear, first: usize, scales: &Arc<[f32]>) {
        self.rows(linear, Step::DivideRows { first, scales: scales.clone() });
    }

    fn turn_rows(&mut self, linear: &Linear, first: usize, count: usize, by: &Arc<Hadamard>) {
        self.rows(linear, Step::TurnRows { first, count, by: by.clone() });
    }

    /// A matrix's rows, and its bias with them.
    fn rows(&mut self, linear: &Linear, step: Step) {
        if linear.bias().is_some() {
            self.push(&linear.bias_tensor(), linear.rows(), 1, step.clone());
        }
        self.push(linear.tensor(), linear.rows(), linear.cols(), step);
    }
}

/// The matrix that makes values, and the first of its rows that do.
fn value_rows<'a>(c: &ModelConfig, attention: &'a Attention) -> (&'a Linear, usize) {
    match &attention.projections {
        Projections::Separate(all) => (&all[2], 0),
        Projections::Fused(one) => (one, (c.heads + c.kv_heads) * c.head_dim),
    }
}

/// Places counted from `first` on, each of which is named once.
fn permutation(places: &[u32], first: usize) -> Result<Vec<u32>, String> {
    let mut seen = vec![false; places.len()];
    let mut within = Vec::with_capacity(places.len());
    for (at, place) in places.iter().enumerate() {
        let from = (*place as usize).checked_sub(first);
        match from.and_then(|from| Some((from, seen.get_mut(from)?))) {
            Some((from, seen)) if !*seen => {
                *seen = true;
                within.push(from as u32);
            }
            _ => {
                return Err(format!(
                    "place {} is filled from {place}; an order names each of {first} to {} once",
                    first + at,
                    (first + places.len()).saturating_sub(1)
                ));
            }
        }
    }
    Ok(within)
}

/// The matrix of the gate, and its first row.
fn gate_rows(gated: &Gated) -> Option<(&Linear, usize)> {
    match &gated.gate_up {
        GateUp::Separate([gate, _]) => Some((gate, 0)),
        GateUp::Fused(one) => Some((one, 0)),
        GateUp::Alone(_) => None,
    }
}

/// The matrix of the up projection, and its first row.
fn up_rows(gated: &Gated) -> (&Linear, usize) {
    match &gated.gate_up {
        GateUp::Separate([_, up]) | GateUp::Alone(up) => (up, 0),
        GateUp::Fused(one) => (one, one.rows() / 2),
    }
}
