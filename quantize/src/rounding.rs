//! How scales and offsets are stored: their dtypes, and values rounded to them before any code is chosen.

use half::{bf16, f16};
use llmpress_formats::Dtype;

use crate::ZeroPoint;
use crate::line::Line;

/// What scales and offsets are rounded to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounding {
    pub(crate) scales: Dtype,
    pub(crate) offsets: Dtype,
}

impl Rounding {
    /// Rounds a line to what is stored.
    pub(crate) fn of(self, line: Line) -> Line {
        let scale = self.scale(line.scale);
        match line.zero {
            0.0 => Line::real(scale, round_to(self.offsets, line.offset)),
            zero => Line::on_code(scale, zero as u8),
        }
    }

    pub(crate) fn scale(self, scale: f32) -> f32 {
        round_to(self.scales, scale)
    }
}

fn round_to(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// The first of F16, BF16 and F32 that moves no scale by more than 2^-8 of it, which is what BF16's eight bits do. Grids that
/// other tools can say have BF16 first: those have scales in the dtype of the model.
pub(crate) fn scale_dtype(zero: ZeroPoint, scales: impl Iterator<Item = f32> + Clone) -> Dtype {
    let fits = |dtype| scales.clone().all(|s| (round_to(dtype, s) - s).abs() <= s.abs() / 256.0);
    let short = match zero {
        ZeroPoint::Real => [Dtype::F16, Dtype::BF16],
        ZeroPoint::Integer | ZeroPoint::Symmetric => [Dtype::BF16, Dtype::F16],
    };
    short.into_iter().find(|dtype| fits(*dtype)).unwrap_or(Dtype::F32)
}

/// F16 where it moves no offset by more than 1/64 of its step, else F32.
pub(crate) fn offset_dtype<'a>(mut lines: impl Iterator<Item = &'a Line>) -> Dtype {
    let fits =
        |line: &Line| (round_to(Dtype::F16, line.offset) - line.offset).abs() <= line.scale.abs() / 64.0;
    if lines.all(fits) { Dtype::F16 } else { Dtype::F32 }
}
