//! The experts of a layer: routed, grouped, multiplied and joined without a word to the host.

use llmpress_formats::Result;
use llmpress_kernels::gpu::experts::{
    ExpertProduct, ExpertWeights, Plan, Routing, Width, combine, group, product, route,
};
use llmpress_kernels::gpu::gate::gate;
use llmpress_kernels::gpu::{self, Buffer, View};

use super::super::{ExpertLinear, ExpertSource, GpuExperts, GpuModel, device};
use super::{GpuSession, activation, padded};
use crate::config::Activation;

/// What says which tokens go through which experts: for the layers of a session, one after the other.
#[derive(Debug)]
pub(super) struct PlanBuffers([Buffer; 5]);

impl PlanBuffers {
    /// Room for the layers of a model with `tokens` tokens.
    pub(super) fn new(model: &GpuModel, tokens: usize) -> Result<Self> {
        let bytes =
            plan_bytes(model.layers.iter().filter_map(|layer| Some(layer.experts()?.routing)), tokens);
        let allocate = |bytes: usize| model.gpu.allocate(bytes).map_err(device);
        let [chosen, weights, slots, jobs, counts] = bytes;
        Ok(Self([
            allocate(chosen)?,
            allocate(weights)?,
            allocate(slots)?,
            allocate(jobs)?,
            allocate(counts)?,
        ]))
    }

    fn plan(&self) -> Plan<'_> {
        let [chosen, weights, slots, jobs, counts] = &self.0;
        Plan {
            chosen: chosen.view(),
            weights: weights.view(),
            slots: slots.view(),
            jobs: jobs.view(),
            counts: counts.view(),
        }
    }
}

/// Bytes of the buffers of a plan that serves all of `routings`.
pub(in crate::gpu) fn plan_bytes(routings: impl Iterator<Item = Routing>, tokens: usize) -> [usize; 5] {
    routings.map(|routing| routing.bytes(tokens)).fold([0; 5], |most, bytes| {
        let mut most = most;
        most.iter_mut().zip(bytes).for_each(|(most, bytes)| *most = bytes.max(*most));
        most
    })
}

impl GpuSession<'_> {
    /// `h += experts(x)` for what is in `x`.
    pub(super) fn experts(
        &self,
        experts: &GpuExperts,
        function: Activation,
        tokens: usize,
    ) -> gpu::Result<()> {
        let m = self.model;
        let gpu = &m.gpu;
        let (routing, plan) = (experts.routing, self.plan.plan());
        let hidden = m.config.hidden_size;
        let (slots, inner) = (routing.slots(tokens), experts.down.cols);
        self.product(&experts.router, tokens, self.y.view(), routing.experts, false)?;
        route(gpu, routing, self.y.view(), tokens, &plan)?;
        let shapes: Vec<ExpertWeights<'_>> =
            experts.gate_up.iter().chain([&experts.down]).map(|linear| self.expert_weights(linear)).collect();
        let width = Width::of(gpu, routing, tokens, &shapes);
        group(gpu, routing, tokens, width, &plan)?;
        // Of a unit that holds them, what belongs to the experts at hand is decoded when it is needed first.
        let mut decoded = None;
        let mut multiply = |linear: &ExpertLinear, by_slot, y: View<'_>, y_stride| {
            if let ExpertSource::Dfloat11 { unit, .. } = linear.source
                && decoded != Some(unit)
            {
                self.unit(unit, 0, 0)?;
                m.units[unit].decode_wanted(gpu, plan.counts, self.scratch.view())?;
                decoded = Some(unit);
            }
            let operands =
                ExpertProduct { x: self.x.view(), stride: padded(linear.cols), by_slot, tokens, y, y_stride };
            product(gpu, routing, self.expert_weights(linear), &operands, width, &plan)
        };
        let mut at = 0;
        for linear in &experts.gate_up {
            multiply(linear, false, self.y.slice(4 * at..self.y.bytes())?, 2 * inner)?;
            at += linear.rows;
        }
        let up = self.y.slice(4 * inner..self.y.bytes())?;
        let (y, x) = (self.y.view(), self.x.view());
        gate(gpu, activation(function), y, Some(up), inner, 2 * inner, slots, x, padded(inner))?;
        multiply(&experts.down, true, self.y.view(), hidden)?;
        combine(gpu, routing, self.y.view(), hidden, tokens, &plan, self.h.view())
    }

    fn expert_weights<'s>(&'s self, linear: &'s ExpertLinear) -> ExpertWeights<'s> {
        let ExpertLinear { rows, whole, cols, source } = linear;
        let (rows, whole, cols) = (*rows, *whole, *cols);
        match source {
            ExpertSource::Dense { words, element, firsts } => ExpertWeights::Dense {
                words: words.view(),
                element: *element,
                firsts: firsts.view(),
                rows,
                cols,
                whole,
            },
            ExpertSource::Fixed12(matrix) => ExpertWeights::Fixed12 { matrix, whole },
            ExpertSource::Dfloat11 { firsts, .. } => ExpertWeights::Dense {
                words: self.scratch.view(),
                element: llmpress_kernels::gpu::dense::Element::Bf16,
                firsts: firsts.view(),
                rows,
                cols,
                whole,
            },
        }
    }
}
