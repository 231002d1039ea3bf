//! What later steps need of earlier ones.

/// What the steps so far have found that others need.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// Why nothing can run on the GPU.
    pub(super) no_gpu: Option<String>,
    /// The GPU's memory.
    pub(super) memory_bytes: Option<u64>,
    /// Layers of the model that was made.
    pub(super) layers: Option<u64>,
}
