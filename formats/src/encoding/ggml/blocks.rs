//! The types of blocks, and what each stands for.
//!
//! ```text
//! Q4_0  d, 16 x 2 codes        Q8_0   d, 32 codes            Q2_K..Q6_K  256 weights: d, dmin, scales of 16 or 32, codes
//! Q4_1  d, m, codes            MXFP4  exponent, codes
//! Q5_x  d, (m,) high bits, codes
//! ```
//!
//! The order of operations is that of the reference dequantisers (`gguf/quants.py` of the package, version 0.19), so that the numbers are
//! the same to the bit.

use half::f16;
use serde::Serialize;

use crate::Dtype;

/// Weights of a small block.
const SMALL: usize = 32;
/// Twice the numbers that MXFP4 has, as ggml counts them: zero has no sign.
const FP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

macro_rules! blocks {
    ($($variant:ident $name:literal $ggml:literal $weights:literal $bytes:literal,)*) => {
        /// A type of ggml.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
        #[allow(missing_docs)]
        pub enum Blocks {
            $($variant,)*
        }

        impl Blocks {
            /// Every type that is read.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Its number in files.
            pub fn ggml(self) -> u32 {
                match self { $(Self::$variant => $ggml,)* }
            }

            /// Weights of a block.
            pub fn weights(self) -> u64 {
                match self { $(Self::$variant => $weights,)* }
            }

            /// Bytes of a block.
            pub fn block_bytes(self) -> u64 {
                match self { $(Self::$variant => $bytes,)* }
            }
        }
    };
}

blocks! {
    F32 "f32" 0 1 4,
    F16 "f16" 1 1 2,
    Bf16 "bf16" 30 1 2,
    Q4_0 "q4_0" 2 32 18,
    Q4_1 "q4_1" 3 32 20,
    Q5_0 "q5_0" 6 32 22,
    Q5_1 "q5_1" 7 32 24,
    Q8_0 "q8_0" 8 32 34,
    Q2K "q2_k" 10 256 84,
    Q3K "q3_k" 11 256 110,
    Q4K "q4_k" 12 256 144,
    Q5K "q5_k" 13 256 176,
    Q6K "q6_k" 14 256 210,
    Mxfp4 "mxfp4" 39 32 17,
}

impl Blocks {
    /// The type of a number in a file.
    pub fn of_ggml(number: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|blocks| blocks.ggml() == number)
    }

    /// The names of all of them.
    pub fn names() -> String {
        Self::ALL.iter().map(|blocks| blocks.name()).collect::<Vec<_>>().join(", ")
    }

    /// Whether weights are codes.
    pub fn is_quantised(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// The dtype that its weights have when they are read.
    pub fn decoded(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            _ => Dtype::BF16,
        }
    }

    /// Bytes of a tensor of this shape, whose rows must be whole blocks.
    pub fn bytes(self, shape: &[u64]) -> Option<u64> {
        let cols = shape.last().copied().unwrap_or(1);
        let weights = shape.iter().try_fold(1u64, |all, side| all.checked_mul(*side))?;
        cols.is_multiple_of(self.weights())
            .then(|| (weights / self.weights()).checked_mul(self.block_bytes()))?
    }

    /// Decodes whole blocks: `bytes` of them into as many weights as they have.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes.chunks_exact(self.block_bytes() as usize);
        let each = blocks.zip(out.chunks_exact_mut(self.weights() as usize));
        match self {
            Self::F32 => each.for_each(|(b, out)| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => each.for_each(|(b, out)| out[0] = half(b, 0)),
            Self::Bf16 => each.for_each(|(b, out)| {
                out[0] = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)
            }),
            Self::Q4_0 => each.for_each(|(b, out)| {
                let d = half(b, 0);
                small(&b[2..], out, |q| d * (f32::from(q) - 8.0));
            }),
            Self::Q4_1 => each.for_each(|(b, out)| {
                let (d, m) = (half(b, 0), half(b, 2));
                small(&b[4..], out, |q| d * f32::from(q) + m);
            }),
            Self::Q5_0 => each.for_each(|(b, out)| {
                let d = half(b, 0);
                small_five(&b[2..], out, |q| d * (f32::from(q) - 16.0));
            }),
            Self::Q5_1 => each.for_each(|(b, out)| {
                let (d, m) = (half(b, 0), half(b, 2));
                small_five(&b[4..], out, |q| d * f32::from(q) + m);
            }),
            Self::Q8_0 => each.for_each(|(b, out)| {
                let d = half(b, 0);
                b[2..].iter().zip(out).for_each(|(q, out)| *out = f32::from(*q as i8) * d);
            }),
            Self::Mxfp4 => each.for_each(|(b, out)| {
                let d = half_exponent(b[0]);
                small(&b[1..], out, |q| d * f32::from(FP4[usize::from(q)]));
            }),
            Self::Q2K => each.for_each(|(b, out)| q2_k(b, out)),
            Self::Q3K => each.for_each(|(b, out)| q3_k(b, out)),
            Self::Q4K => each.for_each(|(b, out)| q4_k(b, &[], &b[16..], out)),
            Self::Q5K => each.for_each(|(b, out)| q4_k(b, &b[16..48], &b[48..], out)),
            Self::Q6K => each.for_each(|(b, out)| q6_k(b, out)),
        }
    }
}

/// The half precision number at a byte.
fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Half of 2^(e - 127).
fn half_exponent(exponent: u8) -> f32 {
    match exponent {
        0 | 1 => f32::from_bits(0x0020_0000 << exponent),
        _ => f32::from_bits(u32::from(exponent - 1) << 23),
    }
}

/// Codes of 4 bits: those of the first half of a block in lower halves of bytes.
fn small(codes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (first, second) = out.split_at_mut(SMALL / 2);
    for ((code, first), second) in codes.iter().zip(first).zip(second) {
        (*first, *second) = (value(code & 15), value(code >> 4));
    }
}

/// Codes of 5 bits: a word of fifth bits before the others.
fn small_five(bytes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let bit = |at: usize| ((high >> at & 1) as u8) << 4;
    for (at, code) in bytes[4..].iter().enumerate() {
        out[at] = value(code & 15 | bit(at));
        out[at + SMALL / 2] = value(code >> 4 | bit(at + SMALL / 2));
    }
}

/// Scales and minima of 16 weights in 4 bits each, codes of 2 bits.
fn q2_k(b: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&b[..16], &b[16..80]);
    let (d, dmin) = (half(b, 80), half(b, 82));
    for (at, out) in out.iter_mut().enumerate() {
        let (scale, minimum) = (d * f32::from(scales[at / 16] & 15), dmin * f32::from(scales[at / 16] >> 4));
        // Of 128 weights, those 32 apart share a byte.
        let code = codes[at / 128 * 32 + at % 32] >> (at % 128 / 32 * 2) & 3;
        *out = scale * f32::from(code) - minimum;
    }
}

/// Scales of 16 weights in 6 bits, codes of 2 bits and a third in a mask.
fn q3_k(b: &[u8], out: &mut [f32]) {
    let (mask, codes, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half(b, 108);
    let scale = |at: usize| {
        let low = if at < 8 { scales[at] & 15 } else { scales[at - 8] >> 4 };
        let high = scales[8 + at % 4] >> (at / 4 * 2) & 3;
        d * (f32::from(low | high << 4) - 32.0)
    };
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = scale(group);
        for (within, out) in out.iter_mut().enumerate() {
            let at = group * 16 + within;
            let low = codes[at / 128 * 32 + at % 32] >> (at % 128 / 32 * 2) & 3;
            let high = mask[at % 32] >> (at / 32) & 1;
            let code = i16::from(low) - if high == 0 { 4 } else { 0 };
            *out = scale * f32::from(code);
        }
    }
}

/// Scales and minima of 32 weights in 6 bits, codes of 4 bits; `high` has a fifth.
fn q4_k(b: &[u8], high: &[u8], codes: &[u8], out: &mut [f32]) {
    let (d, dmin, packed) = (half(b, 0), half(b, 2), &b[4..16]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => (
                packed[group + 4] & 15 | packed[group - 4] >> 2 & 48,
                packed[group + 4] >> 4 | packed[group] >> 2 & 48,
            ),
        };
        let (scale, minimum) = (d * f32::from(scale), dmin * f32::from(minimum));
        let low = codes[group / 2 * 32..][..32].iter().map(|code| code >> (group % 2 * 4) & 15);
        for (at, (low, out)) in low.zip(out).enumerate() {
            let fifth = high.get(at).map_or(0, |bits| (bits >> group & 1) << 4);
            *out = scale * f32::from(low | fifth) - minimum;
        }
    }
}

/// Scales of 16 weights in 8 bits, codes of 4 bits and two more.
fn q6_k(b: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half(b, 208);
    for (at, out) in out.iter_mut().enumerate() {
        let (half, within) = (at / 128, at % 128);
        let four = low[half * 64 + within % 64] >> (within / 64 * 4) & 15;
        let two = high[half * 32 + within % 32] >> (within / 32 * 2) & 3;
        let code = i16::from(four | two << 4) - 32;
        *out = d * f32::from(scales[at / 16] as i8) * f32::from(code);
    }
}
