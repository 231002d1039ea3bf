//! Gates and softmax over panels.
//!
//! One body each, compiled for several instruction sets: every addition's order and every fused multiply-add
//! is written out, so all versions give the same bits.

use super::exp::exp_inline;
use super::isa::{Isa, multiversion};

/// Partial sums over a single column: element `i` goes to sum `i % COLUMN_LANES`; then they are added in order.
const COLUMN_LANES: usize = 16;

/// `up[i] = gate[i] / (1 + e^-gate[i]) * up[i]`: the SiLU gate.
pub fn silu_gate(gate: &[f32], up: &mut [f32]) {
    #[inline(always)]
    fn body(gate: &[f32], up: &mut [f32]) {
        for (up, &gate) in up.iter_mut().zip(gate) {
            *up *= gate / (1.0 + exp_inline(-gate));
        }
    }
    multiversion!(Isa::detect(), body(gate: &[f32], up: &mut [f32]));
}

/// `up[i] = (u + 1) * g / (1 + e^(-alpha g))`, where g is `gate[i]`, `limit` at most, and u is `up[i]`, between `-limit` and `limit`.
pub fn clamped_gate(gate: &[f32], up: &mut [f32], alpha: f32, limit: f32) {
    clamped_gate_with(Isa::detect(), gate, up, alpha, limit);
}

fn clamped_gate_with(isa: Isa, gate: &[f32], up: &mut [f32], alpha: f32, limit: f32) {
    #[inline(always)]
    fn body(gate: &[f32], up: &mut [f32], alpha: f32, limit: f32) {
        for (up, &gate) in up.iter_mut().zip(gate) {
            let gate = if gate > limit { limit } else { gate };
            let clamped = if *up > limit { limit } else { *up };
            let clamped = if clamped < -limit { -limit } else { clamped };
            *up = (clamped + 1.0) * (gate / (1.0 + exp_inline(-alpha * gate)));
        }
    }
    multiversion!(isa, body(gate: &[f32], up: &mut [f32], alpha: f32, limit: f32));
}

/// `up[i] = gelu(gate[i]) * up[i]` with the tanh form of GELU (Hendrycks and Gimpel, section 2):
/// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
pub fn gelu_tanh_gate(gate: &[f32], up: &mut [f32]) {
    #[inline(always)]
    fn body(gate: &[f32], up: &mut [f32]) {
        for (up, &x) in up.iter_mut().zip(gate) {
            let inner = 0.797_884_6 * (0.044_715 * x * x * x + x);
            // 1 + tanh y = 2 / (1 + e^-2y)
            *up *= x / (1.0 + exp_inline(-2.0 * inner));
        }
    }
    multiversion!(Isa::detect(), body(gate: &[f32], up: &mut [f32]));
}

/// The softmax of each column of `scores` (rows x `width`) in place. Minus infinity becomes 0.
///
/// Exponentials of the differences to the column's maximum are added in ascending rows; of a single column in
/// sixteen interleaved sums, which are then added in order. Each is multiplied by the sum's reciprocal.
///
/// # Panics
/// Where `scores` has no whole rows of `width`.
pub fn softmax(scores: &mut [f32], width: usize) {
    softmax_with(Isa::detect(), scores, width);
}

fn softmax_with(isa: Isa, scores: &mut [f32], width: usize) {
    #[inline(always)]
    fn body(scores: &mut [f32], width: usize) {
        // A single column is taken as rows of sixteen; a last, shorter row is no different.
        let row = if width == 1 { COLUMN_LANES } else { width };
        let mut max = [f32::NEG_INFINITY; MOST];
        for scores in scores.chunks(row) {
            for (max, s) in max.iter_mut().zip(scores) {
                // Not `f32::max`, which would hide a NaN from nobody but cost a comparison more.
                *max = if *s > *max { *s } else { *max };
            }
        }
        if width == 1 {
            let all = max.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
            max = [all; MOST];
        }
        let mut sums = [0.0f32; MOST];
        for scores in scores.chunks_mut(row) {
            for ((s, max), sum) in scores.iter_mut().zip(&max).zip(&mut sums) {
                *s = exp_inline(*s - max);
                *sum += *s;
            }
        }
        if width == 1 {
            let all = sums[..COLUMN_LANES].iter().fold(0.0, |a, b| a + b);
            sums = [all; MOST];
        }
        for sum in &mut sums {
            *sum = 1.0 / *sum;
        }
        for scores in scores.chunks_mut(row) {
            for (s, scale) in scores.iter_mut().zip(&sums) {
                *s *= scale;
            }
        }
    }
    assert!(scores.len().is_multiple_of(width));
    if width <= MOST {
        return multiversion!(isa, body(scores: &mut [f32], width: usize));
    }
    // Wider than a panel: as parts of it.
    for first in (0..width).step_by(super::PANEL) {
        let part = first..(first + super::PANEL).min(width);
        let mut columns: Vec<f32> =
            scores.chunks_exact(width).flat_map(|row| &row[part.clone()]).copied().collect();
        // Two columns at least, so that the order of additions stays that of many.
        if part.len() == 1 {
            columns = columns.iter().flat_map(|s| [*s, 0.0]).collect();
            softmax_with(isa, &mut columns, 2);
            columns = columns.iter().step_by(2).copied().collect();
        } else {
            softmax_with(isa, &mut columns, part.len());
        }
        for (row, column) in scores.chunks_exact_mut(width).zip(columns.chunks_exact(part.len())) {
            row[part.clone()].copy_from_slice(column);
        }
    }
}

/// Columns that are kept in registers or on the stack.
const MOST: usize = super::PANEL;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    proptest! {
        #[test]
        fn every_version_of_softmax_gives_the_same_bits(rows in 1usize..70, width in 1usize..60, seed: u64) {
            let scores: Vec<f32> = values(seed, rows * width).iter().map(|s| s * 20.0).collect();
            let mut expected = scores.clone();
            softmax_with(Isa::Portable, &mut expected, width);
            for isa in Isa::available() {
                let mut out = scores.clone();
                softmax_with(isa, &mut out, width);
                prop_assert!(same_bits(&out, &expected), "{isa:?}");
            }
        }

        #[test]
        fn softmax_sums_to_one_and_follows_the_definition(rows in 1usize..70, width in 1usize..60, seed: u64) {
            let scores: Vec<f32> = values(seed | 1, rows * width).iter().map(|s| s * 20.0).collect();
            let mut out = scores.clone();
            softmax(&mut out, width);
            for t in 0..width {
                let column = |x: &[f32]| x.iter().skip(t).step_by(width).map(|&x| f64::from(x)).collect::<Vec<_>>();
                let (scores, out) = (column(&scores), column(&out));
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for (s, p) in scores.iter().zip(&out) {
                    prop_assert!(((s - max).exp() / sum - p).abs() < 1e-6);
                }
            }
        }

        #[test]
        fn every_version_of_the_clamped_gate_gives_the_same_bits(len in 0usize..70, odd in 0usize..5, seed: u64) {
            let (mut gate, mut up) = (values(seed, len), values(seed ^ 5, len));
            gate.iter_mut().chain(&mut up).for_each(|x| *x *= 20.0);
            let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -0.0][odd];
            gate.iter_mut().step_by(7).chain(up.iter_mut().skip(1).step_by(5)).for_each(|x| *x = odd);
            let mut expected = up.clone();
            clamped_gate_with(Isa::Portable, &gate, &mut expected, 1.702, 7.0);
            for isa in Isa::available() {
                let mut out = up.clone();
                clamped_gate_with(isa, &gate, &mut out, 1.702, 7.0);
                prop_assert!(same_bits(&out, &expected), "{isa:?}");
            }
        }

        #[test]
        fn gates_follow_their_definitions(seed: u64) {
            let (gate, up) = (values(seed | 1, 50), values(seed | 3, 50));
            let gate: Vec<f32> = gate.iter().map(|g| g * 30.0).collect();
            let (mut silu, mut gelu, mut clamped) = (up.clone(), up.clone(), up.clone());
            clamped_gate(&gate, &mut clamped, 1.7, 0.5);
            silu_gate(&gate, &mut silu);
            gelu_tanh_gate(&gate, &mut gelu);
            for i in 0..gate.len() {
                let (x, u) = (f64::from(gate[i]), f64::from(up[i]));
                let close = |found: f32, exact: f64| (f64::from(found) - exact).abs() <= 1e-5 * exact.abs().max(1.0);
                prop_assert!(close(silu[i], x / (1.0 + (-x).exp()) * u));
                let (g, c) = (x.min(0.5), u.clamp(-0.5, 0.5));
                prop_assert!(close(clamped[i], (c + 1.0) * g / (1.0 + (-1.7 * g).exp())));
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                prop_assert!(close(gelu[i], 0.5 * x * (1.0 + inner.tanh()) * u), "{x} {u} {}", gelu[i]);
            }
        }
    }

    #[test]
    fn what_is_masked_gets_nothing() {
        let mut scores = [1.0, f32::NEG_INFINITY, f32::NEG_INFINITY, 2.0];
        softmax(&mut scores, 2);
        assert_eq!(scores, [1.0, 0.0, 0.0, 1.0]);
    }
}
