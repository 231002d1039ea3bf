//! Two in four on the processor: kept values in BF16, in fixed12, and as codes of four bits.

use std::hint::black_box;

use llmpress_entropy::fixed12::{Histogram, Strips, StripsRef, TILE_COLS, TILE_ROWS, encode_strips};
use llmpress_kernels::cpu::{
    Elements, Sparse24, SparseCodes, dot_sparse_codes, dot_sparse_fixed12, dot_sparse24, multiply,
};

use super::super::abq::Codes;
use super::super::sparse24::Kept;
use super::{Kernel, WIDENED};

/// Kept values of a group of codes.
const GROUP: usize = 64;

/// Brings kept values into one of the forms.
type Make = fn(Kept) -> Option<Matrix>;

/// A matrix, its kept values in one of the forms.
pub(super) struct Matrix {
    kept: Kept,
    form: Form,
}

enum Form {
    Plain,
    Fixed12 { base: i16, strips: Strips, offsets: Vec<u32> },
    Codes(SparseCodes),
}

impl Matrix {
    /// What is measured, and how each is made of a matrix.
    pub(super) const KERNELS: [(&'static str, Make); 3] = [
        ("sparse24", |kept| Some(Self { kept, form: Form::Plain })),
        ("sparse24 fixed12", Self::in_fixed12),
        ("sparse24 w4 g64", Self::of_codes),
    ];

    fn in_fixed12(kept: Kept) -> Option<Self> {
        let mut histogram = Histogram::new();
        histogram.add(&kept.values);
        let base = histogram.best_window().base;
        let mut strips = Strips::default();
        encode_strips(base, kept.k / 2, &kept.values, &mut strips).ok()?;
        let mut offsets = vec![0u32];
        offsets.extend(strips.escape_counts.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        }));
        Some(Self { kept, form: Form::Fixed12 { base, strips, offsets } })
    }

    fn of_codes(kept: Kept) -> Option<Self> {
        let codes = Codes::new(kept.n, kept.k / 2, 4, Some(GROUP), None);
        let codes = SparseCodes::new(&codes.stored(), &kept.positions, kept.k).ok()?;
        Some(Self { kept, form: Form::Codes(codes) })
    }
}

impl Kernel for Matrix {
    fn bytes(&self) -> usize {
        self.kept.positions.len()
            + match &self.form {
                Form::Plain => 2 * self.kept.values.len(),
                Form::Fixed12 { strips, offsets, .. } => {
                    strips.sign_mantissa.len() + strips.codes.len() + 4 * offsets.len()
                }
                // Positions are a part of them.
                Form::Codes(codes) => return codes.bytes(),
            }
    }

    fn row(&self, row: usize) -> Vec<f32> {
        if let Form::Codes(codes) = &self.form {
            let mut out = vec![0.0; codes.cols()];
            codes.widen(row..row + 1, &mut out);
            return out;
        }
        self.kept.dense(row).into_iter().map(|word| half::bf16::from_bits(word).to_f32()).collect()
    }

    fn multiply(&self, x: &[f32], tokens: usize, widened: &mut Vec<f32>, out: &mut [f32]) -> bool {
        let Kept { n, k, values, positions } = &self.kept;
        let plain = |first: usize, rows: usize| {
            let positions = &positions[first * k.div_ceil(8)..][..rows * k.div_ceil(8)];
            Sparse24::new(Elements::Bf16(&values[first * k / 2..][..rows * k / 2]), positions, rows, *k)
        };
        if tokens == 1 {
            return match &self.form {
                Form::Plain => plain(0, *n).is_some_and(|m| dot_sparse24(&m, black_box(x), out).is_ok()),
                Form::Fixed12 { base, strips, offsets } => {
                    let strips = StripsRef {
                        sign_mantissa: &strips.sign_mantissa,
                        codes: &strips.codes,
                        escape_offsets: offsets,
                        escape_positions: &strips.escape_positions,
                        escape_exponents: &strips.escape_exponents,
                    };
                    debug_assert_eq!(offsets.len() - 1, n.div_ceil(TILE_ROWS) * (k / 2).div_ceil(TILE_COLS));
                    dot_sparse_fixed12(*base, &strips, positions, black_box(x), out).is_ok()
                }
                Form::Codes(codes) => {
                    dot_sparse_codes(codes, 0..*n, black_box(x), out);
                    true
                }
            };
        }
        let mut good = true;
        for (i, out) in out.chunks_mut(WIDENED * tokens).enumerate() {
            let (first, rows) = (i * WIDENED, out.len() / tokens);
            widened.resize(rows * k, 0.0);
            match &self.form {
                Form::Codes(codes) => codes.widen(first..first + rows, widened),
                _ => good &= plain(first, rows).is_some_and(|m| m.widen(widened).is_ok()),
            }
            multiply(widened, *k, black_box(x), tokens, black_box(out));
        }
        good
    }
}
