//! The architectures that are written: those whose tensors, keys and arithmetic llama.cpp has in the same way.

use llmpress_formats::{Checkpoint, Error as FormatError};
use llmpress_model::ModelConfig;

use crate::Result;

/// An architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Mistral,
    Mixtral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
    Phi3,
}

impl Family {
    /// That of a model.
    ///
    /// # Errors
    /// One that is not written, by name.
    pub(super) fn of(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self> {
        Ok(match config.blueprint.model_types.first() {
            Some(&"llama") => Self::Llama,
            Some(&"mistral") => Self::Mistral,
            Some(&"mixtral") => Self::Mixtral,
            Some(&"qwen2") => Self::Qwen2,
            Some(&"qwen3") => Self::Qwen3,
            Some(&"qwen3_moe") => Self::Qwen3Moe,
            Some(&"gemma3") => Self::Gemma3,
            Some(&"phi3") => Self::Phi3,
            _ => {
                let what = format!(
                    "is a {}, which is not written as GGUF; llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma3 and phi3 are. \
                     Export as safetensors and use llama.cpp's converter",
                    config.blueprint.name
                );
                return Err(FormatError::unsupported(checkpoint.root(), None, what).into());
            }
        })
    }

    /// llama.cpp's name of it.
    pub(super) fn architecture(self) -> &'static str {
        match self {
            Self::Llama | Self::Mistral | Self::Mixtral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
        }
    }

    /// Whether rows of query and key are interleaved.
    pub(super) fn interleaves(self) -> bool {
        self.architecture() == "llama"
    }
}
