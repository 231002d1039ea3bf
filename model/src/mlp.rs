//! Gated MLPs and experts (Shazeer, GLU variants; Fedus et al., Switch Transformers; Jiang et al., Mixtral).
//!
//! ```text
//! y = down (act(gate x) * up x)       without a gate: y = down act(up x)
//! experts: a router picks some for each token; their outputs are added by its weights
//! ```

use std::sync::Arc;

use llmpress_formats::{Checkpoint, Result};
use llmpress_kernels::cpu::{Hadamard, clamped_gate, exp, gelu_tanh_gate, silu_gate};
use rayon::prelude::*;

use crate::attention::copy_features;
use crate::config::{Activation, Clamped};
use crate::linear::{Linear, Product, multiply_all, multiply_side_by_side};
use crate::online::turn;
use crate::picks::Picks;
use crate::side_by_side::Stream;
use crate::{Observer, Panels, Unobserved};

/// The MLP of a layer.
#[derive(Debug)]
pub(crate) enum Mlp {
    Dense(Box<Gated>),
    Experts { router: Linear, experts: Vec<Gated>, picking: Box<Picking> },
}

/// How experts are picked, and what every token goes through beside them.
#[derive(Debug)]
pub(crate) struct Picking {
    pub(crate) picks: Picks,
    /// What is added to scores where experts are compared.
    pub(crate) correction: Option<Vec<f32>>,
    pub(crate) shared: Option<Shared>,
}

/// An expert that every token goes through.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) gated: Gated,
    /// A matrix of one row: its output is multiplied by the sigmoid of what this gives.
    pub(crate) gate: Option<Linear>,
}

/// A gated MLP, or one without a gate.
#[derive(Debug)]
pub(crate) struct Gated {
    pub(crate) gate_up: GateUp,
    pub(crate) down: Linear,
    pub(crate) activation: Activation,
    /// The gate's function, where it has limits.
    pub(crate) clamp: Option<Clamped>,
    /// What turns the input of `down` (R4).
    pub(crate) turn: Option<Arc<Hadamard>>,
}

/// The matrices before the gate.
#[derive(Debug)]
pub(crate) enum GateUp {
    Separate([Linear; 2]),
    /// Both in one matrix, the gate first.
    Fused(Linear),
    /// Both in one matrix, whose rows take turns.
    Interleaved(Linear),
    /// No gate: what the function is of.
    Alone(Linear),
}

impl GateUp {
    pub(crate) fn linears(&self) -> &[Linear] {
        match self {
            Self::Separate(both) => both,
            Self::Fused(one) | Self::Interleaved(one) | Self::Alone(one) => std::slice::from_ref(one),
        }
    }

    fn linears_mut(&mut self) -> &mut [Linear] {
        match self {
            Self::Separate(both) => both,
            Self::Fused(one) | Self::Interleaved(one) | Self::Alone(one) => std::slice::from_mut(one),
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

    /// The same where their features take turns.
    fn split_turns(&mut self) {
        let (inner, tokens) = (self.fused.features() / 2, self.fused.tokens());
        self.gate.resize(inner, tokens);
        self.up.resize(inner, tokens);
        for panel in 0..self.fused.count() {
            let width = self.fused.width(panel);
            let pairs = self.fused.panel(panel).chunks_exact(2 * width);
            let gates = self.gate.panel_mut(panel).chunks_exact_mut(width);
            for ((pair, gate), up) in pairs.zip(gates).zip(self.up.panel_mut(panel).chunks_exact_mut(width)) {
                gate.copy_from_slice(&pair[..width]);
                up.copy_from_slice(&pair[width..]);
            }
        }
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
        let (router, gated, shared) = match self {
            Self::Dense(gated) => (None, std::slice::from_ref(&**gated), None),
            Self::Experts { router, experts, picking } => {
                (Some(router), &experts[..], picking.shared.as_ref())
            }
        };
        let gate = shared.and_then(|shared| shared.gate.as_ref());
        router.into_iter().chain(gate).chain(
            shared
                .map(|shared| &shared.gated)
                .into_iter()
                .chain(gated)
                .flat_map(|gated| gated.gate_up.linears().iter().chain([&gated.down])),
        )
    }

    /// Its matrices, to be changed.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let (router, gated, shared) = match self {
            Self::Dense(gated) => (None, std::slice::from_mut(&mut **gated), None),
            Self::Experts { router, experts, picking } => {
                (Some(router), &mut experts[..], picking.shared.as_mut())
            }
        };
        let (gate, shared) = shared.map_or((None, None), |s| (s.gate.as_mut(), Some(&mut s.gated)));
        let gated = shared
            .into_iter()
            .chain(gated)
            .flat_map(|gated| gated.gate_up.linears_mut().iter_mut().chain([&mut gated.down]));
        router.into_iter().chain(gate).chain(gated)
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
            Self::Experts { router, experts, picking } => {
                observer.linear_input(router.tensor(), x);
                let mut scores = Panels::default();
                multiply_all(checkpoint, &mut [Product::new(router, x, &mut scores)])?;
                match &picking.shared {
                    Some(shared) => shared.forward(checkpoint, x, observer, w, out)?,
                    None => {
                        out.resize(x.features(), x.tokens());
                        out.data_mut().fill(0.0);
                    }
                }
                let routes = picking.picks.routes(&mut scores, picking.correction.as_deref());
                let weighs_inputs = picking.picks.weighs_inputs;
                for (expert, tokens) in routes.into_iter().enumerate() {
                    if tokens.is_empty() {
                        continue;
                    }
                    let mut picked = Panels::zeros(x.features(), tokens.len());
                    for (i, (token, weight)) in tokens.iter().enumerate() {
                        let scale = if weighs_inputs { *weight } else { 1.0 };
                        picked.set_token(i, x.token(*token).map(|x| x * scale));
                    }
                    let mut result = Panels::default();
                    experts[expert].forward(checkpoint, &picked, observer, w, &mut result)?;
                    for (i, (token, weight)) in tokens.iter().enumerate() {
                        let weight = if weighs_inputs { 1.0 } else { *weight };
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

impl Shared {
    /// `out = what it gives`, times the sigmoid of its gate.
    fn forward(
        &self,
        checkpoint: &Checkpoint,
        x: &Panels,
        observer: &mut dyn Observer,
        w: &mut Workspace,
        out: &mut Panels,
    ) -> Result<()> {
        self.gated.forward(checkpoint, x, observer, w, out)?;
        let Some(gate) = &self.gate else { return Ok(()) };
        observer.linear_input(gate.tensor(), x);
        let mut scores = Panels::default();
        multiply_all(checkpoint, &mut [Product::new(gate, x, &mut scores)])?;
        for panel in 0..out.count() {
            let width = out.width(panel);
            let scores = scores.panel(panel);
            for row in out.panel_mut(panel).chunks_exact_mut(width) {
                row.iter_mut().zip(scores).for_each(|(y, score)| *y *= 1.0 / (1.0 + exp(-*score)));
            }
        }
        Ok(())
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
            GateUp::Interleaved(linear) => {
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.mlp.fused)).collect();
                multiply_side_by_side(checkpoint, linear, pairs)?;
                streams.iter_mut().for_each(|s| s.mlp.split_turns());
            }
            GateUp::Alone(linear) => {
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.mlp.gate)).collect();
                multiply_side_by_side(checkpoint, linear, pairs)?;
                streams.iter_mut().for_each(|s| s.mlp.ungated());
            }
        }
        for s in &mut *streams {
            self.apply(s.mlp.gate.data(), s.mlp.up.data_mut());
            if let Some(by) = &self.turn {
                turn(by, &mut s.mlp.up, true);
            }
        }
        let pairs = streams.iter_mut().map(|s| (&s.mlp.up, &mut s.y)).collect();
        multiply_side_by_side(checkpoint, &self.down, pairs)
    }

    /// The gate's function of the one times the other.
    fn apply(&self, gate: &[f32], up: &mut [f32]) {
        match (self.clamp, self.activation) {
            (Some(clamp), _) => clamped_gate(gate, up, clamp.alpha, clamp.limit),
            (None, Activation::Silu) => silu_gate(gate, up),
            (None, Activation::GeluTanh) => gelu_tanh_gate(gate, up),
        }
    }

    /// Tells what a matrix multiplies. Of a stack no tensor is multiplied as a whole.
    fn tell(observer: &mut dyn Observer, linear: &Linear, x: &Panels) {
        if !linear.is_stacked() {
            observer.linear_input(linear.tensor(), x);
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
                Self::tell(observer, linear, x);
                multiply_all(checkpoint, &mut [Product::new(linear, x, &mut w.fused)])?;
                w.split();
            }
            GateUp::Interleaved(linear) => {
                Self::tell(observer, linear, x);
                multiply_all(checkpoint, &mut [Product::new(linear, x, &mut w.fused)])?;
                w.split_turns();
            }
            GateUp::Alone(linear) => {
                observer.linear_input(linear.tensor(), x);
                multiply_all(checkpoint, &mut [Product::new(linear, x, &mut w.gate)])?;
                w.ungated();
            }
        }
        if x.tokens() == 1 {
            self.apply(w.gate.data(), w.up.data_mut());
        } else {
            let pieces = w.gate.data().par_chunks(1 << 14);
            pieces.zip(w.up.data_mut().par_chunks_mut(1 << 14)).for_each(|(gate, up)| self.apply(gate, up));
        }
        if let Some(by) = &self.turn {
            turn(by, &mut w.up, true);
        }
        Self::tell(observer, &self.down, &w.up);
        multiply_all(checkpoint, &mut [Product::new(&self.down, &w.up, out)])
    }
}
