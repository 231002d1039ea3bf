//! What the verbs that run a model share: opening it with its tokenizer, and the threads.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use llmpress_formats::{Checkpoint, Error};
use llmpress_kernels::gpu::Gpu;
use llmpress_kernels::gpu::cuda::Cuda;
use llmpress_model::{Engine, GpuModel, Model, Tokenizer, Weights};
use llmpress_pipeline::{Pass, view};

use crate::Outcome;
use crate::args::{Device, DeviceArgs, WeightsChoice};
use crate::report::{Failure, Output};

/// A model and its tokenizer.
pub(crate) struct Loaded {
    pub(crate) model: Box<dyn Engine>,
    pub(crate) tokenizer: Tokenizer,
}

impl Loaded {
    pub(crate) fn open(dir: &Path, device: DeviceArgs, output: Output) -> Result<Self, Failure> {
        Self::after(dir, device, &[], output)
    }

    /// A model as passes leave it.
    pub(crate) fn after(
        dir: &Path,
        device: DeviceArgs,
        passes: &[Pass],
        output: Output,
    ) -> Result<Self, Failure> {
        Ok(Self { model: open_after(dir, device, passes, output)?, tokenizer: Tokenizer::open(dir)? })
    }

    /// Refuses ids that the model has no embedding for.
    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), Failure> {
        match ids.iter().max() {
            Some(&id) if id as usize >= self.model.vocab_size() => {
                Err(Failure::from(Error::Invalid(format!(
                    "the tokenizer gives token id {id}, but {} has a vocabulary of {}: do tokenizer.json and the weights \
                 belong together?",
                    self.model.checkpoint().root().display(),
                    self.model.vocab_size()
                ))))
            }
            _ => Ok(()),
        }
    }
}

/// A model without a tokenizer.
pub(crate) fn open_model(dir: &Path, device: DeviceArgs, output: Output) -> Result<Box<dyn Engine>, Failure> {
    open_after(dir, device, &[], output)
}

fn open_after(
    dir: &Path,
    device: DeviceArgs,
    passes: &[Pass],
    output: Output,
) -> Result<Box<dyn Engine>, Failure> {
    // A missing GPU is said before the weights are read.
    let gpu = match device.device {
        Device::Cpu => None,
        Device::Cuda(ordinal) => Some(gpu(ordinal)?),
    };
    let mut model = Model::open(Arc::new(view(Checkpoint::open_dequantised(dir)?, passes)?))?;
    tell(&model, output);
    let weights = match device.weights {
        WeightsChoice::Stored => Weights::Stored,
        WeightsChoice::Bf16 => Weights::Bf16,
        WeightsChoice::Dfloat11 => Weights::Dfloat11,
        WeightsChoice::Fixed12 => Weights::Fixed12,
    };
    match gpu {
        None => {
            model.load(weights)?;
            Ok(Box::new(model))
        }
        Some(gpu) => Ok(Box::new(GpuModel::open(gpu, &model, weights, true)?)),
    }
}

/// Unused tensors that are named.
const NAMED: usize = 3;

/// Prints what the user should know of a model's checkpoint.
fn tell(model: &Model, output: Output) {
    let root = model.checkpoint().root().display();
    for warning in model.warnings() {
        output.warn(&format!("{root}: {warning}"));
    }
    if let unused @ [_, ..] = model.unused() {
        let names: Vec<&str> = unused.iter().take(NAMED).map(String::as_str).collect();
        let more = if unused.len() > NAMED { ", ..." } else { "" };
        output.warn(&format!(
            "{root}: {} stored tensors are not used by the model that config.json describes: {}{more} (inspect lists them)",
            unused.len(),
            names.join(", ")
        ));
    }
}

/// Tells where a sequence is longer than a model was made for.
pub(crate) fn check_length(model: &dyn Engine, tokens: usize, output: Output) {
    if let Some(most) = model.config().max_positions.filter(|most| tokens > *most) {
        output.warn(&format!(
            "{}: sequences of {tokens} tokens are longer than the {most} that the model was made for \
             (max_position_embeddings)",
            model.checkpoint().root().display()
        ));
    }
}

static OPEN: OnceLock<Gpu> = OnceLock::new();

/// Bytes of the GPU's memory that the command holds with all its models, and the most there were; `None` if it has
/// none open.
pub(crate) fn gpu_memory() -> Option<(usize, usize)> {
    OPEN.get().map(Gpu::allocated)
}

/// A GPU, opened once for all models of a command.
fn gpu(ordinal: usize) -> Result<Gpu, Failure> {
    if let Some(gpu) = OPEN.get() {
        return Ok(gpu.clone());
    }
    let gpu = Gpu::new(Cuda::open(ordinal).map_err(device_failure)?);
    Ok(OPEN.get_or_init(|| gpu).clone())
}

/// What went wrong on a device, as a failure.
pub(crate) fn device_failure(error: llmpress_kernels::gpu::Error) -> Failure {
    Failure::from(Error::Invalid(error.to_string()))
}

/// Runs a verb on `jobs` threads, all processors if none is given.
pub(crate) fn in_pool(jobs: Option<u16>, verb: impl FnOnce() -> Outcome + Send) -> Outcome {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(jobs.map_or(0, usize::from))
        .build()
        .map_err(|e| Failure::Usage(format!("--jobs: {e}")))?;
    pool.install(verb)
}

/// Refuses several windows at once where they would not be read so.
pub(crate) fn check_batch(device: Device, batch: Option<usize>) -> Result<(), Failure> {
    match (device, batch) {
        (Device::Cpu, Some(batch)) if batch > 1 => Err(Failure::Usage(format!(
            "--batch {batch} is for --device cuda: one window keeps the processor busy, so it reads one after the other"
        ))),
        _ => Ok(()),
    }
}
