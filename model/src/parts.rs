//! What a sub-layer is made of, for passes that need its derivatives.
//!
//! ```text
//! residual -- norm --> projections, heads, output   -- post norm --> what is added to the residual
//!                      gate, up, down
//! ```

use llmpress_kernels::cpu::Hadamard;

use crate::attention::{HeadNorms, Projections};
use crate::mlp::{GateUp, Mlp};
use crate::norm::Norm;
use crate::online::HeadRounding;
use crate::{Activation, Linear, Model, RopeConfig, SubLayer};

/// A sub-layer.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// Weights of the norm of what it reads, with the offset of its family.
    pub norm: Option<&'a [f32]>,
    /// Those of the norm of what it gives out.
    pub post_norm: Option<&'a [f32]>,
    /// What lies between.
    pub body: Body<'a>,
}

/// What a sub-layer does.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// Self-attention.
    Attention {
        /// Query, key and value; or one matrix with the rows of all three.
        projections: &'a [Linear],
        /// From all heads.
        output: &'a Linear,
        /// Norms of each head's query and key.
        qk_norm: Option<(&'a [f32], &'a [f32])>,
        /// Whether query and key are normed over all heads together.
        whole_norms: bool,
        /// How many tokens a token sees, itself included.
        window: Option<usize>,
        /// Its rotary embedding.
        rope: &'a RopeConfig,
        /// How each head's query, key and value are rounded.
        rounding: [Option<HeadRounding>; 3],
    },
    /// A gated MLP.
    Gated {
        /// Gate and up; or one matrix with the rows of both.
        gate_up: &'a [Linear],
        /// From the inner features.
        down: &'a Linear,
        /// The gate's function.
        activation: Activation,
        /// What turns the inner features (R4).
        turn: Option<&'a Hadamard>,
    },
    /// An MLP without a gate.
    Plain,
    /// A router and experts.
    Experts,
}

/// What follows the last layer.
#[derive(Clone, Copy, Debug)]
pub struct Outlet<'a> {
    /// Weights of the last norm, with the offset of its family.
    pub norm: &'a [f32],
    /// Its tensor.
    pub norm_tensor: &'a str,
    /// From what it gives out to logits.
    pub head: &'a Linear,
    /// What logits are multiplied by.
    pub scale: f32,
    /// What logits are capped to ([`crate::soft_cap`]).
    pub cap: Option<f32>,
    /// What turns the residual stream between embedding and norm (R1).
    pub turn: Option<&'a Hadamard>,
}

impl Model {
    /// What follows the last layer.
    pub fn outlet(&self) -> Outlet<'_> {
        Outlet {
            norm: &self.norm.weight,
            norm_tensor: &self.norm.name,
            head: &self.head,
            scale: self.config().logit_scale,
            cap: self.config().final_softcap,
            turn: self.online.residual.as_ref(),
        }
    }

    /// What a sub-layer is made of; none where it was pruned away.
    pub fn parts(&self, site: SubLayer) -> Option<Parts<'_>> {
        match site {
            SubLayer::Attention(layer) => {
                let parts = self.layers.get(layer)?.attention.as_ref()?;
                let body = &parts.body;
                let projections = match &body.projections {
                    Projections::Separate(all) => &all[..],
                    Projections::Fused(one) => std::slice::from_ref(one),
                };
                let (qk_norm, whole_norms) = match &body.qk_norm {
                    HeadNorms::None => (None, false),
                    HeadNorms::Heads(q, k) => (Some((&q[..], &k[..])), false),
                    HeadNorms::Whole(..) => (None, true),
                };
                let body = Body::Attention {
                    projections,
                    output: &body.output,
                    qk_norm,
                    whole_norms,
                    window: body.window,
                    rope: self.config().ropes.get(body.rope)?,
                    rounding: self.online.rounding(),
                };
                Some(Parts { norm: weights(&parts.norm), post_norm: weights(&parts.post_norm), body })
            }
            SubLayer::Mlp(layer) => {
                let parts = self.layers.get(layer)?.mlp.as_ref()?;
                let body = match &parts.body {
                    Mlp::Dense(gated) if matches!(gated.gate_up, GateUp::Alone(_)) => Body::Plain,
                    Mlp::Dense(gated) => Body::Gated {
                        gate_up: gated.gate_up.linears(),
                        down: &gated.down,
                        activation: gated.activation,
                        turn: gated.turn.as_deref(),
                    },
                    Mlp::Experts { .. } => Body::Experts,
                };
                Some(Parts { norm: weights(&parts.norm), post_norm: weights(&parts.post_norm), body })
            }
        }
    }
}

fn weights(norm: &Option<Norm>) -> Option<&[f32]> {
    norm.as_ref().map(|norm| norm.weight.as_slice())
}
