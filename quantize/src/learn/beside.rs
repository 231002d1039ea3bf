//! What is learned of a block beside the codes and grids of its matrices, and folded into them.
//!
//! ```text
//! scale       s = exp(l) of a channel between a producer and its readers: norm or rows / s, columns x s
//! compensate  down_proj + a b^T                                            a = 0, b = 1 at the start
//!
//! weights before they are rounded: u c_j / r_i + a_i b_j, c and r the products of the scales of column and row
//! ```
//!
//! (ABQ-LLM, sections 3.2 and 3.3. Here scales start at 1: `smooth` folds its own from activation statistics before.)

use std::ops::Range;

use llmpress_formats::{Dtype, Result, RotationSite, ScaleSite, Scales, Transform};
use llmpress_learn::{Adam, Block, Gradients, Rate};
use llmpress_model::{Model, SubLayer};
use rayon::prelude::*;

use crate::Beside;
use crate::fold::round;

/// How fast logarithms of scales move.
const SCALES: f32 = 0.003;
/// How fast b moves; a moves as fast in units of the matrix's root mean square.
const COMPENSATION: f32 = 0.003;
/// How far a logarithm may go.
const FARTHEST: f32 = 5.0;
/// Rows that a task sums.
const ROWS: usize = 64;
/// Blocks at the start and at the end whose `down_proj` is compensated.
const FIRST: usize = 3;
const LAST: usize = 4;

/// What is learned.
pub(crate) struct Besides {
    layer: usize,
    scales: Vec<Scaled>,
    compensation: Option<Compensation>,
    /// Of each matrix, attention's and the MLP's: unrounded weights, and their columns.
    matrices: [Vec<(Vec<f32>, usize)>; 2],
    norms: [Norm; 2],
    /// Of values, at the start; and what they are now.
    bias: Option<[Vec<f32>; 2]>,
    bias_dtype: Dtype,
}

/// The scales of one site.
struct Scaled {
    site: ScaleSite,
    logs: Vec<f32>,
    adam: Adam,
    uses: Vec<Use>,
}

/// Where scales act on a matrix.
struct Use {
    part: usize,
    matrix: usize,
    along: Along,
}

enum Along {
    /// The channel of each column.
    Columns(Vec<usize>),
    /// Rows of a range, the channels of which are the scales in order.
    Rows(Range<usize>),
}

struct Compensation {
    matrix: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    adam: [Adam; 2],
    /// The root mean square of the matrix.
    size: f32,
}

/// The norm before a sub-layer.
#[derive(Default)]
struct Norm {
    start: Vec<f32>,
    /// As it is stored with the scales.
    now: Vec<f32>,
    dtype: Option<Dtype>,
    offset: f32,
    /// Whether it is scaled.
    scaled: bool,
}

impl Besides {
    /// What is wanted of a block whose matrices have these weights before they are rounded; none where that is nothing.
    ///
    /// # Errors
    /// Tensors that are not there.
    pub(crate) fn new(
        model: &Model,
        (layer, block): (usize, &Block),
        wanted: Beside,
        unrounded: [Vec<Vec<f32>>; 2],
    ) -> Result<Option<Self>> {
        let parts = block.parts();
        let rotated = |of: RotationSite| {
            model.transforms().iter().any(|t| matches!(t, Transform::Rotation { site, .. } if *site == of))
        };
        let mut scales = Vec::new();
        let mut add = |site, count: usize, uses: Vec<Use>| {
            scales.push(Scaled { site, logs: vec![0.0; count], adam: Adam::new(count), uses });
        };
        if let (Some(net), true) = (parts[0], wanted.scale) {
            let rows = net.rows();
            if !rotated(RotationSite::Residual) && !net.norm().is_empty() {
                add(ScaleSite::AttentionNorm, net.norm().len(), readers(0, &rows, net.norm().len()));
            }
            if let (Some([heads, kv_heads, d]), false) = (net.heads(), rotated(RotationSite::Value)) {
                let (matrix, value) = &rows[2];
                let group = heads / kv_heads.max(1);
                let columns = (0..heads * d).map(|j| j / d / group * d + j % d).collect();
                let output = net.tensors().len() - 1;
                let uses = vec![
                    Use { part: 0, matrix: *matrix, along: Along::Rows(value.clone()) },
                    Use { part: 0, matrix: output, along: Along::Columns(columns) },
                ];
                add(ScaleSite::Value, kv_heads * d, uses);
            }
        }
        if let (Some(net), true) = (parts[1], wanted.scale) {
            let rows = net.rows();
            if !rotated(RotationSite::Residual) && !net.norm().is_empty() {
                add(ScaleSite::MlpNorm, net.norm().len(), readers(1, &rows, net.norm().len()));
            }
            if !net.turns() {
                let (matrix, up) = &rows[1];
                let uses = vec![
                    Use { part: 1, matrix: *matrix, along: Along::Rows(up.clone()) },
                    Use {
                        part: 1,
                        matrix: net.tensors().len() - 1,
                        along: Along::Columns((0..up.len()).collect()),
                    },
                ];
                add(ScaleSite::Up, up.len(), uses);
            }
        }
        let layers = model.config().layers.len();
        let ends = layer < FIRST || layer + LAST >= layers;
        let mut matrices: [Vec<(Vec<f32>, usize)>; 2] = Default::default();
        for ((part, net), unrounded) in matrices.iter_mut().zip(parts).zip(unrounded) {
            for (tensor, weights) in net.map_or(&[][..], |net| net.tensors()).iter().zip(unrounded) {
                let rows = model.checkpoint().tensor(tensor)?.shape.first().copied().unwrap_or(1) as usize;
                part.push((weights, rows));
            }
            part.iter_mut().for_each(|(weights, rows)| *rows = weights.len() / (*rows).max(1));
        }
        let compensation = match matrices[1].last() {
            Some((weights, cols)) if wanted.compensate && ends => {
                let squares: f64 = weights.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
                let rows = weights.len() / cols;
                Some(Compensation {
                    matrix: matrices[1].len() - 1,
                    a: vec![0.0; rows],
                    b: vec![1.0; *cols],
                    adam: [Adam::new(rows), Adam::new(*cols)],
                    size: (squares / weights.len().max(1) as f64).sqrt() as f32,
                })
            }
            _ => None,
        };
        if scales.is_empty() && compensation.is_none() {
            return Ok(None);
        }
        let mut norms: [Norm; 2] = Default::default();
        let sites = [SubLayer::Attention(layer), SubLayer::Mlp(layer)];
        for (((norm, net), site), scale) in
            norms.iter_mut().zip(parts).zip(sites).zip([ScaleSite::AttentionNorm, ScaleSite::MlpNorm])
        {
            let Some(net) = net else { continue };
            let tensor = model.norm_tensor(site);
            *norm = Norm {
                start: net.norm().to_vec(),
                now: net.norm().to_vec(),
                dtype: tensor.map(|t| model.checkpoint().tensor(t)).transpose()?.map(|info| info.dtype),
                offset: if model.config().norm_offset() { 1.0 } else { 0.0 },
                scaled: scales.iter().any(|scaled| scaled.site == scale),
            };
        }
        let scales_values = scales.iter().any(|scaled| scaled.site == ScaleSite::Value);
        let bias = parts[0].and_then(|net| net.value_bias()).filter(|_| scales_values);
        let bias_dtype = norms[0].dtype.unwrap_or(Dtype::F32);
        let bias = bias.map(|bias| [bias.to_vec(), bias.to_vec()]);
        Ok(Some(Self { layer, scales, compensation, matrices, norms, bias, bias_dtype }))
    }

    /// The norms before both sub-layers, where they are scaled.
    pub(crate) fn norms(&self) -> [Option<&[f32]>; 2] {
        self.norms.each_ref().map(|norm| norm.scaled.then_some(&norm.now[..]))
    }

    /// The bias of values, where it is scaled.
    pub(crate) fn value_bias(&self) -> Option<&[f32]> {
        self.bias.as_ref().map(|[_, now]| &now[..])
    }

    /// The products of the scales of a matrix's columns, and of its rows.
    fn factors(&self, part: usize, matrix: usize) -> [Vec<f32>; 2] {
        let (weights, cols) = &self.matrices[part][matrix];
        let mut factors = [vec![1.0; *cols], vec![1.0; weights.len() / (*cols).max(1)]];
        for scaled in &self.scales {
            for used in scaled.uses.iter().filter(|used| (used.part, used.matrix) == (part, matrix)) {
                match &used.along {
                    Along::Columns(of) => {
                        factors[0].iter_mut().zip(of).for_each(|(c, at)| *c *= scaled.logs[*at].exp());
                    }
                    Along::Rows(range) => {
                        let rows = factors[1][range.clone()].iter_mut();
                        rows.zip(&scaled.logs).for_each(|(r, l)| *r *= l.exp());
                    }
                }
            }
        }
        factors
    }

    fn compensates(&self, part: usize, matrix: usize) -> Option<&Compensation> {
        self.compensation.as_ref().filter(|c| part == 1 && c.matrix == matrix)
    }

    /// By how much the weights of a matrix are moved.
    pub(crate) fn shift(&self, part: usize, matrix: usize) -> Vec<f32> {
        let ((weights, cols), [c, r]) = (&self.matrices[part][matrix], self.factors(part, matrix));
        let more = self.compensates(part, matrix);
        let mut shift = vec![0.0; weights.len()];
        shift.par_chunks_mut(*cols).zip(weights.par_chunks(*cols)).enumerate().for_each(|(i, (shift, u))| {
            for ((shift, u), c) in shift.iter_mut().zip(u).zip(&c) {
                *shift = u * (c / r[i] - 1.0);
            }
            if let Some(Compensation { a, b, .. }) = more {
                shift.iter_mut().zip(b).for_each(|(shift, b)| *shift += a[i] * b);
            }
        });
        shift
    }

    /// The derivatives by the logarithms of every site's scales, and by a and b. Those by the weights of each matrix are by them
    /// before they are rounded, as far as rounding passes them.
    fn derivatives(&self, gradients: &[Gradients; 2]) -> (Vec<Vec<f32>>, Option<[Vec<f32>; 2]>) {
        let mut by_log: Vec<Vec<f32>> = self.scales.iter().map(|s| vec![0.0; s.logs.len()]).collect();
        for (part, gradients) in gradients.iter().enumerate() {
            for (matrix, g) in gradients.matrices.iter().enumerate() {
                let uses = |scaled: &Scaled| scaled.uses.iter().any(|u| (u.part, u.matrix) == (part, matrix));
                if !self.scales.iter().any(uses) {
                    continue;
                }
                let ((u, cols), [c, r]) = (&self.matrices[part][matrix], self.factors(part, matrix));
                let [by_column, by_row] = by_factors(u, g, (&c, &r), *cols);
                for (scaled, by_log) in self.scales.iter().zip(&mut by_log) {
                    for used in scaled.uses.iter().filter(|used| (used.part, used.matrix) == (part, matrix)) {
                        match &used.along {
                            Along::Columns(of) => {
                                of.iter().zip(&by_column).for_each(|(at, g)| by_log[*at] += g);
                            }
                            Along::Rows(range) => {
                                by_log.iter_mut().zip(&by_row[range.clone()]).for_each(|(l, g)| *l -= g);
                            }
                        }
                    }
                }
            }
        }
        for (scaled, by_log) in self.scales.iter().zip(&mut by_log) {
            let (of, by): (&[f32], &[f32]) = match scaled.site {
                // A norm is stored less its family's offset, which no scale touches.
                ScaleSite::AttentionNorm => (&self.norms[0].now, &gradients[0].norm),
                ScaleSite::MlpNorm => (&self.norms[1].now, &gradients[1].norm),
                ScaleSite::Value => (self.value_bias().unwrap_or_default(), &gradients[0].value_bias),
                ScaleSite::Up => (&[], &[]),
            };
            by_log.iter_mut().zip(of.iter().zip(by)).for_each(|(l, (of, by))| *l -= of * by);
        }
        let by_vectors = self.compensation.as_ref().map(|Compensation { matrix, a, b, .. }| {
            let (g, cols) = (&gradients[1].matrices[*matrix], b.len());
            let by_a = g.par_chunks(cols).map(|g| g.iter().zip(b).map(|(g, b)| g * b).sum()).collect();
            let spread: Vec<f32> = a.iter().flat_map(|a| std::iter::repeat_n(*a, cols)).collect();
            let [by_b, _] = by_factors(&spread, g, (&vec![1.0; cols], &vec![1.0; a.len()]), cols);
            [by_a, by_b]
        });
        (by_log, by_vectors)
    }

    /// One step, down the derivatives of [`Self::derivatives`].
    pub(crate) fn step(&mut self, gradients: &[Gradients; 2], rate: &Rate) {
        let (by_log, by_vectors) = self.derivatives(gradients);
        for (scaled, by_log) in self.scales.iter_mut().zip(&by_log) {
            let start = match scaled.site {
                ScaleSite::AttentionNorm => &self.norms[0].start[..],
                ScaleSite::MlpNorm => &self.norms[1].start,
                ScaleSite::Value | ScaleSite::Up => &[],
            };
            for (at, (log, g)) in scaled.logs.iter_mut().zip(by_log).enumerate() {
                let down = rate.step(&mut scaled.adam.first[at], &mut scaled.adam.second[at], *g);
                // Nothing to share where nothing comes through.
                if start.get(at) != Some(&0.0) {
                    *log = (*log - SCALES * down).clamp(-FARTHEST, FARTHEST);
                }
            }
        }
        if let (Some(Compensation { a, b, adam, size, .. }), Some([by_a, by_b])) =
            (&mut self.compensation, by_vectors)
        {
            let rates = [*size * COMPENSATION, COMPENSATION];
            for ((x, by), (adam, own)) in [(a, by_a), (b, by_b)].into_iter().zip(adam.iter_mut().zip(rates)) {
                for (at, (x, g)) in x.iter_mut().zip(&by).enumerate() {
                    *x -= own * rate.step(&mut adam.first[at], &mut adam.second[at], *g);
                }
            }
        }
        self.refresh();
    }

    /// Norms and the bias, as they are stored with the scales.
    fn refresh(&mut self) {
        for scaled in &self.scales {
            match scaled.site {
                ScaleSite::AttentionNorm => self.norms[0].refresh(&scaled.logs),
                ScaleSite::MlpNorm => self.norms[1].refresh(&scaled.logs),
                ScaleSite::Value => {
                    if let Some([start, now]) = &mut self.bias {
                        let all = now.iter_mut().zip(start).zip(&scaled.logs);
                        all.for_each(|((now, start), l)| *now = round(self.bias_dtype, *start / l.exp()));
                    }
                }
                ScaleSite::Up => {}
            }
        }
    }

    /// The scales as the model gets them.
    pub(crate) fn transforms(&self) -> Vec<Transform> {
        let one = |scaled: &Scaled| {
            let exact = |norm: &Norm| -> Vec<f32> {
                let both = norm.start.iter().zip(&norm.now);
                both.map(|(start, now)| if *now != 0.0 && *start != 0.0 { start / now } else { 1.0 })
                    .collect()
            };
            let scales = match scaled.site {
                ScaleSite::AttentionNorm => exact(&self.norms[0]),
                ScaleSite::MlpNorm => exact(&self.norms[1]),
                ScaleSite::Value | ScaleSite::Up => scaled.logs.iter().map(|l| l.exp()).collect(),
            };
            Transform::Scale { site: scaled.site, layer: self.layer, scales: Scales::new(&scales) }
        };
        self.scales.iter().map(one).collect()
    }
}

impl Norm {
    fn refresh(&mut self, logs: &[f32]) {
        let (dtype, offset) = (self.dtype.unwrap_or(Dtype::F32), self.offset);
        for ((now, start), l) in self.now.iter_mut().zip(&self.start).zip(logs) {
            let stored = round(dtype, start / l.exp() - offset) + offset;
            // One that is rounded to 0 could not be undone.
            *now = if stored != 0.0 || *start == 0.0 { stored } else { *start };
        }
    }
}

/// The columns of all matrices that read a norm.
fn readers(part: usize, rows: &[(usize, Range<usize>)], features: usize) -> Vec<Use> {
    let mut matrices: Vec<usize> = rows.iter().map(|(matrix, _)| *matrix).collect();
    matrices.dedup();
    let of = |matrix| Use { part, matrix, along: Along::Columns((0..features).collect()) };
    matrices.into_iter().map(of).collect()
}

/// The sums of g u c / r over each column, and over each row.
fn by_factors(u: &[f32], g: &[f32], (c, r): (&[f32], &[f32]), cols: usize) -> [Vec<f32>; 2] {
    let pieces = u.par_chunks(ROWS * cols).zip(g.par_chunks(ROWS * cols)).zip(r.par_chunks(ROWS));
    let sums: Vec<[Vec<f32>; 2]> = pieces
        .map(|((u, g), r)| {
            let (mut by_column, mut by_row) = (vec![0.0; cols], Vec::with_capacity(ROWS));
            for ((u, g), r) in u.chunks_exact(cols).zip(g.chunks_exact(cols)).zip(r) {
                let mut sum = 0.0;
                for (((column, u), g), c) in by_column.iter_mut().zip(u).zip(g).zip(c) {
                    let term = g * u * c / r;
                    *column += term;
                    sum += term;
                }
                by_row.push(sum);
            }
            [by_column, by_row]
        })
        .collect();
    // In the order of rows, whatever thread summed them.
    let mut all = [vec![0.0; cols], Vec::with_capacity(r.len())];
    for [by_column, by_row] in sums {
        all[0].iter_mut().zip(by_column).for_each(|(all, one)| *all += one);
        all[1].extend(by_row);
    }
    all
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use llmpress_formats::Checkpoint;

    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| next() + next()).collect()
    }

    fn all(model: &Model) -> Besides {
        let block = Block::new(model, 0).unwrap();
        let wanted = Beside { scale: true, compensate: true, ..Beside::default() };
        let unrounded = block
            .parts()
            .map(|net| net.unwrap().tensors().iter().map(|t| model.weights(t).unwrap()).collect::<Vec<_>>());
        let mut besides = Besides::new(model, (0, &block), wanted, unrounded).unwrap().unwrap();
        // Stored as they are, so that differences are not those of rounding.
        besides.norms.iter_mut().for_each(|norm| norm.dtype = Some(Dtype::F32));
        besides.bias_dtype = Dtype::F32;
        besides
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    /// What a loss is whose derivatives by what the block computes with are `by`.
    fn loss(besides: &Besides, by: &[Gradients; 2]) -> f64 {
        let mut sum = 0.0;
        for (part, by) in by.iter().enumerate() {
            for (matrix, g) in by.matrices.iter().enumerate() {
                sum += dot(&besides.shift(part, matrix), g);
            }
            sum += dot(besides.norms()[part].unwrap(), &by.norm);
        }
        sum + dot(besides.value_bias().unwrap_or_default(), &by[0].value_bias)
    }

    #[test]
    fn derivatives_by_every_scale_and_by_the_compensation_are_those_of_differences() {
        for family in ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "llama_bias"] {
            let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(family);
            let model = Model::open(Arc::new(Checkpoint::open(&golden).unwrap())).unwrap();
            let mut besides = all(&model);
            assert_eq!(besides.scales.len(), 4, "{family}");
            for (at, scaled) in besides.scales.iter_mut().enumerate() {
                scaled.logs = numbers(scaled.logs.len(), at as u32);
            }
            let compensation = besides.compensation.as_mut().unwrap();
            compensation.a = numbers(compensation.a.len(), 7);
            besides.refresh();
            let mut by = besides
                .matrices
                .each_ref()
                .map(|part| Gradients::zeros(part.iter().map(|(weights, _)| weights.len())));
            for (part, by) in by.iter_mut().enumerate() {
                for (matrix, g) in by.matrices.iter_mut().enumerate() {
                    *g = numbers(g.len(), 11 + matrix as u32);
                }
                by.norm = numbers(besides.norms[part].now.len(), 17);
            }
            by[0].value_bias = numbers(besides.value_bias().map_or(0, <[f32]>::len), 19);
            assert_eq!(
                by[0].value_bias.is_empty(),
                !family.contains("qwen2") && family != "llama_bias",
                "{family}"
            );
            let (by_log, by_vectors) = besides.derivatives(&by);
            let [by_a, by_b] = by_vectors.unwrap();
            let h = 1e-3f32;
            let mut check = |what: String,
                             gradient: &[f32],
                             variable: &dyn Fn(&mut Besides) -> &mut Vec<f32>| {
                assert!(gradient.iter().any(|g| *g != 0.0), "{family} {what} gets none");
                let direction = numbers(gradient.len(), 23);
                let start = variable(&mut besides).clone();
                let mut at = |step: f32| {
                    let moved = start.iter().zip(&direction).map(|(x, d)| x + step * d);
                    *variable(&mut besides) = moved.collect();
                    besides.refresh();
                    loss(&besides, &by)
                };
                let found = (at(h) - at(-h)) / f64::from(2.0 * h);
                at(0.0);
                let (along, size) = (dot(gradient, &direction), dot(gradient, gradient).sqrt());
                assert!((found - along).abs() <= 0.02 * size, "{family} {what}: {found} {along} of {size}");
            };
            for (at, gradient) in by_log.iter().enumerate() {
                check(format!("scale {at}"), gradient, &move |b| &mut b.scales[at].logs);
            }
            check("a".to_owned(), &by_a, &|b| &mut b.compensation.as_mut().unwrap().a);
            check("b".to_owned(), &by_b, &|b| &mut b.compensation.as_mut().unwrap().b);
        }
    }

    #[test]
    fn scales_that_are_learned_are_what_a_fold_does() {
        for family in ["llama", "qwen2", "gemma3_text", "phi3"] {
            let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(family);
            let mut model = Model::open(Arc::new(Checkpoint::open(&golden).unwrap())).unwrap();
            let block = Block::new(&model, 0).unwrap();
            let unrounded = block.parts().map(|net| {
                net.unwrap().tensors().iter().map(|t| model.weights(t).unwrap()).collect::<Vec<_>>()
            });
            let wanted = Beside { scale: true, ..Beside::default() };
            let mut besides = Besides::new(&model, (0, &block), wanted, unrounded).unwrap().unwrap();
            for (at, scaled) in besides.scales.iter_mut().enumerate() {
                scaled.logs = numbers(scaled.logs.len(), at as u32);
            }
            besides.refresh();
            model.transform(besides.transforms()).unwrap();
            model.fold_layer(0).unwrap();
            let folded = Block::new(&model, 0).unwrap();
            for (part, net) in folded.parts().into_iter().enumerate() {
                let net = net.unwrap();
                assert_eq!(Some(net.norm()), besides.norms()[part], "{family}");
                for (matrix, tensor) in net.tensors().iter().enumerate() {
                    let shift = besides.shift(part, matrix);
                    let start = &besides.matrices[part][matrix].0;
                    // The norm was rounded, so that its readers get a little other scales.
                    for ((w, u), by) in model.weights(tensor).unwrap().iter().zip(start).zip(shift) {
                        assert!(
                            (w - u - by).abs() <= 0.01 * w.abs() + 1e-6,
                            "{family} {tensor}: {w} {u} {by}"
                        );
                    }
                }
            }
            assert_eq!(folded.parts()[0].unwrap().value_bias(), besides.value_bias(), "{family}");
        }
    }
}
