//! What distillation takes of two models' logits: sums of exponentials, then the derivative by the student's logits.
//!
//! ```text
//! loss of a token = kd T^2 KL(p_T | q_T) + (1 - kd) (lse s - s[label])        T = 2 (Hinton et al., 2015)
//! p_T = softmax(teacher / T)      q_T = softmax(student / T)
//!
//! d loss / d s = kd T (q_T - p_T) + (1 - kd) (softmax(s) - [label])           e^s = (e^(s / 2))^2
//! ```

use super::PANEL;
use super::exp::exp_inline;
use super::isa::{Isa, multiversion};

/// By which logits are divided.
pub const TEMPERATURE: f32 = 2.0;
/// Rows whose terms are added in single precision, before they are added up in double.
const BLOCK: usize = 64;

/// What the derivative and the loss need of each token of a panel.
#[derive(Clone, Debug)]
pub struct DistilSums {
    /// The greatest logit of teacher and student.
    pub max: [[f32; PANEL]; 2],
    /// Of `e^((t - max) / T)`, `e^((s - max) / T)`, `e^(s - max)` and `e^((t - max) / T) (t - s)`.
    pub sums: [[f64; PANEL]; 4],
}

impl DistilSums {
    /// KL(p_T | q_T) of a token, in nats.
    pub fn divergence(&self, token: usize) -> f64 {
        let [t, s, _, weighted] = self.sums.map(|sums| sums[token]);
        let [max_t, max_s] = self.max.map(|max| f64::from(max[token]));
        let by = f64::from(TEMPERATURE);
        weighted / t / by - ((max_t / by + t.ln()) - (max_s / by + s.ln()))
    }

    /// `lse s` of a token.
    pub fn log_sum_exp(&self, token: usize) -> f64 {
        f64::from(self.max[1][token]) + self.sums[2][token].ln()
    }
}

/// The sums over all rows of a panel of `width` tokens: logits are vocabulary x `width`. Terms are added in single precision over 64
/// rows each, in ascending rows, and these in double.
///
/// # Panics
/// Where `width` is not 1 to [`PANEL`], or `teacher` and `student` are not the same whole rows of it.
pub fn distil_sums(teacher: &[f32], student: &[f32], width: usize) -> DistilSums {
    sums_with(Isa::detect(), teacher, student, width)
}

/// What each part of the derivative is multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct DistilShares {
    /// kd, over the tokens that the loss is a mean of.
    pub divergence: f32,
    /// 1 - kd, over the same.
    pub likelihood: f32,
}

/// Turns the student's logits into the derivative of the loss by them, but for what the label that came takes off.
///
/// # Panics
/// As [`distil_sums`].
pub fn distil_back(
    teacher: &[f32],
    student: &mut [f32],
    width: usize,
    sums: &DistilSums,
    shares: DistilShares,
) {
    back_with(Isa::detect(), teacher, student, width, sums, shares);
}

fn sums_with(isa: Isa, teacher: &[f32], student: &[f32], width: usize) -> DistilSums {
    #[inline(always)]
    fn body(teacher: &[f32], student: &[f32], width: usize, found: &mut DistilSums) {
        for (max, logits) in found.max.iter_mut().zip([teacher, student]) {
            for row in logits.chunks_exact(width) {
                for (max, l) in max.iter_mut().zip(row) {
                    *max = if *l > *max { *l } else { *max };
                }
            }
        }
        let scale = 1.0 / TEMPERATURE;
        let blocks = teacher.chunks(BLOCK * width).zip(student.chunks(BLOCK * width));
        for (teacher, student) in blocks {
            let mut part = [[0.0f32; PANEL]; 4];
            let [max_t, max_s] = &found.max;
            for (t, s) in teacher.chunks_exact(width).zip(student.chunks_exact(width)) {
                let [of_t, of_s, of_one, weighted] = &mut part;
                let logits = t.iter().zip(s).zip(max_t.iter().zip(max_s));
                let sums = of_t.iter_mut().zip(of_s).zip(of_one.iter_mut().zip(weighted));
                for (((t, s), (max_t, max_s)), ((of_t, of_s), (of_one, weighted))) in logits.zip(sums) {
                    let of_teacher = exp_inline((t - max_t) * scale);
                    let of_student = exp_inline((s - max_s) * scale);
                    *of_t += of_teacher;
                    *of_s += of_student;
                    *of_one = of_student.mul_add(of_student, *of_one);
                    *weighted = of_teacher.mul_add(t - s, *weighted);
                }
            }
            for (sums, part) in found.sums.iter_mut().zip(&part) {
                sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += f64::from(*part));
            }
        }
    }
    check(teacher, student, width);
    let mut found = DistilSums { max: [[f32::NEG_INFINITY; PANEL]; 2], sums: [[0.0; PANEL]; 4] };
    let out = &mut found;
    multiversion!(isa, body(teacher: &[f32], student: &[f32], width: usize, out: &mut DistilSums));
    found
}

fn back_with(
    isa: Isa,
    teacher: &[f32],
    student: &mut [f32],
    width: usize,
    sums: &DistilSums,
    shares: DistilShares,
) {
    /// Of each token: what `e^((t - max) / T)`, `e^((s - max) / T)` and its square are multiplied by.
    type Scales = [[f32; PANEL]; 3];

    #[inline(always)]
    fn body(teacher: &[f32], student: &mut [f32], width: usize, max: &[[f32; PANEL]; 2], by: &Scales) {
        let scale = 1.0 / TEMPERATURE;
        let ([max_t, max_s], [by_t, by_s, by_one]) = (max, by);
        for (t, s) in teacher.chunks_exact(width).zip(student.chunks_exact_mut(width)) {
            let tokens = t.iter().zip(s).zip(max_t.iter().zip(max_s)).zip(by_t.iter().zip(by_s).zip(by_one));
            for (((t, s), (max_t, max_s)), ((by_t, by_s), by_one)) in tokens {
                let of_teacher = exp_inline((t - max_t) * scale);
                let of_student = exp_inline((*s - max_s) * scale);
                let own = of_student * of_student.mul_add(*by_one, *by_s);
                *s = of_teacher.mul_add(*by_t, own);
            }
        }
    }
    check(teacher, student, width);
    let mut by: Scales = [[0.0; PANEL]; 3];
    let temperature = f64::from(TEMPERATURE);
    let divergence = f64::from(shares.divergence) * temperature;
    let factors = [-divergence, divergence, f64::from(shares.likelihood)];
    for ((by, factor), sums) in by.iter_mut().zip(factors).zip(&sums.sums) {
        by.iter_mut().zip(sums).take(width).for_each(|(by, sum)| *by = (factor / sum) as f32);
    }
    let (max, by) = (&sums.max, &by);
    multiversion!(
        isa,
        body(teacher: &[f32], student: &mut [f32], width: usize, max: &[[f32; PANEL]; 2], by: &Scales)
    );
}

fn check(teacher: &[f32], student: &[f32], width: usize) {
    assert!((1..=PANEL).contains(&width) && teacher.len() == student.len());
    assert!(student.len().is_multiple_of(width));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    proptest! {
        #[test]
        fn every_version_gives_the_same_bits(rows in 0usize..140, width in 1usize..=48, seed: u64) {
            let (teacher, student) = (values(seed, rows * width), values(seed ^ 1, rows * width));
            let shares = DistilShares { divergence: 0.7, likelihood: 0.3 };
            let expected = sums_with(Isa::Portable, &teacher, &student, width);
            let mut back = student.clone();
            back_with(Isa::Portable, &teacher, &mut back, width, &expected, shares);
            for isa in Isa::available() {
                let found = sums_with(isa, &teacher, &student, width);
                for (a, b) in expected.sums.iter().flatten().zip(found.sums.iter().flatten()) {
                    prop_assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{isa:?}");
                }
                prop_assert!(same_bits(&expected.max.concat(), &found.max.concat()));
                let mut out = student.clone();
                back_with(isa, &teacher, &mut out, width, &found, shares);
                prop_assert!(same_bits(&out, &back), "{isa:?}");
            }
        }

        #[test]
        fn loss_and_derivative_are_those_of_the_definitions(
            rows in prop::collection::vec((-9.0f32..9.0, -3.0f32..3.0), 1..200), kd in 0.0f32..1.0,
        ) {
            let (t, s): (Vec<f32>, Vec<f32>) = rows.iter().map(|(a, d)| (*a, a + d)).unzip();
            let soft = |x: &[f32], by: f64| {
                let sum: f64 = x.iter().map(|x| (f64::from(*x) / by).exp()).sum();
                x.iter().map(|x| (f64::from(*x) / by).exp() / sum).collect::<Vec<f64>>()
            };
            let (p, q, one) = (soft(&t, 2.0), soft(&s, 2.0), soft(&s, 1.0));
            let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            let sums = distil_sums(&t, &s, 1);
            prop_assert!((sums.divergence(0) - kl).abs() < 1e-5, "{} {kl}", sums.divergence(0));
            prop_assert!((sums.log_sum_exp(0) - f64::from(s[0]) + one[0].ln()).abs() < 1e-5);
            let mut d = s.clone();
            distil_back(&t, &mut d, 1, &sums, DistilShares { divergence: kd, likelihood: 1.0 - kd });
            for at in 0..d.len() {
                let kd = f64::from(kd);
                let exact = kd * 2.0 * (q[at] - p[at]) + (1.0 - kd) * one[at];
                prop_assert!((f64::from(d[at]) - exact).abs() < 1e-5, "{} {exact}", d[at]);
            }
        }
    }
}
