//! Kernels for the processor.
//!
//! Activations lie in *panels*: up to [`PANEL`] tokens side by side, `panel[feature * width + token]`.
//!
//! Every kernel states the order in which it adds, so its result is the same bits on every processor: a
//! fast path is compared with the scalar reference bit for bit.

pub mod abq;
mod distil;
mod dot;
mod draw;
mod elementwise;
mod exp;
mod gate_back;
mod hadamard;
mod head_codes;
mod isa;
mod jensen_shannon;
mod log_sum_exp;
mod multiply;
mod multiply_double;
mod norm;
pub mod pages;
mod quantize_columns;
mod sparse24;
#[cfg(test)]
mod test_values;
mod widen;

pub use distil::{DistilShares, DistilSums, TEMPERATURE, distil_back, distil_sums};
pub use dot::{
    LANES, SparseFault, dot_fixed12, dot_rows, dot_sparse_codes, dot_sparse_fixed12, dot_sparse24,
};
pub use draw::{Limits, draw};
pub use elementwise::{clamped_gate, gelu_tanh_gate, silu_gate, softmax};
pub use exp::exp;
pub use gate_back::{gelu_tanh_gate_back, silu_gate_back};
pub use hadamard::Hadamard;
pub use head_codes::HeadCodes;
pub use isa::limit_instruction_set;
pub use jensen_shannon::jensen_shannon;
pub use log_sum_exp::{divergence, log_sum_exp};
pub use multiply::multiply;
pub use multiply_double::{DOUBLE_PANEL, multiply_double};
pub use norm::rms_norm;
pub use quantize_columns::quantize_columns;
pub use sparse24::codes::{CodesFault, SparseCodes};
pub use sparse24::{BadPositions, QUAD, Sparse24};

/// The instructions that the kernels use on this processor.
#[must_use]
pub fn instruction_set() -> &'static str {
    match isa::Isa::detect() {
        isa::Isa::Portable => "portable",
        #[cfg(target_arch = "x86_64")]
        isa::Isa::Avx2 => "AVX2, FMA, F16C",
        #[cfg(target_arch = "x86_64")]
        isa::Isa::Avx512 => "AVX-512 F, BW, VL, DQ, VBMI, VBMI2",
    }
}

/// Most tokens of a panel.
pub const PANEL: usize = 48;

/// The elements of weights as they are stored.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// IEEE single precision.
    F32(&'a [f32]),
    /// Words of bfloat16.
    Bf16(&'a [u16]),
    /// Words of IEEE half precision.
    F16(&'a [u16]),
}

impl Elements<'_> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) | Self::F16(x) => x.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Widens elements `first ..` to single precision, exactly.
    ///
    /// # Panics
    /// Where `first + out.len()` exceeds [`Self::len`].
    pub fn widen(&self, first: usize, out: &mut [f32]) {
        widen::widen(isa::Isa::detect(), *self, first, out);
    }

    /// Element `i` in single precision.
    #[must_use]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::F32(x) => x[i],
            Self::Bf16(x) => f32::from_bits(u32::from(x[i]) << 16),
            Self::F16(x) => half::f16::from_bits(x[i]).to_f32(),
        }
    }
}
