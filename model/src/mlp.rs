//! Gated MLPs and experts (Shazeer, GLU variants; Fedus et al., Switch Transformers; Jiang et al., Mixtral).
//!
//! ```text
//! y = down (act(gate x) * up x)       without a gate: y = down act(up x)
//! experts: a router picks some for each token; their outputs are added by its weights
//! ```

use std::sync::Arc;

use llmpress_formats::{Checkpoint, Result};
use llmpress_kernels::cpu::{Hadamard, gelu_tanh_gate, silu_gate, softmax};
use rayon::prelude::*;

use crate::attention::copy_features;
use crate::config::Activation;
use crate::linear::{Linear, Product, multiply_all, multiply_side_by_side};
use crate::online::turn;
use crate::side_by_side::Stream;
use crate::{Observer, Panels, Unobserved};

/// The MLP of a layer.
#[derive(Debug)]
pub(crate) enum Mlp {
    Dense(Box<Gated>),
    Experts { router: Linear, experts: Vec<Gated>, top_k: usize, normalise: bool },
}

/// A gated MLP, or one without a gate.
#[derive(Debug)]
pub(crate) struct Gated {
    pub(crate) gate_up: GateUp,
    pub(crate) down: Linear,
    pub(crate) activation: Activation,
    /// What turns the input of `down` (R4).
    pub(crate) turn: Option<Arc<Hadamard>>,
}

/// The matrices before the gate.
#[derive(Debug)]
pub(crate) enum GateUp {
    Separate([Linear; 2]),
    /// Both in one matrix, the gate first.
    Fused(Linear),
    /// No gate: what the function is of.
    Alone(Linear),
}

impl GateUp {
    pub(crate) fn linears(&self) -> &[Linear] {
        match self {
            Self::Separate(both) => both,
            Self::Fused(one) | Self::Alone(one) => std::slice::from_ref(one),
        }
    }

    fn linears_mut(&mut self) -> &mut [Linear] {
        match self {
            Self::Separate(both) => both,
            Self::Fused(one) | Self::Alone(one) => std::slice::from_mut(one),
        }
    }
}

/// Activations of an MLP, kept from layer to layer for their memory.
#[derive(Default)]
pub(crate) struct Workspace {
    gate: Panels,
    up: Panels,
    fused: Panels,
}

impl Workspace {
    /// Gate and up of what a fused matrix gave.
    fn split(&mut self) {
        let inner = self.fused.features() / 2;
        copy_features(&self.fused, 0, inner, &mut self.gate);
        copy_features(&self.fused, inner, inner, &mut self.up);
    }

    /// Where there is no gate, the function's values are multiplied by one.
    fn ungated(&mut self) {
        self.up.resize(self.gate.features(), self.gate.tokens());
        self.up.data_mut().fill(1.0);
    }
}

impl Mlp {
    /// Its matrices.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let (router, gated) = match self {
            Self::Dense(gated) => (None, std::slice::from_ref(&**gated)),
            Self::Experts { router, experts, .. } => (Some(router), &experts[..]),
        };
        router
            .into_iter()
            .chain(gated.iter().flat_map(|gated| gated.gate_up.linears().iter().chain([&gated.down])))
    }

    /// Its matrices, to be changed.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let (router, gated) = match self {
            Self::Dense(gated) => (None, std::slice::from_mut(&mut **gated)),
            Self::Experts { router, experts, .. } => (Some(router), &mut experts[..]),
        };
        let gated = gated
            .iter_mut()
            .flat_map(|gated| gated.gate_up.linears_mut().iter_mut().chain([&mut gated.down]));
        router.into_iter().chain(gated)
    }

    /// The gated MLPs: one, or the experts.
    pub(crate) fn gated(&self) -> &[Gated] {
        match self {
            Self::Dense(gated) => std::slice::from_ref(&**gated),
            Self::Experts { experts, .. } => experts,
        }
    }

    /// The gated MLPs, to be changed.
    pub(crate) fn gated_mut(&mut self) -> &mut [Gated] {
        match self {
            Self::Dense(gated) => std::slice::from_mut(&mut **gated),
            Self::Experts { experts, .. } => experts,
        }
    }

    /// `y = mlp(x)` for one token of each of several sequences, each as it is by itself. Experts take one after the other.
    pub(crate) fn forward_side_by_side(
        &self,
        checkpoint: &Checkpoint,
        streams: &mut [Stream<'_>],
    ) -> Result<()> {
        match self {
            Self::Dense(gated) => gated.forward_side_by_side(checkpoint, streams),
            Self::Experts { .. } => streams
                .iter_mut()
                .try_for_each(|s| self.forward(checkpoint, &s.x, &mut Unobserved, &mut s.mlp, &mut s.y)),
        }
    }

    /// `out = mlp(x)`.
    pub(crate) fn forward(
        &self,
        checkpoint: &Checkpoint,
        x: &Panels,
        observer: &mut dyn Observer,
        w: &mut Workspace,
        out: &mut Panels,
    ) -> Result<()> {
        match self {
            Self::Dense(gated) => gated.forward(checkpoint, x, observer, w, out),
            Self::Experts { router, experts, top_k, normalise } => {
                observer.linear_input(router.tensor(), x);
                let mut scores = Panels::default();
                multiply_all(checkpoint, &mut [Product::new(router, x, &mut scores)])?;
                out.resize(x.features(), x.tokens());
                out.data_mut().fill(0.0);
                for (expert, tokens) in route(&mut scores, *top_k, *normalise).into_iter().enumerate() {
                    if tokens.is_empty() {
                        continue;
                    }
                    let mut picked = Panels::zeros(x.features(), tokens.len());
                    for (i, (token, _)) in tokens.iter().enumerate() {
                        picked.set_token(i, x.token(*token));
                    }
                    let mut result = Panels::default();
                    experts[expert].forward(checkpoint, &picked, observer, w, &mut result)?;
                    for (i, (token, weight)) in tokens.iter().enumerate() {
                        let sum: Vec<f32> =
                            out.token(*token).zip(result.token(i)).map(|(y, e)| y + weight * e).collect();
                        out.set_token(*token, sum);
                    }
                }
                Ok(())
            }
        }
    }
}

impl Gated {
    fn forward_side_by_side(&self, checkpoint: &Checkpoint, streams: &mut [Stream<'_>]) -> Result<()> {
        match &self.gate_up {
            GateUp::Separate([gate, up]) => {
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.mlp.gate)).collect();
                multiply_side_by_side(checkpoint, gate, pairs)?;
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.mlp.up)).collect();
                multiply_side_by_side(checkpoint, up, pairs)?;
            }
            GateUp::Fused(linear) => {
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.mlp.fused)).collect();
                multiply_side_by_side(checkpoint, linear, pairs)?;
                streams.iter_mut().for_each(|s| s.mlp.split());
            }
            GateUp::Alone(linear) => {
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.mlp.gate)).collect();
                multiply_side_by_side(checkpoint, linear, pairs)?;
                streams.iter_mut().for_each(|s| s.mlp.ungated());
            }
        }
        let apply = self.gate();
        for s in &mut *streams {
            apply(s.mlp.gate.data(), s.mlp.up.data_mut());
            if let Some(by) = &self.turn {
                turn(by, &mut s.mlp.up, true);
            }
        }
        let pairs = streams.iter_mut().map(|s| (&s.mlp.up, &mut s.y)).collect();
        multiply_side_by_side(checkpoint, &self.down, pairs)
    }

    fn gate(&self) -> fn(&[f32], &mut [f32]) {
        match self.activation {
            Activation::Silu => silu_gate,
            Activation::GeluTanh => gelu_tanh_gate,
        }
    }

    fn forward(
        &self,
        checkpoint: &Checkpoint,
        x: &Panels,
        observer: &mut dyn Observer,
        w: &mut Workspace,
        out: &mut Panels,
    ) -> Result<()> {
        match &self.gate_up {
            GateUp::Separate([gate, up]) => {
                [gate, up].iter().for_each(|linear| observer.linear_input(linear.tensor(), x));
                let mut products = [Product::new(gate, x, &mut w.gate), Product::new(up, x, &mut w.up)];
                multiply_all(checkpoint, &mut products)?;
            }
            GateUp::Fused(linear) => {
                observer.linear_input(linear.tensor(), x);
                multiply_all(checkpoint, &mut [Product::new(linear, x, &mut w.fused)])?;
                w.split();
            }
            GateUp::Alone(linear) => {
                observer.linear_input(linear.tensor(), x);
                multiply_all(checkpoint, &mut [Product::new(linear, x, &mut w.gate)])?;
                w.ungated();
            }
        }
        let apply = self.gate();
        if x.tokens() == 1 {
            apply(w.gate.data(), w.up.data_mut());
        } else {
            let pieces = w.gate.data().par_chunks(1 << 14);
            pieces.zip(w.up.data_mut().par_chunks_mut(1 << 14)).for_each(|(gate, up)| apply(gate, up));
        }
        if let Some(by) = &self.turn {
            turn(by, &mut w.up, true);
        }
        observer.linear_input(self.down.tensor(), &w.up);
        multiply_all(checkpoint, &mut [Product::new(&self.down, &w.up, out)])
    }
}

/// For each expert the tokens that go through it, with their weights: the softmax over all experts, of which a
/// token takes the `top_k` largest (of equals the first).
fn route(scores: &mut Panels, top_k: usize, normalise: bool) -> Vec<Vec<(usize, f32)>> {
    let experts = scores.features();
    for panel in 0..scores.count() {
        let width = scores.width(panel);
        softmax(scores.panel_mut(panel), width);
    }
    let mut routes = vec![Vec::new(); experts];
    for token in 0..scores.tokens() {
        let mut picked: Vec<(usize, f32)> = scores.token(token).enumerate().collect();
        picked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        picked.truncate(top_k);
        let sum: f32 = if normalise { picked.iter().map(|(_, p)| p).sum() } else { 1.0 };
        for (expert, p) in picked {
            routes[expert].push((token, p / sum));
        }
    }
    routes
}
