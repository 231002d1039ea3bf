//! A gated MLP with its derivatives.
//!
//! ```text
//! forward:   gate, up = W x      inner = act(gate) up      [R4]      y = W_down inner
//! backward:  dW_down = dy inner^T      d inner = W_down^T dy      [R4^T]      d gate, d up      dW = d x^T
//! ```

use std::sync::Arc;

use llmpress_kernels::cpu::{Hadamard, gelu_tanh_gate, gelu_tanh_gate_back, silu_gate, silu_gate_back};
use llmpress_model::{Activation, Panels};
use rayon::prelude::*;

use crate::linear::{Back, ByToken, Room, add_gradient, back};
use crate::net::{Given, Gradients, Part, round, turn};

/// Values that a task gates.
const PIECE: usize = 1 << 14;

/// A gated MLP without its weights.
#[derive(Clone, Debug)]
pub(crate) struct Mlp {
    pub(crate) gate: Part,
    pub(crate) up: Part,
    pub(crate) down: Part,
    pub(crate) activation: Activation,
    pub(crate) turn: Option<Arc<Hadamard>>,
}

/// What the way back needs.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    gate: Panels,
    up: Panels,
    inner: Panels,
    d_inner: Panels,
}

impl Mlp {
    /// `bits` are those of what the last matrix multiplies. False where that cannot be quantised.
    pub(crate) fn forward(
        &self,
        weights: &[&[f32]],
        x: &Panels,
        bits: Option<u8>,
        kept: &mut Kept,
        y: &mut Panels,
    ) -> bool {
        self.gate.product(weights, None, x, &mut kept.gate);
        self.up.product(weights, None, x, &mut kept.up);
        kept.inner.clone_from(&kept.up);
        let apply = match self.activation {
            Activation::Silu => silu_gate,
            Activation::GeluTanh => gelu_tanh_gate,
        };
        let pieces = kept.gate.data().par_chunks(PIECE);
        pieces.zip(kept.inner.data_mut().par_chunks_mut(PIECE)).for_each(|(gate, up)| apply(gate, up));
        self.turn(&mut kept.inner, true);
        let sound = round(&mut kept.inner, bits);
        self.down.product(weights, None, &kept.inner, y);
        sound
    }

    /// `gradients` take what is added; `x` is what was multiplied, `dy` the derivative by what came out, `dx` takes that by
    /// what was multiplied.
    pub(crate) fn backward(
        &self,
        given: Given<'_>,
        x: &ByToken,
        (dy, dx): (&Panels, Option<&mut Panels>),
        (kept, room): (&mut Kept, &mut Room),
        gradients: &mut Gradients,
    ) {
        let gradients = &mut gradients.matrices;
        room.by_token.take(&kept.inner);
        room.by_feature.take(dy);
        add_gradient(&room.by_feature, &room.by_token, self.down.of_mut(gradients));
        let matrix = |part: &Part, at| Back {
            weights: part.of(given.matrices),
            cols: part.cols,
            turned: given.turned_part(at),
        };
        matrix(&self.down, 2).product(dy, room, &mut kept.d_inner);
        self.turn(&mut kept.d_inner, false);
        let apply = match self.activation {
            Activation::Silu => silu_gate_back,
            Activation::GeluTanh => gelu_tanh_gate_back,
        };
        let gate = kept.gate.data_mut().par_chunks_mut(PIECE);
        let all =
            gate.zip(kept.up.data_mut().par_chunks_mut(PIECE)).zip(kept.d_inner.data().par_chunks(PIECE));
        all.for_each(|((gate, up), d)| apply(gate, up, d));
        for (part, d) in [(&self.gate, &kept.gate), (&self.up, &kept.up)] {
            room.by_feature.take(d);
            add_gradient(&room.by_feature, x, part.of_mut(gradients));
        }
        if let Some(dx) = dx {
            let parts = [(matrix(&self.gate, 0), &kept.gate), (matrix(&self.up, 1), &kept.up)];
            back(parts, room, dx);
        }
    }

    fn turn(&self, x: &mut Panels, forward: bool) {
        if let Some(by) = &self.turn {
            turn(by, x, forward);
        }
    }
}
