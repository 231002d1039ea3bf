//! A sub-layer with its derivatives.

use std::ops::Range;
use std::sync::Arc;

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::{Hadamard, rms_norm};
use llmpress_model::{Body, Linear, Model, Panels, SubLayer, rounded_inputs};
use rayon::prelude::*;

use crate::attention::{self, Attention};
use crate::linear::{ByToken, Room, product, transposed};
use crate::maps::Maps;
use crate::mlp::{self, Mlp};
use crate::norm::{norm_back, norm_gradient};

/// A sub-layer without its weights: what it computes of a residual stream, and the derivatives of what it computes.
#[derive(Clone, Debug)]
pub struct Net {
    site: SubLayer,
    tensors: Vec<String>,
    /// Empty where nothing norms what it reads.
    norm: Vec<f32>,
    post_norm: Option<Vec<f32>>,
    eps: f32,
    /// What it gives out is multiplied by it.
    scale: f32,
    /// To which what the first matrices multiply is quantised, and what the last one does. Derivatives pass as they are.
    bits: [Option<u8>; 2],
    inner: Inner,
}

#[derive(Clone, Debug)]
enum Inner {
    Attention(Box<Attention>),
    Mlp(Mlp),
}

/// What a sub-layer computes with.
#[derive(Clone, Copy, Debug)]
pub struct Given<'a> {
    /// The weights of each matrix, row-major, in the order of [`Net::tensors`].
    pub matrices: &'a [&'a [f32]],
    /// The weights of the norm of what it reads; its own where there are none.
    pub norm: Option<&'a [f32]>,
    /// The bias of values; its own where there is none.
    pub value_bias: Option<&'a [f32]>,
    /// The same matrices turned, where they serve several windows: else each way back turns them itself.
    pub turned: Option<&'a Turned>,
}

impl<'a> Given<'a> {
    /// Matrices, with its own norm and biases.
    pub fn of(matrices: &'a [&'a [f32]]) -> Self {
        Self { matrices, norm: None, value_bias: None, turned: None }
    }

    /// The turned weights of a part, by its place among those of its sub-layer.
    pub(crate) fn turned_part(&self, at: usize) -> Option<&'a [f32]> {
        self.turned.and_then(|turned| turned.0.get(at)).map(Vec::as_slice)
    }
}

/// Matrices of a sub-layer as derivatives by what they multiply take them: `[cols, rows]` of query, key, value and output, or of
/// gate, up and down.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Turned(Vec<Vec<f32>>);

/// The derivatives of a loss by what a sub-layer computes with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gradients {
    /// By the weights of each matrix.
    pub matrices: Vec<Vec<f32>>,
    /// By those of the norm of what it reads; empty where nobody wants them.
    pub norm: Vec<f32>,
    /// By the bias of values; empty where nobody wants them.
    pub value_bias: Vec<f32>,
}

impl Gradients {
    /// Zeros for matrices of so many weights each.
    pub fn zeros(matrices: impl IntoIterator<Item = usize>) -> Self {
        let matrices = matrices.into_iter().map(|count| vec![0.0; count]).collect();
        Self { matrices, norm: Vec::new(), value_bias: Vec::new() }
    }

    /// Zeros again.
    pub fn clear(&mut self) {
        let Self { matrices, norm, value_bias } = self;
        let all = matrices.iter_mut().chain([norm, value_bias]);
        all.for_each(|g| g.par_chunks_mut(PIECE).for_each(|g| g.fill(0.0)));
    }
}

/// Values that a task sets.
const PIECE: usize = 1 << 16;

/// What the way back needs of the way there, and the room for both.
#[derive(Debug, Default)]
pub struct Kept {
    x: Panels,
    /// Before the norm of what comes out.
    y: Panels,
    attention: attention::Kept,
    mlp: mlp::Kept,
    scratch: Scratch,
}

impl Kept {
    /// Lends what holds nothing from the way there to the way back: sub-layers that run one after the other need it once.
    pub(crate) fn swap_scratch(&mut self, scratch: &mut Scratch) {
        std::mem::swap(&mut self.scratch, scratch);
    }
}

/// Room for the way back.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    columns: ByToken,
    /// The derivative by what the first matrices multiply.
    dx: Panels,
    room: Room,
}

/// Some rows of a matrix.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    matrix: usize,
    rows: Range<usize>,
    pub(crate) cols: usize,
    bias: Option<Vec<f32>>,
}

impl Part {
    /// Its weights.
    pub(crate) fn of<'w>(&self, weights: &[&'w [f32]]) -> &'w [f32] {
        &weights[self.matrix][self.rows.start * self.cols..self.rows.end * self.cols]
    }

    /// Their derivatives.
    pub(crate) fn of_mut<'g>(&self, gradients: &'g mut [Vec<f32>]) -> &'g mut [f32] {
        &mut gradients[self.matrix][self.rows.start * self.cols..self.rows.end * self.cols]
    }

    /// With its own bias, or another one.
    pub(crate) fn product(&self, weights: &[&[f32]], bias: Option<&[f32]>, x: &Panels, y: &mut Panels) {
        product(self.of(weights), bias.or(self.bias.as_deref()), x, y);
    }
}

/// Gives the rows of a run of matrices out in turn.
struct Parts<'a> {
    linears: &'a [Linear],
    first: usize,
    row: usize,
}

impl Parts<'_> {
    fn take(&mut self, rows: usize) -> Option<Part> {
        let (linear, rest) = self.linears.split_first()?;
        let range = self.row..self.row + rows;
        let part = Part {
            matrix: self.first,
            rows: range.clone(),
            cols: linear.cols(),
            bias: linear.bias().and_then(|bias| Some(bias.get(range.clone())?.to_vec())),
        };
        if range.end > linear.rows() {
            return None;
        }
        self.row = range.end;
        if self.row == linear.rows() {
            (self.linears, self.first, self.row) = (rest, self.first + 1, 0);
        }
        Some(part)
    }
}

impl Net {
    /// Of a sub-layer of a model; none where it was pruned away, or has experts, whose tokens depend on what is learned, or
    /// where matrices quantise what they share to other bits each, or where its family has parts without derivatives
    /// ([`crate::check`]).
    pub fn new(model: &Model, site: SubLayer) -> Option<Self> {
        let (parts, config) = (model.parts(site)?, model.config());
        if crate::family::missing(config).is_some() {
            return None;
        }
        let bits_of = |first: &[Linear], last: &Linear| {
            let bits = first.first()?.activation_bits();
            let same = first.iter().all(|linear| linear.activation_bits() == bits);
            same.then_some([bits, last.activation_bits()])
        };
        let (linears, bits, inner) = match parts.body {
            Body::Attention { projections, output, qk_norm, whole_norms, window, rope, rounding } => {
                let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
                let mut rows = Parts { linears: projections, first: 0, row: 0 };
                let inner = Attention {
                    projections: [rows.take(q)?, rows.take(kv)?, rows.take(kv)?],
                    output: whole(output, projections.len()),
                    heads: config.heads,
                    kv_heads: config.kv_heads,
                    head_dim: config.head_dim,
                    qk_norm: qk_norm.map(|(q, k)| [q.to_vec(), k.to_vec()]),
                    whole_norms,
                    cap: config.attention_softcap,
                    eps: config.norm_eps,
                    window: window.unwrap_or(usize::MAX),
                    rope: rope.clone(),
                    scale: config.attention_scale,
                    rounding,
                };
                let bits = bits_of(projections, output)?;
                ([projections, std::slice::from_ref(output)], bits, Inner::Attention(Box::new(inner)))
            }
            Body::Gated { gate_up, down, activation, turn } => {
                let mut rows = Parts { linears: gate_up, first: 0, row: 0 };
                let inner = Mlp {
                    gate: rows.take(down.cols())?,
                    up: rows.take(down.cols())?,
                    down: whole(down, gate_up.len()),
                    activation,
                    turn: turn.cloned().map(Arc::new),
                };
                let bits = bits_of(gate_up, down)?;
                ([gate_up, std::slice::from_ref(down)], bits, Inner::Mlp(inner))
            }
            Body::Plain | Body::Experts | Body::Mixer => return None,
        };
        Some(Self {
            site,
            tensors: linears.into_iter().flatten().map(|linear| linear.tensor().to_owned()).collect(),
            norm: parts.norm.unwrap_or_default().to_vec(),
            post_norm: parts.post_norm.map(<[f32]>::to_vec),
            eps: config.norm_eps,
            scale: config.residual_scale,
            bits,
            inner,
        })
    }

    /// The sub-layer that it is.
    pub fn site(&self) -> SubLayer {
        self.site
    }

    /// The tensors of its matrices, in the order in which weights and their derivatives are given.
    pub fn tensors(&self) -> &[String] {
        &self.tensors
    }

    /// The bias of its values, where it is attention and has one.
    pub fn value_bias(&self) -> Option<&[f32]> {
        match &self.inner {
            Inner::Attention(inner) => inner.projections[2].bias.as_deref(),
            Inner::Mlp(_) => None,
        }
    }

    /// Heads of queries, heads of keys and values, and the features of each, where it is attention.
    pub fn heads(&self) -> Option<[usize; 3]> {
        match &self.inner {
            Inner::Attention(inner) => Some([inner.heads, inner.kv_heads, inner.head_dim]),
            Inner::Mlp(_) => None,
        }
    }

    /// The matrix of queries, keys and values, or of gate and up, and which of its rows: in the order named.
    pub fn rows(&self) -> Vec<(usize, Range<usize>)> {
        let parts: Vec<&Part> = match &self.inner {
            Inner::Attention(inner) => inner.projections.iter().collect(),
            Inner::Mlp(inner) => vec![&inner.gate, &inner.up],
        };
        parts.into_iter().map(|part| (part.matrix, part.rows.clone())).collect()
    }

    /// Whether the way back changes the derivative that it is given: through a norm of what comes out, or a scale.
    pub(crate) fn changes_derivative(&self) -> bool {
        self.post_norm.is_some() || self.scale != 1.0
    }

    /// Turns its matrices.
    pub fn turn(&self, matrices: &[&[f32]], to: &mut Turned) {
        let parts: Vec<&Part> = match &self.inner {
            Inner::Attention(inner) => inner.projections.iter().chain([&inner.output]).collect(),
            Inner::Mlp(inner) => vec![&inner.gate, &inner.up, &inner.down],
        };
        to.0.resize(parts.len(), Vec::new());
        parts.into_iter().zip(&mut to.0).for_each(|(part, to)| transposed(part.of(matrices), part.cols, to));
    }

    /// Rows and columns of each of its matrices.
    pub fn shapes(&self) -> Vec<[usize; 2]> {
        let parts: Vec<&Part> = match &self.inner {
            Inner::Attention(inner) => inner.projections.iter().chain([&inner.output]).collect(),
            Inner::Mlp(inner) => vec![&inner.gate, &inner.up, &inner.down],
        };
        let mut shapes = vec![[0, 0]; self.tensors.len()];
        for part in parts {
            if let Some(shape) = shapes.get_mut(part.matrix) {
                *shape = [shape[0].max(part.rows.end), part.cols];
            }
        }
        shapes
    }

    /// The weights of the norm of what it reads, as they multiply; empty where nothing norms it.
    pub fn norm(&self) -> &[f32] {
        &self.norm
    }

    /// Whether something turns what the last matrix multiplies.
    pub fn turns(&self) -> bool {
        matches!(&self.inner, Inner::Mlp(mlp) if mlp.turn.is_some())
    }

    /// What the sub-layer adds to a residual stream, into `y`.
    ///
    /// # Errors
    /// Where inputs, or queries, keys and values, are quantised: one that is NaN or infinite.
    pub fn forward(
        &self,
        given: Given<'_>,
        residual: &Panels,
        kept: &mut Kept,
        y: &mut Panels,
    ) -> Result<()> {
        norm(residual, given.norm.unwrap_or(&self.norm), self.eps, &mut kept.x);
        let out = if self.post_norm.is_some() { &mut kept.y } else { &mut *y };
        let [first, last] = self.bits;
        let sound = round(&mut kept.x, first)
            && match &self.inner {
                Inner::Attention(inner) => inner.forward(given, &kept.x, last, &mut kept.attention, out),
                Inner::Mlp(inner) => inner.forward(given.matrices, &kept.x, last, &mut kept.mlp, out),
            };
        if !sound {
            return Err(self.not_finite());
        }
        if let Some(weight) = &self.post_norm {
            norm(&kept.y, weight, self.eps, y);
        }
        self.scaled(y);
        Ok(())
    }

    /// Times the scale of what is added to the residual stream.
    fn scaled(&self, x: &mut Panels) {
        let scale = self.scale;
        if scale != 1.0 {
            x.data_mut().par_chunks_mut(PIECE).for_each(|x| x.iter_mut().for_each(|x| *x *= scale));
        }
    }

    fn not_finite(&self) -> Error {
        Error::Invalid(format!(
            "{}: what is to be quantised before its sub-layer multiplies it is NaN or infinite",
            self.tensors.first().map_or("", String::as_str)
        ))
    }

    /// What attention weighs in a residual stream, for [`Self::divergence`]; nothing of an MLP.
    ///
    /// # Errors
    /// Those of [`Self::forward`].
    pub fn maps(&self, given: Given<'_>, residual: &Panels, kept: &mut Kept, maps: &mut Maps) -> Result<()> {
        let Inner::Attention(inner) = &self.inner else { return Ok(()) };
        norm(residual, given.norm.unwrap_or(&self.norm), self.eps, &mut kept.x);
        match round(&mut kept.x, self.bits[0]) && inner.maps(given, &kept.x, &mut kept.attention, maps) {
            true => Ok(()),
            false => Err(self.not_finite()),
        }
    }

    /// The mean over heads and tokens of the KL divergence of what [`Self::forward`] weighed just before from `maps`, in nats.
    pub fn divergence(&self, kept: &Kept, maps: &Maps) -> f64 {
        match &self.inner {
            Inner::Attention(inner) => inner.divergence(&kept.attention, maps),
            Inner::Mlp(_) => 0.0,
        }
    }

    /// Adds to `gradients` the derivatives of a loss by what is given. `dy` is that by what [`Self::forward`] gave out just
    /// before of `residual` with the same `kept`; it is changed. To the loss are added the divergences from `maps`, each
    /// times its share. `input` takes the derivative of what is given out by `residual`.
    pub fn backward(
        &self,
        given: Given<'_>,
        residual: &Panels,
        kept: &mut Kept,
        (dy, maps): (&mut Panels, &[(&Maps, f32)]),
        gradients: &mut Gradients,
        input: Option<&mut Panels>,
    ) {
        self.scaled(dy);
        if let Some(weight) = &self.post_norm {
            all_norms_back(&kept.y, weight, self.eps, dy);
        }
        let Scratch { columns, dx: by_input, room } = &mut kept.scratch;
        columns.take(&kept.x);
        let wanted = input.is_some() || !gradients.norm.is_empty();
        let dx = wanted.then_some(&mut *by_input);
        match &self.inner {
            Inner::Attention(inner) => {
                inner.backward(given, columns, (&*dy, maps, dx), (&mut kept.attention, room), gradients);
            }
            Inner::Mlp(inner) => inner.backward(given, columns, (dy, dx), (&mut kept.mlp, room), gradients),
        }
        if !gradients.norm.is_empty() {
            add_norm_gradient(residual, by_input, self.eps, &mut gradients.norm);
        }
        if let Some(input) = input {
            std::mem::swap(input, by_input);
            all_norms_back(residual, given.norm.unwrap_or(&self.norm), self.eps, input);
        }
    }
}

/// Quantises each token, where there are bits, and back; false where one cannot be.
pub(crate) fn round(x: &mut Panels, bits: Option<u8>) -> bool {
    let Some(bits) = bits else { return true };
    let Ok(values) = rounded_inputs(x, bits) else { return false };
    *x = values;
    true
}

/// Turns every token, forward or back.
pub(crate) fn turn(by: &Hadamard, x: &mut Panels, forward: bool) {
    let widths: Vec<usize> = (0..x.count()).map(|panel| x.width(panel)).collect();
    let panels: Vec<_> = x.panels_mut().zip(widths).collect();
    panels.into_par_iter().for_each(
        |(data, width)| {
            if forward { by.forward(data, width) } else { by.back(data, width) }
        },
    );
}

fn whole(linear: &Linear, matrix: usize) -> Part {
    Part { matrix, rows: 0..linear.rows(), cols: linear.cols(), bias: linear.bias().map(<[f32]>::to_vec) }
}

/// From the derivative `d` by `norm(x)` to that by x, in place. No weights: no norm.
pub(crate) fn all_norms_back(x: &Panels, weight: &[f32], eps: f32, d: &mut Panels) {
    if weight.is_empty() {
        return;
    }
    let panels: Vec<_> = d.panels_mut().enumerate().collect();
    panels.into_par_iter().for_each(|(panel, d)| norm_back(x.panel(panel), weight, eps, x.width(panel), d));
}

/// Adds to `out` the derivative by the norm's weights, panel after panel.
pub(crate) fn add_norm_gradient(x: &Panels, d: &Panels, eps: f32, out: &mut [f32]) {
    for panel in 0..x.count() {
        norm_gradient(x.panel(panel), eps, x.width(panel), d.panel(panel), out);
    }
}

/// `out = norm(x)`. No weights: no norm.
pub(crate) fn norm(x: &Panels, weight: &[f32], eps: f32, out: &mut Panels) {
    if weight.is_empty() {
        out.clone_from(x);
        return;
    }
    out.resize(x.features(), x.tokens());
    let panels: Vec<_> = out.panels_mut().enumerate().collect();
    panels
        .into_par_iter()
        .for_each(|(panel, out)| rms_norm(x.panel(panel), weight, eps, x.width(panel), out));
}
