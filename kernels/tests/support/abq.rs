//! Matrices of weights of 1 to 8 bits, as they are stored.

use llmpress_kernels::cpu::Elements;
use llmpress_kernels::cpu::abq::{Stored, Zero};
use proptest::prelude::*;

/// Equality by bits, but for NaNs.
pub(crate) fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

/// Marsaglia's xorshift.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// -1 .. 1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Which kind of zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Symmetric,
    Integer,
    Real,
}

/// A matrix with its components.
pub(crate) struct Made {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bits: u8,
    pub(crate) balanced: bool,
    pub(crate) group_size: Option<usize>,
    pub(crate) activation_bits: Option<u8>,
    pub(crate) words: Vec<u32>,
    pub(crate) scale: Vec<u16>,
    pub(crate) zero: Vec<u8>,
    pub(crate) offset: Vec<f32>,
    pub(crate) kind: Kind,
}

impl Made {
    pub(crate) fn new(
        numbers: &mut Numbers,
        (rows, cols): (usize, usize),
        (bits, balanced): (u8, bool),
        group_size: Option<usize>,
        kind: Kind,
    ) -> Self {
        let planes = usize::from(bits) + usize::from(balanced);
        let (across, groups) = (cols.div_ceil(32), group_size.map_or(1, |size| cols.div_ceil(size)));
        let mut words = vec![0u32; planes * rows * across];
        let levels = (1u64 << bits) + u64::from(balanced);
        // Extremes more often than the others.
        let code = |n: &mut Numbers| match n.next() >> 40 {
            r if r % 5 == 0 => levels - 1,
            r if r % 5 == 1 => 0,
            r => (r >> 8) % levels,
        };
        for row in 0..rows {
            for col in 0..cols {
                let code = code(numbers);
                for plane in 0..planes {
                    words[(plane * rows + row) * across + col / 32] |=
                        ((code >> plane & 1) as u32) << (col % 32);
                }
            }
        }
        let count = rows * groups;
        Self {
            rows,
            cols,
            bits,
            balanced,
            group_size,
            activation_bits: None,
            words,
            scale: (0..count).map(|_| half::f16::from_f32(0.1 * numbers.float()).to_bits()).collect(),
            zero: (0..count).map(|_| (numbers.next() >> 30) as u8).collect(),
            offset: (0..count).map(|_| numbers.float()).collect(),
            kind,
        }
    }

    /// Turns the signs of all weights.
    pub(crate) fn negate(&mut self) {
        self.scale.iter_mut().for_each(|scale| *scale ^= 0x8000);
        self.offset.iter_mut().for_each(|offset| *offset = -*offset);
    }

    pub(crate) fn stored(&self) -> Stored<'_> {
        Stored {
            rows: self.rows,
            cols: self.cols,
            bits: self.bits,
            planes: self.bits + u8::from(self.balanced),
            group_size: self.group_size,
            activation_bits: self.activation_bits,
            words: &self.words,
            scale: Elements::F16(&self.scale),
            zero: match self.kind {
                Kind::Symmetric => Zero::Symmetric,
                Kind::Integer => Zero::Integer(&self.zero),
                Kind::Real => Zero::Real(Elements::F32(&self.offset)),
            },
        }
    }
}

pub(crate) fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Symmetric), Just(Kind::Integer), Just(Kind::Real)]
}
