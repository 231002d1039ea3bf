//! What a model takes of a GPU's memory: of doctor and plan.

use std::path::Path;
use std::sync::Arc;

use llmpress_formats::{Checkpoint, printable};
use llmpress_model::{GpuNeeds, Model, Weights};
use serde::Serialize;

use crate::report::{Failure, bytes, table};

/// What a model takes in each form of its weights.
#[derive(Debug, Serialize)]
pub(crate) struct ModelNeeds {
    path: String,
    /// Tokens of the sequence.
    context: usize,
    forms: Vec<Needs>,
}

#[derive(Debug, Serialize)]
struct Needs {
    weights_form: &'static str,
    #[serde(flatten)]
    bytes: GpuNeeds,
    total: u64,
}

impl ModelNeeds {
    /// Of a checkpoint, with a sequence of so many tokens.
    pub(crate) fn of(dir: &Path, context: usize) -> Result<Self, Failure> {
        let model = Model::open(Arc::new(Checkpoint::open_dequantised(dir)?))?;
        let forms = [
            ("stored", Weights::Stored),
            ("bf16", Weights::Bf16),
            ("dfloat11", Weights::Dfloat11),
            ("fixed12", Weights::Fixed12),
        ];
        let mut needs = Self { path: dir.display().to_string(), context, forms: Vec::new() };
        for (form, weights) in forms {
            needs.add(form, GpuNeeds::of(&model, weights, context)?);
        }
        Ok(needs)
    }

    /// Adds a form.
    pub(crate) fn add(&mut self, form: &'static str, needs: GpuNeeds) {
        self.forms.push(Needs { weights_form: form, bytes: needs, total: needs.total() });
    }

    /// A table, for GPUs of so much memory.
    pub(crate) fn text(&self, gpus: &[u64]) -> String {
        let mut head = ["--weights", "weights", "cache", "workspace", "together"].map(str::to_owned).to_vec();
        head.extend((0..gpus.len()).map(|gpu| format!("GPU {gpu}")));
        let mut lines = vec![head];
        lines.extend(self.forms.iter().map(|form| {
            let GpuNeeds { weights, cache, workspace, .. } = form.bytes;
            let mut line = vec![form.weights_form.to_owned()];
            line.extend([weights, cache, workspace, form.total].map(bytes));
            let fits = |memory: &u64| if form.total <= *memory { "fits" } else { "too large" };
            line.extend(gpus.iter().map(|memory| fits(memory).to_owned()));
            line
        }));
        format!("{}, a sequence of {} tokens:\n{}", printable(&self.path), self.context, table(&lines))
    }
}
