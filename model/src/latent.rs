//! Queries, keys and values through small latent vectors (DeepSeek-V2, section 2.1).
//!
//! ```text
//! x --> q_a, norm --> q_b, or q      heads x (plain | turned)
//! x --> kv_a:  latent, norm --> kv_b:  heads x (plain | values)
//!              turned part of keys, the same for all heads
//! ```

use llmpress_formats::{Checkpoint, Result};

use crate::attention::copy_features;
use crate::linear::{Linear, Product, multiply_all, multiply_side_by_side};
use crate::norm::rms;
use crate::side_by_side::Stream;
use crate::{Observer, Panels};

/// Sizes of latent attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentConfig {
    /// Size of the vector that queries are made of; none: they are made of the residual stream.
    pub query_rank: Option<usize>,
    /// Size of the vector that keys and values are made of.
    pub rank: usize,
    /// Features of a query or key that are not turned.
    pub plain: usize,
    /// Those that are, after them.
    pub turned: usize,
    /// Features of a value.
    pub value: usize,
}

/// Added to the mean square in the norms of latent vectors, whatever the configuration says of others.
const EPS: f32 = 1e-6;

/// The matrices of a layer.
#[derive(Debug)]
pub(crate) struct Latent {
    pub(crate) config: LatentConfig,
    pub(crate) heads: usize,
    pub(crate) norm: Vec<f32>,
    /// Weights of the norm of the queries' vector, where they have one.
    pub(crate) query_norm: Option<Vec<f32>>,
    /// What reads the residual stream: `kv_a`, then `q_a` or `q`.
    pub(crate) readers: [Linear; 2],
    /// `kv_b`, and `q_b` where queries have a vector.
    pub(crate) expand: Vec<Linear>,
}

/// Activations, kept from layer to layer for their memory.
#[derive(Default)]
pub(crate) struct Workspace {
    /// What `kv_a` gives.
    compressed: Panels,
    latent: Panels,
    normed: Panels,
    /// What `kv_b` gives.
    expanded: Panels,
    query: Panels,
    query_normed: Panels,
}

impl Workspace {
    fn norm(&mut self, latent: &Latent) {
        copy_features(&self.compressed, 0, latent.config.rank, &mut self.latent);
        rms(&self.latent, &latent.norm, EPS, &mut self.normed);
        if let Some(weight) = &latent.query_norm {
            rms(&self.query, weight, EPS, &mut self.query_normed);
        }
    }

    /// Keys and values of all heads.
    fn split(&self, latent: &Latent, k: &mut Panels, v: &mut Panels) {
        let LatentConfig { rank, plain, turned, value, .. } = latent.config;
        let tokens = self.expanded.tokens();
        k.resize(latent.heads * (plain + turned), tokens);
        v.resize(latent.heads * value, tokens);
        for panel in 0..self.expanded.count() {
            let width = self.expanded.width(panel);
            let shared = &self.compressed.panel(panel)[rank * width..];
            let heads = self.expanded.panel(panel).chunks_exact((plain + value) * width);
            let keys = k.panel_mut(panel).chunks_exact_mut((plain + turned) * width);
            let values = v.panel_mut(panel).chunks_exact_mut(value * width);
            for ((from, key), to) in heads.zip(keys).zip(values) {
                key[..plain * width].copy_from_slice(&from[..plain * width]);
                key[plain * width..].copy_from_slice(shared);
                to.copy_from_slice(&from[plain * width..]);
            }
        }
    }
}

impl Latent {
    /// Queries, keys and values of all heads, before they are turned.
    pub(crate) fn project(
        &self,
        checkpoint: &Checkpoint,
        x: &Panels,
        observer: &mut dyn Observer,
        w: &mut Workspace,
        [q, k, v]: [&mut Panels; 3],
    ) -> Result<()> {
        self.readers.iter().for_each(|linear| observer.linear_input(linear.tensor(), x));
        let [kv_a, q_a] = &self.readers;
        let [kv_b, expand @ ..] = &self.expand[..] else { return Ok(()) };
        let first = if expand.is_empty() { &mut *q } else { &mut w.query };
        multiply_all(
            checkpoint,
            &mut [Product::new(kv_a, x, &mut w.compressed), Product::new(q_a, x, first)],
        )?;
        w.norm(self);
        observer.linear_input(kv_b.tensor(), &w.normed);
        let mut products = vec![Product::new(kv_b, &w.normed, &mut w.expanded)];
        if let [q_b] = expand {
            observer.linear_input(q_b.tensor(), &w.query_normed);
            products.push(Product::new(q_b, &w.query_normed, q));
        }
        multiply_all(checkpoint, &mut products)?;
        w.split(self, k, v);
        Ok(())
    }

    /// The same for one token of each of several sequences, each as it is by itself.
    pub(crate) fn project_side_by_side(
        &self,
        checkpoint: &Checkpoint,
        streams: &mut [Stream<'_>],
    ) -> Result<()> {
        let [kv_a, q_a] = &self.readers;
        let [kv_b, expand @ ..] = &self.expand[..] else { return Ok(()) };
        let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.attention.latent.compressed)).collect();
        multiply_side_by_side(checkpoint, kv_a, pairs)?;
        let pairs = streams.iter_mut().map(|s| {
            let w = &mut s.attention;
            (&s.x, if expand.is_empty() { &mut w.q } else { &mut w.latent.query })
        });
        multiply_side_by_side(checkpoint, q_a, pairs.collect())?;
        streams.iter_mut().for_each(|s| s.attention.latent.norm(self));
        let pairs = streams.iter_mut().map(|s| {
            let w = &mut s.attention.latent;
            (&w.normed, &mut w.expanded)
        });
        multiply_side_by_side(checkpoint, kv_b, pairs.collect())?;
        if let [q_b] = expand {
            let pairs = streams.iter_mut().map(|s| {
                let w = &mut s.attention;
                (&w.latent.query_normed, &mut w.q)
            });
            multiply_side_by_side(checkpoint, q_b, pairs.collect())?;
        }
        for s in streams {
            let w = &mut s.attention;
            w.latent.split(self, &mut w.k, &mut w.v);
        }
        Ok(())
    }
}
