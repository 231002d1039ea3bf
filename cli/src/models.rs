//! What the verbs that run a model share: opening it with its tokenizer, and the threads.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use llmpress_formats::{Checkpoint, Error, Removal};
use llmpress_kernels::gpu::Gpu;
use llmpress_kernels::gpu::cuda::Cuda;
use llmpress_model::{Engine, GpuModel, GpuWeights, Model, Tokenizer};

use crate::Outcome;
use crate::args::{Device, DeviceArgs, WeightsChoice};
use crate::report::Failure;

/// Longest text that is read.
const MAX_TEXT_BYTES: u64 = 1 << 30;

/// A model and its tokenizer.
pub(crate) struct Loaded {
    pub(crate) model: Box<dyn Engine>,
    pub(crate) tokenizer: Tokenizer,
}

impl Loaded {
    pub(crate) fn open(dir: &Path, device: DeviceArgs) -> Result<Self, Failure> {
        Self::pruned(dir, device, None)
    }

    /// A model without some sub-layers.
    pub(crate) fn pruned(dir: &Path, device: DeviceArgs, removal: Option<&Removal>) -> Result<Self, Failure> {
        Ok(Self { model: open_pruned(dir, device, removal)?, tokenizer: Tokenizer::open(dir)? })
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
pub(crate) fn open_model(dir: &Path, device: DeviceArgs) -> Result<Box<dyn Engine>, Failure> {
    open_pruned(dir, device, None)
}

fn open_pruned(
    dir: &Path,
    device: DeviceArgs,
    removal: Option<&Removal>,
) -> Result<Box<dyn Engine>, Failure> {
    // A missing GPU is said before the weights are read.
    let gpu = match device.device {
        Device::Cpu => None,
        Device::Cuda(ordinal) => Some(gpu(ordinal)?),
    };
    let model = Model::open(Arc::new(crate::prune::pruned(Checkpoint::open(dir)?, removal)?))?;
    match gpu {
        None if device.gpu_weights != WeightsChoice::Stored => {
            Err(Failure::Usage("--gpu-weights needs --device cuda".to_owned()))
        }
        None => Ok(Box::new(model)),
        Some(gpu) => {
            let weights = match device.gpu_weights {
                WeightsChoice::Stored => GpuWeights::Stored,
                WeightsChoice::Bf16 => GpuWeights::Bf16,
                WeightsChoice::Dfloat11 => GpuWeights::Dfloat11,
                WeightsChoice::Fixed12 => GpuWeights::Fixed12,
            };
            Ok(Box::new(GpuModel::open(gpu, &model, weights, true)?))
        }
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

/// A text file.
pub(crate) fn read_text(path: &Path) -> Result<String, Failure> {
    let bytes = llmpress_formats::read_input(path, MAX_TEXT_BYTES)?;
    String::from_utf8(bytes).map_err(|e| {
        Error::corrupt(path, None, format!("is not UTF-8 at byte {}", e.utf8_error().valid_up_to())).into()
    })
}
