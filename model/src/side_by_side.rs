//! One token of each of several sequences through the layers on the processor: weights are read once for all of them, and each
//! sequence has the bits that it has by itself.

use llmpress_formats::{Error, Result};

use crate::linear::multiply_side_by_side;
use crate::norm::normed;
use crate::rope::Rotation;
use crate::{Cache, Model, Panels, Skips, SubLayer, attention, mlp};

/// A sequence on its way.
pub(crate) struct Stream<'a> {
    pub(crate) cache: &'a mut Cache,
    pub(crate) rotations: Vec<Rotation>,
    /// The residual stream.
    h: Panels,
    /// The same before the layer, where both sub-layers read it.
    both: Panels,
    /// What a sub-layer gets, and what it gives.
    pub(crate) x: Panels,
    pub(crate) y: Panels,
    pub(crate) attention: attention::Workspace,
    pub(crate) mlp: mlp::Workspace,
}

impl Model {
    /// The state after the last norm of one token of each sequence, which follows those in its cache.
    ///
    /// # Errors
    /// Those of [`Self::hidden`].
    pub(crate) fn hidden_side_by_side(
        &self,
        ids: &[u32],
        caches: Vec<&mut Cache>,
        skips: &Skips,
    ) -> Result<Vec<Panels>> {
        let (config, eps) = (self.config(), self.config().norm_eps);
        let parallel = config.blueprint.parallel;
        let mut streams = Vec::with_capacity(ids.len());
        for (id, cache) in ids.iter().zip(caches) {
            if cache.len() >= cache.capacity() {
                let (needed, capacity) = (cache.len() + 1, cache.capacity());
                return Err(Error::Limit(format!("{needed} tokens do not fit a cache of {capacity}")));
            }
            let rotation = |rope| Rotation::new(rope, cache.len(), 1, cache.announced());
            streams.push(Stream {
                rotations: config.ropes.iter().map(rotation).collect(),
                h: self.embed_at(&[*id], cache.len())?,
                both: Panels::default(),
                cache,
                x: Panels::default(),
                y: Panels::default(),
                attention: attention::Workspace::default(),
                mlp: mlp::Workspace::default(),
            });
        }
        for (index, layer) in self.layers.iter().enumerate() {
            if parallel {
                streams.iter_mut().for_each(|s| s.both.clone_from(&s.h));
            }
            if let Some(a) = layer.attention.as_ref().filter(|_| !skips.contains(&SubLayer::Attention(index)))
            {
                streams.iter_mut().for_each(|s| normed(a.norm.as_ref(), &s.h, eps, &mut s.x));
                let bits = self.online.qkv_bits;
                a.body.forward_side_by_side(&self.checkpoint, config, bits, index, &mut streams)?;
                streams.iter_mut().for_each(|s| self.add(&mut s.h, &mut s.y, a.post_norm.as_ref(), &mut s.x));
            }
            if let Some(m) = layer.mlp.as_ref().filter(|_| !skips.contains(&SubLayer::Mlp(index))) {
                streams.iter_mut().for_each(|s| {
                    normed(m.norm.as_ref(), if parallel { &s.both } else { &s.h }, eps, &mut s.x);
                });
                m.body.forward_side_by_side(&self.checkpoint, &mut streams)?;
                streams.iter_mut().for_each(|s| self.add(&mut s.h, &mut s.y, m.post_norm.as_ref(), &mut s.x));
            }
        }
        streams
            .into_iter()
            .map(|s| {
                s.cache.advance(1);
                self.last_norm(&s.h)
            })
            .collect()
    }

    /// All logits of one state of each sequence.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub(crate) fn logits_side_by_side(&self, states: &[Panels]) -> Result<Vec<Panels>> {
        let mut all: Vec<Panels> = states.iter().map(|_| Panels::default()).collect();
        let pairs = states.iter().zip(&mut all).collect();
        multiply_side_by_side(&self.checkpoint, &self.head, pairs)?;
        all.iter_mut().for_each(|logits| self.cap(logits));
        Ok(all)
    }
}
