//! What calibrated passes see of a forward pass, and what pruning leaves out of it.

use std::collections::BTreeSet;

use crate::Panels;

/// A sub-layer: attention or MLP with its norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SubLayer {
    /// Self-attention of a layer.
    Attention(usize),
    /// MLP or experts of a layer.
    Mlp(usize),
}

/// Receives activations as they pass. Every method does nothing by default.
pub trait Observer {
    /// The residual stream (features x tokens, F32) before a sub-layer; called for skipped ones too.
    fn before(&mut self, sub_layer: SubLayer, residual: &Panels) {
        let _ = (sub_layer, residual);
    }

    /// The residual stream after a sub-layer.
    fn after(&mut self, sub_layer: SubLayer, residual: &Panels) {
        let _ = (sub_layer, residual);
    }

    /// The input (features x tokens, F32) of the product with the tensor called `weight`. An expert sees the
    /// tokens that were sent to it.
    fn linear_input(&mut self, weight: &str, input: &Panels) {
        let _ = (weight, input);
    }
}

/// Observes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {}

/// The sub-layers that a forward pass leaves out: the residual passes them by, and an attention left out has
/// no keys and values.
pub type Skips = BTreeSet<SubLayer>;
