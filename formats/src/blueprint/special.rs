//! Parts that only the decoder on the processor has.

use super::{Blueprint, Scores};

impl Blueprint {
    /// The first part of attention that only the decoder on the processor has, in words.
    pub fn special_attention(&self) -> Option<&'static str> {
        let mixers = &self.mixers;
        let parts = [
            (mixers.latent, "latent attention"),
            (mixers.delta.is_some(), "gated delta layers"),
            (mixers.gated, "gated attention"),
            (mixers.sinks.is_some(), "attention sinks"),
            (mixers.temperature, "queries scaled by their position"),
        ];
        parts.into_iter().find_map(|(has, what)| has.then_some(what))
    }

    /// The first part of experts that only the decoder on the processor has, in words.
    pub fn special_experts(&self) -> Option<&'static str> {
        let experts = self.experts.as_ref()?;
        let parts = [
            (experts.clamp.is_some(), "experts with a clamped function"),
            (experts.shared.is_some(), "shared experts"),
            (experts.stacked.is_some(), "experts in one tensor"),
            (
                experts.scores != Scores::Softmax || experts.groups.is_some(),
                "a router that compares no softmax of all",
            ),
        ];
        parts.into_iter().find_map(|(has, what)| has.then_some(what))
    }

    /// The first of both.
    pub fn special(&self) -> Option<&'static str> {
        self.special_attention().or(self.special_experts())
    }
}
