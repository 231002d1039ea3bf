//! What the calls of a step found.

use serde::{Deserialize, Serialize};

use crate::{Ceilings, KernelRow, Rate};

/// Something that must hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub what: String,
    /// Whether it holds.
    pub held: bool,
    /// What was found.
    pub found: String,
}

/// The GPU that was measured on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Its compute capability.
    pub compute_capability: String,
    /// Its multiprocessors.
    pub multiprocessors: u64,
    /// Its memory.
    pub memory_bytes: u64,
    /// The CUDA version that its driver supports.
    pub driver_cuda: String,
    /// Seconds in which the driver compiled every kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernels_loaded_s: Option<f64>,
    /// What `nvidia-smi` says: the driver's version and the clocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvidia_smi: Option<String>,
}

/// A kernel against its reference on the processor, on one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelProof {
    /// The kernel.
    pub kernel: String,
    /// The shape.
    pub shape: String,
    /// Whether it must be equal bit for bit; else near.
    pub exact: bool,
    /// The largest error, as a share of what rounding allows.
    #[serde(default)]
    pub worst: Option<f64>,
    /// What is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// The speed of a model in one encoding.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelSpeed {
    /// How its weights lie in the GPU's memory.
    pub weights: String,
    /// Its layers.
    pub layers: u64,
    /// Tokens of the prompt a second.
    pub prefill_tokens_per_s: Rate,
    /// Tokens a second after it.
    pub decode_tokens_per_s: Rate,
    /// Seconds to the first token.
    pub time_to_first_token_s: f64,
    /// Bytes of its weights in the GPU's memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_bytes: Option<u64>,
    /// The most bytes of the GPU's memory that were in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_peak_bytes: Option<u64>,
}

/// What the calls of a step found.
#[derive(Clone, Debug, Default)]
pub(super) struct Findings {
    pub(super) checks: Vec<Check>,
    pub(super) card: Option<Card>,
    /// Why nothing can run on the GPU.
    pub(super) no_gpu: Option<String>,
    pub(super) proofs: Vec<KernelProof>,
    pub(super) ceilings: Option<Ceilings>,
    pub(super) no_cublas: Option<String>,
    pub(super) kernels: Vec<KernelRow>,
    /// Layers of the model that was made.
    pub(super) layers: Option<u64>,
    pub(super) speeds: Vec<ModelSpeed>,
}

impl Findings {
    pub(super) fn check(&mut self, what: impl Into<String>, held: bool, found: impl Into<String>) {
        self.checks.push(Check { what: what.into(), held, found: found.into() });
    }
}
