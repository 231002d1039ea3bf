//! Finds the tensors of what stands in the place of attention, or beside it, and of experts.

use llmpress_formats::blueprint::{DeltaNames, Experts, Stacked};
use llmpress_formats::{Error, Result};

use crate::attention::Extras;
use crate::config::Clamped;
use crate::decoder::Loader;
use crate::delta::{Delta, Inputs};
use crate::latent::{Latent, LatentConfig};
use crate::linear::{Linear, Stack, small, small_row, vector};
use crate::mlp::{GateUp, Gated, Mlp, Picking, Shared};
use crate::picks::Picks;

impl Loader<'_> {
    /// A small tensor of the layer, `name` and all.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let name = format!("{}{name}", self.name);
        self.used.note(&name);
        vector(self.checkpoint, &name, len)
    }

    /// What attention of a layer has besides.
    pub(crate) fn extras(&self, index: usize) -> Result<Extras> {
        let (c, mixers) = (self.config, &self.blueprint().mixers);
        let layer = &c.layers[index];
        Ok(Extras {
            chunk: layer.chunk,
            sinks: mixers.sinks.map(|name| self.vector(name, c.heads)).transpose()?,
            gated: mixers.gated,
            temperature: c.temperature.filter(|_| !layer.turned),
            turned_norm: (c.norms_turned && layer.turned).then(|| vec![1.0; c.head_dim]),
            turned_from: c.latent.map_or(0, |latent| latent.plain),
        })
    }

    /// The matrices of latent attention.
    pub(crate) fn latent(&self, latent: LatentConfig) -> Result<Latent> {
        let c = self.config;
        let of_queries = c.heads * c.head_dim;
        let kv_a = self.linear(
            "self_attn.kv_a_proj_with_mqa",
            latent.rank + latent.turned,
            c.hidden_size,
            c.qkv_bias,
        )?;
        let kv_b =
            self.linear("self_attn.kv_b_proj", c.heads * (latent.plain + latent.value), latent.rank, false)?;
        let (query, query_norm, expand) = match latent.query_rank {
            None => (self.linear("self_attn.q_proj", of_queries, c.hidden_size, false)?, None, vec![kv_b]),
            Some(rank) => {
                let q_b = self.linear("self_attn.q_b_proj", of_queries, rank, false)?;
                let norm = self.norm("self_attn.q_a_layernorm", rank)?.weight;
                (
                    self.linear("self_attn.q_a_proj", rank, c.hidden_size, c.qkv_bias)?,
                    Some(norm),
                    vec![kv_b, q_b],
                )
            }
        };
        Ok(Latent {
            config: latent,
            heads: c.heads,
            norm: self.norm("self_attn.kv_a_layernorm", latent.rank)?.weight,
            query_norm,
            readers: [kv_a, query],
            expand,
        })
    }

    /// A layer that remembers.
    pub(crate) fn delta(&self) -> Result<Delta> {
        let (c, names) = (self.config, &self.blueprint().mixers.delta);
        let none = || Error::Invalid(format!("{} models have no delta layers", self.blueprint().name));
        let (config, names) = (c.delta.ok_or_else(none)?, names.as_ref().ok_or_else(none)?);
        let (keys, values) = (2 * config.key_heads * config.key_dim, config.values());
        let DeltaNames { module, inputs } = names;
        let linear = |name: &str, rows| self.linear(&format!("{module}.{name}"), rows, c.hidden_size, false);
        let inputs = match inputs[..] {
            [both, ba] => Inputs::Grouped(Box::new([
                linear(both, keys + 2 * values)?,
                linear(ba, 2 * config.value_heads)?,
            ])),
            [qkv, z, b, a] => Inputs::Separate(Box::new([
                linear(qkv, keys + values)?,
                linear(z, values)?,
                linear(b, config.value_heads)?,
                linear(a, config.value_heads)?,
            ])),
            _ => return Err(none()),
        };
        let convolution = format!("{}{module}.conv1d.weight", self.name);
        self.used.note(&convolution);
        let of = |name: &str, len| self.vector(&format!("{module}.{name}"), len);
        let rates = of("A_log", config.value_heads)?;
        Ok(Delta {
            config,
            inputs,
            convolution: small(self.checkpoint, &convolution, &[config.channels(), 1, config.kernel])?,
            rates: rates.into_iter().map(|a| -f64::from(a).exp() as f32).collect(),
            steps: of("dt_bias", config.value_heads)?,
            norm: of("norm.weight", config.value_dim)?,
            eps: c.norm_eps,
            output: self.linear(&format!("{module}.out_proj"), c.hidden_size, values, false)?,
        })
    }

    /// A router, its experts, and one that every token goes through.
    pub(crate) fn experts(
        &self,
        intermediate: usize,
        count: usize,
        picks: Picks,
        clamp: Option<Clamped>,
        shared: Option<usize>,
    ) -> Result<Mlp> {
        let blueprint = self.blueprint();
        let missing = || Error::Invalid(format!("{} models have no experts", blueprint.name));
        let names = blueprint.experts.as_ref().ok_or_else(missing)?;
        let module = names.module;
        let stacked = names.stacked.as_ref().filter(|stacked| {
            let has = |name: &str| {
                self.checkpoint.tensors().contains_key(&format!("{}{module}.experts.{name}", self.name))
            };
            has(stacked.names[0]) || !has(&format!("0.{}.weight", names.names[0]))
        });
        let one = |expert: usize| match stacked {
            Some(stacked) => self.of_stack(names, stacked, count, expert, intermediate),
            None => {
                let [gate, up, down] = names.names.map(|part| format!("{module}.experts.{expert}.{part}"));
                self.gated([&gate, &up, &down], intermediate)
            }
        };
        let clamped = |gated: Gated| Gated { clamp, ..gated };
        let experts = (0..count).map(|expert| one(expert).map(clamped)).collect::<Result<Vec<_>>>()?;
        let hidden = self.config.hidden_size;
        let router = self.linear(&format!("{module}.{}", names.router), count, hidden, names.router_bias)?;
        let correction =
            names.correction.map(|name| self.vector(&format!("{module}.{name}"), count)).transpose()?;
        let shared = match (&names.shared, shared) {
            (Some(shared), Some(inner)) => {
                let name = |part: &str| format!("{module}.{}.{part}", shared.module);
                let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"].map(name);
                let gated = self.gated([&gate, &up, &down], inner)?;
                let gate = shared.gate.map(|name| self.linear(&format!("{module}.{name}"), 1, hidden, false));
                Some(Shared { gated, gate: gate.transpose()? })
            }
            _ => None,
        };
        let picking = Box::new(Picking { picks, correction, shared });
        Ok(Mlp::Experts { router, experts, picking })
    }

    /// One expert of those that lie in one tensor each.
    fn of_stack(
        &self,
        names: &Experts,
        stacked: &Stacked,
        count: usize,
        index: usize,
        inner: usize,
    ) -> Result<Gated> {
        let (c, hidden) = (self.config, self.config.hidden_size);
        let stack = Stack { count, index, transposed: stacked.transposed };
        let linear = |name: &str, rows: usize, cols: usize| -> Result<Linear> {
            let tensor = format!("{}{}.experts.{name}", self.name, names.module);
            self.used.note(&tensor);
            let bias = match stacked.bias {
                false => None,
                true => {
                    let biases = format!("{tensor}_bias");
                    self.used.note(&biases);
                    Some(small_row(self.checkpoint, &biases, [count, rows], index)?)
                }
            };
            Linear::open_stacked(self.checkpoint, &tensor, stack, rows, cols, bias)
        };
        let [gate_up, down] = stacked.names;
        let gate_up = linear(gate_up, 2 * inner, hidden)?;
        let gate_up = match stacked.interleaved {
            true => GateUp::Interleaved(gate_up),
            false => GateUp::Fused(gate_up),
        };
        let down = linear(down, hidden, inner)?;
        Ok(Gated { gate_up, down, activation: c.activation, clamp: None, turn: None })
    }
}
