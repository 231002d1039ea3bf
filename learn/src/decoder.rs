//! The whole decoder with its derivatives: all sub-layers and the last norm between an embedding and a head that stay.
//!
//! ```text
//! ids --embedding--> stream --sub-layer, +--> stream ... --last norm--> what the head multiplies      Decoder::forward
//! by matrices, by norms <-- sub-layer <-- ... <-- last norm <-- derivative by it                      Decoder::backward
//! ```
//!
//! A window at a time: its streams and what each sub-layer's way back needs are in memory, gradients are added up. A residual stream
//! that is turned (R1) is turned back before the last norm, and so are derivatives on their way from it.

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::Hadamard;
use llmpress_model::{Model, Panels};
use rayon::prelude::*;

use crate::net::{Scratch, add_norm_gradient, all_norms_back, norm, turn};
use crate::{Given, Gradients, Kept, Net};

/// Values that a task adds.
const PIECE: usize = 1 << 14;

/// A decoder without the weights of its sub-layers.
#[derive(Clone, Debug)]
pub struct Decoder {
    nets: Vec<Net>,
    norm: Vec<f32>,
    norm_tensor: String,
    eps: f32,
    /// What turns the residual stream (R1).
    turn: Option<Hadamard>,
}

/// What a window leaves for the way back, and the room for both.
#[derive(Debug, Default)]
pub struct DecoderKept {
    /// The residual stream before each sub-layer, and after the last.
    streams: Vec<Panels>,
    /// The last of them turned back, where it is turned.
    outlet: Panels,
    kept: Vec<Kept>,
    added: Panels,
    hidden: Panels,
    d: Panels,
    dy: Panels,
    dx: Panels,
    scratch: Scratch,
}

impl DecoderKept {
    /// What the head multiplies, as the last [`Decoder::forward`] left it.
    pub fn hidden(&self) -> &Panels {
        &self.hidden
    }
}

/// The derivatives of a loss by what is learned of a decoder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DecoderGradients {
    /// Of each sub-layer, in order.
    pub sub_layers: Vec<Gradients>,
    /// By the weights of the last norm; empty where nobody wants them.
    pub norm: Vec<f32>,
}

impl DecoderGradients {
    /// Zeros again.
    pub fn clear(&mut self) {
        self.sub_layers.iter_mut().for_each(Gradients::clear);
        self.norm.fill(0.0);
    }
}

impl Decoder {
    /// Of a model, whose layers are folded already where it has transformations.
    ///
    /// # Errors
    /// A family with parts that have no derivatives; experts, whose tokens depend on what is learned; a sub-layer whose matrices quantise what they share to other bits each.
    pub fn new(model: &Model) -> Result<Self> {
        crate::check(model)?;
        let outlet = model.outlet();
        let net = |site| {
            Net::new(model, site).ok_or_else(|| {
                Error::Invalid(format!(
                    "{site:?} has experts, or quantises what its matrices share to other bits each: it cannot be trained with \
                     the rest"
                ))
            })
        };
        Ok(Self {
            nets: model.sub_layers().into_iter().map(net).collect::<Result<_>>()?,
            norm: outlet.norm.to_vec(),
            norm_tensor: outlet.norm_tensor.to_owned(),
            eps: model.config().norm_eps,
            turn: outlet.turn.cloned(),
        })
    }

    /// Its sub-layers, first to last.
    pub fn nets(&self) -> &[Net] {
        &self.nets
    }

    /// The weights of the last norm, as they multiply, and their tensor.
    pub fn last_norm(&self) -> (&str, &[f32]) {
        (&self.norm_tensor, &self.norm)
    }

    /// Zeros for all matrices, for the norms of what sub-layers read and for the last one.
    pub fn gradients(&self) -> DecoderGradients {
        let of = |net: &Net| Gradients {
            norm: vec![0.0; net.norm().len()],
            ..Gradients::zeros(net.shapes().into_iter().map(|[rows, cols]| rows * cols))
        };
        let sub_layers = self.nets.iter().map(of).collect();
        DecoderGradients { sub_layers, norm: vec![0.0; self.norm.len()] }
    }

    /// What the head multiplies after a window of tokens, left in `kept`. `model` embeds them; `given` has what each sub-layer
    /// computes with, `norm` the weights of the last norm, its own where there are none.
    ///
    /// # Errors
    /// An id beyond the vocabulary; those of [`Net::forward`]; not as many sub-layers as it has.
    pub fn forward(
        &self,
        model: &Model,
        (given, last): (&[Given<'_>], Option<&[f32]>),
        ids: &[u32],
        kept: &mut DecoderKept,
    ) -> Result<()> {
        if given.len() != self.nets.len() {
            return Err(Error::Invalid("not as many sub-layers are given as the decoder has".to_owned()));
        }
        kept.streams.resize_with(self.nets.len() + 1, Panels::default);
        kept.kept.resize_with(self.nets.len(), Kept::default);
        let mut stream = model.embed(ids)?;
        for (at, (net, given)) in self.nets.iter().zip(given).enumerate() {
            net.forward(*given, &stream, &mut kept.kept[at], &mut kept.added)?;
            let next = sum(&stream, &kept.added, std::mem::take(&mut kept.streams[at]));
            kept.streams[at] = std::mem::replace(&mut stream, next);
        }
        let outlet = match &self.turn {
            Some(by) => {
                kept.outlet.clone_from(&stream);
                turn(by, &mut kept.outlet, false);
                &kept.outlet
            }
            None => &stream,
        };
        norm(outlet, last.unwrap_or(&self.norm), self.eps, &mut kept.hidden);
        kept.streams[self.nets.len()] = stream;
        Ok(())
    }

    /// Adds to `gradients` the derivatives of a loss by what is given; `d` is that by what [`Self::forward`] left just before, with
    /// the same `kept`.
    pub fn backward(
        &self,
        (given, last): (&[Given<'_>], Option<&[f32]>),
        d: &Panels,
        kept: &mut DecoderKept,
        gradients: &mut DecoderGradients,
    ) {
        let DecoderKept { streams, outlet, kept, d: by_stream, dy, dx, scratch, .. } = kept;
        let Some(stream) = streams.last() else { return };
        let stream = if self.turn.is_some() { &*outlet } else { stream };
        if !gradients.norm.is_empty() {
            add_norm_gradient(stream, d, self.eps, &mut gradients.norm);
        }
        by_stream.clone_from(d);
        all_norms_back(stream, last.unwrap_or(&self.norm), self.eps, by_stream);
        if let Some(by) = &self.turn {
            turn(by, by_stream, true);
        }
        let all = self.nets.iter().zip(given).zip(streams).zip(kept).zip(&mut gradients.sub_layers);
        for (at, ((((net, given), stream), kept), gradients)) in all.enumerate().rev() {
            kept.swap_scratch(scratch);
            // A norm or a scale of what comes out changes the derivative that it is given.
            let dy = match net.changes_derivative() {
                true => {
                    dy.clone_from(by_stream);
                    &mut *dy
                }
                false => &mut *by_stream,
            };
            let input = (at > 0).then_some(&mut *dx);
            net.backward(*given, stream, kept, (dy, &[]), gradients, input);
            kept.swap_scratch(scratch);
            if at > 0 {
                let pieces = by_stream.data_mut().par_chunks_mut(PIECE).zip(dx.data().par_chunks(PIECE));
                pieces.for_each(|(d, dx)| d.iter_mut().zip(dx).for_each(|(d, dx)| *d += dx));
            }
        }
    }
}

/// `a + b`, in the room of `out`.
fn sum(a: &Panels, b: &Panels, mut out: Panels) -> Panels {
    out.resize(a.features(), a.tokens());
    let pieces = out.data_mut().par_chunks_mut(PIECE).zip(a.data().par_chunks(PIECE));
    pieces.zip(b.data().par_chunks(PIECE)).for_each(|((out, a), b)| {
        out.iter_mut().zip(a).zip(b).for_each(|((out, a), b)| *out = a + b);
    });
    out
}
