//! Norms of the residual stream.

use llmpress_formats::Result;
use llmpress_kernels::gpu::layer_norm::layer_norm;
use llmpress_kernels::gpu::rms_norm::{rms_norm, round_rows};
use llmpress_kernels::gpu::{self, Buffer, Gpu, View};

use super::device;
use crate::norm::Norm;

/// A norm with its weights; or none, where the stream is read as it is.
#[derive(Debug)]
pub(super) enum GpuNorm {
    None,
    Rms(Buffer),
    Layer { weight: Buffer, bias: Option<Buffer> },
}

impl GpuNorm {
    /// Copies a norm whose outputs are multiplied by `scale`.
    pub(super) fn upload(gpu: &Gpu, norm: Option<&Norm>, scale: f32) -> Result<Self> {
        let Some(norm) = norm else { return Ok(Self::None) };
        let upload = |values: &[f32]| {
            let scaled: Vec<f32> = values.iter().map(|x| x * scale).collect();
            gpu.upload(&scaled).map_err(device)
        };
        let weight = upload(&norm.weight)?;
        Ok(match norm.centred {
            true => Self::Layer { weight, bias: norm.bias.as_deref().map(upload).transpose()? },
            false => Self::Rms(weight),
        })
    }

    /// `x = norm(h)`: h `F32 [tokens, hidden]`, x `BF16 [tokens, ld]` with zeros from `hidden` on.
    #[expect(clippy::too_many_arguments, reason = "the operands of a norm")]
    pub(super) fn apply(
        &self,
        gpu: &Gpu,
        h: View<'_>,
        hidden: usize,
        tokens: usize,
        eps: f32,
        x: View<'_>,
        ld: usize,
    ) -> gpu::Result<()> {
        match self {
            Self::None => round_rows(gpu, h, hidden, tokens, x, ld),
            Self::Rms(weight) => rms_norm(gpu, h, weight.view(), hidden, tokens, eps, x, ld),
            Self::Layer { weight, bias } => {
                let bias = bias.as_ref().map(Buffer::view);
                layer_norm(gpu, h, weight.view(), bias, hidden, tokens, eps, x, ld)
            }
        }
    }
}
