//! Derivatives of the gates: from that of `act(gate) * up` to those of gate and up.
//!
//! One body each, compiled for several instruction sets, as the gates themselves.

use super::exp::exp_inline;
use super::isa::{Isa, multiversion};

/// With `d` the derivative of a loss by `silu(gate) * up`, `gate` and `up` become those by themselves.
///
/// With s = 1 / (1 + e^-gate): `d up s (1 + gate (1 - s))` and `d gate s`.
pub fn silu_gate_back(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
    silu_with(Isa::detect(), gate, up, d);
}

/// The same for the tanh form of GELU.
///
/// With u = sqrt(2 / pi) (gate + 0.044715 gate^3), s = 1 / (1 + e^-2u) and v = 2 sqrt(2 / pi) (1 + 3 x 0.044715 gate^2):
/// `d up s (1 + gate v (1 - s))` and `d gate s`.
pub fn gelu_tanh_gate_back(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
    gelu_with(Isa::detect(), gate, up, d);
}

fn silu_with(isa: Isa, gate: &mut [f32], up: &mut [f32], d: &[f32]) {
    #[inline(always)]
    fn body(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
        for ((gate, up), d) in gate.iter_mut().zip(up).zip(d) {
            let x = *gate;
            let s = 1.0 / (1.0 + exp_inline(-x));
            *gate = d * *up * s * (x * (1.0 - s) + 1.0);
            *up = d * x * s;
        }
    }
    multiversion!(isa, body(gate: &mut [f32], up: &mut [f32], d: &[f32]));
}

fn gelu_with(isa: Isa, gate: &mut [f32], up: &mut [f32], d: &[f32]) {
    #[inline(always)]
    fn body(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
        for ((gate, up), d) in gate.iter_mut().zip(up).zip(d) {
            let x = *gate;
            let inner = 0.797_884_6 * (0.044_715 * x * x * x + x);
            let s = 1.0 / (1.0 + exp_inline(-2.0 * inner));
            let slope = 1.595_769_2 * (0.134_145 * x * x + 1.0);
            *gate = d * *up * s * (x * slope * (1.0 - s) + 1.0);
            *up = d * x * s;
        }
    }
    multiversion!(isa, body(gate: &mut [f32], up: &mut [f32], d: &[f32]));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    type Back = fn(Isa, &mut [f32], &mut [f32], &[f32]);

    proptest! {
        #[test]
        fn every_version_gives_the_same_bits(len in 0usize..70, seed: u64) {
            let [gate, up, d] = [1, 2, 3].map(|k| values(seed ^ k, len));
            for back in [silu_with as Back, gelu_with] {
                let (mut a, mut b) = (gate.clone(), up.clone());
                back(Isa::Portable, &mut a, &mut b, &d);
                for isa in Isa::available() {
                    let (mut x, mut y) = (gate.clone(), up.clone());
                    back(isa, &mut x, &mut y, &d);
                    prop_assert!(same_bits(&x, &a) && same_bits(&y, &b), "{isa:?}");
                }
            }
        }

        #[test]
        fn derivatives_are_those_of_the_definitions(gate in -9f32..9.0, up in -3f32..3.0, d in -2f32..2.0) {
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let gelu = |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh());
            for (back, act) in [(silu_with as Back, &silu as &dyn Fn(f64) -> f64), (gelu_with, &gelu)] {
                let (mut a, mut b) = ([gate], [up]);
                back(Isa::detect(), &mut a, &mut b, &[d]);
                let (x, u, d, h) = (f64::from(gate), f64::from(up), f64::from(d), 1e-5);
                let by_gate = d * u * (act(x + h) - act(x - h)) / (2.0 * h);
                prop_assert!((f64::from(a[0]) - by_gate).abs() < 2e-5, "{} {by_gate}", a[0]);
                prop_assert!((f64::from(b[0]) - d * act(x)).abs() < 1e-5);
            }
        }
    }
}
