//! Small floats as numbers: what every byte, or half of one, stands for.
//!
//! ```text
//! E4M3  s eeee mmm   bias 7, no infinities, all ones: not a number     E2M1  s ee m   bias 1, numbers alone: 0 to 6
//! E5M2  s eeeee mm   the upper half of an F16                          E8M0  2^(e - 127), all ones: not a number
//! ```
//!
//! OCP Microscaling Formats (MX) Specification 1.0, section 5.3; OCP 8-bit Floating Point Specification 1.0.

use half::{bf16, f16};
use serde::Serialize;

use crate::Dtype;

/// What a weight is stored as before it is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Element {
    /// FP8 with 4 bits of exponent.
    E4m3,
    /// FP8 with 5 bits of exponent.
    E5m2,
    /// FP4, two in a byte: the first in the lower half.
    E2m1,
}

impl Element {
    /// The name in formats.
    pub fn name(self) -> &'static str {
        match self {
            Self::E4m3 => "e4m3",
            Self::E5m2 => "e5m2",
            Self::E2m1 => "e2m1",
        }
    }

    /// Elements in a byte.
    pub(super) fn in_byte(self) -> u64 {
        match self {
            Self::E4m3 | Self::E5m2 => 1,
            Self::E2m1 => 2,
        }
    }

    /// What each byte stands for: one number, or two.
    pub(super) fn table(self) -> Vec<[f32; 2]> {
        (0..=u8::MAX)
            .map(|byte| match self {
                Self::E4m3 => [e4m3(byte), 0.0],
                Self::E5m2 => [f16::from_bits(u16::from(byte) << 8).to_f32(), 0.0],
                Self::E2m1 => [e2m1(byte & 15), e2m1(byte >> 4)],
            })
            .collect()
    }
}

/// A float of a sign, exponent and mantissa, without infinities.
fn small(sign: bool, exponent: i32, mantissa: u8, bits: i32, bias: i32) -> f32 {
    let ones = f32::from(mantissa) * 2f32.powi(-bits);
    let value =
        if exponent == 0 { ones * 2f32.powi(1 - bias) } else { (1.0 + ones) * 2f32.powi(exponent - bias) };
    if sign { -value } else { value }
}

fn e4m3(byte: u8) -> f32 {
    let (sign, exponent, mantissa) = (byte >> 7 == 1, byte >> 3 & 15, byte & 7);
    if exponent == 15 && mantissa == 7 {
        return f32::NAN;
    }
    small(sign, i32::from(exponent), mantissa, 3, 7)
}

fn e2m1(half: u8) -> f32 {
    small(half >> 3 == 1, i32::from(half >> 1 & 3), half & 1, 1, 1)
}

fn e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// Bytes of a scale; `None` of a dtype that scales do not have.
pub(super) fn scale_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        Dtype::F8_E4M3 | Dtype::F8_E8M0 | Dtype::U8 => Some(1),
        _ => None,
    }
}

/// Scales in single precision, exactly. Bytes without a dtype of their own are exponents.
pub(super) fn scales(dtype: Dtype, bytes: &[u8], out: &mut Vec<f32>) {
    out.clear();
    match dtype {
        Dtype::F32 => out.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        Dtype::F16 => out.extend(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
        Dtype::BF16 => out.extend(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        Dtype::F8_E4M3 => out.extend(bytes.iter().map(|b| e4m3(*b))),
        _ => out.extend(bytes.iter().map(|b| e8m0(*b))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_what_the_standards_say() {
        let four: Vec<f32> = (0..16).map(e2m1).collect();
        assert_eq!(four[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert!(four[8..].iter().zip(&four).all(|(a, b)| a.to_bits() == b.to_bits() | 1 << 31));
        let of = |byte| e4m3(byte);
        assert_eq!([of(0x7e), of(0x08), of(0x01), of(0x38)], [448.0, 2f32.powi(-6), 2f32.powi(-9), 1.0]);
        assert!(of(0x7f).is_nan() && of(0xff).is_nan() && of(0x80).to_bits() == 1 << 31);
        let five = Element::E5m2.table();
        assert_eq!([five[0x7b][0], five[0x3c][0], five[0x01][0]], [57344.0, 1.0, 2f32.powi(-16)]);
        assert!(five[0x7c][0] == f32::INFINITY && five[0x7d][0].is_nan());
        assert_eq!([e8m0(127), e8m0(0), e8m0(254)], [1.0, 2f32.powi(-127), 2f32.powi(127)]);
        assert!(e8m0(255).is_nan());
    }
}
