//! One layer at a time, for passes that change its weights: what its linears read, and other weights in their place.
//!
//! ```text
//! residual -- norm --> q, k, v      heads --> o      + -- norm --> gate, up      inner --> down      +
//!             Normed                Heads                 Normed                 Inner
//!                                                         router, then of each expert: Tokens, Inner
//! ```

use llmpress_formats::{Error, Result};

use crate::attention::Projections;
use crate::decoder::Layer;
use crate::linear::Linear;
use crate::mlp::{Gated, Mlp};
use crate::norm::normed;
use crate::{Model, Panels, SubLayer};

/// What a linear of a layer multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reads {
    /// The residual stream after the sub-layer's norm: [`Model::normed`].
    Normed,
    /// The outputs of all heads.
    Heads,
    /// The gated inner features of an MLP.
    Inner,
    /// Those of [`Reads::Normed`] that the router sends to this expert.
    ExpertTokens(usize),
    /// The gated inner features of this expert.
    ExpertInner(usize),
}

/// Linears of a layer that multiply the same activations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedInput {
    /// Where they are.
    pub sub_layer: SubLayer,
    /// What they multiply.
    pub reads: Reads,
    /// Its features.
    pub features: usize,
    /// Their tensors, `[rows, features]` each; taps name the first of them first.
    pub tensors: Vec<String>,
}

impl Model {
    /// The same model once more, with the checkpoint's own weights, which both read.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn twin(&self) -> Result<Self> {
        Self::open(self.checkpoint.clone())
    }

    /// The linears of a layer by what they read, in the order in which they run; without routers, which decide where
    /// tokens go, and without what was pruned away.
    pub fn inputs_of(&self, layer: usize) -> Vec<SharedInput> {
        let mut inputs = Vec::new();
        let Some(parts) = self.layers.get(layer) else { return inputs };
        let mut add = |sub_layer, reads, linears: &[Linear]| {
            let tensors = linears.iter().map(|linear| linear.tensor().to_owned()).collect();
            let features = linears.first().map_or(0, Linear::cols);
            inputs.push(SharedInput { sub_layer, reads, features, tensors });
        };
        if let Some(attention) = &parts.attention {
            let site = SubLayer::Attention(layer);
            match &attention.body.projections {
                Projections::Separate(all) => add(site, Reads::Normed, &all[..]),
                Projections::Fused(one) => add(site, Reads::Normed, std::slice::from_ref(one)),
            }
            add(site, Reads::Heads, std::slice::from_ref(&attention.body.output));
        }
        if let Some(mlp) = &parts.mlp {
            let site = SubLayer::Mlp(layer);
            let mut gated = |gated: &Gated, first, second| {
                add(site, first, gated.gate_up.linears());
                add(site, second, std::slice::from_ref(&gated.down));
            };
            match &mlp.body {
                Mlp::Dense(one) => gated(one, Reads::Normed, Reads::Inner),
                Mlp::Experts { experts, .. } => {
                    for (index, expert) in experts.iter().enumerate() {
                        gated(expert, Reads::ExpertTokens(index), Reads::ExpertInner(index));
                    }
                }
            }
        }
        inputs
    }

    /// `out = norm(residual)` as the linears of a sub-layer get it, or the residual stream as it is where nothing norms it; false where it
    /// was pruned away.
    pub fn normed(&self, sub_layer: SubLayer, residual: &Panels, out: &mut Panels) -> bool {
        let norm = match sub_layer {
            SubLayer::Attention(l) => self.layers.get(l).and_then(|l| l.attention.as_ref()).map(|a| &a.norm),
            SubLayer::Mlp(l) => self.layers.get(l).and_then(|l| l.mlp.as_ref()).map(|m| &m.norm),
        };
        if let Some(norm) = norm {
            normed(norm.as_ref(), residual, self.config().norm_eps, out);
        }
        norm.is_some()
    }

    /// The weights of a layer's linear or of the head, row-major in single precision, as products see them now.
    ///
    /// # Errors
    /// No such linear; weights that cannot be read.
    pub fn weights(&self, tensor: &str) -> Result<Vec<f32>> {
        let linear = self.layers.iter().flat_map(Layer::linears).chain([&self.head]);
        let linear = linear.into_iter().find(|linear| linear.tensor() == tensor);
        linear.ok_or_else(|| self.no_such(tensor))?.weights(&self.checkpoint)
    }

    /// Puts other weights in the place of a layer's linear, row-major in single precision. They hold for products on the
    /// processor until [`Self::restore`].
    ///
    /// # Errors
    /// No such linear; not as many weights as it has.
    pub fn replace(&mut self, tensor: &str, weights: Vec<f32>) -> Result<()> {
        let linear = self.linear_mut(tensor)?;
        linear.replace(weights, linear.activation_bits())
    }

    /// Like [`Self::replace`], with inputs that are quantised to `activation_bits`, each token by itself, as the encoding
    /// `abq` has them. None: they stay as they are.
    ///
    /// # Errors
    /// Those of [`Self::replace`].
    pub fn replace_quantised(
        &mut self,
        tensor: &str,
        weights: Vec<f32>,
        activation_bits: Option<u8>,
    ) -> Result<()> {
        self.linear_mut(tensor)?.replace(weights, activation_bits)
    }

    /// Takes the checkpoint's own weights again.
    ///
    /// # Errors
    /// No such linear.
    pub fn restore(&mut self, tensor: &str) -> Result<()> {
        self.linear_mut(tensor)?.restore();
        Ok(())
    }

    fn linear_mut(&mut self, tensor: &str) -> Result<&mut Linear> {
        let missing = self.no_such(tensor);
        let mut linears = self.layers.iter_mut().flat_map(Layer::linears_mut);
        linears.find(|linear| linear.tensor() == tensor).ok_or(missing)
    }

    fn no_such(&self, tensor: &str) -> Error {
        let root = self.checkpoint.root().display();
        Error::Invalid(format!("{root}: {tensor} is no linear of a layer of this model"))
    }
}
