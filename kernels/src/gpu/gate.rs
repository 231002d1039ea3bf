//! The gate of an MLP.

use super::{Argument, Gpu, Launch, Result, View, size32};

/// Features of a block.
const FEATURES: usize = 1024;

/// The function of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
}

/// `x[t] = act(gate[t]) * up[t]`, or `act(gate[t])` without `up`: gate and up `F32 [tokens, inner]` with rows of `stride`, x `BF16 [tokens, ld]` with zeros from
/// `inner` on. By the operations of `cpu::silu_gate` and `cpu::gelu_tanh_gate`: the same bits before rounding.
///
/// # Errors
/// A buffer is too small; the launch fails.
#[expect(clippy::too_many_arguments, reason = "the operands of a gate")]
pub fn gate(
    gpu: &Gpu,
    activation: Activation,
    gate: View<'_>,
    up: Option<View<'_>>,
    inner: usize,
    stride: usize,
    tokens: usize,
    x: View<'_>,
    ld: usize,
) -> Result<()> {
    if tokens == 0 || inner == 0 {
        return Ok(());
    }
    let needed = 4 * ((tokens - 1) * stride + inner);
    gate.require("gate", needed)?;
    if let Some(up) = up {
        up.require("up", needed)?;
    }
    x.require("x", 2 * tokens * ld.max(inner))?;
    gpu.launch(&Launch {
        file: "gate",
        kernel: match activation {
            Activation::Silu => "silu_gate",
            Activation::GeluTanh => "gelu_tanh_gate",
        },
        grid: [size32("ld", ld.div_ceil(FEATURES))?, size32("tokens", tokens)?, 1],
        block: 256,
        shared: 0,
        arguments: &[
            gate.pointer(),
            up.map_or(Argument::Pointer(0), |up| up.pointer()),
            Argument::U32(size32("inner", inner)?),
            Argument::U32(size32("stride", stride)?),
            x.pointer(),
            Argument::U32(size32("ld", ld)?),
        ],
        overlaps: true,
    })
}
